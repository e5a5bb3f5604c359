"""Kills of the daemon, and other faults, to guests under load; a report of what came of it.

    python -m tests.faults [--seed N] [--rounds 200] [--target images|repository] [--qemu 7.2|10.0|11.1]

The same seed is the same plan. `--qemu` is the first guest's, its neighbour has another one. Exit code 1 if
anything went wrong; what the daemons said then stays in the folder that is printed. Needs root: it mounts file
systems.
"""

import argparse
import asyncio
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

import structlog
import uvloop

from tests.faults import plan
from tests.faults.bed import Bed
from tests.faults.campaign import Campaign
from tests.faults.report import Report
from tests.guest.versions import QEMUS, qemu

KILLS = 200
STOP_SECONDS = 30.0
REPORT = Path(".cache/faults.txt")


async def campaign(arguments: argparse.Namespace, folder: Path, report: Report) -> None:
    """All of it, in a folder."""
    repository = arguments.target == "repository"
    faults = plan.make(arguments.seed, kills=arguments.rounds, repository=repository)
    async with Bed(folder, version=arguments.qemu, repository=repository) as bed:
        await Campaign(bed, report, stop_seconds=arguments.stop, say=say).run(faults)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  (a command)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Kill vmfleece, and worse, while it backs up guests.")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="repeats a plan")  # noqa: S311
    parser.add_argument("--rounds", type=int, default=KILLS, help="kills of the daemon (default: %(default)s)")
    parser.add_argument("--target", choices=["images", "repository"], default="images")
    parser.add_argument("--qemu", choices=list(QEMUS), default="10.0")
    parser.add_argument("--stop", type=float, default=STOP_SECONDS, help="seconds that a QEMU is stopped for")
    parser.add_argument("--report", type=Path, default=REPORT, help="where it is kept (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep what the daemons said also if nothing was wrong")
    arguments = parser.parse_args()
    qemu(arguments.qemu)  # rather now than later
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report(arguments.seed, f"{arguments.target}, QEMU {arguments.qemu}")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    say(f"seed {arguments.seed}, in {folder}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(campaign(arguments, folder, report))
        finally:
            arguments.report.parent.mkdir(parents=True, exist_ok=True)
            with arguments.report.open("a") as file:
                file.write(f"{report}\n\n")
            print(report)  # noqa: T201  (a command)
    if not (report.wrong or arguments.keep):
        shutil.rmtree(folder)
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
