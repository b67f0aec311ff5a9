import datetime

from roost import Agent

agent = Agent()


@agent.turn
def remind(turn):
    waiting = turn.state.setdefault("waiting", {})
    if turn.timer:  # nobody is attached: what it says is kept for the next time that somebody looks
        text = waiting.pop(turn.timer)
        turn.state.setdefault("done", []).append(f"{clock(turn)} {text}")
        return text
    match turn.message.split(maxsplit=2):
        case ["in", seconds, text]:
            name = f"reminder {turn.id}"
            turn.wake_in(float(seconds), text, name=name)
            waiting[name] = text
            return f"I will remind you in {seconds} s."
        case ["list"]:
            return "\n".join([*turn.state.get("done", []), *(f"(waits) {text}" for text in waiting.values())])
        case ["forget"]:
            for name in waiting:
                turn.cancel_wake(name)
            waiting.clear()
            return "Nothing waits any more."
    return "Say: in SECONDS WHAT, list, or forget."


def clock(turn):
    """A call, so that a turn that is run twice says the same time in both."""
    return turn.call("look at the clock", now, repeat="safe")


def now():
    return datetime.datetime.now().strftime("%H:%M:%S")


if __name__ == "__main__":
    agent.run()
