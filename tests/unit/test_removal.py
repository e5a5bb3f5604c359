"""What goes into QEMU's graph and out of it: a wrong order kills the guest, so the order is checked in words."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fleecing.graph import Filter, insertion, nodes_below, preparation, removal
from orchestrator.fleecing.names import DISMANTLING, FLEECING, DiskNames, role_of, run_of, run_prefix
from orchestrator.model import Disk
from orchestrator.qemu.commands import CLUSTER_BYTES, Command
from orchestrator.run.backup import new_run_id

RUN = "0a1b2c3d"
PREFIX = run_prefix(RUN)


def disk(name: str) -> Disk:
    return Disk(name, f"drive-{name}", f"/machine/peripheral/{name}", 1 << 30, "qcow2", f"/{name}.qcow2")


def names(number: int = 0) -> DiskNames:
    return DiskNames(RUN, number)


def words(commands: list[Command]) -> list[str]:
    """A command and what it is about, without the prefix."""
    found = []
    for command in commands:
        said = command.arguments
        match command.name:
            case "qom-set":
                about = f"{said['path'].rpartition('/')[2]} on {said['value']}"
            case "blockdev-reopen":
                (options,) = said["options"]
                about = f"{options['node-name']} on {options['file']}"
            case "transaction":
                steps = [(action["type"].rpartition("-")[2], action["data"]) for action in said["actions"]]
                about = ", ".join(f"{verb} {on['node']} {on.get('name') or on['target']}" for verb, on in steps)
            case _:
                about = said["node-name"]
        found.append(f"{command.name} {about}".replace(PREFIX, ""))
    return found


OLD, NEW = "old", "new"


def fleeced(number: int, name: str, old_bitmap: str | None = None) -> Filter:
    return Filter(disk(name), names(number), names(number).image, NEW, CLUSTER_BYTES, old_bitmap)


def test_filters_go_in_before_devices_are_put_on_them_and_snapshots_last() -> None:
    filters = [fleeced(0, "vda"), fleeced(1, "vdb")]
    assert words(insertion(filters, cbw_timeout_seconds=7)) == [
        "transaction add drive-vda new, add drive-vdb new",
        "blockdev-add 0-cbw",
        "blockdev-add 1-cbw",
        "qom-set vda on 0-cbw",
        "qom-set vdb on 1-cbw",
        "blockdev-add 0-snap",
        "blockdev-add 1-snap",
    ]


def test_devices_are_put_on_gates_before_any_filter_is_there() -> None:
    filters = [fleeced(0, "vda"), fleeced(1, "vdb")]
    commands = preparation(filters, cbw_timeout_seconds=7)
    assert words(commands) == [
        "transaction add drive-vda new, add drive-vdb new",
        "blockdev-add 0-gate",
        "blockdev-add 1-gate",
        "qom-set vda on 0-gate",
        "qom-set vdb on 1-gate",
        "blockdev-add 0-cbw",
        "blockdev-add 1-cbw",
    ]
    assert commands[1].arguments == {"driver": "raw", "node-name": names(0).gate, "file": "drive-vda"}
    assert commands[5:] == insertion(filters, cbw_timeout_seconds=7)[1:3]


def test_an_incremental_ends_the_old_bitmap_while_the_guest_is_paused_and_copies_only_what_is_in_it() -> None:
    commands = insertion([fleeced(0, "vda", OLD), fleeced(1, "vdb")], cbw_timeout_seconds=7)
    assert words(commands) == [
        "transaction add drive-vda new, add drive-vdb new, disable drive-vda old",
        "blockdev-add 0-cbw",
        "blockdev-add 1-cbw",
        "qom-set vda on 0-cbw",
        "qom-set vdb on 1-cbw",
        "blockdev-add 0-snap",
        "blockdev-add 1-snap",
        "transaction add 0-snap changed, merge 0-snap changed",
    ]
    assert commands[1].arguments["bitmap"] == {"node": "drive-vda", "name": OLD}
    assert "bitmap" not in commands[2].arguments


def test_a_guest_that_runs_keeps_its_old_bitmap_until_the_filters_are_in() -> None:
    commands = preparation([fleeced(0, "vda", OLD)], cbw_timeout_seconds=7)
    assert words(commands)[0] == "transaction add drive-vda new"
    assert not any("disable" in word for word in words(commands))
    assert "bitmap" not in commands[-1].arguments


def test_a_filter_breaks_the_backup_never_the_guest() -> None:
    _, cbw, drive, snapshot = insertion([fleeced(3, "vda")], cbw_timeout_seconds=7)
    assert cbw.arguments == {
        "driver": "copy-before-write",
        "node-name": f"vmf-{RUN}-3-cbw",
        "file": "drive-vda",
        "target": f"vmf-{RUN}-3-img",
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": 7,
    }
    assert drive.arguments == {
        "path": "/machine/peripheral/vda",
        "property": "drive",
        "value": f"vmf-{RUN}-3-cbw",
    }
    assert snapshot.arguments == {
        "driver": "snapshot-access",
        "node-name": f"vmf-{RUN}-3-snap",
        "file": f"vmf-{RUN}-3-cbw",
        "discard": "unmap",
    }


def test_old_data_goes_to_the_target_without_fleecing() -> None:
    unfleeced = Filter(disk("vda"), names(), names().target, NEW, CLUSTER_BYTES)
    (_, cbw, *_) = insertion([unfleeced], cbw_timeout_seconds=1)
    assert cbw.arguments["target"] == names().target


# --- taking out ---


def block_entry(qdev: str, node: str) -> dict[str, Any]:
    image = {"virtual-size": 1 << 30, "filename": "/x"}
    return {
        "device": "",
        "qdev": qdev,
        "removable": False,
        "inserted": {"node-name": node, "drv": "copy-before-write", "ro": False, "image": image},
    }


def graph_of(*edges: tuple[str, str, str]) -> dict[str, Any]:
    """x-debug-query-block-graph's reply, with edges (parent, edge's name, child)."""
    all_names = sorted({name for parent, _, child in edges for name in (parent, child)})
    ids = {name: number for number, name in enumerate(all_names, start=1)}
    return {
        "nodes": [{"id": number, "type": "block-driver", "name": name} for name, number in ids.items()],
        "edges": [
            {"parent": ids[parent], "child": ids[child], "name": name, "perm": [], "shared-perm": []}
            for parent, name, child in edges
        ],
    }


def our_nodes(number: int, *roles: str) -> list[dict[str, Any]]:
    return [{"node-name": names(number).prefix + role} for role in reversed(roles or DISMANTLING)]


FOREIGN = [{"node-name": name} for name in ("drive-vda", "#block123", "vmf-ffffffff-0-cbw", "vmfx")]
OPEN = graph_of(
    (names(0).gate, "file", "drive-vda"),
    (names(0).cbw, "file", "drive-vda"),
    (names(0).cbw, "target", names(0).image),
    (names(1).gate, "file", "#block7"),
    (names(1).cbw, "file", "#block7"),
    ("drive-vda", "file", "#block1"),
)
"""The gates let everything through to the disks."""
FILTERING = graph_of(
    ("/machine/peripheral/vda/virtio-backend", "root", names(0).gate),
    (names(0).gate, "file", names(0).cbw),
    (names(0).cbw, "file", "drive-vda"),
    (names(0).cbw, "target", names(0).image),
    (names(1).gate, "file", names(1).cbw),
    (names(1).cbw, "file", "#block7"),
    ("drive-vda", "file", "#block1"),
)
"""The gates lead to the filters: the point in time is taken."""


def taken_out(
    nodes: list[dict[str, Any]],
    block: list[dict[str, Any]],
    roles: tuple[str, ...] = DISMANTLING,
    graph: dict[str, Any] = FILTERING,
) -> list[str]:
    return words(removal(PREFIX, roles=roles, nodes=nodes, block=block, graph=graph))


REST = [f"blockdev-del 0-{role}" for role in ("img", "grant", "file", "wto", "target", "tfile")]


def test_everything_of_a_disk_goes_parents_first() -> None:
    block = [block_entry("/machine/peripheral/vda/virtio-backend", names().gate)]
    assert taken_out(our_nodes(0) + FOREIGN, block) == [
        "blockdev-del 0-wfrom",
        "blockdev-del 0-snap",
        "blockdev-reopen 0-gate on drive-vda",
        "qom-set vda on drive-vda",
        "blockdev-del 0-gate",
        "blockdev-del 0-cbw",
        *REST,
    ]


def test_a_gate_that_leads_to_the_disk_just_goes() -> None:
    block = [block_entry("/machine/peripheral/vda/virtio-backend", names().gate)]
    assert taken_out(our_nodes(0), block, graph=OPEN) == [
        "blockdev-del 0-wfrom",
        "blockdev-del 0-snap",
        "qom-set vda on drive-vda",
        "blockdev-del 0-gate",
        "blockdev-del 0-cbw",
        *REST,
    ]


def test_without_gates_the_device_comes_off_the_filter() -> None:
    block = [block_entry("/machine/peripheral/vda/virtio-backend", names().cbw)]
    left = our_nodes(0, *(role for role in DISMANTLING if role != "gate"))
    assert taken_out(left, block) == [
        "blockdev-del 0-wfrom",
        "blockdev-del 0-snap",
        "qom-set vda on drive-vda",
        "blockdev-del 0-cbw",
        *REST,
    ]


def test_only_the_asked_roles_go() -> None:
    out = taken_out(our_nodes(0), [], FLEECING, OPEN)
    assert out == [f"blockdev-del 0-{role}" for role in ("wfrom", "snap", "gate", "cbw", "img", "grant", "file")]


@pytest.mark.parametrize("role", ["gate", "cbw"])
def test_each_device_gets_the_node_below_its_own_filter(role: str) -> None:
    block = [
        block_entry("/machine/peripheral/vda/virtio-backend", names(0).prefix + role),
        block_entry("vdb", names(1).prefix + role),
        block_entry("vdc", "drive-vdc"),
    ]
    out = taken_out(our_nodes(1, role) + our_nodes(0, role), block, graph=OPEN)
    assert sorted(out) == [
        f"blockdev-del 0-{role}",
        f"blockdev-del 1-{role}",
        "qom-set vda on drive-vda",
        "qom-set vdb on #block7",
    ]
    for number, device in ((0, "vda on drive-vda"), (1, "vdb on #block7")):
        assert out.index(f"qom-set {device}") < out.index(f"blockdev-del {number}-{role}")


@pytest.mark.parametrize("nodes", [[], FOREIGN, [{"node-name": f"vmf-{RUN}0-0-cbw"}]])
def test_what_is_not_of_this_run_stays(nodes: list[dict[str, Any]]) -> None:
    assert taken_out(nodes, [block_entry("vda", "drive-vda")]) == []


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(DISMANTLING)), unique=True).flatmap(st.permutations),
    st.sampled_from(["gate", "cbw", "drive"]),
)
def test_whatever_is_left_in_whatever_order_parents_go_first(left: list[tuple[int, str]], under: str) -> None:
    nodes = [{"node-name": names(number).prefix + role} for number, role in left]
    both = {number for number in (0, 1) if {(number, "gate"), (number, "cbw")} <= set(left)}
    graph = FILTERING if both == {0, 1} else OPEN
    block = [block_entry(f"vd{number}", names(number).prefix + under) for number in (0, 1)]
    out = taken_out(nodes, block, graph=graph)
    deleted = [one.removeprefix("blockdev-del ") for one in out if one.startswith("blockdev-del")]
    assert sorted(deleted) == sorted(f"{number}-{role}" for number, role in left)
    ranks = [DISMANTLING.index(role_of(node)) for node in deleted]
    assert ranks == sorted(ranks)
    assert [one for one in out if one.startswith("qom-set")] == [
        f"qom-set vd{number} on {('drive-vda', '#block7')[number]}"
        for node in deleted
        for number in (int(node[0]),)
        if role_of(node) == under
    ]


def test_nodes_below_follows_file_edges_only() -> None:
    assert nodes_below(FILTERING) == {
        names(0).gate: names(0).cbw,
        names(0).cbw: "drive-vda",
        names(1).gate: names(1).cbw,
        names(1).cbw: "#block7",
        "drive-vda": "#block1",
    }


# --- names ---


@given(st.integers(0, 999))
def test_names_fit_qemu_and_tell_what_they_are(number: int) -> None:
    run = new_run_id()
    one = DiskNames(run, number)
    nodes = [one.source_window, one.snapshot, one.gate, one.cbw, one.image, one.grant, one.file]
    nodes += [one.target_window, one.target, one.target_file]
    assert [role_of(node) for node in nodes] == list(DISMANTLING)
    others = [one.job, one.window_job(0), one.window_job(1), one.export, one.server]
    assert len({*nodes, *others}) == len(nodes) + len(others)
    for name in (*nodes, *others):
        assert len(name) <= 31
        assert name.startswith(run_prefix(run))
        assert name.startswith(one.prefix)
        assert run_of(name) == run


def test_one_disks_prefix_is_never_another_ones() -> None:
    assert not names(10).cbw.startswith(names(1).prefix)
    assert not run_prefix("ab12").startswith(run_prefix("ab1"))
