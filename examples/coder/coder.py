"""A code interpreter: runs the Python that its user sends, each time in a jail of its own.

The files that the code writes are kept in /state, and are there again the next time. Nothing else of a run is
left, whatever the code does: it sees none of this agent's files, has no network, and ends after 20 seconds.
"""

from pathlib import Path

from roost import Agent, TaskError, Turn

agent = Agent()
PROGRAM = "main.py"


@agent.turn
def run(turn: Turn) -> str:
    kept = turn.state_dir / "files"
    kept.mkdir(exist_ok=True)
    files = {path.name: path.read_bytes() for path in kept.iterdir()}
    files[PROGRAM] = without_fence(turn.message).encode()
    try:
        result = turn.run(["python3", PROGRAM], files=files, outputs=["*"])
    except (TaskError, ValueError) as error:
        return f"It could not be run: {error}"
    written = keep(result.files, files, kept)
    told = [result.stdout, result.stderr]
    if result.timed_out:
        told.append("It took too long, and was stopped.")
    elif result.out_of_memory:
        told.append("It ran out of memory.")
    elif result.code:
        told.append(f"It ended with code {result.code}.")
    if result.truncated:
        told.append("It wrote more than is shown here.")
    told += [f"{name}: {len(data)} bytes" for name, data in written.items()]
    told += [f"{name} is too large to be kept." for name in result.omitted]
    return "\n".join(part.rstrip() for part in told if part) or "It said nothing."


def keep(after: dict[str, bytes], before: dict[str, bytes], kept: Path) -> dict[str, bytes]:
    """Writes down what is new or changed, and returns it. What lies in directories is left out."""
    written = {name: data for name, data in after.items() if "/" not in name and data != before.get(name)}
    for name, data in written.items():
        (kept / name).write_bytes(data)
    return written


def without_fence(message: str) -> str:
    """The code in a message that has it between lines of three backquotes, as language models write it."""
    lines = message.strip().splitlines()
    if len(lines) > 1 and lines[0].startswith("```") and lines[-1] == "```":
        return "\n".join(lines[1:-1]) + "\n"
    return message
