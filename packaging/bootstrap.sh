#!/usr/bin/env bash
# Brings this machine to where Roost can run: system packages (as root, by apt) and .venv.
#
#   packaging/bootstrap.sh           what the demo and a node on this machine need
#   packaging/bootstrap.sh --image   and what building the coordinator's image needs
#   packaging/bootstrap.sh --test    and what the tests need
#   packaging/bootstrap.sh --bench   and what benchmarks compare with
#   packaging/bootstrap.sh --vm      and what a Debian box in an emulator needs
#
# It may run at any time, any number of times: what is there is left alone, and a stamp in .venv lets it end
# in a fraction of a second when nothing has changed. Without root no system package is installed; what is
# missing is said, and only a missing Python is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=packaging/common.sh
. packaging/common.sh

readonly STAMP=.venv/roost-stamp
readonly GUARD=/usr/sbin/policy-rc.d
readonly GUARD_MARK="# Roost's bootstrap: no service starts while its packages are installed"

# --- system packages -----------------------------------------------------------------------------------

# Each line: a command that is only there when the package is, and the package.
needed() {
  echo "etcd etcd-server"
  if [ "$1" != run ]; then
    echo "buildah buildah"
    echo "podman podman"
    echo "runc runc"
    echo "mmdebstrap mmdebstrap"
  fi
  if [ "$1" = vm ]; then
    echo "qemu-system-x86_64 qemu-system-x86"
    echo "mkfs.ext4 e2fsprogs"
  fi
  if [ "$1" = bench ]; then echo "borg borgbackup"; fi
  if [ "$1" = test ] || [ "$1" = vm ] || [ "$1" = bench ]; then
    echo "etcdctl etcd-client"
    echo "bwrap bubblewrap"
    echo "ip iproute2"
    echo "systemd-analyze systemd"
  fi
}

missing_packages() {
  needed "$1" | while read -r tool package; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null || echo "$package"
  done
  # mmdebstrap on Ubuntu makes a Debian base only if it knows Debian's keys.
  [ "$1" = run ] || [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
  # A library and no command: tests let a process's clock jump with it.
  [ "$1" != test ] || compgen -G "/usr/lib/*/faketime/libfaketime.so.1" >/dev/null || echo libfaketime
}

# Debian starts a service as soon as its package is there, and etcd's would take port 2379 and start at each
# boot. Roost runs its own etcd, so that one must not run: this file is how Debian is told to start nothing.
# One that the machine's owner put there is set aside meanwhile, since it might say yes.
guard_up() {
  if [ -e "$GUARD" ] && ! grep -qF "$GUARD_MARK" "$GUARD"; then mv "$GUARD" "$GUARD.before-roost"; fi
  printf '#!/bin/sh\n%s\nexit 101\n' "$GUARD_MARK" >"$GUARD"
  chmod 755 "$GUARD"
}

guard_down() {
  rm -f "$GUARD"
  if [ -e "$GUARD.before-roost" ]; then mv "$GUARD.before-roost" "$GUARD"; fi
}

apt_install() {
  command -v apt-get >/dev/null ||
    die "these packages are missing and there is no apt-get here: $*" \
      "Roost's scripts know Debian and Ubuntu; elsewhere install the same programs by hand"
  say "installing with apt: $*"
  local log
  log=$(mktemp)
  guard_up
  trap guard_down EXIT
  # The lists on a fresh machine are absent or old; on others, asking for them again only costs time.
  if ! apt_get install "$@" >"$log" 2>&1; then
    if ! { apt_get update && apt_get install "$@"; } >"$log" 2>&1; then
      cat "$log" >&2
      rm -f "$log"
      die "apt-get could not install: $*" "apt-get's own words are above"
    fi
  fi
  rm -f "$log"
  # Not starting it now is half of it: the package has also enabled it for the next boot. (`systemctl disable` does
  # no more than remove this link, and is not there in a container that gets systemd later.)
  if [[ " $* " == *" etcd-server "* ]]; then
    rm -f /etc/systemd/system/multi-user.target.wants/etcd.service
  fi
  guard_down
  trap - EXIT
}

apt_get() {
  DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 --no-install-recommends "$@" </dev/null
}

install_packages() {
  local missing
  mapfile -t missing < <(missing_packages "$1")
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ]; then
    apt_install "${missing[@]}"
  else
    say "missing, and only root can install them: ${missing[*]}"
    say "make check goes on without them; make demo, make test and make image need them: run those with sudo"
  fi
}

