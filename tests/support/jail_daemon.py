"""A daemon for tests of the jailer: it passes the jailer's socket on to the test, and lives until it is told
to end. So the test talks to a real jailer by itself, and can kill the daemon like any other process."""

from __future__ import annotations

import os
import signal
import socket
import sys


def main() -> None:
    fd = int(os.environ["ROOST_JAILER_FD"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as test:
        test.connect("\0" + sys.argv[1])
        socket.send_fds(test, [str(os.getpid()).encode()], [fd])
    os.close(fd)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
