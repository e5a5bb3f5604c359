"""The contract of a monitor, over a real QEMU and over the fake one that the runs' tests believe."""

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.errors import (
    CommandFailed,
    CommandTimeout,
    ConnectFailed,
    ConnectionLost,
    MonitorError,
    NobodyThere,
)
from orchestrator.qemu import commands
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import Monitor, raise_first
from orchestrator.qemu.qmp import SUN_PATH_BYTES
from tests.component.rigs import RIGS, QemuRig, Rig, real
from tests.component.world import open_descriptors, settled

WRONG = commands.dismiss_job("vmf-nobody")
SOON_SECONDS = 5.0


@pytest.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:  # a socket's path must be short
        async with RIGS[request.param](Path(folder)) as made:
            yield made


@pytest.fixture
async def monitor(rig: Rig) -> AsyncIterator[Monitor]:
    async with rig.connect(rig.path) as connected:
        yield connected


@pytest.fixture
async def qemu() -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:
        async with real(Path(folder)) as made:
            yield made


async def status(monitor: Monitor) -> bool:
    return bool((await monitor.execute(commands.QUERY_STATUS))["running"])


# Commands ----------------------------------------------------------------------------------------------------


async def test_a_command_is_answered(monitor: Monitor) -> None:
    assert "qemu" in await monitor.execute(commands.QUERY_VERSION)
    assert monitor.connected


async def test_a_refused_command_says_which_and_why(monitor: Monitor) -> None:
    with pytest.raises(CommandFailed, match="Job not found") as refused:
        await monitor.execute(WRONG)
    assert refused.value.command == "job-dismiss"
    assert refused.value.code == "qemu-refused"


async def test_a_pipeline_is_carried_out_in_its_order(monitor: Monitor) -> None:
    asked = [commands.QUERY_STATUS, commands.CONT, commands.QUERY_STATUS, commands.STOP, commands.QUERY_STATUS]
    replies = await monitor.pipeline(asked)
    assert [reply.get("running") for reply in replies] == [False, None, True, None, False]


async def test_pipelines_given_one_after_the_other_do_not_mix(monitor: Monitor) -> None:
    switch = [commands.CONT, commands.QUERY_STATUS, commands.STOP, commands.QUERY_STATUS]
    found = await asyncio.gather(*(monitor.pipeline(switch) for _ in range(20)))
    for replies in found:
        assert [reply.get("running") for reply in replies] == [None, True, None, False]


async def test_a_refused_command_does_not_stop_those_behind_it(monitor: Monitor) -> None:
    replies = await monitor.pipeline([commands.CONT, WRONG, commands.QUERY_STATUS])
    assert isinstance(replies[1], CommandFailed)
    assert replies[2]["running"]
    with pytest.raises(CommandFailed):
        raise_first(replies)
    raise_first([replies[0], replies[2]])


async def test_an_empty_pipeline_is_nothing(monitor: Monitor) -> None:
    assert await monitor.pipeline([]) == []


# Events ------------------------------------------------------------------------------------------------------


async def test_events_arrive_in_order_with_qemus_time(monitor: Monitor) -> None:
    with monitor.subscribe("STOP", "RESUME") as events:
        await monitor.pipeline([commands.CONT, commands.STOP] * 3)
        async with asyncio.timeout(SOON_SECONDS):
            found = [await events.next() for _ in range(6)]
    assert [event.name for event in found] == ["RESUME", "STOP"] * 3
    times = [event.timestamp for event in found]
    assert times == sorted(times)
    assert abs(times[0] - time.time()) < 60


async def test_a_stream_holds_only_the_events_that_it_names(monitor: Monitor) -> None:
    with monitor.subscribe("STOP") as stops, monitor.subscribe("STOP", "RESUME") as both:
        await monitor.pipeline([commands.CONT, commands.STOP, commands.CONT])
        async with asyncio.timeout(SOON_SECONDS):
            while len(seen := both.received()) < 3:
                await asyncio.sleep(0.01)
        assert [event.name for event in seen] == ["RESUME", "STOP", "RESUME"]
        assert [event.name for event in stops.received()] == ["STOP"]
        assert stops.received() == []


async def test_a_stream_begins_when_it_is_opened(monitor: Monitor) -> None:
    await monitor.pipeline([commands.CONT, commands.STOP])
    with monitor.subscribe("STOP", "RESUME") as events:
        await monitor.execute(commands.CONT)
        async with asyncio.timeout(SOON_SECONDS):
            assert (await events.next()).name == "RESUME"
        assert events.received() == []


