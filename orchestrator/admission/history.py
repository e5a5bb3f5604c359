"""What the past runs of a VM let expect of its fleecing images. Pure; documents as the catalogue keeps them.

A run tells what a disk needs if it succeeded, or if that disk's image ran full. Any other end came early: its
peak is a lower bound, which counts beside runs that tell, but neither alone nor in place of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.admission import estimate
from orchestrator.model import Outcome
from orchestrator.units import MIB

TELLING_RUNS = 10
FULL_MARGIN_BYTES = 2 * MIB
"""The write that did not fit is not always in the peak."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One disk in one run. `filled_bytes`: the grant that its image ran full of; 0 if it did not."""

    peak_bytes: int
    succeeded: bool
    filled_bytes: int


def expected(results: Sequence[Mapping[str, Any]], kind: str) -> dict[str, int]:
    """The grant that each disk is expected to need in the next run of this kind; no entry: nothing is known.

    It is the most that one of the last ten telling runs (or one between them) held, and a quarter more. An image
    that ran full counts as twice its grant, so that the next try gets more, until a run succeeds: that one shows
    what the disk needs, and the failed one counts only by what it held, like any other.

    `results` are JSON documents, oldest first. What is malformed, or from before a key existed, tells nothing.
    """
    uses: dict[str, list[_Use]] = {}
    for result in results:
        if isinstance(result, Mapping) and result.get("kind") == kind:
            for disk, use in _uses(result):
                uses.setdefault(disk, []).append(use)
    needs = {disk: _need(of_disk) for disk, of_disk in uses.items()}
    return {disk: need for disk, need in needs.items() if need is not None}


def _need(uses: Sequence[_Use]) -> int | None:
    need = telling = 0
    settled = False
    for use in reversed(uses):
        settled = settled or use.succeeded
        doubled = 0 if settled else 2 * use.filled_bytes
        need = max(need, use.peak_bytes * 5 // 4, doubled)
        telling += use.succeeded or use.filled_bytes > 0
        if telling == TELLING_RUNS:
            break
    return need if telling else None


def _uses(result: Mapping[str, Any]) -> Iterator[tuple[str, _Use]]:
    succeeded = result.get("outcome") in (Outcome.SUCCEEDED, Outcome.WARNING)
    error = result.get("error")
    ran_full = isinstance(error, Mapping) and error.get("code") == "fleecing-full"
    disks = result.get("disks")
    for disk in disks if isinstance(disks, list | tuple) else ():
        if not isinstance(disk, Mapping) or not isinstance(disk.get("storage"), str):
            continue  # without fleecing
        name, peak_bytes = disk.get("disk"), _size(disk, "fleecing_peak_bytes")
        if isinstance(name, str) and peak_bytes is not None:
            grant_bytes = (_size(disk, "grant_bytes") or 0) if ran_full else 0
            yield name, _Use(peak_bytes, succeeded, grant_bytes if _is_full(peak_bytes, grant_bytes) else 0)


def _is_full(peak_bytes: int, grant_bytes: int) -> bool:
    """Whether an image was full of its grant: up to QEMU's limit, which is below the grant."""
    margin = min(FULL_MARGIN_BYTES, grant_bytes // 4)
    return peak_bytes + margin >= estimate.limit(grant_bytes)


def _size(document: Mapping[str, Any], key: str) -> int | None:
    value = document.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
