"""An agent of a real framework, without a network: a function stands in for the model, as the framework's
own tests have it. Nothing of Roost is in this file, so that it runs in other sandboxes just as well."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic_ai import Agent, ModelMessage, ModelRequest, ModelResponse, RunContext, TextPart
from pydantic_ai.direct import model_request
from pydantic_ai.models.function import AgentInfo, FunctionModel

LOOP = "loop: "  # a message that begins so is answered by the framework's whole agent loop


@dataclass
class Guest:
    name: str


async def _answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """The model. It needs no thread, for a process with threads can't be forked."""
    asked = [str(getattr(part, "content", "")) for message in messages for part in message.parts]
    return ModelResponse(parts=[TextPart(f"You said: {asked[-1]}")])


_model = FunctionModel(_answer)
_agent = Agent(_model, deps_type=Guest, output_type=str, instructions="You book tables. Be brief.")


@_agent.tool
async def book_table(ctx: RunContext[Guest], people: int, hour: int) -> str:
    """Books a table for so many people."""
    return f"{people} at {hour}, {ctx.deps.name}"


async def reply(message: str) -> str:
    """One call of the model, or for LOOP the agent's loop around it, which in itself takes some ms."""
    if message.startswith(LOOP):
        return (await _agent.run(message, deps=Guest("Ana"))).output
    response = await model_request(_model, [ModelRequest.user_text_prompt(message)])
    return "".join(part.content for part in response.parts if isinstance(part, TextPart))