# Tests that need one of these are skipped, and say so, where it can't be had.
install_wanted() {
  [ "$1" = test ] && [ "$(id -u)" = 0 ] && ! command -v trinity >/dev/null || return 0
  (apt_install trinity) || say "going on without trinity: the tests with random system calls are skipped"
}

# --- Python ----------------------------------------------------------------------------------------------

# Prints the path of a Python that can make .venv, after installing it as root if need be.
ready_python() {
  local python
  if [ "$(id -u)" = 0 ] && ! find_python >/dev/null && [ ! -x /usr/bin/python3 ]; then
    apt_install python3 python3-venv >&2
  fi
  python=$(find_python) || no_python
  if ! can_make_venv "$python"; then
    if [ "$(id -u)" != 0 ] || [ "$python" != /usr/bin/python3 ]; then
      die "$python can't make virtual environments" "as root: apt-get install python3-venv"
    fi
    apt_install python3-venv >&2
  fi
  if lacks_compiler "$python"; then
    # shellcheck disable=SC2086 # a list of packages
    if [ "$(id -u)" = 0 ]; then
      apt_install $COMPILER_PACKAGES >&2
    else
      die "fastcdc must be compiled for this Python, and there is no compiler" \
        "as root: apt-get install $COMPILER_PACKAGES"
    fi
  fi
  echo "$python"
}

# What .venv and the stubs are made from. A virtual environment can't be moved, so its place counts too.
fingerprint() {
  { pwd && sha256sum pyproject.toml setup.py requirements.lock protos/v1/*.proto; } | sha256sum
}

venv_is_current() {
  local proto
  [ -e "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ] && [ -x .venv/bin/python ] || return 1
  for proto in protos/v1/*.proto; do
    [ -e "${proto%.proto}_pb2.py" ] && [ -e "${proto%.proto}_pb2_grpc.py" ] || return 1
  done
}

make_venv() {
  local python
  # A broken .venv (its Python was removed or upgraded away) is made anew; pip mends all else.
  if ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(ready_python)
    say "making .venv from $python ($("$python" -V))"
    rm -rf .venv
    "$python" -m venv .venv
  fi
  rm -f "$STAMP"
  say "installing Python packages and generating stubs (a minute when nothing is cached)"
  # The lock holds for what pip builds with, too: stubs must not be newer than the library that loads them.
  # Newer releases of pip read the second variable for that, older ones the first.
  PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock PIP_DISABLE_PIP_VERSION_CHECK=1 \
    .venv/bin/python -m pip install -qq --editable '.[coordinator,edge,cli,dev]' </dev/null ||
    die "pip could not install Roost's Python packages" "pip's own words are above"
  check_compiled .venv/bin/python
  fingerprint >"$STAMP"
}

main() {
  local level=run
  case "${1:-}" in
    "") ;;
    --image | --test | --bench | --vm) level=${1#--} ;;
    *) die "unknown argument $1" "known are --image, --test, --bench and --vm" ;;
  esac
  # Two makes at once would fight over apt and .venv: the second waits for the first, then finds all done.
  exec 9<pyproject.toml
  flock --timeout 900 9 || die "another bootstrap of this directory has been running for 15 minutes"
  install_packages "$level"
  install_wanted "$level"
  venv_is_current || make_venv
}

main "$@"
