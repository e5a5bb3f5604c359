"""How long one admission decision takes, beside the number of runs that wait: `python -m benchmarks.admission`.

20 storages (folders, asked for their free space each time) with three runs each under way; everybody else waits,
most for one storage, some for two. A decision looks at all that wait. "A run ends": its grants are given back, and
whoever may start now is granted theirs, each a transaction of the SQLite ledger in the temporary folder.
"""

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.report import Section, Table
from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.base import Grant
from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.storage.base import Space
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.units import GIB

STORAGES = 20
RUNNING = 3
WAITING = (10, 100, 1000, 10_000)
DECISIONS = 200
ENDS = 30
IN_TWO = 0.05
"""The share of runs with disks on two storages."""


class Ample(DirectoryStorage):
    """Asks its file system as always, but only its quota is short."""

    def space(self) -> Space:
        super().space()
        return Space(free_bytes=1 << 50, floor_bytes=0)


async def decided(folder: Path, waiting: int) -> tuple[float, float]:
    """Seconds of a decision, and from a run's end to its successor's start: both medians."""
    storages = {
        f"s{number}": Ample(f"s{number}", folder, quota_bytes=RUNNING * 10 * GIB, min_free=0)
        for number in range(STORAGES)
    }
    ledger = SqliteLedger(folder / f"ledger-{waiting}.sqlite")
    targets: dict[str, int | None] = {"main": None, "offsite": STORAGES * RUNNING}
    controller = Controller(storages, ledger, max_runs=2 * STORAGES * RUNNING, target_max_runs=targets)
    rng = random.Random(waiting)
    ends: dict[str, asyncio.Event] = {}
    started: asyncio.Queue[str] = asyncio.Queue()

    async def run(number: int) -> None:
        name = f"r{number}"
        ends[name] = asyncio.Event()
        count = 2 if number >= STORAGES * RUNNING and rng.random() < IN_TWO else 1
        chosen = rng.sample(sorted(storages), count)
        if number < STORAGES * RUNNING:
            chosen = [f"s{number % STORAGES}"]
        async with controller.admit(
            run=name,
            vm=f"vm{number}",
            target=rng.choice(sorted(targets)),
            priority=rng.randrange(101),
            disks={storage: Grant(storage, 10 * GIB) for storage in chosen},
            on_wait=lambda _waiting: None,
        ):
            started.put_nowait(name)
            await ends[name].wait()

    async with controller.serving(), contextlib.AsyncExitStack() as stack:
        tasks = [asyncio.ensure_future(run(number)) for number in range(STORAGES * RUNNING)]
        stack.push_async_callback(_end, tasks)
        running = [await started.get() for _ in tasks]
        tasks += [asyncio.ensure_future(run(STORAGES * RUNNING + number)) for number in range(waiting)]
        while len(controller.waiting()) < waiting:
            await asyncio.sleep(0.2)

        decisions = []
        for _ in range(DECISIONS):
            begun = time.perf_counter()
            controller._decide()
            decisions.append(time.perf_counter() - begun)

        successions = []
        for name in running[: min(ENDS, waiting // 2)]:
            begun = time.perf_counter()
            ends[name].set()
            try:
                async with asyncio.timeout(1):
                    await started.get()
            except TimeoutError:
                continue  # nobody who waits needs only that
            successions.append(time.perf_counter() - begun)
    return statistics.median(decisions), statistics.median(successions)


async def _end(tasks: list["asyncio.Future[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def measure() -> Section:
    """A row for each number of runs that wait."""
    rows = []
    first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for waiting in WAITING:
            report.say(f"{waiting} runs wait")
            decision, succession = await decided(Path(folder), waiting)
            first = first or decision
            rows.append(
                (str(waiting), f"{decision * 1e3:.2f} ms", f"{decision / first:.1f}", f"{succession * 1e3:.1f} ms")
            )
    return Section(
        "How long an admission decision takes",
        f"""
        {STORAGES} storages in folders, whose free space is asked for each time, {RUNNING} runs each under
        way, and so many that wait, {IN_TWO:.0%} of them for two storages, for two targets. A decision
        looks at the heads of lines, so it hardly grows with those that wait. The last column has two
        transactions of the SQLite ledger in it. Medians.
        """,
        (
            Table(
                (
                    "runs that wait",
                    "a decision",
                    f"times that of {WAITING[0]}",
                    "a run ends → the next one starts",
                ),
                tuple(rows),
            ),
        ),
    )


if __name__ == "__main__":
    report.main(measure)
