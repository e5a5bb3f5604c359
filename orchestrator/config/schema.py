"""The tables and keys of the configuration file. Pure.

The descriptions and examples are what users see: in the JSON schema, in problems, and (held by a
test) in config/vmfleece.toml and docs/configuration.md. Defaults are written as a user writes them.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from orchestrator.config.later import LATER
from orchestrator.config.properties import read_keep
from orchestrator.config.settings import JobState, LogFormat, LogLevel, NotifyDriver, TargetDriver
from orchestrator.config.values import (
    AbsolutePath,
    Calendar,
    CbwTimeout,
    Duration,
    HostName,
    LatencyBudget,
    Listen,
    MaxRuns,
    Name,
    Patterns,
    Quota,
    Rate,
    ShareOrSize,
    Socket,
    Url,
    one_of,
    read_fleecing,
)
from orchestrator.model import Compression, Consistency, Discard, FleecingPolicy, Keep


def _key(default: Any = ..., *, description: str, example: Any) -> Any:
    # Any: defaults are written as in the file, and validated into the field's type.
    return Field(default, description=description, examples=[example], validate_default=True)


class Table(BaseModel):
    """A TOML table; a key that it does not know is a problem."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class DaemonTable(Table):
    """The service itself."""

    state_dir: AbsolutePath = _key(
        "/var/lib/vmfleece",
        description="Folder of the journal, the catalogue and the ledger.",
        example="/var/lib/vmfleece",
    )
    run_dir: AbsolutePath = _key(
        "/run/vmfleece",
        description="Folder of the control socket.",
        example="/run/vmfleece",
    )
    listen: Listen | None = _key(
        None,
        description="Address and port of the API by TCP, read-only without a token; not by TCP if absent.",
        example="127.0.0.1:9321",
    )
    hosts: list[HostName] = _key(
        [],
        description="Names by which that address may be called, beside addresses and the host's own name.",
        example=["backup.example.org"],
    )
    token_file: AbsolutePath | None = _key(
        None,
        description="File with the token that whoever changes something by TCP needs; systemd's credential "
        "api.token if absent. Without one, nothing can be changed there.",
        example="/etc/vmfleece/api.token",
    )
    metrics_file: AbsolutePath | None = _key(
        None,
        description="File that metrics are written to every 30 s, for node_exporter's textfile collector.",
        example="/var/lib/prometheus/node-exporter/vmfleece.prom",
    )
    stop_timeout: Duration = _key(
        "60s",
        description="How long runs under way may take to end when the service is told to stop.",
        example="60s",
    )
    max_runs: MaxRuns = _key(4, description="How many VMs are backed up at the same time at most.", example=4)
    log_format: Annotated[LogFormat, Field(strict=False), one_of(LogFormat)] = _key(
        "json", description="How log lines are written.", example="json"
    )
    log_level: Annotated[LogLevel, Field(strict=False), one_of(LogLevel)] = _key(
        "info", description="The least important log lines that are written.", example="info"
    )
    ledger: str = _key("sqlite", description="Where it is kept who holds which space.", example="sqlite")


class StorageTable(Table):
    """A place where fleecing images live while backups run."""

    driver: str = _key("directory", description="What kind of storage it is: a folder.", example="directory")
    path: AbsolutePath = _key(
        description="Folder of the fleecing images; on a fast, local file system.",
        example="/var/lib/vmfleece/fleecing",
    )
    quota: Quota = _key(
        description="What all fleecing images of the storage together never exceed.",
        example="200GiB",
    )
    min_free: ShareOrSize = _key(
        "10%",
        description="What always stays free on the file system: a share of it, or a size.",
        example="10%",
    )
    first_grant: ShareOrSize = _key(
        "10%",
        description="What a fleecing image is granted first where no past backup of the VM tells: a share of its "
        "disk, or a size.",
        example="10%",
    )
    max_runs: MaxRuns | None = _key(
        None,
        description="How many runs use it at the same time at most; no limit if absent.",
        example=2,
    )


