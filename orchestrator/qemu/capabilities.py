"""What a QEMU can do, read from its own schema. Pure; versions are never compared.

Source: qapi/introspect.json. Names of types in the schema are meaningless numbers, so a feature is found by
following the types from a command to the member that it needs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features that decide how a backup is made.

    `break_snapshot`: a failing copy breaks the backup, not the guest (without it there is no safe backup).
    `discard_source`: block jobs move the boundary as they copy. Where it is, grants can also be extended and
    filters be taken out while the guest runs; where it is not, neither is safe (QEMU aborts).
    `job_cluster_size`: block jobs can be told to copy whole chunks of any size.
    """

    break_snapshot: bool
    snapshot_access: bool
    discard_source: bool
    job_cluster_size: bool


def from_schema(schema: Iterable[Mapping[str, Any]]) -> Capabilities:
    """Read the reply of query-qmp-schema."""
    entities = {entity["name"]: entity for entity in schema}
    backup_type = entities["blockdev-backup"]["arg-type"]
    backup = _members(entities, backup_type)
    drivers = _variants(entities, entities["blockdev-add"]["arg-type"])
    filter_members = _members(entities, drivers.get("copy-before-write"))
    return Capabilities(
        break_snapshot={"on-cbw-error", "cbw-timeout"} <= filter_members,
        snapshot_access="snapshot-access" in drivers,
        discard_source="discard-source" in backup,
        job_cluster_size="min-cluster-size" in _member_of(entities, backup_type, "x-perf"),
    )


def _members(entities: Mapping[str, Mapping[str, Any]], type_name: str | None) -> set[str]:
    entity = entities.get(type_name or "", {})
    return {member["name"] for member in entity.get("members", [])}


def _member_of(entities: Mapping[str, Mapping[str, Any]], type_name: str, member: str) -> set[str]:
    """The members of a type's member."""
    found = [one["type"] for one in entities[type_name]["members"] if one["name"] == member]
    return _members(entities, found[0]) if found else set()


def _variants(entities: Mapping[str, Mapping[str, Any]], type_name: str) -> dict[str, str]:
    return {variant["case"]: variant["type"] for variant in entities[type_name].get("variants", [])}