async def test_waiting_for_an_event_can_be_cancelled_without_loss(monitor: Monitor) -> None:
    with monitor.subscribe("RESUME") as events:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(events.next(), 0.01)
        await monitor.execute(commands.CONT)
        async with asyncio.timeout(SOON_SECONDS):
            assert (await events.next()).name == "RESUME"


# Losing the connection ---------------------------------------------------------------------------------------


async def lose(rig: Rig, monitor: Monitor, how: str) -> None:
    if how == "killed":
        await rig.kill()
    else:
        rig.cut(monitor)


@pytest.mark.parametrize("how", ["killed", "cut"])
async def test_waiting_streams_raise_when_the_connection_is_lost(rig: Rig, monitor: Monitor, how: str) -> None:
    with monitor.subscribe("STOP") as events, monitor.subscribe("RESUME") as others:
        waiting = [asyncio.ensure_future(stream.next()) for stream in (events, others)]
        await asyncio.sleep(0)
        await lose(rig, monitor, how)
        async with asyncio.timeout(SOON_SECONDS):
            ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in ended] == [ConnectionLost, ConnectionLost]
        with pytest.raises(ConnectionLost):
            await events.next()
    assert not monitor.connected


@pytest.mark.parametrize("how", ["killed", "cut"])
async def test_what_arrived_before_the_loss_is_still_delivered(rig: Rig, monitor: Monitor, how: str) -> None:
    with monitor.subscribe("RESUME", "STOP") as events:
        await monitor.pipeline([commands.CONT, commands.STOP])
        await lose(rig, monitor, how)
        async with asyncio.timeout(SOON_SECONDS):
            assert [(await events.next()).name, (await events.next()).name] == ["RESUME", "STOP"]
            with pytest.raises(ConnectionLost):
                await events.next()


@pytest.mark.parametrize("how", ["killed", "cut"])
async def test_commands_raise_when_the_connection_is_lost(rig: Rig, monitor: Monitor, how: str) -> None:
    rig.hold()
    waiting = asyncio.ensure_future(monitor.execute(commands.QUERY_STATUS))
    await asyncio.sleep(0.05)
    await lose(rig, monitor, how)
    async with asyncio.timeout(SOON_SECONDS):
        with pytest.raises(ConnectionLost) as lost:
            await waiting
    assert lost.value.retryable
    assert "unknown" in lost.value.hint
    rig_is_gone = how == "killed"
    if not rig_is_gone:
        rig.go_on()


@pytest.mark.parametrize("how", ["killed", "cut"])
async def test_commands_after_the_loss_raise_at_once(rig: Rig, monitor: Monitor, how: str) -> None:
    await lose(rig, monitor, how)
    for _ in range(2):
        async with asyncio.timeout(SOON_SECONDS):
            with pytest.raises(ConnectionLost):
                await monitor.execute(commands.QUERY_STATUS)
    with tempfile.TemporaryFile() as file:
        async with asyncio.timeout(SOON_SECONDS):
            with pytest.raises(ConnectionLost):
                await monitor.pass_descriptor(file.fileno(), opaque="vmf-x")


async def test_reconnecting_after_a_loss(rig: Rig, monitor: Monitor) -> None:
    await monitor.execute(commands.CONT)
    rig.cut(monitor)
    with pytest.raises(ConnectionLost):
        await monitor.execute(commands.QUERY_STATUS)
    await monitor.reconnect(deadline_seconds=SOON_SECONDS)
    assert monitor.connected
    assert await status(monitor)
    with monitor.subscribe("STOP") as events:
        await monitor.execute(commands.STOP)
        async with asyncio.timeout(SOON_SECONDS):
            assert (await events.next()).name == "STOP"


async def test_streams_opened_before_a_loss_stay_ended(rig: Rig, monitor: Monitor) -> None:
    with monitor.subscribe("RESUME") as events:
        rig.cut(monitor)
        with pytest.raises(ConnectionLost):
            await events.next()
        await monitor.reconnect(deadline_seconds=SOON_SECONDS)
        with pytest.raises(ConnectionLost):
            await events.next()


async def test_streams_end_at_each_loss(rig: Rig, monitor: Monitor) -> None:
    for _ in range(3):
        with monitor.subscribe("STOP") as events:
            rig.cut(monitor)
            async with asyncio.timeout(SOON_SECONDS):
                with pytest.raises(ConnectionLost):
                    await events.next()
        await monitor.reconnect(deadline_seconds=SOON_SECONDS)
        assert await status(monitor) is False


