"""What may become of an instance's record: pure functions, a record in, the next record out, or a RoostError
that says why not. `coordinator.ownership` makes transactions of them.

Invariants, checked at every transition: the epoch only grows, by 1; within an epoch there is one owner; the
version grows by at most 1, and only within an epoch, or together with it when an operator replaces the state.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.records import InstanceRecord, Phase
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources


class InvariantBroken(Exception):
    """A transition would break promise 1: a bug. Nothing was written."""


def place(
    current: InstanceRecord | None,
    key: InstanceKey,
    node: str,
    why: str,
    agent_version: str,
    now_unix: float,
    home: str = "",
) -> InstanceRecord:
    """A new owner in a new epoch. What was committed stays, and so do the size and, without a new one, the
    home."""
    new = InstanceRecord(
        key=key,
        epoch=current.epoch + 1 if current else 1,
        node=node,
        version=current.version if current else 0,
        root=current.root if current else "",
        last_turn=current.last_turn if current else "",
        phase=Phase.PLACED,
        why=why,
        agent_version=agent_version,
        placed_at_unix=now_unix,
        size=current.size if current else None,
        parked=current.parked if current else "",
        parent=current.parent if current else "",
        state_bytes=current.state_bytes if current else 0,
        home=home or (current.home if current else ""),
    )
    return _checked(current, new)


def wake(current: InstanceRecord | None, node: str, epoch: int, agent_version: str) -> InstanceRecord:
    """Its owner starts its process, with this version of the agent. EPOCH_STALE if `node` does not own it."""
    owned = _owned(current, node, epoch)
    return _checked(owned, replace(owned, phase=Phase.LIVE, agent_version=agent_version))


def commit(
    current: InstanceRecord | None,
    node: str,
    epoch: int,
    version: int,
    root: str,
    turn_id: str,
    state_bytes: int = 0,
) -> InstanceRecord:
    """The next state version. `current` itself if this very commit was applied before.

    EPOCH_STALE if `node` does not own it in `epoch`, or if `version` is not the next one.
    """
    owned = _owned(current, node, epoch)
    if (version, root) == (owned.version, owned.root):
        return owned
    if version != owned.version + 1:
        raise RoostError(
            Reason.EPOCH_STALE,
            f"{owned.key} is at version {owned.version}, so {version} can't be committed next",
            "the node must fetch the instance again before it goes on",
        )
    new = replace(owned, version=version, root=root, parent=owned.root, state_bytes=state_bytes)
    return _checked(owned, replace(new, last_turn=turn_id, phase=Phase.LIVE))


def replace_state(
    current: InstanceRecord | None, key: InstanceKey, version: int, root: str, state_bytes: int, why: str
) -> InstanceRecord:
    """A version that no turn made, in a new epoch: what runs by the old one is over. An instance that there
    was not yet belongs to no node. `current` itself if this was applied before. STATE_CHANGED if `version`
    is not the next one."""
    if current is not None and (version, root) == (current.version, current.root):
        return current
    if version != (current.version if current else 0) + 1:
        raise RoostError(
            Reason.STATE_CHANGED,
            f"{key} is at version {current.version if current else 0} now, so {version} can't be the next",
            "begin again from what is committed now",
        )
    base = current or InstanceRecord(key, 0, "", 0, "", "", Phase.HIBERNATED, why, "", 0.0)
    new = replace(base, epoch=base.epoch + 1, version=version, root=root, parent=base.root)
    return _checked(current, replace(new, state_bytes=state_bytes, phase=Phase.HIBERNATED, why=why))


def hibernate(current: InstanceRecord | None, node: str, epoch: int) -> InstanceRecord:
    """Its process is gone. `current` itself if that was known. EPOCH_STALE if `node` does not own it."""
    owned = _owned(current, node, epoch)
    if owned.phase is Phase.HIBERNATED:
        return owned
    return _checked(owned, replace(owned, phase=Phase.HIBERNATED))


def resize(current: InstanceRecord | None, node: str, epoch: int, size: Resources | None) -> InstanceRecord:
    """Its size from now on, wherever it goes. EPOCH_STALE if `node`, which agreed, does not own it."""
    owned = _owned(current, node, epoch)
    return _checked(owned, replace(owned, size=size))


def keep(current: InstanceRecord | None, node: str, epoch: int) -> InstanceRecord:
    """Stays as it is: for what is written beside it. EPOCH_STALE if `node` does not own it."""
    return _owned(current, node, epoch)


def park(current: InstanceRecord | None, node: str, epoch: int, what: str) -> InstanceRecord:
    """Notes a call of which nobody knows whether it was made. EPOCH_STALE if `node` does not own it."""
    return replace(_owned(current, node, epoch), parked=what)


def unpark(current: InstanceRecord | None, key: InstanceKey, left: str) -> InstanceRecord:
    """A person said what became of a call; `left` is another such call, if there is one."""
    if current is None:
        raise RoostError(
            Reason.BAD_REQUEST, f"there is no instance {key}", "one comes to be with its first message"
        )
    return replace(current, parked=left)


def _owned(current: InstanceRecord | None, node: str, epoch: int) -> InstanceRecord:
    if current is not None and (current.node, current.epoch) == (node, epoch):
        return current
    now = f"{current.node} owns it in epoch {current.epoch}" if current else "it was never placed"
    raise RoostError(
        Reason.EPOCH_STALE,
        f"{node} does not own this instance in epoch {epoch}: {now}",
        "resolve again: its state is safe with its owner",
    )


def _checked(old: InstanceRecord | None, new: InstanceRecord) -> InstanceRecord:
    if old is None:
        holds = new.epoch == 1 and new.version == (0 if new.node else 1)
    elif new.epoch == old.epoch:
        same = (new.version, new.root) == (old.version, old.root)
        holds = new.node == old.node and (same or new.version == old.version + 1)
    else:
        same = (new.version, new.root) == (old.version, old.root)
        replaced = (new.version, new.node, new.parent) == (old.version + 1, old.node, old.root)
        holds = new.epoch == old.epoch + 1 and (same or replaced)
    if not holds or (old is not None and new.key != old.key) or bool(new.version) != bool(new.root):
        raise InvariantBroken(f"{old} may not become {new}")
    return new
