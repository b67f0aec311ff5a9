#!/usr/bin/env bash
# Makes the disk of a Debian box with systemd, this checkout, and a node installed as its service:
# packaging/vm/build.sh DIRECTORY puts base.tar (kept: it takes a minute), disk.ext4, vmlinuz and initrd there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=packaging/common.sh
. packaging/common.sh

readonly SUITE=bookworm SUITE_PYTHON=3.11 SIZE=4G
directory=$(realpath -m "$1")
tree=$directory/tree
checkout=$tree/srv/roost  # not where it is here: a box clears its /tmp as it boots
packages=systemd,systemd-sysv,dbus,udev,kmod,linux-image-cloud-amd64,initramfs-tools,python3,python3-venv,procps
packages+=,iproute2,ca-certificates,etcd-server,etcd-client,perl

# The tests run from a copy of this checkout's .venv; so the Pythons must be the same.
.venv/bin/python -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$SUITE_PYTHON'.split('.'))))" ||
  die "the box is Debian $SUITE with Python $SUITE_PYTHON, and .venv is of another one" \
    "run this on Debian 12, or make .venv with PYTHON=/path/to/python$SUITE_PYTHON"

mkdir -p "$directory"
if [ ! -e "$directory/base.tar" ]; then
  say "making a Debian $SUITE with systemd and a kernel"
  mmdebstrap --quiet --variant=minbase --include="$packages" --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --format=tar "$SUITE" "$directory/base.tar.part"
  mv "$directory/base.tar.part" "$directory/base.tar"
fi

say "installing this checkout into it"
rm -rf "$tree"
mkdir -p "$checkout/.venv"
tar -C "$tree" -xf "$directory/base.tar"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$checkout"
cp protos/v1/*_pb2* "$checkout/protos/v1/"
cp -a .venv/. "$checkout/.venv"
packaging/systemd/install.sh --root "$tree"
cp packaging/vm/roost-vm-test.service "$tree/etc/systemd/system/"
echo roost-vm >"$tree/etc/hostname"
echo "127.0.0.1 localhost roost-vm" >"$tree/etc/hosts"
cp -L "$tree"/boot/vmlinuz-* "$directory/vmlinuz"
cp -L "$tree"/boot/initrd.img-* "$directory/initrd"

say "writing the disk"
rm -f "$directory/disk.ext4"
truncate -s "$SIZE" "$directory/disk.ext4"
PATH="$PATH:/usr/sbin:/sbin" mkfs.ext4 -q -d "$tree" "$directory/disk.ext4"
rm -rf "$tree"
