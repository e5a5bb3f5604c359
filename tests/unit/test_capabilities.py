"""What a QEMU can do, read from small schemas, and once from the real one."""

import json
import subprocess
from typing import Any

import pytest

from orchestrator.qemu.capabilities import Capabilities, from_schema

CBW = ("file", "target", "bitmap", "on-cbw-error", "cbw-timeout")


def schema(*, backup: tuple[str, ...], drivers: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Shaped as query-qmp-schema's reply; types have numbers for names, and come in any order."""
    types = {driver: str(number) for number, driver in enumerate(drivers, start=100)}
    return [
        {"name": "blockdev-add", "meta-type": "command", "arg-type": "7", "ret-type": "0"},
        *[object_type(types[driver], members) for driver, members in drivers.items()],
        object_type("7", ("driver", "node-name"), [{"case": one, "type": types[one]} for one in drivers]),
        object_type("3", ("device", "target", *backup)) if "x-perf" not in backup else job_type("3", backup),
        object_type("9", ("max-workers", "min-cluster-size")),
        {"name": "blockdev-backup", "meta-type": "command", "arg-type": "3", "ret-type": "0"},
        {"name": "stop", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "0", "meta-type": "object", "members": []},
    ]


def object_type(
    name: str, members: tuple[str, ...], variants: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    found = {"name": name, "meta-type": "object", "members": [{"name": one, "type": "str"} for one in members]}
    return found | ({"tag": "driver", "variants": variants} if variants else {})


def job_type(name: str, members: tuple[str, ...]) -> dict[str, Any]:
    made = object_type(name, members)
    made["members"] = [one | {"type": "9"} if one["name"] == "x-perf" else one for one in made["members"]]
    return made


@pytest.mark.parametrize(
    ("backup", "drivers", "wanted"),
    [
        (("discard-source",), {"copy-before-write": CBW, "snapshot-access": ()}, (True, True, True, False)),
        ((), {"copy-before-write": CBW, "snapshot-access": ()}, (True, True, False, False)),
        ((), {"copy-before-write": CBW[:3], "snapshot-access": ()}, (False, True, False, False)),
        ((), {"copy-before-write": (*CBW[:3], "on-cbw-error")}, (False, False, False, False)),
        ((), {"copy-before-write": (*CBW[:3], "cbw-timeout")}, (False, False, False, False)),
        (("discard-source",), {"qcow2": CBW}, (False, False, True, False)),
        (
            ("discard-source", "x-perf"),
            {"copy-before-write": CBW, "snapshot-access": ()},
            (True, True, True, True),
        ),
        (("on-cbw-error",), {"copy-before-write": ("discard-source",)}, (False, False, False, False)),
    ],
)
def test_features_are_found_where_they_count(
    backup: tuple[str, ...], drivers: dict[str, tuple[str, ...]], wanted: tuple[bool, ...]
) -> None:
    assert from_schema(schema(backup=backup, drivers=drivers)) == Capabilities(*wanted)


def test_the_real_qemu_has_what_we_need() -> None:
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    said = [{"execute": name} for name in ("qmp_capabilities", "query-qmp-schema", "quit")]
    spoken = subprocess.run(
        argv, input="\n".join(map(json.dumps, said)), capture_output=True, text=True, check=True, timeout=60
    )
    replies = [json.loads(line) for line in spoken.stdout.splitlines()]
    (real,) = (reply["return"] for reply in replies if isinstance(reply.get("return"), list))
    found = from_schema(real)
    assert found.break_snapshot
    assert found.snapshot_access
    # Where block jobs can discard their source, the schema says so somewhere; where not, nowhere.
    assert found.discard_source is ("discard-source" in spoken.stdout)
    assert found.job_cluster_size is ("min-cluster-size" in spoken.stdout)
