"""What the configuration says, as frozen plain values for every other layer."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.model import Compression, Keep, RunOptions, Vm
from orchestrator.units import Share


class LogFormat(StrEnum):
    """How log lines are written."""

    JSON = "json"
    CONSOLE = "console"


class LogLevel(StrEnum):
    """The least important log lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TargetDriver(StrEnum):
    """What kind of target it is: a folder of qcow2 files, or a repository in restic's format."""

    IMAGES = "images"
    RESTIC = "restic"


class NotifyDriver(StrEnum):
    """How somebody is told: people, by whatever apprise knows, or a check that watches over jobs."""

    APPRISE = "apprise"
    HEALTHCHECKS = "healthchecks"


class JobState(StrEnum):
    """How a job ended: as the worst of its runs."""

    FAILED = "failed"
    WARNING = "warning"
    SUCCEEDED = "succeeded"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen by TCP; `host` is an address, not a name."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """The service itself. `max_runs` over all storages and targets.

    `listen` None: not by TCP. `hosts` are names that it is called by there. `token_file` None: systemd's
    credential.
    """

    state_dir: Path
    run_dir: Path
    stop_timeout_seconds: float
    max_runs: int
    log_format: LogFormat
    log_level: LogLevel
    listen: Address | None = None
    hosts: tuple[str, ...] = ()
    token_file: Path | None = None
    metrics_file: Path | None = None


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """A storage of fleecing images. `max_runs` None: no limit."""

    name: str
    path: Path
    quota_bytes: int
    min_free: Share | int
    first_grant: Share | int
    max_runs: int | None = None


@dataclass(frozen=True, slots=True)
class TargetSettings:
    """A target of backups. `place` is its absolute path or its URL, `path` None if it has no path.

    `compress` of a repository is always ZSTD. `password_file` None: systemd's credential, `reclaim` None: space of
    forgotten snapshots is freed by hand only, `max_runs` None: no limit.
    """

    name: str
    driver: TargetDriver
    place: str
    path: Path | None
    compress: Compression = Compression.NONE
    password_file: Path | None = None
    reclaim: str | None = None
    max_runs: int | None = None


@dataclass(frozen=True, slots=True)
class Hook:
    """The program that a job calls at its phases, and how long each call may take."""

    path: Path
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class JobSettings:
    """A job. `vms` are those that its patterns select; `schedule` None: only by hand; `keep` None: everything."""

    name: str
    vms: tuple[str, ...]
    options: RunOptions
    schedule: str | None
    randomized_delay_seconds: float
    repeat_missed: bool
    retries: int
    keep: Keep | None = None
    merge_chains: bool = False
    hook: Hook | None = None


@dataclass(frozen=True, slots=True)
class NotifySettings:
    """Who is told how jobs ended. `jobs` are patterns; `url_file` None: systemd's credential.

    People are told of `states`, of the same one again not before `repeat_after_seconds`.
    """

    name: str
    driver: NotifyDriver
    url_file: Path | None
    jobs: tuple[str, ...]
    states: tuple[JobState, ...]
    repeat_after_seconds: float


@dataclass(frozen=True, slots=True)
class Setting:
    """One key in effect: `value` as TOML has it, None: not set; `origin` FILE:LINE or default."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration without a problem. `settings` are all keys with where they come from."""

    path: Path
    daemon: DaemonSettings
    storage: dict[str, StorageSettings]
    target: dict[str, TargetSettings]
    vm: dict[str, Vm]
    job: dict[str, JobSettings]
    notify: dict[str, NotifySettings]
    settings: tuple[Setting, ...]

    def vms(self) -> dict[str, Vm]:
        """Return the VMs by name, in the file's order."""
        return dict(self.vm)

    def job_vms(self, job_name: str) -> list[str]:
        """Return the names of the VMs that a job backs up, in the file's order."""
        return list(self._job(job_name).vms)

    def run_options(self, job_name: str) -> RunOptions:
        """Return how a job backs up each of its VMs."""
        return self._job(job_name).options

    def keeps(self, target: str, vm: str) -> tuple[Keep, ...]:
        """Return what jobs say is kept of a VM's snapshots on a target; none: everything is.

        All of them count, whichever job made a snapshot: what one keeps, another must not remove.
        """
        jobs = (job for job in self.job.values() if job.options.target == target and vm in job.vms)
        return tuple(dict.fromkeys(job.keep for job in jobs if job.keep is not None))

    def _job(self, name: str) -> JobSettings:
        if name not in self.job:
            known = ", ".join(self.job) or "none"
            raise ConfigError(f"there is no job {name!r} in {self.path}", hint=f"there are: {known}")
        return self.job[name]
