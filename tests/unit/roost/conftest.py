"""The chef's files stand alone, as in a jail: its directory is on the path, not in a package."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import roost.agent as sdk
from tests.support.sdk import Node, Serve

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "chef"))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves a handler in a thread, with its state in tmp_path; returns the node's end once it is ready. With
    `warm_up`, if it is `told` so, it is warm then."""
    nodes: list[Node] = []
    threads: list[threading.Thread] = []

    def start(
        handler: Callable[..., Any], warm_up: Callable[[], Any] | None = None, *, told: bool = True
    ) -> Node:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=sdk.serve, args=(*sdk.service(handler, theirs, tmp_path), warm_up))
        thread.start()
        threads.append(thread)
        nodes.append(Node(ours))
        assert nodes[-1].receive() == {"kind": "ready"}
        if warm_up is not None and told:
            nodes[-1].send(kind="warm")
            assert nodes[-1].receive() == {"kind": "ready"}
        return nodes[-1]

    yield start
    for node in nodes:
        node.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "the agent did not end when the node closed its socket"
