"""The client: talk to the one instance of one user, wherever it is.

with Client() as client, client.attach("chef", "ana") as chat:
    reply = chat.send("What can I cook?")

async with AsyncClient() as client, client.attach("chef", "ana") as chat:
    async for event in chat.stream("What can I cook?"):
        match event:
            case Waiting(text): ...              # what it waits for, in words
            case Delta(text): ...                # provisional
            case Restarted(): ...                # the deltas so far are void
            case Reply(text, receipt): ...       # last, and committed, as its receipt says
"""

from roost._async import AsyncChat, AsyncClient
from roost._sync import Chat, Client
from roost._types import Delta, Event, Receipt, Reply, Restarted, Waiting
from shared.errors import Reason, RoostError

__all__ = [
    "AsyncChat",
    "AsyncClient",
    "Chat",
    "Client",
    "Delta",
    "Event",
    "Reason",
    "Receipt",
    "Reply",
    "Restarted",
    "RoostError",
    "Waiting",
]
