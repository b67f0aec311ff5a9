#!/usr/bin/env bash
# Makes this machine a node of Roost, as a systemd service; or takes that back.
#
#   packaging/systemd/install.sh [--prefix DIR] [--root DIR]
#   packaging/systemd/install.sh --uninstall [--prefix DIR] [--root DIR]
#
#   --prefix     where the programs go; /opt/roost if not given
#   --root       install into this directory as if it were /, for images and packages: nothing is started
#   --uninstall  remove the service and the programs; configuration, state and the user roost stay
#
# Run it again to upgrade: it replaces the programs and the unit, keeps the configuration, and restarts the service if
# it was running.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packaging/common.sh
. "$here/../common.sh"

readonly UNIT=roost-edge.service
prefix=/opt/roost root="" action=install

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --uninstall) action=uninstall; shift ;;
      --prefix | --root)
        if [[ "${2:-}" != /* ]]; then die "$1 needs a directory, as a whole path from / on"; fi
        if [ "$1" = --prefix ]; then prefix=${2%/}; else root=${2%/}; fi
        shift 2
        ;;
      *) die "unknown argument $1" "known are --prefix, --root and --uninstall" ;;
    esac
  done
  # The prefix is removed as a whole by --uninstall, so it must be Roost's alone.
  case "$prefix" in
    "" | / | /usr | /usr/local | /opt | /etc | /var | /var/lib | /home | /root)
      die "$prefix can't be the prefix: it holds other things too" "take a directory of its own, like /opt/roost" ;;
  esac
}

# Is there a systemd that runs this very system? Otherwise units can be enabled, but not started.
booted() { [ -z "$root" ] && [ -d /run/systemd/system ]; }

install_programs() {
  local python wheels
  python=$(find_python) || no_python
  can_make_venv "$python" || die "$python can't make virtual environments" "apt-get install python3-venv"
  ! lacks_compiler "$python" ||
    die "fastcdc must be compiled for this Python, and there is no compiler" "apt-get install $COMPILER_PACKAGES"
  say "installing the programs into $root$prefix"
  [ -x "$root$prefix/bin/python" ] || "$python" -m venv "$root$prefix"
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' RETURN
  "$here/../wheel.sh" "$root$prefix/bin/python" "$wheels" >/dev/null
  # Twice: the first brings what is missing, the second replaces Roost itself even if its version is the same.
  pip_install -c "$here/../../requirements.lock" "$(echo "$wheels"/roost-*.whl)[edge]"
  pip_install --force-reinstall --no-deps "$wheels"/roost-*.whl
  check_compiled "$root$prefix/bin/python"
  # The programs must name the place where they will be, not the one where they were put together.
  if [ -n "$root" ]; then
    find "$root$prefix/bin" -type f -exec sed -i "s|$root$prefix|$prefix|g" {} +
  fi
}

pip_install() {
  "$root$prefix/bin/python" -m pip install -qq --disable-pip-version-check "$@" </dev/null
}

install_config() {
  local config=$root/etc/roost/edge.toml node
  mkdir -p "$root/etc/roost"
  if [ -e "$config" ]; then
    say "keeping $config"
    return
  fi
  node=$(uname -n | tr 'A-Z.' 'a-z-' | tr -cd 'a-z0-9-')
  sed "s/@NODE@/${node:-edge}/" "$here/edge.toml.example" >"$config"
  chmod 0644 "$config"
  say "wrote $config: name your coordinators there"
}

install_unit() {
  mkdir -p "$root/etc/systemd/system"
  sed "s|/opt/roost/|$prefix/|" "$here/$UNIT" >"$root/etc/systemd/system/$UNIT"
  systemctl ${root:+--root="$root"} --quiet enable "$UNIT"
  if booted; then
    systemctl daemon-reload
    systemctl try-restart "$UNIT"
  fi
}

uninstall() {
  if booted; then systemctl --quiet stop "$UNIT" 2>/dev/null || say "$UNIT was not running"; fi
  systemctl ${root:+--root="$root"} --quiet disable "$UNIT" 2>/dev/null || say "$UNIT was not enabled"
  rm -f "$root/etc/systemd/system/$UNIT"
  if booted; then systemctl daemon-reload; fi
  rm -rf "${root:-}${prefix:?}"
  say "removed. Left for you to keep or delete: $root/etc/roost, $root/var/lib/roost, and the user roost"
}

parse "$@"
[ "$(id -u)" = 0 ] || die "this must run as root" "sudo $0 $*"
command -v systemctl >/dev/null || die "there is no systemd on this machine" "run roost-edge under what starts services here"
if [ "$action" = uninstall ]; then
  uninstall
  exit
fi
mkdir -p "$root/etc"
systemd-sysusers ${root:+--root="$root"} "$here/roost.sysusers"
mkdir -p "$root/var/lib/roost"
chmod 0711 "$root/var/lib/roost"
install_programs
install_config
install_unit
if booted && systemctl --quiet is-active "$UNIT"; then
  say "the service runs the new programs"
else
  say "done. When /etc/roost/edge.toml is right: systemctl start roost-edge"
fi
