#!/usr/bin/env bash
# Writes requirements.lock: one exact version for everything that pyproject.toml's ranges lead to, direct or not,
# the build's own tools included. Nothing is installed. Run it by `make lock`, then `make setup check test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

report=$(mktemp)
trap 'rm -f "$report"' EXIT
mapfile -t build < <(.venv/bin/python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')

# Resolved together with what builds, because stubs and the library that loads them must agree.
.venv/bin/python -m pip install -qq --dry-run --ignore-installed --report "$report" \
  '.[coordinator,edge,cli,dev]' "${build[@]}" </dev/null

.venv/bin/python - "$report" >requirements.lock.new <<'PY'
import json
import sys

print("# Made by `make lock`; edit pyproject.toml instead. Used as constraints: it pins, and installs nothing by itself.")
packages = [p["metadata"] for p in json.load(open(sys.argv[1]))["install"]]
found = {p["name"].lower().replace("_", "-"): p["version"] for p in packages}
for name in sorted(found.keys() - {"roost"}):
    print(f"{name}=={found[name]}")
PY
mv requirements.lock.new requirements.lock
