# What the scripts here share; sourced, never run.
# shellcheck shell=bash

say() { echo "roost: $*"; }

# die MESSAGE [HINT]
die() {
  echo "roost: $1" >&2
  [ $# -lt 2 ] || echo "  hint: $2" >&2
  exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints a Python that can run Roost, if there is one. Debian's own first: it is at the same place in the read-only
# system that a jail sees.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
    if new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

no_python() {
  die "Roost needs Python 3.11 or newer, and here is $(/usr/bin/python3 -V 2>/dev/null || echo no /usr/bin/python3)" \
    "Debian 12 and Ubuntu 24.04 have it; or name another with PYTHON=/path/to/python3.11 before the command"
}

can_make_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# Does this Python lack a compiler that it needs? fastcdc has ready-made wheels for CPython 3.11 and 3.12 on x86_64
# only. Elsewhere pip compiles it; where it can't, it installs it without the part that Roost imports, and calls that
# a success.
lacks_compiler() {
  case "$("$1" -c 'import sys, platform; print(*sys.version_info[:2], platform.machine())')" in
    "3 11 x86_64" | "3 12 x86_64") return 1 ;;
  esac
  ! command -v cc >/dev/null || ! "$1" -c '
import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())'
}
# shellcheck disable=SC2034
readonly COMPILER_PACKAGES="gcc libc6-dev python3-dev"

# check_compiled PYTHON: did pip get all of fastcdc? (PYTHON's own headers may be missing, or pip remembers a failure.)
check_compiled() {
  "$1" -c 'import fastcdc.fastcdc_cy' 2>/dev/null ||
    die "fastcdc was installed without its compiled part" \
      "install a C compiler and this Python's headers, then: $1 -m pip cache remove fastcdc; \
$1 -m pip install --force-reinstall --no-deps fastcdc"
}
