"""Runs in a jail of its own, without network and without a user: unpacks an agent's packages into its /state,
which the agent's jails then see, read-only, as /packages. Standard library only.

Over the socket in descriptor 3, messages are a 4-byte big-endian length and JSON:

    node -> here   {"trees": [...], "wheels": [...]}   paths of directories to copy, and of wheels to unpack
    here -> node   {"kind": "progress", "text"}        any number
                   {"kind": "done"} or {"kind": "failed", "message"}, the last

What must hold: when it says "done", all that it wrote is on the disk. Wheels are hostile: nothing of them
is run, their names stay beneath /state, and what they unpack to is bounded.
"""

from __future__ import annotations

import compileall
import json
import os
import posixpath
import py_compile
import shutil
import socket
import struct
import sys
import traceback
import zipfile

TARGET, SHOWN_AT = "/state", "/packages"
MAX_BYTES, MAX_FILES = 2 << 30, 200_000
_LENGTH = struct.Struct(">I")
_PIECE = 1 << 20


class Failed(Exception):
    """What the agent's developer is to be told."""


class Target:
    """Files beneath `root`, within the limits."""

    def __init__(self, root: str, most_bytes: int = MAX_BYTES, most_files: int = MAX_FILES) -> None:
        self.root = root
        self._bytes_left = most_bytes
        self._files_left = most_files
        self._most = f"{most_bytes >> 20:,} MiB or {most_files:,} files"

    def path(self, name: str) -> str:
        clean = posixpath.normpath(name)
        if name.startswith("/") or clean.split("/")[0] in ("..", ".") or "\\" in name or "\0" in name:
            raise Failed(f"it holds a file with the name {name[:200]!r}")
        path = f"{self.root}/{clean}"
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        return path

    def count(self, size: int, files: int = 0) -> None:
        self._bytes_left -= size
        self._files_left -= files
        if self._bytes_left < 0 or self._files_left < 0:
            raise Failed(f"unpacked, the packages are more than {self._most}")


def unpack_wheel(file: str, target: Target) -> None:
    """As pip does it, but for entry points and the record of what was installed."""
    with zipfile.ZipFile(file) as wheel:
        for member in wheel.infolist():
            name = _place(member.filename)
            if member.is_dir() or name is None:
                continue
            target.count(0, files=1)
            path = target.path(name)
            with wheel.open(member) as source, open(path, "wb") as copy:
                while piece := source.read(_PIECE):
                    target.count(len(piece))
                    copy.write(_at_home(piece) if copy.tell() == 0 and name.startswith("bin/") else piece)
            if member.external_attr >> 16 & 0o111 or name.startswith("bin/"):
                os.chmod(path, 0o755)


def _place(name: str) -> str | None:
    """Where a wheel's file goes; None: nowhere."""
    top, _, rest = name.partition("/")
    if not top.endswith(".data"):
        return name
    kind, _, rest = rest.partition("/")
    return {"purelib": rest, "platlib": rest, "data": rest, "scripts": f"bin/{rest}"}.get(kind)


def _at_home(beginning: bytes) -> bytes:
    """A script that asks for any python gets this one."""
    if beginning.startswith(b"#!python"):
        return b"#!" + sys.executable.encode() + beginning[len(b"#!python") :]
    return beginning


def copy_tree(tree: str, target: Target) -> None:
    for directory, directories, files in os.walk(tree):
        directories[:] = [d for d in directories if not os.path.islink(f"{directory}/{d}")]
        for name in files:
            source = f"{directory}/{name}"
            target.count(os.stat(source).st_size, files=1)
            shutil.copy(source, target.path(os.path.relpath(source, tree)))


def compile_all(root: str) -> None:
    """So that importing costs no compiling. Nothing changes here any more, so nobody need look whether it
    did. What can't be compiled is, as for pip, the matter of who imports it."""
    compileall.compile_dir(
        root,
        quiet=2,
        stripdir=root,
        prependdir=SHOWN_AT,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def main() -> None:
    os.umask(0o022)
    node = socket.socket(fileno=3)

    def say(**message: str) -> None:
        data = json.dumps(message).encode()
        node.sendall(_LENGTH.pack(len(data)) + data)

    stream = node.makefile("rb")
    asked = json.loads(stream.read(*_LENGTH.unpack(stream.read(_LENGTH.size))))
    target = Target(TARGET)
    where = ""
    try:
        for where in asked["trees"]:
            say(kind="progress", text=f"copying {where.removeprefix('/agent/')}")
            copy_tree(where, target)
        for number, where in enumerate(asked["wheels"], 1):
            say(kind="progress", text=f"{number} of {len(asked['wheels'])} packages")
            unpack_wheel(where, target)
        where = ""
        say(kind="progress", text="compiling")
        compile_all(TARGET)
        os.chmod(TARGET, 0o755)  # for the uids of the agent's jails
        os.sync()
        say(kind="done")
    except Exception as error:
        if not isinstance(error, Failed):
            traceback.print_exc()
        why = str(error) or type(error).__name__
        say(kind="failed", message=f"{where.removeprefix('/agent/')}: {why}" if where else why)


if __name__ == "__main__":
    main()
