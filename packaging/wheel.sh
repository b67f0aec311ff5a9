#!/usr/bin/env bash
# Builds Roost's own wheel: packaging/wheel.sh PYTHON DIRECTORY. PYTHON has the pip to build with; prints the wheel's path.
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$1 directory=$2

# Built from a copy: pip would leave a build directory in the sources, whose old files get into the next wheel.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
(cd "$source" && cp -r pyproject.toml setup.py README.md LICENSE protos shared coordinator edge_agent roost "$copy")
find "$copy" -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock holds for what pip builds with, too: stubs must not be newer than the library that loads them. Newer
# releases of pip read the second variable for that, older ones the first.
PIP_CONSTRAINT=$source/requirements.lock PIP_BUILD_CONSTRAINT=$source/requirements.lock \
  "$python" -m pip wheel -qq --no-deps --wheel-dir "$directory" "$copy" </dev/null >&2
echo "$directory"/roost-*.whl
