"""A QEMU without QEMU: what it holds, what it says, and what would kill it.

It carries out the commands that a run uses on disks with real content: a guest's write goes through the filter
that its device is on, and a block job copies the point in time. The laws of what crashes or hangs a real QEMU
are enforced: a command that breaks one is recorded in `deaths`, and each test ends by asserting that there are
none. Also recorded is whatever touches what is not ours.

`FakeMonitor` (fake_monitor.py) is the way in; tests control QEMU and its guest by the methods without underscore.
"""

import asyncio
import copy
import itertools
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.errors import CommandFailed
from orchestrator.qemu.commands import PREFIX, Command
from orchestrator.qemu.monitor import Event
from tests.component.fake_blocks import CLUSTER, Bitmap, Device, Fdset, Job, Node, clusters, write_out

if TYPE_CHECKING:
    from tests.component.fake_monitor import FakeMonitor

NAME_LENGTH = 31
FILTERS = ("copy-before-write", "snapshot-access")


class QemuWouldDie(AssertionError):
    """The command, in this state, would have ended a real QEMU, or hurt its guest."""


class FakeQemu:
    """One guest's QEMU. `disks` is the content of its disks, by device id."""

    def __init__(
        self, disks: Mapping[str, bytes], *, discard_source: bool = True, running: bool = True, image: str = ""
    ) -> None:
        self.discard_source = discard_source
        self.status = "running" if running else "paused"
        self.migration = ""
        self.alive = True
        self.accepts = True
        self.silent = False
        self.monitors: list[FakeMonitor] = []
        self.backlog: list[tuple[list[Command], FakeMonitor, asyncio.Future[list[Any]] | None]] = []
        self.executed: list[Command] = []
        self.deaths: list[str] = []
        self.nodes: dict[str, Node] = {}
        self.devices: dict[str, Device] = {}
        self.jobs: dict[str, Job] = {}
        self.fdsets: dict[int, Fdset] = {}
        self.lent: dict[str, int] = {}
        # How jobs go: by themselves, `pace` clusters a turn of the loop, or by `step` only.
        self.automatic = True
        self.pace = 16
        self.during_copy: Callable[[Job], None] = lambda _job: None
        self.before: Callable[[Command], None] = lambda _command: None
        self.target_error: str | None = None
        self.flush_error: str | None = None
        self.writes = 0
        self.write_ns = 1_000_000
        """What each write takes, by the device's counters; the real time is another one."""
        self.moments: dict[str, tuple[int, bytes]] = {}
        """By disk: how many writes there had been, and its content, when it got its filter last."""
        self._numbers = itertools.count(1)
        for disk, content in disks.items():
            self.add_disk(disk, content, image=image)

    # What tests do to it -------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.status == "running"

    def add_disk(
        self, disk: str, content: bytes, *, image: str = "", read_only: bool = False, removable: bool = False
    ) -> None:
        """Plug a disk in."""
        name = f"#block{next(self._numbers)}"
        self.nodes[name + "f"] = Node(name + "f", "file", {}, image=image)
        self.nodes[name] = Node(
            name,
            "qcow2",
            {},
            {"file": name + "f"},
            content=bytearray(content),
            image=image,
            size=len(content),
            read_only=read_only,
        )
        self.devices[disk] = Device(disk, name, name, removable=removable)

    def grow(self, disk: str, size: int) -> None:
        """Make a disk larger, as block_resize does."""
        node = self.nodes[self.devices[disk].own_node]
        assert node.content is not None
        node.content.extend(bytes(size - node.size))
        node.size = size

    def content(self, disk: str) -> bytes:
        """What the guest would read now."""
        return bytes(self._base(self.devices[disk].own_node).content or b"")

    def guest_writes(self, disk: str, offset: int, data: bytes) -> None:
        """Let the guest write through whatever its device is on."""
        assert self.running, "a paused guest does not write"
        device = self.devices[disk]
        base = self._base(device.node)
        assert base.content is not None
        filtered = self._filter_under(device.node)
        if filtered is not None:
            for at in clusters(offset, len(data)):
                self._copy_before_write(filtered, at, bytes(base.content[at * CLUSTER : (at + 1) * CLUSTER]))
        self.writes += 1
        device.writes += 1
        device.write_ns += self.write_ns
        for bitmap in base.bitmaps.values():
            if bitmap.recording:
                bitmap.dirty.update(clusters(offset, len(data)))
        base.content[offset : offset + len(data)] = data

    def break_snapshot(self, disk: str) -> None:
        """Break the disk's snapshot, as a copy that took longer than cbw-timeout does."""
        filtered = self._filter_under(self.devices[disk].node)
        assert filtered is not None
        filtered.broken = True

    def user(self, name: str, **arguments: object) -> Any:
        """Have somebody else, on a monitor of their own, execute a command (`pause`: a stop that goes well)."""
        return getattr(self, "_" + name.replace("-", "_"))(arguments)

    def start_foreign_job(self, name: str) -> None:
        """Have somebody else start a job."""
        self.jobs[name] = Job(name, "", "", total=1, type="mirror", status="running")

    def kill(self) -> None:
        """End the process: everything in it is gone, and the descriptors that it held."""
        self.alive = False
        for node in self.nodes.values():
            self._close(node)
        for fdset in self.fdsets.values():
            os.close(fdset.descriptor)
        for descriptor in self.lent.values():
            os.close(descriptor)
        self.nodes, self.jobs, self.fdsets, self.devices, self.lent = {}, {}, {}, {}, {}
        self.cut()

    def cut(self) -> None:
        """End the connections; QEMU drops the commands that it has not begun with."""
        self.backlog.clear()
        for monitor in list(self.monitors):
            monitor.lose()

    def speak(self) -> None:
        """Answer again after having been `silent`."""
        self.silent = False
        self.catch_up()

    def catch_up(self) -> None:
        """Carry out what has arrived while it did not look."""
        while self.backlog:
            commands, monitor, waiter = self.backlog.pop(0)
            replies = [self.carry_out(command, monitor) for command in commands]
            if waiter is not None and not waiter.done():
                waiter.set_result(replies)

    def step(self, job: str) -> None:
        """Have a job copy one cluster."""
        self._copy(self.jobs[job], 1)

    def ours(self) -> list[str]:
        """Everything of vmfleece's that is in it, in words."""
        found = [f"node {name}" for name in self.nodes if name.startswith(PREFIX)]
        found += [f"job {name}" for name in self.jobs if name.startswith(PREFIX)]
        found += [f"fdset {fdset.opaque}" for fdset in self.fdsets.values()]
        found += [f"descriptor {name}" for name in self.lent]
        found += [f"{one.id} is on {one.node}" for one in self.devices.values() if one.node != one.own_node]
        return found

    # Commands ------------------------------------------------------------------------------------------------

    def carry_out(self, command: Command, monitor: "FakeMonitor") -> Any:
        """Execute one command: its reply, or the CommandFailed that says why not."""
        self.before(command)
        self.executed.append(command)
        try:
            if command.name in ("add-fd", "getfd"):
                taking = self._add_fd if command.name == "add-fd" else self._getfd
                return taking(command.arguments, monitor)
            return getattr(self, "_" + command.name.replace("-", "_"))(command.arguments)
        except CommandFailed as refusal:
            return refusal
        except QemuWouldDie as death:
            self.deaths.append(f"{command.name} {dict(command.arguments)}: {death}")
            raise

    def emit(self, name: str, **data: object) -> None:
        """Send an event to whoever listens."""
        event = Event(name, data, time.time())
        for monitor in list(self.monitors):
            monitor.receive(event)

    def _query_status(self, _arguments: Any) -> Any:
        return {"status": self.status, "running": self.running}

    def _query_version(self, _arguments: Any) -> Any:
        return {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "fake"}

    def _query_migrate(self, _arguments: Any) -> Any:
        return {"status": self.migration} if self.migration else {}

    def _query_qmp_schema(self, _arguments: Any) -> Any:
        filter_members = ["file", "target", "bitmap", "on-cbw-error", "cbw-timeout"]
        backup = ["job-id", "device", "target", "sync", "speed", "auto-dismiss", "on-target-error", "compress"]
        backup += ["discard-source"] * self.discard_source
        return [
            {"name": "blockdev-backup", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
            {"name": "1", "meta-type": "object", "members": [{"name": name, "type": "str"} for name in backup]},
            {"name": "blockdev-add", "meta-type": "command", "arg-type": "2", "ret-type": "0"},
            {
                "name": "2",
                "meta-type": "object",
                "tag": "driver",
                "members": [{"name": "driver", "type": "9"}],
                "variants": [
                    {"case": "copy-before-write", "type": "3"},
                    {"case": "snapshot-access", "type": "4"},
                ],
            },
            {"name": "3", "meta-type": "object", "members": [{"name": name} for name in filter_members]},
            {"name": "4", "meta-type": "object", "members": [{"name": "file"}]},
        ]

    def _query_block(self, _arguments: Any) -> Any:
        return [
            {
                "device": "",
                "qdev": device.qdev,
                "removable": device.removable,
                "inserted": self._described(self.nodes[device.node]),
            }
            for device in self.devices.values()
        ]

    def _query_named_block_nodes(self, _arguments: Any) -> Any:
        return [self._described(node) for node in self.nodes.values()]

    def _described(self, node: Node) -> dict[str, Any]:
        base = self._base(node.name)
        return {
            "node-name": node.name,
            "drv": node.driver,
            "ro": node.read_only,
            "write_threshold": node.threshold,
            "image": {"virtual-size": base.size, "filename": base.image},
            "dirty-bitmaps": [
                {
                    "name": name,
                    "granularity": bitmap.granularity,
                    "count": len(bitmap.dirty) * CLUSTER,
                    "recording": bitmap.recording,
                    "persistent": bitmap.persistent,
                    "busy": bitmap.busy,
                    **({"inconsistent": True} if bitmap.inconsistent else {}),
                }
                for name, bitmap in node.bitmaps.items()
            ],
        }

    def _query_blockstats(self, arguments: Any) -> Any:
        if not arguments.get("query-nodes"):
            return [
                {
                    "qdev": device.qdev,
                    "stats": {
                        "wr_operations": device.writes,
                        "failed_wr_operations": 0,
                        "wr_total_time_ns": device.write_ns,
                    },
                }
                for device in self.devices.values()
            ]
        return [
            {"node-name": node.name, "stats": {"wr_highest_offset": node.high_water}}
            for node in self.nodes.values()
        ]

    def _x_debug_query_block_graph(self, _arguments: Any) -> Any:
        numbers = {name: number for number, name in enumerate(self.nodes)}
        nodes = [{"id": number, "type": "block-driver", "name": name} for name, number in numbers.items()]
        edges = [
            {"parent": numbers[node.name], "child": numbers[child], "name": role, "perm": [], "shared-perm": []}
            for node in self.nodes.values()
            for role, child in node.children.items()
        ]
        for device in self.devices.values():  # a guest device is a parent, too
            nodes.append({"id": len(nodes), "type": "block-backend", "name": device.qdev})
            child = numbers[device.node]
            edges.append({"parent": nodes[-1]["id"], "child": child, "name": "root", "perm": []})
        return {"nodes": nodes, "edges": edges}

    def _query_fdsets(self, _arguments: Any) -> Any:
        return [
            {"fdset-id": number, "fds": [{"fd": fdset.descriptor, "opaque": fdset.opaque}]}
            for number, fdset in self.fdsets.items()
        ]

    def _stop(self, _arguments: Any) -> Any:
        if self.running and self.discard_source and self.devices:
            raise QemuWouldDie("a stop can lose an interrupt, and the guest's disk hangs")
        return self._pause({})

    def _pause(self, _arguments: Any) -> Any:
        if self.running:
            self.status = "paused"
            self.emit("STOP")
        return {}

    def _cont(self, _arguments: Any) -> Any:
        if not self.running:
            self.status = "running"
            self.emit("RESUME")
        return {}

    def _qom_get(self, arguments: Any) -> Any:
        device = next((one for one in self.devices.values() if one.path == arguments["path"]), None)
        if device is None or arguments["property"] != "type":
            raise CommandFailed("qom-get", f"Property '{arguments['property']}' not found")
        return "virtio-blk-pci"

    def _qom_set(self, arguments: Any) -> Any:
        device = next((one for one in self.devices.values() if one.path == arguments["path"]), None)
        if device is None:
            raise CommandFailed("qom-set", f"Device '{arguments['path']}' not found")
        node = self._node("qom-set", arguments["value"])
        old = self.nodes[device.node]
        if self.running and not self.discard_source:
            raise QemuWouldDie("a device changes its node while the guest runs")
        if self.running and self._filter_under(node.name) is not None:
            raise QemuWouldDie("disks get their filters one by one: that is no point in time")
        if not (node.name.startswith(PREFIX) or old.name.startswith(PREFIX)):
            raise QemuWouldDie("a device is moved from and to somebody else's node")
        self._check_way_back("qom-set", old.name, node.name)
        device.node = node.name
        self._note_moments()
        return {}

    def _check_way_back(self, command: str, old: str, new: str) -> None:
        filtered = self._filter_under(old)
        if filtered is None or filtered is self._filter_under(new):
            return
        if any(one.driver == "snapshot-access" for one in self._parents(filtered.name)):
            raise CommandFailed(command, f"Permission conflict on node '{new}'")

    def _note_moments(self) -> None:
        """Remember the point in time of each disk whose filter begins to work."""
        for device in self.devices.values():
            filtered = self._filter_under(device.node)
            if filtered is not None and not filtered.used:
                filtered.used = True
                self.moments[device.id] = (self.writes, self.content(device.id))

    def _blockdev_add(self, arguments: Any) -> Any:
        self._check_quiet()
        name, driver = arguments["node-name"], arguments["driver"]
        if len(name) > NAME_LENGTH:
            raise CommandFailed("blockdev-add", "Invalid node-name")
        if name in self.nodes:
            raise CommandFailed("blockdev-add", f"Duplicate nodes with node-name='{name}'")
        if driver in FILTERS and self.running and not self.discard_source:
            raise QemuWouldDie(f"a {driver} node is added while the guest runs")
        children = {role: arguments[role] for role in ("file", "target") if role in arguments}
        for child in children.values():
            node = self._node("blockdev-add", child)
            if node.driver == "snapshot-access" and (self._jobs_on(child) or self._parents(child)):
                raise QemuWouldDie("a second parent on a snapshot-access node")
        if driver == "copy-before-write" and arguments.get("on-cbw-error") != "break-snapshot":
            raise QemuWouldDie("a failing copy would give the guest an I/O error")
        node = Node(name, driver, dict(arguments), children)
        if "bitmap" in arguments:
            node.access = set(self._bitmap("blockdev-add", **arguments["bitmap"]).dirty)
        if driver == "file":
            number = int(arguments["filename"].removeprefix("/dev/fdset/"))
            if number not in self.fdsets:
                raise CommandFailed("blockdev-add", f"Failed to find fdset /dev/fdset/{number}")
            node.descriptor = os.dup(self.fdsets[number].descriptor)
        self.nodes[name] = node
        return {}

    def _blockdev_del(self, arguments: Any) -> Any:
        self._check_quiet()
        node = self._node("blockdev-del", arguments["node-name"])
        if not node.name.startswith(PREFIX):
            raise QemuWouldDie("somebody else's node is deleted")
        used = [one.name for one in self._parents(node.name)]
        used += [one.id for one in self.devices.values() if one.node == node.name]
        used += [job.id for job in self._jobs_on(node.name)]
        if used:
            raise CommandFailed("blockdev-del", f"Node {node.name} is in use by {used}")
        if node.driver in FILTERS and self.running and not self.discard_source:
            raise QemuWouldDie(f"a {node.driver} node is deleted while the guest runs")
        if node.size and "file" in node.children and not self.flush_error:
            self._write_out(node)  # errors of this are heard by nobody
        del self.nodes[node.name]
        self._close(node)
        return {}

    def _blockdev_reopen(self, arguments: Any) -> Any:
        self._check_quiet()
        changes = [(self._reopened(options), options) for options in arguments["options"]]
        for node, options in changes:
            if self._is_target(node):
                self._write_out(node)
            node.options = dict(options)
            node.children["file"] = options["file"]
        self._note_moments()
        return {}

    def _reopened(self, options: Any) -> Node:
        """The node to be reopened. Raises CommandFailed if QEMU would not."""
        node = self._node("blockdev-reopen", options["node-name"])
        self._node("blockdev-reopen", options["file"])
        is_gate = node.driver == "raw" and "size" not in node.options
        moved = options["file"] != node.children.get("file")
        if options["driver"] != node.driver or (moved and not is_gate):
            raise CommandFailed("blockdev-reopen", "Cannot change the option 'driver' or 'file'")
        if node.driver == "raw" and not self.discard_source:
            raise QemuWouldDie("a node is changed on a QEMU that does not survive it")
        if is_gate:
            self._check_way_back("blockdev-reopen", node.name, options["file"])
        if self._is_target(node) and self.flush_error:
            raise CommandFailed("blockdev-reopen", f"Could not flush: {self.flush_error}")
        return node

    def _is_target(self, node: Node) -> bool:
        """Whether it is an image on the target; a fleecing image is on a node that limits it."""
        return node.driver == "qcow2" and self.nodes[node.children["file"]].descriptor is not None

    def _block_set_write_threshold(self, arguments: Any) -> Any:
        node = self._node("block-set-write-threshold", arguments["node-name"])
        node.threshold = arguments["write-threshold"]
        return {}

    def _add_fd(self, arguments: Any, monitor: "FakeMonitor") -> Any:
        descriptor = monitor.take_descriptor()
        if descriptor is None:
            raise CommandFailed("add-fd", "No file descriptor supplied via SCM_RIGHTS")
        number = next(self._numbers)
        self.fdsets[number] = Fdset(arguments["opaque"], descriptor)
        return {"fdset-id": number, "fd": descriptor}

    def _getfd(self, arguments: Any, monitor: "FakeMonitor") -> Any:
        descriptor = monitor.take_descriptor()
        if descriptor is None:
            raise CommandFailed("getfd", "No file descriptor supplied via SCM_RIGHTS")
        if arguments["fdname"] in self.lent:
            self._closefd(arguments)
        self.lent[arguments["fdname"]] = descriptor
        return {}

    def _closefd(self, arguments: Any) -> Any:
        if arguments["fdname"] not in self.lent:
            raise CommandFailed("closefd", f"File descriptor named '{arguments['fdname']}' not found")
        os.close(self.lent.pop(arguments["fdname"]))
        return {}

    def _nbd_server_start(self, _arguments: Any) -> Any:
        raise CommandFailed("nbd-server-start", "NBD server already running")

    def _block_export_add(self, _arguments: Any) -> Any:
        raise CommandFailed("block-export-add", "NBD server not running")

    def _nbd_server_stop(self, _arguments: Any) -> Any:
        raise QemuWouldDie("somebody else's NBD server is stopped")

    def _query_block_exports(self, _arguments: Any) -> Any:
        return [{"id": "theirs", "type": "nbd", "node-name": "#block1", "shutting-down": False}]

    def _remove_fd(self, arguments: Any) -> Any:
        fdset = self.fdsets.get(arguments["fdset-id"])
        if fdset is None:
            description = f"File descriptor named 'fdset-id:{arguments['fdset-id']}' not found"
            raise CommandFailed("remove-fd", description)
        if not fdset.opaque.startswith(PREFIX):
            raise QemuWouldDie("somebody else's descriptors are removed")
        del self.fdsets[arguments["fdset-id"]]
        os.close(fdset.descriptor)
        return {}

    # Jobs ----------------------------------------------------------------------------------------------------

    def _query_jobs(self, _arguments: Any) -> Any:
        return [
            {
                "id": job.id,
                "type": job.type,
                "status": job.status,
                "current-progress": job.current,
                "total-progress": job.total,
                **({"error": job.error} if job.error else {}),
            }
            for job in self.jobs.values()
        ]

    def _query_block_jobs(self, _arguments: Any) -> Any:
        return [
            {
                "device": job.id,
                "type": job.type,
                "status": job.status,
                "io-status": job.io_status,
                "offset": job.current,
                "len": job.total,
                "speed": job.speed,
                "paused": job.status == "paused",
            }
            for job in self.jobs.values()
        ]

    def _transaction(self, arguments: Any) -> Any:
        before = {name: copy.deepcopy(node.bitmaps) for name, node in self.nodes.items()}
        prepared = []
        try:
            for action in arguments["actions"]:
                if action["type"] == "blockdev-backup":
                    prepared.append(self._prepare_backup(action["data"]))
                else:
                    verb = action["type"].removeprefix("block-dirty-bitmap-")
                    self._change_bitmap(
                        verb, **{key.replace("-", "_"): one for key, one in action["data"].items()}
                    )
        except CommandFailed:
            for name, bitmaps in before.items():
                self.nodes[name].bitmaps = bitmaps
            raise
        self._start(prepared)
        return {}

    def _change_bitmap(
        self, verb: str, node: str, name: str = "", *, target: str = "", bitmaps: Any = (), **options: Any
    ) -> None:
        if not (name or target).startswith("vmfleece:") and not node.startswith(PREFIX):
            raise QemuWouldDie("somebody else's bitmap is touched")
        there = self._node("transaction", node).bitmaps
        if verb == "add":
            if name in there:
                raise CommandFailed("transaction", f"Bitmap already exists: {name}")
            there[name] = Bitmap(
                options["granularity"], not options.get("disabled"), options.get("persistent", False)
            )
            return
        bitmap = self._bitmap("transaction", node, name or target)
        if bitmap.busy or (bitmap.inconsistent and verb != "remove"):
            raise CommandFailed("transaction", f"Bitmap '{name or target}' is busy or inconsistent")
        if verb == "merge":
            for other in bitmaps:
                where = other if isinstance(other, dict) else {"node": node, "name": other}
                bitmap.dirty |= self._bitmap("transaction", **where).dirty
        elif verb == "remove":
            del there[name]
        else:
            bitmap.recording = verb == "enable"

    def _bitmap(self, command: str, node: str, name: str) -> Bitmap:
        bitmaps = self._node(command, node).bitmaps
        if name not in bitmaps:
            raise CommandFailed(command, f"Dirty bitmap '{name}' not found")
        return bitmaps[name]

    def _blockdev_backup(self, arguments: Any) -> Any:
        self._start([self._prepare_backup(arguments)])
        return {}

    def _start(self, prepared: list[Job]) -> None:
        for job in prepared:
            self.nodes[job.target].size = self._base(self.nodes[job.source].name).size
            self.jobs[job.id] = job
            self._change(job, "created")
            self._change(job, "running")
            self._advance_soon(job)

    def _prepare_backup(self, arguments: Any) -> Job:
        source, offset, size = self._whole("blockdev-backup", arguments["device"])
        target, *place = self._whole("blockdev-backup", arguments["target"])
        if arguments["job-id"] in self.jobs:
            raise CommandFailed("blockdev-backup", f"Job ID '{arguments['job-id']}' already in use")
        if "discard-source" in arguments and not self.discard_source:
            raise CommandFailed("blockdev-backup", "Parameter 'discard-source' is unexpected")
        if source.driver != "snapshot-access":
            raise QemuWouldDie("a job on the disk itself gives the guest the target's errors")
        parents = [one.name for one in self._parents(source.name) if one.name != arguments["device"]]
        if parents or self._jobs_on(source.name):
            raise QemuWouldDie("a second parent on a snapshot-access node")
        if arguments["device"] != source.name:
            if place != [offset, size]:
                raise QemuWouldDie("a part of the disk is copied to another place")
            if arguments.get("discard-source") or arguments.get("compress"):
                raise CommandFailed("blockdev-backup", "Compression is not supported for this drive")
        filtered = self.nodes[source.children["file"]]
        discards = bool(arguments.get("discard-source"))
        if discards and filtered.children["target"] == target.name:
            raise QemuWouldDie("discard-source would discard the backup itself")
        changed = None
        if arguments["sync"] == "bitmap":
            changed = sorted(self._bitmap("blockdev-backup", source.name, arguments["bitmap"]).dirty)
        return Job(
            arguments["job-id"],
            source.name,
            target.name,
            total=size if changed is None else len(changed) * CLUSTER,
            changed=changed,
            discards=discards,
            first=offset // CLUSTER,
            nodes=(arguments["device"], arguments["target"]),
            on_target_error=arguments["on-target-error"],
            speed=arguments["speed"],
        )

    def _check_quiet(self) -> None:
        """A change of the graph waits for all requests in flight, and the guest for it (`fleecing.quiet`)."""
        if moving := [
            job.id for job in self.jobs.values() if job.id.startswith(PREFIX) and job.status == "running"
        ]:
            raise QemuWouldDie(f"the graph is changed while {moving} have requests in flight")

    def _whole(self, command: str, name: str) -> tuple[Node, int, int]:
        """The node that a job reads or writes, and which part of it, by offset and size."""
        node = self._node(command, name)
        if node.driver == "raw" and "offset" in node.options:
            return self._node(command, node.children["file"]), node.options["offset"], node.options["size"]
        return node, 0, self._base(node.name).size

    def _human_monitor_command(self, arguments: Any) -> Any:
        self._check_quiet()
        _, name, act = arguments["command-line"].replace('"', "").split(maxsplit=2)
        if name not in self.nodes or act == "flush":
            return ""  # this way in, QEMU tells of no error
        discard, quiet, offset, size = act.split()
        assert (discard, quiet) == ("discard", "-q")
        node = self.nodes[name]
        if not name.startswith(PREFIX) or node.driver != "snapshot-access":
            raise QemuWouldDie("somebody's data is discarded")
        if self._parents(name) or self._jobs_on(name):
            raise QemuWouldDie("a snapshot-access node is discarded while a job reads it")
        filtered = self.nodes[node.children["file"]]
        whole = range(int(offset) // CLUSTER, -(-(int(offset) + int(size)) // CLUSTER))
        filtered.released.update(whole)
        for at in whole:
            self.nodes[filtered.children["target"]].store.pop(at, None)
        return ""

    def _block_job_set_speed(self, arguments: Any) -> Any:
        job = self._job("block-job-set-speed", arguments["device"])
        if job.over:
            raise CommandFailed("block-job-set-speed", f"Job '{job.id}' in state 'concluded' cannot do that")
        job.speed = arguments["speed"]
        return {}

    def _job_cancel(self, arguments: Any) -> Any:
        job = self._job("job-cancel", arguments["id"])
        if job.over:
            raise CommandFailed("job-cancel", f"Job '{job.id}' in state '{job.status}' cannot be cancelled")
        job.cancelling = True
        self._advance_soon(job)
        return {}

    def _job_pause(self, arguments: Any) -> Any:
        job = self._job("job-pause", arguments["id"])
        if job.over:
            raise CommandFailed("job-pause", f"Job '{job.id}' in state '{job.status}' cannot be paused")
        if job.pausing or job.status == "paused":
            raise CommandFailed("job-pause", "Job is already paused")
        job.pausing = True
        self._advance_soon(job)
        return {}

    def _job_resume(self, arguments: Any) -> Any:
        job = self._job("job-resume", arguments["id"])
        if not job.pausing and job.status != "paused":
            raise CommandFailed("job-resume", "Can't resume a job that was not paused")
        job.pausing = False
        if job.status == "paused":
            job.io_status = "ok"
            self._change(job, "running")
        self._advance_soon(job)
        return {}

    def _job_dismiss(self, arguments: Any) -> Any:
        job = self._job("job-dismiss", arguments["id"])
        if job.status != "concluded":
            raise CommandFailed("job-dismiss", f"Job '{job.id}' in state '{job.status}' cannot be dismissed")
        self._change(job, "null")
        del self.jobs[job.id]
        return {}

    def _job(self, command: str, name: str) -> Job:
        if name not in self.jobs:
            raise CommandFailed(command, "Job not found")
        if not name.startswith(PREFIX):
            raise QemuWouldDie("somebody else's job is touched")
        return self.jobs[name]

    def _change(self, job: Job, status: str) -> None:
        job.status = status
        self.emit("JOB_STATUS_CHANGE", id=job.id, status=status)

    def _advance_soon(self, job: Job) -> None:
        asyncio.get_running_loop().call_soon(self._advance, job)

    def _advance(self, job: Job) -> None:
        if self.jobs.get(job.id) is not job or job.over:
            return
        if job.cancelling:
            self._conclude(job, "BLOCK_JOB_CANCELLED")
        elif job.pausing and job.status == "running":
            self._change(job, "paused")
        elif self.automatic and job.status == "running":
            self._copy(job, self.pace)
            if not job.over:
                self._advance_soon(job)

    def _copy(self, job: Job, count: int) -> None:
        self.during_copy(job)
        if job.id not in self.jobs:  # QEMU was killed meanwhile
            return
        source, target = self.nodes[job.source], self.nodes[job.target]
        filtered = self.nodes[source.children["file"]]
        for _ in range(count):
            at = job.first + job.position
            if job.changed is not None and at < len(job.changed):
                at = job.changed[at]
            if job.position * CLUSTER >= job.total:
                self._change(job, "waiting")
                self._change(job, "pending")
                self._conclude(job, "BLOCK_JOB_COMPLETED")
                return
            unreadable = filtered.access is not None and at not in filtered.access
            if filtered.broken or unreadable or at in filtered.released:
                self._fail(job, "read", "Permission denied")
                return
            if self.target_error is not None:
                self._fail(job, "write", self.target_error)
                return
            target.store[at] = self._snapshot_cluster(filtered, at)
            if job.discards:
                filtered.released.add(at)
                self.nodes[filtered.children["target"]].store.pop(at, None)
            job.position += 1

    def _fail(self, job: Job, operation: str, error: str) -> None:
        stops = operation == "write" and job.on_target_error == "enospc" and error == "No space left on device"
        action = "stop" if stops else "report"
        if stops:
            job.io_status = "nospace"
            self._change(job, "paused")
        self.emit("BLOCK_JOB_ERROR", device=job.id, operation=operation, action=action)
        if not stops:
            job.error = error
            self._change(job, "aborting")
            self._conclude(job, "BLOCK_JOB_COMPLETED")

    def _conclude(self, job: Job, event: str) -> None:
        if job.cancelling:
            self._change(job, "aborting")
        error = {"error": job.error} if job.error else {}
        self.emit(event, device=job.id, type=job.type, offset=job.current, len=job.total, speed=0, **error)
        self._change(job, "concluded")

    # Nodes ---------------------------------------------------------------------------------------------------

    def _node(self, command: str, name: str) -> Node:
        if name not in self.nodes:
            raise CommandFailed(command, f"Cannot find device='' nor node-name='{name}'")
        return self.nodes[name]

    def _base(self, name: str) -> Node:
        node = self.nodes[name]
        while node.content is None and "file" in node.children:
            node = self.nodes[node.children["file"]]
        return node

    def _filter_under(self, name: str) -> Node | None:
        """The filter that a write to this node passes, if there is one."""
        node = self.nodes[name]
        while node.driver != "copy-before-write":
            if node.content is not None or "file" not in node.children:
                return None
            node = self.nodes[node.children["file"]]
        return node

    def _parents(self, name: str) -> list[Node]:
        return [node for node in self.nodes.values() if name in node.children.values()]

    def _jobs_on(self, name: str) -> list[Job]:
        return [job for job in self.jobs.values() if not job.over and name in (job.source, job.target, *job.nodes)]

    def _copy_before_write(self, filtered: Node, at: int, old: bytes) -> None:
        if filtered.broken or at in filtered.saved or at in filtered.released:
            return
        if filtered.access is not None and at not in filtered.access:
            return
        image = self.nodes[filtered.children["target"]]
        if self.target_error and self.nodes[image.children["file"]].driver == "file":
            filtered.broken = True
            return
        image.store[at] = old
        grant = self.nodes[image.children["file"]]
        if grant.driver == "raw":
            if image.image_bytes > grant.options["size"]:
                del image.store[at]
                filtered.broken = True
                return
            grant.high_water = max(grant.high_water, image.image_bytes)
            if grant.threshold and image.image_bytes > grant.threshold:
                excess = image.image_bytes - grant.threshold
                threshold, grant.threshold = grant.threshold, 0
                self.emit(
                    "BLOCK_WRITE_THRESHOLD",
                    **{"node-name": grant.name, "amount-exceeded": excess, "write-threshold": threshold},
                )
        filtered.saved.add(at)

    def _snapshot_cluster(self, filtered: Node, at: int) -> bytes:
        if at in filtered.saved:
            return self.nodes[filtered.children["target"]].store[at]
        base = self._base(filtered.name).content
        assert base is not None
        return bytes(base[at * CLUSTER : (at + 1) * CLUSTER])

    def _write_out(self, node: Node) -> None:
        descriptor = self.nodes[node.children["file"]].descriptor
        assert descriptor is not None
        write_out(descriptor, node)

    def _close(self, node: Node) -> None:
        if node.descriptor is not None:
            os.close(node.descriptor)
            node.descriptor = None