async def test_everybody_may_reconnect_at_once(rig: Rig, monitor: Monitor) -> None:
    rig.cut(monitor)
    with pytest.raises(ConnectionLost):
        await monitor.execute(commands.QUERY_STATUS)
    await asyncio.gather(*(monitor.reconnect(deadline_seconds=SOON_SECONDS) for _ in range(5)))
    assert await status(monitor) is False


async def test_reconnecting_while_connected_changes_nothing(monitor: Monitor) -> None:
    with monitor.subscribe("RESUME") as events:
        await monitor.reconnect(deadline_seconds=SOON_SECONDS)
        await monitor.execute(commands.CONT)
        async with asyncio.timeout(SOON_SECONDS):
            assert (await events.next()).name == "RESUME"


async def test_reconnecting_to_a_qemu_that_is_gone_fails_at_once(rig: Rig, monitor: Monitor) -> None:
    await rig.kill()
    async with asyncio.timeout(SOON_SECONDS):
        with pytest.raises(NobodyThere) as gone:
            await monitor.reconnect(deadline_seconds=100 * SOON_SECONDS)
    assert gone.value.code == "vm-gone"
    assert not monitor.connected


async def test_another_process_at_the_same_socket_is_not_taken_for_the_first_one() -> None:
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:
        async with real(Path(folder)) as first, first.connect(first.path) as monitor:
            process = monitor.process
            first.cut(monitor)
            await monitor.reconnect(deadline_seconds=SOON_SECONDS)
            assert monitor.process == process
            await first.kill()
            async with real(Path(folder)) as second:
                for _ in range(2):
                    with pytest.raises(NobodyThere) as gone:
                        await monitor.reconnect(deadline_seconds=SOON_SECONDS)
                    assert gone.value.code == "vm-gone"
                    assert not monitor.connected
                async with second.connect(second.path) as another:  # nobody holds it
                    assert another.process != process


async def test_reconnecting_to_a_monitor_that_somebody_else_holds_does_not_say_that_qemu_is_gone(
    rig: Rig, monitor: Monitor
) -> None:
    rig.cut(monitor)
    async with rig.connect(rig.path):
        with pytest.raises(ConnectFailed) as failed:
            await monitor.reconnect(deadline_seconds=0.3)
    assert not isinstance(failed.value, NobodyThere)


# Silence and cancellation ------------------------------------------------------------------------------------


async def test_a_deadline_that_passes(rig: Rig, monitor: Monitor) -> None:
    rig.hold()
    try:
        with pytest.raises(CommandTimeout) as late:
            await monitor.execute(commands.CONT, deadline_seconds=0.1)
    finally:
        rig.go_on()
    assert late.value.retryable
    assert "unknown" in late.value.hint
    # It is carried out all the same, before whatever is said next.
    assert await status(monitor)


async def test_a_silent_qemu_that_answers_in_time(rig: Rig, monitor: Monitor) -> None:
    rig.hold()
    waiting = asyncio.ensure_future(monitor.pipeline([commands.CONT, commands.QUERY_STATUS]))
    await asyncio.sleep(0.1)
    rig.go_on()
    async with asyncio.timeout(SOON_SECONDS):
        assert (await waiting)[1]["running"]


async def test_a_cancelled_command_leaves_the_connection_usable(rig: Rig, monitor: Monitor) -> None:
    rig.hold()
    waiting = asyncio.ensure_future(monitor.pipeline([commands.CONT, commands.STOP, commands.CONT]))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    rig.go_on()
    assert await status(monitor)
    assert monitor.connected


@pytest.mark.parametrize("turns", range(8))
async def test_a_pipeline_is_sent_as_a_whole_or_not_at_all(monitor: Monitor, turns: int) -> None:
    """Cancelled at whichever moment: never a `stop` without its `cont`."""
    await monitor.execute(commands.CONT)
    with monitor.subscribe("STOP", "RESUME") as events:
        waiting = asyncio.ensure_future(monitor.pipeline([commands.STOP, WRONG, commands.CONT]))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await status(monitor)
        assert [event.name for event in events.received()] in ([], ["STOP", "RESUME"])


# Descriptors -------------------------------------------------------------------------------------------------


async def fdsets(monitor: Monitor) -> dict[str, int]:
    return {
        fd["opaque"]: fdset["fdset-id"]
        for fdset in await monitor.execute(commands.QUERY_FDSETS)
        for fd in fdset["fds"]
    }


