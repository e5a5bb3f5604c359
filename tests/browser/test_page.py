"""The status page in a real browser: what an administrator sees, and what he is never shown."""

import asyncio
import time
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe

from orchestrator.fleecing import boundary
from orchestrator.run import sampling
from orchestrator.service.api import stream
from tests.browser.conftest import Visit, Visited
from tests.browser.host import MARKUP, NEVER, OVERDUE, VMS, enter_history, more, served
from tests.component.fake_blocks import CLUSTER
from tests.component.http import Caller, free_port
from tests.component.world import World, settled
from tests.faults.daemon import Daemon

PAGE_BYTES = 300_000
ORDER = {"vms": ["web01"], "fleecing": "enabled=1,storage=local"}


async def text(visited: Visited, selector: str) -> str:
    return " ".join((await visited.page.inner_text(selector)).split())


async def violations(visited: Visited) -> list[str]:
    found = (await Axe().run(visited.page)).response["violations"]
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


async def copying(world: World, call: Caller) -> str:
    """Begin a backup of web01, and wait until its job can be moved."""
    request = (await call("POST", "/api/v1/runs", body=ORDER)).json
    await settled(lambda: bool([job for job in world.qemu.jobs.values() if job.status == "running"]))
    return str(request["runs"][0]["run"])


async def strip(visited: Visited, run: str) -> str:
    found = await visited.page.get_attribute(f'[data-run="{run}"] [data-strip]', "data-strip")
    return found or ""


async def test_two_hundred_vms_with_the_worst_first(tmp_path: Path, visit: Visit) -> None:
    async with served(tmp_path) as (_, _, _, port), visit(port) as one:
        await one.live()
        assert await text(one, "#verdict") == "2 of 200 VMs are not protected"
        assert await one.page.title() == "(2) vmfleece: VMs are not protected"
        rows = await one.page.eval_on_selector_all("#vms tr", "all => all.map(row => row.dataset.vm)")
        assert rows[:2] == [NEVER, OVERDUE]
        assert len(rows) == 12  # what is under way is not pushed out of sight
        await one.page.click("#vms-all")
        assert await one.page.locator("#vms tr").count() == 1 + len(VMS)
        await one.page.fill("#vm-name", "VM01")
        assert await one.page.locator("#vms tr").count() == 10
        await one.page.select_option("#vm-state", "bad")
        assert await one.page.locator("#vms tr").count() == 2
        failed = await text(one, f'[data-vm="{OVERDUE}"]')
        assert "overdue" in failed
        assert "2 days ago" in failed
        assert "target-full" in failed
        await one.page.select_option("#run-state", "failed")
        await one.until("() => document.querySelectorAll('#past tr').length === 1")
        await one.page.select_option("#run-vm", "web01")
        await one.page.wait_for_selector("#past-none:not([hidden])")

        loaded = [response for response in one.responses if "/events" not in response.url]
        assert {response.url.split("/")[2] for response in loaded} == {f"127.0.0.1:{port}"}
        files = {response.url.rpartition("/")[2]: response for response in loaded if "/api/" not in response.url}
        assert {"", "style.css", "page.js", "live.js"} < files.keys()
        for response in files.values():
            headers = await response.all_headers()
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-content-type-options"] == "nosniff"
        first = {response.url: len(await response.body()) for response in loaded}
        assert sum(first.values()) < PAGE_BYTES, first


async def test_names_and_errors_are_text_whatever_they_hold(tmp_path: Path, visit: Visit) -> None:
    async with served(tmp_path) as (_, _, _, port), visit(port) as one:
        await one.live()
        await one.page.wait_for_selector("#past tr")
        for place in (f'[data-vm="{OVERDUE}"]', '#past tr[data-outcome="failed"]'):
            assert MARKUP in await one.page.inner_text(place)
        assert await one.page.locator("main img, main script, main b").count() == 0
        assert "vmfleece" in await one.page.title()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
async def test_it_is_for_everybody_on_any_screen(tmp_path: Path, visit: Visit, scheme: str, width: int) -> None:
    async with served(tmp_path) as (world, _, call, port), visit(port, scheme=scheme, width=width) as one:
        await one.live()
        run = await copying(world, call)
        await one.page.wait_for_selector(f'[data-run="{run}"] [data-strip]')
        await one.page.emulate_media(reduced_motion="reduce")
        assert await violations(one) == []
        assert await one.page.evaluate("document.documentElement.scrollWidth") <= width
        await one.page.keyboard.press("Tab")
        assert await one.page.evaluate("document.activeElement.className") == "skip"
        await one.page.keyboard.press("Enter")
        await one.page.keyboard.press("Tab")
        assert await one.page.evaluate("document.activeElement.id") == "vm-name"
        await call("POST", f"/api/v1/runs/{run}/cancel")
        await one.until("() => document.querySelectorAll('.run').length === 0")


