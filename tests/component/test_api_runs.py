"""Runs that are begun, followed and ended over the API: the engine, a fake QEMU, and real sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from yarl import URL

from orchestrator.run import retry
from orchestrator.service.engine import Engine
from tests.component.http import Caller, over_socket
from tests.component.test_admission import opened
from tests.component.world import MIB, World, settled

Make = Callable[..., World]
pytestmark = pytest.mark.usefixtures("quick_images", "events_are_told")


@contextlib.asynccontextmanager
async def daemon(world: World, *, supervise: bool = True, **more: Any) -> AsyncIterator[tuple[Engine, Caller]]:
    async with (
        opened(world, supervise=supervise, **more) as one,
        over_socket(world.folder / "run/api.sock") as call,
    ):
        yield one, call


async def over(call: Caller, request: str) -> dict[str, Any]:
    """A request, once it is over."""
    found: dict[str, Any] = {"state": "under-way"}
    while found["state"] == "under-way":
        await asyncio.sleep(0.01)
        found = await call.get(f"/api/v1/requests/{request}")
    return found


def held_up(world: World) -> None:
    """Have copies go on only when a test says so."""
    world.qemu.automatic = False


async def copying(call: Caller) -> dict[str, Any]:
    while True:
        for run in (await call.get("/api/v1/status"))["runs"]:
            if run["phase"] == "copying":
                return dict(run)
        await asyncio.sleep(0.01)


async def test_a_backup_is_begun_followed_and_found_in_the_history(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB})
    async with daemon(world) as (_, call), call.events() as events:
        begun = await call("POST", "/api/v1/runs", body={"vms": ["web*"], "fleecing": "enabled=1,storage=local"})
        assert begun.status == 202
        request = begun.json
        (run,) = request["runs"]
        assert (request["vms"], request["state"], run["vm"]) == (["web01"], "under-way", "web01")
        seen = []
        async for event in events:
            seen.append(event)
            if event["event"] == "request.finished":
                break
        of_run = [event for event in seen if event.get("run") == run["run"]]
        assert {event["request"] for event in seen} == {request["request"]}
        names = [event["event"] for event in of_run if event["event"] != "run.progress"]
        assert (names[0], names[-1]) == ("run.started", "run.finished")
        assert "run.phase" in names  # also what the log leaves out
        phases = list(dict.fromkeys(event["phase"] for event in of_run if event["event"] == "run.progress"))
        assert phases == ["preparing", "snapshotting", "copying", "committing", "cleaning"]
        assert all((event["id"] is None) == (event["event"] == "run.progress") for event in seen)

        ended = await over(call, request["request"])
        (result,) = ended["results"]
        assert (ended["state"], ended["error"], result["outcome"]) == ("ended", None, "succeeded")
        world.assert_copied(result["snapshot"])
        (listed,) = (await call.get("/api/v1/runs"))["runs"]
        assert (listed["run"], listed["state"], listed["copied_bytes"]) == (run["run"], "succeeded", MIB)
        details = await call.get(f"/api/v1/runs/{run['run']}")
        assert details["result"] == result
        (snapshot,) = (await call.get("/api/v1/targets/main/snapshots"))["snapshots"]
        assert (snapshot["id"], snapshot["run"]) == (result["snapshot"], run["run"])
    await world.assert_nothing_is_left(before)


async def test_who_comes_back_is_told_what_he_missed_or_that_he_missed_it(make: Make) -> None:
    world = make(disks={"vda": MIB})
    async with daemon(world) as (_, call):

        async def events_of_a_backup(after: str | None) -> list[dict[str, Any]]:
            async with call.events(after) as events:
                found = []
                request = (await call("POST", "/api/v1/runs", body={"vms": ["web01"]})).json["request"]
                async for event in events:
                    found.append(event)
                    if event["event"] == "request.finished" and event["request"] == request:
                        return found
            raise AssertionError

        first = [event for event in await events_of_a_backup(None) if event["id"]]
        again = [event for event in await events_of_a_backup(first[2]["id"]) if event["id"]]
        assert again[: len(first) - 3] == first[3:]
        stranger = await events_of_a_backup("ffffffff-7")
        assert (stranger[0]["event"], stranger[0]["after"]) == ("events.lost", "ffffffff-7")
        assert [event for event in stranger if event["id"]][: len(first)] == first


async def test_a_run_is_ended_and_its_vm_put_right(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": 4 * MIB})
    held_up(world)
    async with daemon(world) as (_, call):
        request = (await call("POST", "/api/v1/runs", body={"vms": ["web01"]})).json
        run = (await copying(call))["run"]
        assert (await call.get(f"/api/v1/runs/{run}"))["progress"]["phase"] == "copying"
        assert (await call.get("/api/v1/vms/web01"))["status"] == "running"  # also while it is backed up
        ended = await call("POST", f"/api/v1/runs/{run}/cancel")
        assert (ended.status, ended.json["run"]) == (202, run)
        (result,) = (await over(call, request["request"]))["results"]
        assert (result["outcome"], result["error"]["code"], result["snapshot"]) == ("cancelled", "cancelled", None)
        assert (await call.get(f"/api/v1/runs/{run}"))["state"] == "cancelled"
        again = await call("POST", f"/api/v1/runs/{run}/cancel")
        assert (again.status, again.code) == (409, "run-over")
        assert (await call.get("/api/v1/runs?state=cancelled"))["runs"][0]["run"] == run
        assert (await call.get("/api/v1/runs?state=failed"))["runs"] == []
    await world.assert_nothing_is_left(before)


async def test_a_run_that_waits_for_another_of_its_vm_is_seen_and_can_be_ended(make: Make) -> None:
    world = make(disks={"vda": 4 * MIB})
    held_up(world)
    async with daemon(world) as (_, call):
        first = (await call("POST", "/api/v1/runs", body={"vms": ["web01"]})).json
        await copying(call)
        second = (await call("POST", "/api/v1/runs", body={"vms": ["web01"]})).json
        (run,) = second["runs"]
        (waiting,) = (await call.get("/api/v1/queue"))["queue"]
        assert (waiting["run"], waiting["vm"]) == (run["run"], "web01")
        assert "another run of this VM" in waiting["reasons"][0]
        assert [one["state"] for one in (await call.get("/api/v1/runs"))["runs"]] == ["queued", "copying"]
        assert (await call.get(f"/api/v1/runs/{run['run']}"))["waiting"] == waiting
        await call("POST", f"/api/v1/runs/{run['run']}/cancel")
        (result,) = (await over(call, second["request"]))["results"]
        assert (result["outcome"], result["disks"]) == ("cancelled", [])
        assert (await call.get(f"/api/v1/runs/{run['run']}"))["state"] == "cancelled"
        assert len((await call.get("/api/v1/status"))["runs"]) == 1  # the first goes on
        world.qemu.automatic = True
        for job in world.qemu.jobs.values():
            world.qemu._advance_soon(job)
        assert (await over(call, first["request"]))["results"][0]["error"] is None


async def test_a_job_is_run_and_its_next_try_can_be_ended(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "MINUTE_SECONDS", 1000.0)
    world = make(disks={"vda": MIB})
    world.qemu.accepts = False
    async with daemon(world, retries=2) as (one, call):
        begun = await call("POST", "/api/v1/jobs/nightly/run")
        assert (begun.status, begun.json["job"], begun.json["vms"]) == (202, "nightly", ["web01"])
        await settled(lambda: bool(one.status().queue))
        (waiting,) = (await call.get("/api/v1/queue"))["queue"]
        assert waiting["until"] is not None
        await call("POST", f"/api/v1/runs/{waiting['run']}/cancel")
        ended = await over(call, begun.json["request"])
        (result,) = ended["results"]
        assert result["error"]["code"] == "vm-unreachable"
        assert [run["run"] for run in ended["runs"]] == [waiting["run"]]


async def test_a_request_is_ended_with_all_its_runs(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": 4 * MIB})
    held_up(world)
    async with daemon(world) as (_, call):
        request = (await call("POST", "/api/v1/jobs/nightly/run")).json["request"]
        await copying(call)
        assert (await call("POST", f"/api/v1/requests/{request}/cancel")).status == 202
        ended = await over(call, request)
        assert (ended["state"], ended["error"]["code"]) == ("cancelled", "cancelled")
        assert (await call.get("/api/v1/runs"))["runs"][0]["state"] == "cancelled"
        assert (await call("POST", f"/api/v1/requests/{request}/cancel")).status == 202  # may be said again
    await world.assert_nothing_is_left(before)


async def test_the_end_of_the_service_ends_what_was_asked_for_and_the_streams(
    make: Make, before: list[str]
) -> None:
    world = make(disks={"vda": 4 * MIB})
    held_up(world)
    following: list[asyncio.Task[list[str]]] = []
    async with over_socket(world.folder / "run/api.sock") as patient:
        async with daemon(world) as (one, call):

            async def follow() -> list[str]:
                async with patient.events() as events:
                    return [event["event"] async for event in events]

            following.append(asyncio.create_task(follow()))
            while not one.feed.followers:
                await asyncio.sleep(0.01)
            await call("POST", "/api/v1/runs", body={"vms": ["web01"]})
            await copying(call)
        async with asyncio.timeout(20):
            seen = await following[0]
    assert seen[-2:] == ["run.finished", "request.finished"]
    await world.assert_nothing_is_left(before)


async def test_a_command_at_work_answers_but_begins_nothing(make: Make) -> None:
    world = make(disks={"vda": MIB})
    async with daemon(world, supervise=False) as (_, call):
        assert (await call.get("/healthz"))["daemon"] is False
        for path, body in (("/api/v1/runs", {"vms": ["web01"]}), ("/api/v1/jobs/nightly/run", None)):
            refused = await call("POST", path, body=body)
            assert (refused.status, refused.code) == (409, "locked")
        assert (await call("POST", "/api/v1/cleanup", body={"dry_run": True})).json == {
            "dry_run": True,
            "repairs": [],
        }


async def test_what_there_is(make: Make) -> None:
    world = make(disks={"vda": MIB})
    async with daemon(world) as (_, call):
        (vm,) = (await call.get("/api/v1/vms"))["vms"]
        assert (vm["vm"], vm["reachable"], vm["disks"][0]["size_bytes"]) == ("web01", True, MIB)
        details = await call.get("/api/v1/vms/web01")
        assert [(disk["disk"], disk["backup"]) for disk in details["disks"]] == [("vda", "full")]
        (job,) = (await call.get("/api/v1/jobs"))["jobs"]
        assert (job["job"], job["next_due"], job["vms"]) == ("nightly", None, ["web01"])
        (storage,) = (await call.get("/api/v1/storages"))["storages"]
        assert (storage["name"], storage["granted_bytes"]) == ("local", 0)
        assert (await call.get("/api/v1/targets"))["targets"][0]["target"] == "main"
        world.qemu.kill()
        gone = await call("GET", "/api/v1/vms/web01")
        assert gone.status == 502
        assert gone.code in {"vm-gone", "vm-unreachable"}  # noticed while, or before, it is asked


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/v1/vms/web02", None, 404, "unknown-name"),
        ("GET", "/api/v1/vms/..%2fetc%2fpasswd", None, 404, "unknown-name"),
        ("GET", "/api/v1/vms/%00", None, 404, "unknown-name"),
        ("GET", "/api/v1/runs/..%2f..%2fcatalogue.sqlite", None, 404, "unknown-name"),
        ("GET", "/api/v1/runs/%27%20OR%201=1%20--", None, 404, "unknown-name"),
        ("GET", "/api/v1/targets/..%2f..%2f..%2froot/snapshots", None, 404, "unknown-name"),
        ("GET", "/api/v1/../../etc/passwd", None, 404, "not-found"),
        ("GET", "/api/v1/requests/0badcafe", None, 404, "unknown-name"),
        ("POST", "/api/v1/jobs/weekly/run", None, 404, "unknown-name"),
        ("POST", "/api/v1/runs/0badcafe/cancel", None, 404, "unknown-name"),
        ("POST", "/api/v1/runs", {"vms": ["web02"]}, 404, "unknown-name"),
        ("POST", "/api/v1/runs", {"vms": []}, 400, "config"),
        ("POST", "/api/v1/runs", {}, 400, "config"),
        ("POST", "/api/v1/runs", [], 400, "config"),
        ("POST", "/api/v1/runs", {"vms": ["web01"], "fulll": True}, 400, "config"),
        ("POST", "/api/v1/runs", {"vms": ["web01"], "full": "yes"}, 400, "config"),
        ("POST", "/api/v1/runs", {"vms": ["web01"], "bwlimit": "fast"}, 400, "config"),
        ("POST", "/api/v1/runs", {"vms": ["web01"], "target": "mian"}, 404, "unknown-name"),
        ("POST", "/api/v1/runs", {"vms": ["web01"], "fleecing": "storage=../x"}, 400, "config"),
        ("POST", "/api/v1/runs", {"vms": ["web01"], "consistency": "freeze"}, 400, "config"),
        ("GET", "/api/v1/runs?limit=0", None, 400, "config"),
        ("GET", "/api/v1/runs?state=lucky", None, 400, "config"),
        ("GET", "/api/v1/runs?wm=web01", None, 400, "config"),
        ("GET", "/api/v1/status?x=1", None, 400, "config"),
    ],
)
async def test_what_makes_no_sense_is_refused_and_says_why(
    make: Make, *, method: str, path: str, body: Any, status: int, code: str
) -> None:
    world = make(disks={"vda": MIB})
    async with daemon(world) as (one, call):
        async with call.session.request(method, URL(call.base + path, encoded=True), json=body) as response:
            answer = await response.json()
        assert (response.status, answer["code"]) == (status, code), answer
        assert answer["message"]
        assert one.catalogue.entries(limit=10) == []
