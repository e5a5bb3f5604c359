"""`python -m benchmarks`: measure everything and write RESULTS.md; with names: only these, and print.

Each benchmark is a process of its own, with a folder of its own for temporary files, one after the other. One that
fails or takes too long is said to have failed, and the others go on. Nothing is left running: a benchmark is told
to end and has time to, then its whole session is killed.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.report import Section, Table
from orchestrator import aio
from orchestrator.cli.running import run_async
from orchestrator.units import GIB
from tests.guest.restics import RESTICS

NAMES = (
    "guest_impact",
    "latency_budget",
    "pause",
    "scale",
    "growth",
    "admission",
    "windows",
    "space",
    "incremental",
    "nbd",
    "throughput",
    "repository",
    "restore",
)
RESULTS = Path(__file__).parent / "RESULTS.md"
LIMIT_SECONDS = 600.0
ENDING_SECONDS = 20.0
PREFACE = """
Written by `python -m benchmarks` (`make bench`), which took {minutes:.1f} minutes; do not edit. Trust the ratios:
seconds depend on the machine, and guests run without hardware virtualisation (TCG). [README](README.md) says what
follows from it.
""".strip()


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one benchmark: its section, or why there is none."""

    name: str
    seconds: float
    section: Section | None
    failure: str = ""

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.name}"


async def measured(name: str, folder: Path) -> Measured:
    """Run one benchmark. It is ended whatever happens here."""
    own = folder / name
    own.mkdir()
    file, began = own / "section.json", time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "TERM", "--"),
        *(sys.executable, "-m", f"benchmarks.{name}", "--json", str(file)),
        env=os.environ | {"TMPDIR": str(own)},
        start_new_session=True,
    )
    failure = ""
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            await process.wait()
    except TimeoutError:
        failure = f"not ended within {LIMIT_SECONDS:g} s"
    finally:
        await aio.finish(end(process))
    if not failure and not file.exists():
        failure = f"exit code {process.returncode}"
    section = report.load(file) if file.exists() else None
    shutil.rmtree(own)
    return Measured(name, time.monotonic() - began, section, failure)


async def end(process: asyncio.subprocess.Process) -> None:
    """Have a benchmark end, and kill what it has left of its session."""
    if process.returncode is None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_SECONDS):
                await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def main(names: list[str]) -> int:
    """Measure, then write or print; 1 if a benchmark failed or a bound falls short."""
    machine = about()
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="vmf-bench-") as folder:
        for name in names or NAMES:
            print(f"benchmarks.{name}", file=sys.stderr, flush=True)
            results.append(await measured(name, Path(folder)))
            print(f"  {results[-1].failure or 'done'}, {results[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            text = rendered(results, machine, time.monotonic() - began)
            if not names:
                RESULTS.write_text(text)
    if names:
        print(text)
    sections = [one.section for one in results if one.section is not None]
    fine = len(sections) == len(results) and all(bound.held for one in sections for bound in one.bounds)
    return 0 if fine else 1


def rendered(results: list[Measured], machine: Table, seconds: float) -> str:
    """The whole of RESULTS.md."""
    sections = [one.section for one in results if one.section is not None]
    parts = [
        "# Results",
        PREFACE.format(minutes=seconds / 60),
        report.markdown_table(machine),
        "## What must hold",
        report.markdown_table(report.bounds_table(sections)),
    ]
    for one in results:
        if one.section is None:
            parts.append(f"## {one.name}\n\n`{one.command}` **failed**: {one.failure}")
        else:
            parts.append(report.markdown(report.with_command(one.section, one.command, one.seconds)).rstrip())
    return "\n\n".join(parts) + "\n"


def about() -> Table:
    """The machine and the versions, before anything is measured."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    rows = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": _said("git", "describe", "--always", "--dirty"),
        "processors": f"{os.cpu_count()}, {model[1] if model else platform.machine()}",
        "memory": f"{memory:.0f} GiB",
        "temporary files on": _said("stat", "-f", "-c", "%T", tempfile.gettempdir()),
        "load when it began": f"{os.getloadavg()[0]:.1f}",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "QEMU": _said("qemu-system-x86_64", "--version"),
        "restic": ", ".join(_said(program, "version") for program in RESTICS.values() if shutil.which(program)),
        "nbdcopy": _said("nbdcopy", "--version"),
    }
    return Table(("measured on", ""), tuple(rows.items()))


def _said(*argv: str) -> str:
    try:
        done = subprocess.run(argv, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure everything, or only the benchmarks that are named.")
    parser.add_argument("name", nargs="*", choices=[*NAMES, []], help=f"one of {', '.join(NAMES)}")
    sys.exit(run_async(main(parser.parse_args().name)))
