#!/usr/bin/env bash
# In the box: the jails' own tests under cgroup v2, and the installed service from deploy to chat. Says its exit code
# in the last line, which is all that gets out of here.
set -uo pipefail
mapfile -t arguments < <(sed -n 's/.*roost\.tests=\([^ ]*\).*/\1/p' /proc/cmdline | base64 -d | tr ' ' '\n' | sed '/^$/d')
[ ${#arguments[@]} -gt 0 ] || arguments=(tests/vm tests/contract/test_jails.py tests/jail)
echo "roost-vm: $(uname -r), $(systemctl --version | head -1), $(stat -f -c %T /sys/fs/cgroup)"
ip link set lo up
# Out of systemd's group for this: the jailers that tests start must find no processes in the group they divide.
echo $$ >/sys/fs/cgroup/cgroup.procs
export ROOST_IN_VM=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$PWD
.venv/bin/python -m pytest -p no:cacheprovider --timeout 900 "${arguments[@]}"
echo "roost-vm: exit code $?"
