#!/usr/bin/env bash
# Boots a Debian box in an emulator and runs the tests there that this machine can't: under cgroup v2, with systemd,
# as the hardened service. packaging/vm/run.sh [DIRECTORY [PYTEST ARGUMENTS...]]; ends with the tests' exit code.
#
# Emulated, the box is ten or more times slower than this machine. ACCEL=kvm makes it about as fast, where KVM works:
# a machine that is itself a virtual one may show /dev/kvm and yet hang in it, so it is not taken unasked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=packaging/common.sh
. packaging/common.sh

readonly MINUTES=${MINUTES:-60} ACCEL=${ACCEL:-tcg,thread=multi}
directory=${1:-.cache/vm}
shift || true
packaging/vm/build.sh "$directory"
say "booting it, for at most $MINUTES minutes (under $ACCEL)"
console=$directory/console.log
: >"$console"
# Whatever ends this script ends the box.
setpriv --pdeathsig KILL timeout "${MINUTES}m" qemu-system-x86_64 -machine q35 -accel "$ACCEL" -cpu max -smp 2 \
  -m 3G -nographic -no-reboot -nodefaults -serial stdio -kernel "$directory/vmlinuz" -initrd "$directory/initrd" \
  -drive "file=$directory/disk.ext4,format=raw,if=virtio,cache=unsafe" -append \
  "root=/dev/vda rw console=ttyS0 quiet loglevel=3 systemd.show_status=no systemd.unit=roost-vm-test.service \
roost.tests=$(printf '%s ' "$@" | base64 -w0)" </dev/null |
  stdbuf -oL tr -d '\r' | tee "$console" || true
code=$(sed -n 's/^roost-vm: exit code \([0-9]*\)$/\1/p' "$console" | tail -1)
[ -n "$code" ] || die "the box ended without a result" "its words are above, and in $console"
exit "$code"
