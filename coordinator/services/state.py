"""State: versions of instances, for operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from coordinator.cache import Cache
from coordinator.collecting.collector import Collector
from coordinator.inline import InlineCommits
from coordinator.manifests import Manifests
from coordinator.ownership import Ownership
from coordinator.quotas import Quota, quota_key
from coordinator.records import AgentRecord, Stored
from coordinator.resolving import Resolving
from coordinator.store.base import Expect, Put, Store
from protos.v1 import state_pb2, state_pb2_grpc
from shared.content import is_hash
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import MAX_NOTE, StateManifest
from shared.names import NAME_RULE, is_name
from shared.policy import Policy, parse_policy
from shared.units import format_size

_SIGN_OF_LIFE = 5.0  # seconds
_MOST_SALVAGED = 1000  # hashes at a time


class StateServicer(state_pb2_grpc.StateServicer):
    def __init__(
        self,
        store: Store,
        ownership: Ownership,
        resolving: Resolving,
        manifests: Manifests,
        inline: InlineCommits,
        cache: Cache,
        collector: Collector,
        salvage: Callable[[Sequence[str]], Awaitable[int]],
    ) -> None:
        self._store = store
        self._cache = cache
        self._collector = collector
        self._salvage = salvage
        self._ownership = ownership
        self._resolving = resolving
        self._manifests = manifests
        self._inline = inline

    async def Head(self, request: state_pb2.HeadRequest, context: Any) -> state_pb2.HeadReply:
        key = InstanceKey.from_proto(request.key)
        policy = _policy(await self._resolving.agent(key))
        reply = state_pb2.HeadReply(
            history=policy.state.history,
            disk_bytes=policy.disk.state_bytes,
            gc_round=self._cache.gc_round,
        )
        if stored := await self._ownership.read(key):
            record = stored.value
            await self._inline.settle(key)  # whoever asks goes on to read the blob store
            reply.epoch, reply.version, reply.root = record.epoch, record.version, record.root
            reply.parent, reply.node, reply.phase = record.parent, record.node, record.phase.value
        return reply

    async def Publish(self, request: state_pb2.PublishRequest, context: Any) -> state_pb2.PublishReply:
        """What it refers to was put by whoever calls, who has asked for each chunk; that it can be read, and
        follows on what is committed, is looked at here, since a node that can't read it has lost its user."""
        key = InstanceKey.from_proto(request.key)
        if not is_hash(request.root) or request.version < 1 or not 0 < len(request.why) <= MAX_NOTE:
            raise RoostError(
                Reason.BAD_REQUEST, "a version has a number, the hash of a manifest, and a reason, in short"
            )
        policy = _policy(await self._resolving.agent(key))
        manifest = await self._manifests.load(request.root)
        stored = await self._ownership.read(key)
        if stored is None or stored.value.root != request.root:
            _check(manifest, key, request.version, stored.value.root if stored else "", policy)
            self._cache.check_quota(key, manifest.size, is_new=stored is None)
        done = await self._ownership.replace_state(
            key, request.version, request.root, manifest.size, request.why, request.gc_round
        )
        return state_pb2.PublishReply(epoch=done.value.epoch)

    async def Salvage(self, request: state_pb2.SalvageRequest, context: Any) -> state_pb2.SalvageAnswer:
        if len(request.hashes) > _MOST_SALVAGED or not all(map(is_hash, request.hashes)):
            raise RoostError(
                Reason.BAD_REQUEST, f"not at most {_MOST_SALVAGED:,} hashes", "ask for some at a time"
            )
        return state_pb2.SalvageAnswer(nodes=await self._salvage(request.hashes))

    async def Quota(self, request: state_pb2.QuotaRequest, context: Any) -> state_pb2.QuotaReply:
        tenant = request.tenant
        if not is_name(tenant):
            raise RoostError(Reason.BAD_REQUEST, f"{tenant!r} is no tenant name", NAME_RULE)
        while True:  # each turn means that somebody else changed it; the call's deadline bounds it
            found = await self._store.get(quota_key(tenant))
            before = quota = Quota.decode(found).value if found else Quota(tenant)
            if request.HasField("state_bytes"):
                quota = replace(quota, state_bytes=request.state_bytes)
            if request.HasField("instances"):
                quota = replace(quota, instances=request.instances)
            if quota == before:
                break
            guard = Expect(quota_key(tenant), found.revision if found else 0)
            result = await self._store.txn([guard], [Put(quota_key(tenant), quota.encode())])
            if result.succeeded:
                self._cache.quotas.learn(quota_key(tenant), Stored(quota, result.revision))
                break
        used = self._cache.used(tenant)
        return state_pb2.QuotaReply(
            state_bytes=quota.state_bytes,
            instances=quota.instances,
            used_bytes=used.state_bytes,
            used_instances=used.instances,
        )

    async def Collect(
        self, request: state_pb2.CollectRequest, context: Any
    ) -> AsyncIterator[state_pb2.Collection]:
        """It goes on for as long as somebody waits for it; a round that is left in its middle is no harm."""
        work = self._collector.look() if request.dry_run else self._collector.collect()
        collecting = asyncio.create_task(work, name="collect for an operator")
        try:
            while not (await asyncio.wait([collecting], timeout=_SIGN_OF_LIFE))[0]:
                yield state_pb2.Collection()
            yield collecting.result().to_proto()
        finally:
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)


def _check(manifest: StateManifest, key: InstanceKey, version: int, root: str, policy: Policy) -> None:
    if manifest.key != str(key) or manifest.version != version:
        raise RoostError(
            Reason.BAD_REQUEST,
            f"the manifest is of version {manifest.version} of {manifest.key}, not {version} of {key}",
        )
    if manifest.parent != root:
        raise RoostError(
            Reason.STATE_CHANGED,
            f"{key} has changed since version {version} of it was made",
            "begin again from what is committed now",
        )
    if manifest.size > policy.disk.state_bytes:
        raise RoostError(
            Reason.STATE_TOO_LARGE,
            f"the files take {format_size(manifest.size)}, and an instance of {key.agent} may have "
            f"{format_size(policy.disk.state_bytes)}",
            "deploy it with more resources.disk in agent.toml, up to 4G",
        )


def _policy(agent: AgentRecord) -> Policy:
    return parse_policy(agent.policy_toml)
