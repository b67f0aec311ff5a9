"""What jails are asked for on behalf of agents: from a policy to a `JailSpec`. Pure."""

from __future__ import annotations

from edge_agent.control import Agent
from edge_agent.egress.proxy import environment
from edge_agent.jail.api import JailSpec
from edge_agent.jail.python import PARKS_VARIABLE, agent_argv, agent_environment, zygote_argv
from shared.policy import Policy, Start
from shared.resources import Disk, Resources

# Bytes that a fork leaves with its zygote: what it wrote to before it was in a jail, and the older copy of
# each page that the zygote wrote to since, count as the zygote's as long as the fork lives.
OF_A_FORK = 2 << 20


def parks(policy: Policy) -> bool:
    """Do jails of this agent wait for users? A device that nobody uses is not kept from those who would."""
    run = policy.run
    return bool(run.entry) and run.start in (Start.AUTO, Start.PARKED) and not policy.need.devices


def of_instance(jail_id: str, agent: Agent, need: Resources, packages: str, zygote: str) -> JailSpec:
    """`need`: what this instance gets, which may not be what the policy says. See JailSpec for the others."""
    policy = agent.policy
    return JailSpec(
        jail_id=jail_id,
        bundle=agent.version,
        argv=agent_argv(policy.run),
        env=environment(policy.network) | agent_environment(policy.run, packages),
        limits=need,
        disk=policy.disk,
        packages=packages,
        zygote=zygote,
    )


def of_zygote(jail_id: str, agent: Agent, capacity_bytes: int, packages: str) -> JailSpec:
    """`capacity_bytes`: of memory, of the node. At least a core: it works for many, and its forks begin
    within its own limits. It reaches nothing; what it imports may look at the variables once and for all."""
    policy, need = agent.policy, agent.policy.need
    forks = capacity_bytes // need.memory_bytes  # as many as there can ever be
    limits = Resources(need.memory_bytes + forks * OF_A_FORK, max(1000, need.cpu_millis), max(32, need.pids))
    env, argv = environment(policy.network), zygote_argv(policy.run.entry)
    if parks(policy):
        env = {**env, PARKS_VARIABLE: "1"}
    disk = Disk(policy.disk.state_bytes)  # no fork may write a larger file than its zygote might have
    return JailSpec(jail_id, agent.version, argv, env, limits, disk=disk, packages=packages)
