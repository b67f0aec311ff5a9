#!/usr/bin/env bash
# Builds the coordinator's image. Run it by `make image`, which sees to the programs and the .venv it needs.
#
#   packaging/coordinator/build.sh [--base IMAGE] [--tag NAME] [--storage DIR]
#
#   --base     the Debian image to build on; without it a minimal one is made here from Debian's packages, so no
#              registry is needed
#   --tag      the image's name; roost-coordinator:VERSION if not given
#   --storage  keep images in DIR instead of this machine's container storage
#
# Prints the image's id as its last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The suite of the base that is made here, and its Python: wheels are chosen for that, not for this machine's.
readonly SUITE=bookworm SUITE_PYTHON=3.11 SUITE_GLIBC=36
readonly HERE=packaging/coordinator
readonly WHEELS=$HERE/wheels
readonly BASE_TAR=.cache/base-$SUITE.tar

say() { echo "image: $*" >&2; }

# The project's wheel, and those of all that its coordinator needs, at the versions of requirements.lock.
make_wheels() {
  local wheel platforms=() minor
  rm -rf "$WHEELS"
  wheel=$(packaging/wheel.sh .venv/bin/python "$WHEELS")
  for ((minor = 17; minor <= SUITE_GLIBC; minor++)); do
    platforms+=(--platform "manylinux_2_${minor}_$(uname -m)")
  done
  .venv/bin/pip download -qq --only-binary=:all: --python-version "$SUITE_PYTHON" --implementation cp \
    "${platforms[@]}" --platform "manylinux2014_$(uname -m)" --constraint requirements.lock --dest "$WHEELS" \
    "${wheel}[coordinator]"
}

# A minimal Debian with Python as an image; the archive is kept, since it takes half a minute to make.
make_base() {
  if [ ! -e "$BASE_TAR" ]; then
    say "making a minimal Debian $SUITE"
    mkdir -p .cache
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
      --dpkgopt='path-include=/usr/share/doc/*/copyright' --dpkgopt='path-exclude=/usr/share/locale/*' \
      "$SUITE" "$BASE_TAR.part" --format=tar
    mv "$BASE_TAR.part" "$BASE_TAR"
  fi
  podman "${storage[@]}" import --quiet "$BASE_TAR" "localhost/roost-base:$SUITE" >/dev/null
}

base="" tag="" storage=()
while [ $# -gt 0 ]; do
  case "$1" in
    --base) base=$2 ;;
    --tag) tag=$2 ;;
    --storage) storage=(--root "$2/root" --runroot "$2/run") ;;
    *) echo "unknown argument $1; known are --base, --tag and --storage" >&2; exit 2 ;;
  esac
  shift 2
done

say "making wheels"
make_wheels
version=$(cd "$WHEELS" && echo roost-*.whl | cut -d- -f2)
: "${tag:=localhost/roost-coordinator:$version}"
pull=if-missing
if [ -z "$base" ]; then
  make_base
  base=localhost/roost-base:$SUITE
  pull=never
fi

say "building $tag"
id=$(mktemp)
trap 'rm -f "$id"' EXIT
# Isolation by chroot needs no namespaces of its own, so this works inside other containers too. The docker format is
# the one that can carry a health check.
buildah "${storage[@]}" bud --quiet --isolation chroot --format docker --pull="$pull" --build-arg BASE="$base" \
  --tag "$tag" --iidfile "$id" "$HERE" >&2
echo "$(<"$id")"
