"""What the alarms see and reach: the cache, and the links that this coordinator holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from coordinator.alarms import Seen
from coordinator.cache import Cache
from coordinator.records import COORDINATORS, AgentRecord
from coordinator.registry import Registry
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError


class CachedView:
    """Implements `coordinator.alarms.View` and `Nodes`."""

    def __init__(self, cache: Cache, registry: Registry) -> None:
        self._cache = cache
        self._registry = registry

    def scheduled(self) -> Iterable[Seen]:
        for stored in self._cache.timers.records.values():
            if stored.value.timers:
                instance = self._cache.instance(stored.value.key)
                owner = self._cache.node(instance.value.node) if instance else None
                yield Seen(stored, instance.value if instance else None, owner.value if owner else None)

    def linked(self) -> Collection[str]:
        return self._registry.links.keys()

    def alive(self) -> Collection[str]:
        return [key.removeprefix(COORDINATORS) for key in self._cache.coordinators.records]

    def agent(self, tenant: str, name: str) -> AgentRecord | None:
        return self._cache.agent(tenant, name)

    def started_id(self, node: str) -> str | None:
        link = self._registry.links.get(node)
        return link.info.started_id if link else None

    async def wake(self, node: str, wake: link_pb2.Wake, timeout: float) -> None:
        link = self._registry.links.get(node)
        if link is None:
            raise RoostError(Reason.NODE_UNREACHABLE, f"the link of {node} ended")
        await link.wake(wake, timeout)
