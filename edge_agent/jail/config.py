"""What the jailer needs to know, from the node's edge.toml."""

from __future__ import annotations

import pwd
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.config import EdgeConfig
from shared.config import ConfigError

_NOBODYS = 64_200  # uid and gid of the daemon where there is no user of the configured name
MAX_SLOTS = 32_768  # jails with a directory; each has two of the 65,536 ids


@dataclass(frozen=True, slots=True)
class JailerConfig:
    config_file: Path  # for the daemon
    data_dir: Path
    daemon_uid: int = _NOBODYS
    daemon_gid: int = _NOBODYS
    uid_base: int = 2_000_000_000
    stop_grace: float = 20.0  # seconds that the daemon has after SIGTERM
    devices: dict[str, tuple[str, ...]] = field(default_factory=dict)  # paths by name
    credentials_dir: Path | None = None  # copied into the daemon's root, as is ca_file
    ca_file: Path | None = None

    @property
    def jails_dir(self) -> Path:
        return self.data_dir / "jails"

    @property
    def bundles_dir(self) -> Path:
        return self.data_dir / "bundles"

    @property
    def daemon_dir(self) -> Path:
        return self.data_dir / "daemon"

    @property
    def new_root(self) -> Path:
        """An empty directory where jails, each in its own mount namespace, build their root."""
        return self.data_dir / "root"

    def init_uid(self, slot: int) -> int:
        return self.uid_base + 2 * slot

    def agent_uid(self, slot: int) -> int:
        return self.uid_base + 2 * slot + 1

    def slot_of(self, agent_uid: int) -> int | None:
        """The slot whose agent has this uid, or None if it is nobody's."""
        slot, odd = divmod(agent_uid - self.uid_base, 2)
        return slot if odd and 0 <= slot < MAX_SLOTS else None


def jailer_config(edge: EdgeConfig, config_file: Path) -> JailerConfig:
    """ConfigError if the daemon would be root."""
    try:
        user = pwd.getpwnam(edge.jailer.daemon_user)
        uid, gid = user.pw_uid, user.pw_gid
    except KeyError:
        uid = gid = _NOBODYS
    if uid == 0:
        raise ConfigError(f"{config_file}: jailer.daemon_user must not be root: the daemon faces the network")
    return JailerConfig(
        config_file=config_file.resolve(),
        data_dir=edge.data_dir.resolve(),
        daemon_uid=uid,
        daemon_gid=gid,
        uid_base=edge.jailer.uid_base,
        stop_grace=edge.jailer.stop_grace,
        devices={name: device.paths for name, device in edge.devices.items()},
        credentials_dir=edge.egress.credentials_dir,
        ca_file=edge.egress.ca_file,
    )