class TargetTable(Table):
    """A place where backups go. Which keys fit which driver: `checks`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["path"]}, {"required": ["url"]}]})

    driver: Annotated[TargetDriver, Field(strict=False), one_of(TargetDriver)] = _key(
        "images",
        description="What kind of target it is: images, a folder of qcow2 files; restic, a repository.",
        example="restic",
    )
    path: AbsolutePath | None = _key(
        None,
        description="Folder of the backups.",
        example="/srv/backup/vms",
    )
    url: Url | None = _key(
        None,
        description="Address of a repository in a bucket, instead of path.",
        example="s3://bucket/prefix",
    )
    password_file: AbsolutePath | None = _key(
        None,
        description="File with the password of the repository; systemd's credential NAME.password if absent.",
        example="/etc/vmfleece/main.password",
    )
    reclaim: Calendar | None = _key(
        None,
        description="When the space of a repository's forgotten snapshots is freed; only by hand if absent.",
        example="sun 04:00",
    )
    max_runs: MaxRuns | None = _key(
        None,
        description="How many runs write to it at the same time at most; no limit if absent.",
        example=2,
    )
    compress: Annotated[Compression, Field(strict=False), one_of(Compression)] = _key(
        "none",
        description="How QEMU compresses the clusters that it writes. A repository is always compressed: zstd.",
        example="zstd",
    )


class VmTable(Table):
    """A virtual machine."""

    qmp: Socket = _key(
        description="Socket of a QMP monitor that nobody else uses.",
        example="/run/qemu/web01.qmp",
    )
    agent: Socket | None = _key(
        None,
        description="Socket of the guest agent, which nobody else uses; for consistency freeze.",
        example="/run/qemu/web01.qga",
    )
    priority: Annotated[int, Field(ge=0, le=100)] = _key(
        50, description="Who comes first where runs wait: higher first.", example=50
    )
    latency_budget: LatencyBudget | None = _key(
        None,
        description="What the guest's writes may take on average while it is backed up: while they take longer, "
        "it is copied slower. Never slowed if absent.",
        example="20ms",
    )
    exclude_disks: Patterns = _key(
        [],
        description="Device ids of disks that are not backed up.",
        example=["scratch0"],
    )
    extra_files: list[AbsolutePath] = _key(
        [],
        description="Small files that belong to the VM, such as its UEFI variables: stored with each snapshot.",
        example=["/var/lib/qemu/web01/OVMF_VARS.fd"],
    )


class FleecingTable(Table):
    """Whether a backup uses fleecing images, and where."""

    enabled: bool = _key(True, description="Whether to use fleecing images.", example=True)
    storage: Name | None = _key(
        None,
        description="The storage to use; if absent the one that holds the disk's own image.",
        example="local",
    )

    @model_validator(mode="after")
    def _storage_is_used(self) -> "FleecingTable":
        if self.storage is not None and not self.enabled:
            raise ValueError(
                f"storage {self.storage!r} is given but fleecing is off; "
                "allowed: enabled=1 with a storage, or enabled=0 alone"
            )
        return self


class JobTable(Table):
    """Which VMs are backed up, when, to which target and how."""

    schedule: Calendar | None = _key(
        None,
        description="When the job is due, in systemd's calendar syntax; only by hand if absent.",
        example="mon..fri 02:30",
    )
    randomized_delay: Duration = _key(
        "0s",
        description="Starts up to this much later, the same for the same due time and host.",
        example="15min",
    )
    repeat_missed: bool = _key(
        False,
        description="Whether a due time that passed while the service was down is made up for.",
        example=True,
    )
    vms: Annotated[Patterns, Field(min_length=1)] = _key(
        description="Names of VMs, or patterns with *, ? and [...].",
        example=["web*", "db01"],
    )
    exclude: Patterns = _key(
        [],
        description="Names or patterns of VMs that vms matches but shall not.",
        example=["web99"],
    )
    target: Name = _key(description="The target that the backups go to.", example="main")
    fleecing: Annotated[
        FleecingTable | None,
        BeforeValidator(lambda given: given if given is None else read_fleecing(given)),
    ] = _key(
        None,
        description="Whether to use fleecing images and where, as vzdump writes it, or a table. "
        "Absent: used where it can be had.",
        example="enabled=1,storage=local",
    )
    fleecing_policy: Annotated[FleecingPolicy, Field(strict=False), one_of(FleecingPolicy)] | None = _key(
        None,
        description="Where fleecing cannot be had, require fails and prefer backs up without it. "
        "Absent: require if the job has fleecing or its target is a repository, else prefer.",
        example="require",
    )
    consistency: Annotated[Consistency, Field(strict=False), one_of(Consistency)] = _key(
        "pause",
        description="How all disks get one point in time: pause stops the guest for milliseconds; freeze has the "
        "guest agent freeze its file systems meanwhile, and where it cannot, warns and does without; none asks "
        "for no guarantee, but QEMU still needs that pause to put its filters in safely.",
        example="pause",
    )
    cbw_timeout: CbwTimeout = _key(
        "10s",
        description="How long a guest's write waits for its old data to be saved, at most.",
        example="10s",
    )
    bwlimit: Rate = _key(
        "0",
        description="How fast a run copies at most: KiB/s, or with a unit; 0 is no limit.",
        example="50MiB",
    )
    discard: Annotated[Discard, Field(strict=False), one_of(Discard)] = _key(
        "auto",
        description="What gives back fleecing space during a full copy: job, QEMU's block job as it copies (9.1 "
        "or later); window, vmfleece after each part of the disk, on any QEMU, but the images are not compressed; "
        "auto: job where QEMU can, else window unless the target compresses.",
        example="auto",
    )
    full_every: Annotated[int, Field(ge=0, le=1000)] = _key(
        0,
        description="How many snapshots build on each other at most, the full one included; 0: no limit.",
        example=30,
    )
    prune_backups: Annotated[Keep, BeforeValidator(read_keep), WithJsonSchema({"type": "string"})] | None = _key(
        None,
        description="Which backups of its VMs are kept on the target, as vzdump writes it; all if absent.",
        example="keep-last=3,keep-daily=13,keep-weekly=8",
    )
    merge_chains: bool = _key(
        False,
        description="Whether the oldest backup of a chain that is kept is merged with those before it that are "
        "not, so that these can be removed. Reads and writes as much as a full backup.",
        example=False,
    )
    hook: AbsolutePath | None = _key(
        None,
        description="Program that is called at the phases of the job and of its runs, as vzdump calls its hook "
        "script.",
        example="/etc/vmfleece/hook",
    )
    hook_timeout: Duration = _key(
        "10min",
        description="How long each call of the hook may take.",
        example="10min",
    )
    retries: Annotated[int, Field(ge=0, le=10)] = _key(
        2, description="How often a run that failed is tried again.", example=2
    )


class NotifyTable(Table):
    """Who is told how jobs ended."""

    driver: Annotated[NotifyDriver, Field(strict=False), one_of(NotifyDriver)] = _key(
        "apprise",
        description="How it is told: apprise, to people, by mail, chat and whatever else apprise knows; "
        "healthchecks, to a check that notices jobs that do not start or end.",
        example="apprise",
    )
    url_file: AbsolutePath | None = _key(
        None,
        description="File with the address, since that holds secrets; systemd's credential NAME.url if absent.",
        example="/etc/vmfleece/admins.url",
    )
    jobs: Annotated[Patterns, Field(min_length=1)] = _key(
        ["*"],
        description="Names of jobs, or patterns with *, ? and [...].",
        example=["nightly"],
    )
    states: list[Annotated[JobState, Field(strict=False), one_of(JobState)]] = _key(
        ["failed", "warning"],
        description="Of which ends of a job people are told; they are told as well when it is good again.",
        example=["failed", "warning"],
    )
    repeat_after: Duration = _key(
        "6h",
        description="How long people are not told again that a job is in the same state.",
        example="6h",
    )

    @model_validator(mode="after")
    def _checks_are_told_everything(self) -> "NotifyTable":
        if self.driver is NotifyDriver.HEALTHCHECKS and self.model_fields_set & {"states", "repeat_after"}:
            raise ValueError(
                "states and repeat_after are for people, and a check is told everything; "
                "allowed: without them, or driver = 'apprise'"
            )
        return self


class File(Table):
    """The configuration of vmfleece."""

    daemon: DaemonTable = Field(default_factory=DaemonTable)
    storage: dict[Name, StorageTable] = Field({}, description="Storages by name.")
    target: dict[Name, TargetTable] = Field({}, description="Targets by name.")
    vm: dict[Name, VmTable] = Field({}, description="VMs by name.")
    job: dict[Name, JobTable] = Field({}, description="Jobs by name.")
    notify: dict[Name, NotifyTable] = Field({}, description="Who is told of jobs, by name.")


NAMED: dict[str, type[Table]] = {
    "storage": StorageTable,
    "target": TargetTable,
    "vm": VmTable,
    "job": JobTable,
    "notify": NotifyTable,
}
SECTIONS: dict[str, type[Table]] = {"daemon": DaemonTable, **NAMED}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, without what is not available yet."""
    schema = File.model_json_schema()
    tables = {name: schema["$defs"][table.__name__]["properties"] for name, table in SECTIONS.items()}
    for properties in (*tables.values(), schema["$defs"]["FleecingTable"]["properties"]):
        for definition in properties.values():
            _leave_out_null(definition)
    tables["job"]["fleecing"] = {
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/FleecingTable"}],
        **{key: tables["job"]["fleecing"][key] for key in ("description", "examples")},
    }
    for later in LATER:
        if later.only is not None:
            tables[later.section][later.key]["const"] = later.only
    for name in NAMED:
        schema["properties"][name]["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _leave_out_null(definition: dict[str, Any]) -> None:
    # TOML has no null: such a key is left out.
    if "default" in definition and definition["default"] is None:
        del definition["default"]
        kinds = definition.pop("anyOf")
        definition.update(next(kind for kind in kinds if kind != {"type": "null"}))