async def test_a_run_is_seen_as_it_goes_and_its_end_at_once(tmp_path: Path, visit: Visit) -> None:
    async with served(tmp_path) as (world, _, call, port), visit(port) as one:
        await one.live()
        run = await copying(world, call)
        await one.page.wait_for_selector(f'[data-run="{run}"] [data-strip]')
        assert await strip(one, run) == "." * 64
        (job,) = world.qemu.jobs
        for _ in range(32):
            world.qemu.step(job)
        await one.until("run => document.querySelector(`[data-run='${run}'] strong`).textContent === '50%'", run)
        assert await strip(one, run) == "#" * 32 + ">" + "." * 31
        assert "copying" in await text(one, '#vms [data-vm="web01"]')
        asked = time.monotonic()
        await one.page.evaluate(
            "Promise.all(['status', 'protection', 'runs'].map(path => fetch(`api/v1/${path}`)))"
        )
        asking_seconds = time.monotonic() - asked
        for _ in range(33):  # the last one finds nothing left
            world.qemu.step(job)
        while (await call.get(f"/api/v1/runs/{run}"))["state"] != "succeeded":
            await asyncio.sleep(0.01)
        ended = time.monotonic()
        await one.until("run => document.querySelector('#past').textContent.includes(run)", run)
        # By events, not by the clock: within a second, beside what asking takes on this machine.
        assert time.monotonic() - ended < 1 + 5 * asking_seconds
        await one.until("() => document.querySelectorAll('.run').length === 0")
        assert "succeeded" in await text(one, "#announce")


async def test_what_a_backup_costs_the_guest_is_shown(
    tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_SECONDS", 0.2)
    async with served(tmp_path) as (world, _, call, port), visit(port) as one:
        await one.live()
        run = await copying(world, call)
        here = f'[data-run="{run}"] [data-writes]'
        await one.page.wait_for_selector(here)
        assert await text(one, here) == "guest writes: none since the snapshot"
        world.qemu.write_ns = 12_000_000
        world.qemu.guest_writes("vda", 0, b"new")
        await one.page.wait_for_selector(f'[data-run="{run}"] [data-writes="12"] svg.spark rect[height="10"]')
        assert await text(one, here) == "guest writes: 12 ms on average, 12 ms in the slowest second"
        assert await violations(one) == []
        await call("POST", f"/api/v1/runs/{run}/cancel")
        await one.until("() => document.querySelectorAll('.run').length === 0")


async def test_windows_are_drawn_where_they_are(
    tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "WINDOW_BYTES", 16 * CLUSTER)  # a quarter of the disk
    async with served(tmp_path, discard_source=False) as (world, _, call, port), visit(port) as one:
        await one.live()
        run = await copying(world, call)
        await one.until("run => document.querySelector(`[data-run='${run}'] [data-strip]`) !== null", run)
        (job,) = world.qemu.jobs
        for _ in range(17):
            world.qemu.step(job)
        await one.until(
            "run => document.querySelector(`[data-run='${run}'] [data-strip]`).dataset.strip"
            " === '#'.repeat(16) + '>'.repeat(16) + '.'.repeat(32)",
            run,
        )
        kinds = await one.page.eval_on_selector_all(
            f'[data-run="{run}"] [data-strip] rect', "all => all.map(part => part.className.baseVal)"
        )
        assert kinds == ["done", "copying", "waiting"]
        await call("POST", f"/api/v1/runs/{run}/cancel")
        await one.until("() => document.querySelectorAll('.run').length === 0")


async def test_without_events_it_asks_again_and_again(
    tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FOLLOWERS", 0)
    async with served(tmp_path) as (world, _, call, port), visit(port, quiet=False) as one:
        await one.page.wait_for_selector("#connection[data-state=polling]")
        run = await copying(world, call)
        await one.page.wait_for_selector(f'[data-run="{run}"]')
        await call("POST", f"/api/v1/runs/{run}/cancel")
        await one.until("() => document.querySelectorAll('.run').length === 0")


async def test_a_lost_connection_is_said_and_regained(tmp_path: Path, visit: Visit) -> None:
    port = free_port()
    config = tmp_path / "vmfleece.toml"
    config.write_text(daemon_config(tmp_path, port))
    enter_history(tmp_path)
    daemon = await Daemon.start(config, tmp_path / "first.log")
    await daemon.until(lambda: daemon.of("daemon.ready"), "is ready")
    async with visit(port, quiet=False) as one:
        await one.live()
        assert await text(one, "#verdict") == "2 of 199 VMs are not protected"
        daemon.kill()
        await daemon.ended()
        await one.page.wait_for_selector("#connection[data-state=lost]")
        alarm = await text(one, "#lost[role=alert]")
        assert alarm.startswith("Connection lost")
        assert "ago" in alarm
        assert await text(one, "#verdict") == "2 of 199 VMs are not protected"  # the last that is known stays
        daemon = await Daemon.start(config, tmp_path / "second.log")
        await daemon.until(lambda: daemon.of("daemon.ready"), "is ready")
        await one.live()
        assert await one.page.is_hidden("#lost")
    await daemon.stop()


def daemon_config(folder: Path, port: int) -> str:
    return f"""
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
listen = "127.0.0.1:{port}"
[storage.local]
path = "{folder}/fleecing"
quota = "1GiB"
[target.main]
path = "{folder}/backups"
{more(folder)}"""
