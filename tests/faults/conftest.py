"""Beds in folders with short names: a socket's path may not be long."""

import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.bed import Bed
from tests.faults.campaign import Campaign
from tests.faults.plan import Fault
from tests.faults.report import Report

STOP_SECONDS = 4.0
Suffer = Callable[..., Awaitable[Report]]


@pytest.fixture
def suffer() -> Iterator[Suffer]:
    """Yield a function that does faults to guests on a bed of their own and returns what came of it."""

    async def run(faults: Sequence[Fault], *, version: str, repository: bool = False) -> Report:
        report = Report(0, f"QEMU {version}")
        async with Bed(Path(folder) / "bed", version=version, repository=repository) as bed:
            await Campaign(bed, report, stop_seconds=STOP_SECONDS).run(faults)
        print(report)  # noqa: T201  (shown if something is wrong)
        return report

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield run