async def test_descriptors_reach_qemu(monitor: Monitor) -> None:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1 << 20)
        number = await monitor.pass_descriptor(file.fileno(), opaque="vmf-x-file")
        assert await fdsets(monitor) == {"vmf-x-file": number}
    # Ours is closed; QEMU has its own.
    await monitor.execute(commands.blockdev_add(commands.file_node("vmf-x-file", number)))
    await monitor.execute(commands.remove_fd(number))
    nodes = [node["node-name"] for node in await monitor.execute(commands.QUERY_NODES)]
    assert nodes == ["vmf-x-file"]
    await monitor.execute(commands.blockdev_del("vmf-x-file"))
    assert await fdsets(monitor) == {}


async def test_descriptors_that_are_passed_at_once_do_not_mix(monitor: Monitor) -> None:
    with ExitStack() as opened:
        files = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(5)]
        passed = await asyncio.gather(
            *(monitor.pass_descriptor(file.fileno(), opaque=f"vmf-{n}") for n, file in enumerate(files)),
            *(monitor.execute(commands.QUERY_STATUS) for _ in range(5)),
        )
    numbers = [number for number in passed if isinstance(number, int)]
    assert len(set(numbers)) == 5
    assert await fdsets(monitor) == {f"vmf-{n}": number for n, number in enumerate(numbers)}
    for number in numbers:
        await monitor.execute(commands.remove_fd(number))
    assert await fdsets(monitor) == {}


async def test_add_fd_without_a_descriptor_is_refused(monitor: Monitor) -> None:
    with pytest.raises(CommandFailed):
        await monitor.execute(commands.add_fd(opaque="vmf-x"))


async def test_an_unknown_set_is_refused(monitor: Monitor) -> None:
    with pytest.raises(CommandFailed):
        await monitor.execute(commands.remove_fd(77))
    with pytest.raises(CommandFailed):
        await monitor.execute(commands.blockdev_add(commands.file_node("vmf-x-file", 77)))


@pytest.mark.parametrize("turns", range(8))
async def test_passing_a_descriptor_can_be_cancelled(monitor: Monitor, turns: int) -> None:
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        os.ftruncate(other.fileno(), 3 << 20)
        waiting = asyncio.ensure_future(monitor.pass_descriptor(one.fileno(), opaque="vmf-one"))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        number = await monitor.pass_descriptor(other.fileno(), opaque="vmf-other")
    found = await fdsets(monitor)
    assert found.pop("vmf-other") == number
    assert found.keys() <= {"vmf-one"}


# The graph: what the fake claims to know of QEMU's refusals --------------------------------------------------


async def test_nodes_are_refused_alike(monitor: Monitor) -> None:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1 << 20)
        number = await monitor.pass_descriptor(file.fileno(), opaque="vmf-x-file")
    replies = await monitor.pipeline(
        [
            commands.blockdev_add(commands.file_node("vmf-x-file", number)),
            commands.remove_fd(number),
            commands.blockdev_add(commands.grant_node("vmf-x-grant", file="vmf-x-file", size_bytes=1 << 19)),
            commands.blockdev_add(commands.grant_node("vmf-x-grant", file="vmf-x-file", size_bytes=1 << 19)),
            commands.blockdev_add(commands.grant_node("vmf-x-other", file="vmf-nobody", size_bytes=1 << 19)),
            commands.blockdev_add(
                commands.grant_node("vmf-a-name-of-32-characters-long", file="vmf-x-file", size_bytes=1 << 19)
            ),
            commands.write_threshold("vmf-x-grant", 1 << 18),
            commands.write_threshold("vmf-nobody", 1 << 18),
            commands.reopen(commands.grant_node("vmf-x-grant", file="vmf-x-file", size_bytes=1 << 20)),
            commands.reopen(commands.grant_node("vmf-nobody", file="vmf-x-file", size_bytes=1 << 20)),
            commands.blockdev_del("vmf-x-file"),
            commands.blockdev_del("vmf-nobody"),
            commands.blockdev_del("vmf-x-grant"),
            commands.blockdev_del("vmf-x-file"),
            commands.set_drive("/machine/peripheral/nobody", "vmf-x-file"),
            commands.cancel_job("vmf-nobody"),
            commands.dismiss_job("vmf-nobody"),
            commands.set_speed("vmf-nobody", 1),
        ]
    )
    refused = [isinstance(reply, CommandFailed) for reply in replies]
    assert refused == [at in (3, 4, 5, 7, 9, 10, 11, 14, 15, 16, 17) for at in range(18)]


