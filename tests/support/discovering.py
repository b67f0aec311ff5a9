"""`python -m tests.support.discovering NODE SITE ADDRESS`: advertises, and prints whom it hears."""

from __future__ import annotations

import asyncio
import json
import sys

from edge_agent.discovery import Discovery


async def main() -> None:
    node, site, address = sys.argv[1:]
    discovery = Discovery(node, site, address, address)
    running = asyncio.create_task(discovery.run())
    printed: list[str] | None = None
    while not running.done():
        heard = [f"{p.node}@{p.site} {p.address}" for p in discovery.peers]
        if heard != printed:
            print(json.dumps(heard), flush=True)
        printed = heard
        await asyncio.sleep(0.05)
    await running


if __name__ == "__main__":
    asyncio.run(main())
