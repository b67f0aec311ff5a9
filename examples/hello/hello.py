from roost import Agent

agent = Agent()


@agent.turn
def hello(turn):
    visits = turn.state["visits"] = turn.state.get("visits", 0) + 1
    return f"Hello {turn.user}, this is visit {visits}."


if __name__ == "__main__":
    agent.run()
