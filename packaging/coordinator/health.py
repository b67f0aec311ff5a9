"""Asks a coordinator on this machine whether it serves: `health.py CONFIG` exits 0 if so, else 1 with why.

It reads where to ask from the coordinator's own configuration, so that a changed port can't make it lie. With
`listen` at port 0 it asks where the coordinator says, in its ready file, that it listens.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT = 4.0  # seconds; less than the container engine's own, so that the sentence is still heard
ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}


def address(config: Path) -> str:
    """Where to ask, as host:port."""
    settings = tomllib.loads(config.read_text())
    host, _, port = settings["listen"].rpartition(":")
    if port == "0":
        port = Path(settings["ready_file"]).read_text().strip().rpartition(":")[2]
    return f"{ANY.get(host, host)}:{port}"


def main() -> str | None:
    where = address(Path(sys.argv[1]))
    with grpc.insecure_channel(where) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        except grpc.RpcError as error:
            return f"no answer from {where}: {error.code().name}: {error.details()}"
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        return f"{where} says {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}"
    return None


if __name__ == "__main__":
    sys.exit(main())
