"""`vmfleece export`: disks of a snapshot for whoever speaks NBD, until Ctrl-C."""

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator import memory
from orchestrator.cli import render
from orchestrator.cli.choose import checked_targets, the_snapshot
from orchestrator.config import Config
from orchestrator.errors import EXIT_OK


async def export(config: Config, arguments: argparse.Namespace) -> int:
    """Serve disks read-only, say where, and go on until told to stop, which is success."""
    memory.keep_freed()
    targets = checked_targets(config, arguments.target)
    snapshot = await the_snapshot(targets, arguments.snapshot)
    wanted = arguments.disk or [disk.disk for disk in snapshot.disks]
    disks = [snapshot.disk(disk).disk for disk in dict.fromkeys(wanted)]
    with _private_folder(config.daemon.run_dir) as folder:
        async with targets[snapshot.target].exported(snapshot, disks, folder) as uris:
            if arguments.json:
                exports = [{"disk": disk, "uri": uri} for disk, uri in uris.items()]
                render.print_json({"snapshot": snapshot.id, "exports": exports})
                sys.stdout.flush()
            else:
                for disk, uri in uris.items():
                    render.print_line(f"{disk}: {uri}")
                render.print_line(
                    f"for example: qemu-img convert -f raw -O qcow2 '{uris[disks[0]]}' {disks[0]}.qcow2"
                )
                render.print_line("until Ctrl-C")
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
    return EXIT_OK


@contextlib.contextmanager
def _private_folder(run_dir: Path) -> Iterator[Path]:
    """A folder that only its owner may enter, in run_dir or where temporary files go."""
    try:
        folder = tempfile.mkdtemp(prefix="export-", dir=run_dir)
    except OSError:
        folder = tempfile.mkdtemp(prefix="vmfleece-export-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