async def test_nodes_describe_themselves_alike(monitor: Monitor) -> None:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1 << 20)
        number = await monitor.pass_descriptor(file.fileno(), opaque="vmf-x-file")
    await monitor.execute(commands.blockdev_add(commands.file_node("vmf-x-file", number)))
    await monitor.execute(commands.remove_fd(number))
    grant = commands.grant_node("vmf-x-grant", file="vmf-x-file", size_bytes=1 << 19)
    await monitor.execute(commands.blockdev_add(grant))
    await monitor.execute(commands.write_threshold("vmf-x-grant", 1 << 18))
    nodes = {node["node-name"]: node for node in await monitor.execute(commands.QUERY_NODES)}
    assert {name: node["write_threshold"] for name, node in nodes.items()} == {
        "vmf-x-file": 0,
        "vmf-x-grant": 1 << 18,
    }
    assert nodes["vmf-x-grant"]["drv"] == "raw"
    stats = await monitor.execute(commands.QUERY_NODE_STATS)
    offsets = {node.get("node-name"): node["stats"]["wr_highest_offset"] for node in stats}
    assert offsets["vmf-x-grant"] == 0
    graph = await monitor.execute(commands.QUERY_GRAPH)
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    edges = {(names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in graph["edges"]}
    assert edges == {("vmf-x-grant", "file", "vmf-x-file")}


# Connecting --------------------------------------------------------------------------------------------------


async def test_a_missing_socket(rig: Rig) -> None:
    with pytest.raises(NobodyThere, match="nobody"):
        async with rig.connect(rig.path.with_name("nobody")):
            pass


async def test_after_the_block_the_monitor_is_free_again(rig: Rig) -> None:
    for _ in range(3):
        async with rig.connect(rig.path) as monitor:
            assert await status(monitor) is False
        assert not monitor.connected
        with pytest.raises(MonitorError):
            await monitor.execute(commands.QUERY_STATUS)


async def test_an_error_in_the_block_comes_out_as_it_is(rig: Rig) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with rig.connect(rig.path):
            raise KeyError("mine")


async def test_cancelling_the_block(rig: Rig) -> None:
    async def use() -> None:
        async with rig.connect(rig.path):
            await asyncio.sleep(60)

    task = asyncio.ensure_future(use())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with rig.connect(rig.path) as monitor:
        assert await status(monitor) is False


async def test_a_second_client_gets_no_greeting(qemu: Rig) -> None:
    async with qemu.connect(qemu.path):
        with pytest.raises(ConnectFailed, match="no greeting") as failed:
            async with qemu.connect(qemu.path, deadline_seconds=0.2):
                pass
    assert "a monitor socket of its own" in failed.value.hint


async def test_too_long_a_path(tmp_path: Path) -> None:
    rig = QemuRig(tmp_path, None)  # type: ignore[arg-type]  # no QEMU is asked
    path = Path("/run") / ("x" * (SUN_PATH_BYTES + 1 - len("/run/")))
    with pytest.raises(ConnectFailed, match="longer"):
        async with rig.connect(path):
            pass


async def test_a_socket_that_is_no_monitor(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:
        path = Path(folder) / "other"

        async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example.org ESMTP\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_unix_server(talk, path):
            with pytest.raises(ConnectFailed):
                async with QemuRig(tmp_path, None).connect(path, deadline_seconds=1):  # type: ignore[arg-type]
                    pass


async def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConnectFailed):
        async with QemuRig(tmp_path, None).connect(path):  # type: ignore[arg-type]
            pass


async def test_a_qemu_that_reads_no_more_can_be_left(qemu: Rig) -> None:
    async with asyncio.timeout(SOON_SECONDS):
        async with qemu.connect(qemu.path) as monitor:
            qemu.hold()
            flood = Command("query-status", {})
            with pytest.raises(CommandTimeout):
                await monitor.pipeline([flood] * 5000, deadline_seconds=0.3)
    qemu.go_on()
    async with qemu.connect(qemu.path) as monitor:
        assert await status(monitor) is False


async def test_descriptors_are_closed_with_the_connection(qemu: Rig) -> None:
    before = open_descriptors()
    for _ in range(3):
        async with qemu.connect(qemu.path) as monitor:
            await status(monitor)
    qemu.hold()
    for _ in range(3):
        with pytest.raises(ConnectFailed):
            async with qemu.connect(qemu.path, deadline_seconds=0.05):
                pass
    qemu.go_on()
    await settled(lambda: open_descriptors() == before)
    assert open_descriptors() == before


def test_the_sockets_path_limit_is_the_kernels() -> None:
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:
        path = folder + "/" + "x" * (SUN_PATH_BYTES - len(folder) - 1)
        for name, fits in ((path, True), (path + "x", False)):
            with socket.socket(socket.AF_UNIX) as one:
                if fits:
                    one.bind(name)
                else:
                    with pytest.raises(OSError, match="too long"):
                        one.bind(name)
