"""Runs a program that ends with its parent: `python tied.py PARENT PROGRAM ARGUMENT...`

The supervisor can't arrange this itself between fork and exec: gRPC, whose threads it has, doesn't survive a
fork that is not at once followed by exec. So this file, without any import that is not needed, becomes the
program; the kernel keeps the arrangement across exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it died before this could be arranged
        sys.exit(1)
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]} can't be run: {error.strerror}")
