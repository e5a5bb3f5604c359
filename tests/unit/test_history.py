"""What past runs let expect of a VM's fleecing images."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.admission import estimate, history
from orchestrator.units import GIB, MIB

FULL = "fleecing-full"
Document = dict[str, Any]


def disk(peak: int, grant: int | None = 0, **more: object) -> Document:
    """One disk of a result; `grant` None: as results were before they said it."""
    said = {} if grant is None else {"grant_bytes": grant}
    sizes = {"size_bytes": 100 * GIB, "copied_bytes": 100 * GIB, "fleecing_peak_bytes": peak}
    return {"disk": "vda", **sizes, "storage": "local", **said, **more}


def run(*disks: object, outcome: str = "succeeded", code: str | None = None, kind: str = "full") -> Document:
    error = code and {"code": code, "message": "…", "hint": ""}
    return {"vm": "web01", "run": "r", "outcome": outcome, "kind": kind, "error": error, "disks": list(disks)}


def failed(*disks: object, code: str = FULL) -> Document:
    return run(*disks, outcome="failed", code=code)


def succeeded(*gibs: int) -> list[Document]:
    return [run(disk(gib * GIB)) for gib in gibs]


RAN_FULL = failed(disk(10 * GIB, 10 * GIB))


@pytest.mark.parametrize(
    ("results", "gibs"),
    [
        (succeeded(4), 5),
        (succeeded(2, 4, 3), 5),
        (succeeded(40, 4, *[3] * 9), 5),
        (succeeded(40, *[3] * 9), 50),
        ([run(disk(4 * GIB), outcome="warning")], 5),
        # full, and tried again
        ([RAN_FULL], 20),
        ([*succeeded(4), RAN_FULL], 20),
        ([RAN_FULL, failed(disk(20 * GIB, 20 * GIB))], 40),
        ([RAN_FULL, *succeeded(3)], 12.5),
        ([RAN_FULL, *succeeded(12)], 15),
        ([RAN_FULL, *succeeded(*[4] * 9)], 12.5),
        ([RAN_FULL, *succeeded(*[4] * 10)], 5),
        ([*succeeded(3), RAN_FULL, *succeeded(3), failed(disk(8 * GIB, 8 * GIB))], 16),
        # lower bounds: they neither stand alone, nor in place of a run that tells
        ([*succeeded(4), failed(disk(8 * GIB, 8 * GIB), code="target-full")], 10),
        ([*succeeded(4), failed(disk(2 * GIB, 8 * GIB), code="target-full")], 5),
        ([*succeeded(4), run(disk(8 * GIB), outcome="cancelled")], 10),
        ([*succeeded(4), *[failed(disk(0), code="target-full")] * 20], 5),
        ([RAN_FULL, failed(disk(0), code="target-full")], 20),
        ([failed(disk(8 * GIB), code="target-full"), *succeeded(*[4] * 10)], 5),
        # a failure that is not this disk's
        ([*succeeded(4), failed(disk(8 * GIB, 16 * GIB))], 10),
        # from before results said what was granted
        ([*succeeded(4), failed(disk(8 * GIB, None))], 10),
        ([run(disk(4 * GIB, None))], 5),
        # other kinds, other sizes
        ([*succeeded(4), run(disk(40 * GIB), kind="incremental")], 5),
        ([run(disk(4 * GIB, size_bytes=GIB))], 5),
        # without fleecing
        ([*succeeded(4), *[run(disk(0, storage=None))] * 10], 5),
    ],
)
def test_what_is_expected(results: list[Document], gibs: float) -> None:
    assert history.expected(results, "full") == {"vda": gibs * GIB}


@pytest.mark.parametrize(
    "results",
    [
        [],
        [run()],
        [run(disk(4 * GIB), kind="incremental")],
        [run(disk(4 * GIB, storage=None))],
        [failed(disk(4 * GIB), code="target-full")],
        [run(disk(4 * GIB), outcome="cancelled")],
        [failed(disk(4 * GIB, None))],
    ],
)
def test_what_tells_nothing(results: list[Document]) -> None:
    assert history.expected(results, "full") == {}


@pytest.mark.parametrize("grant", [64 * 1024 * 4, MIB, 2 * MIB, 256 * MIB, GIB, 100 * GIB])
def test_an_image_is_full_close_to_its_limit(grant: int) -> None:
    """The limit is what QEMU stops at: of a large grant that is far more than 2 MiB below it."""
    near = estimate.limit(grant) - min(2 * MIB, grant // 4)
    for peak in (near, estimate.limit(grant), grant):
        assert history.expected([failed(disk(peak, grant))], "full") == {"vda": 2 * grant}
    assert history.expected([failed(disk(near - 1, grant))], "full") == {}


def test_each_disk_has_its_own_history() -> None:
    calm, full = disk(GIB, 4 * GIB, disk="vdb"), disk(10 * GIB, 10 * GIB)
    unrelated = run(disk(2 * GIB, disk="vdc"))
    assert history.expected([*[run(calm)] * 2, unrelated, failed(full, calm)], "full") == {
        "vda": 20 * GIB,
        "vdb": GIB * 5 // 4,
        "vdc": GIB * 5 // 2,
    }
    assert history.expected([failed(full, calm), run(calm)], "full")["vda"] == 20 * GIB


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["full", "failed", FULL, "vda"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["code", "disk"]), inner),
    max_leaves=4,
)


@given(st.data())
def test_malformed_results_are_skipped(data: st.DataObject) -> None:
    def spoilt(document: Document) -> Document:
        keys = data.draw(st.lists(st.sampled_from(sorted(document)), unique=True))
        lost = data.draw(st.sets(st.sampled_from(sorted(document))))
        drawn = {key: data.draw(junk) for key in keys}
        return {key: value for key, value in (document | drawn).items() if key not in lost}

    results: list[Any] = [
        data.draw(junk),
        spoilt(run(disk(4 * GIB))),
        spoilt(failed(spoilt(disk(4 * GIB, 4 * GIB)))),
        run(spoilt(disk(4 * GIB)), data.draw(junk)),
        *succeeded(4),
    ]
    found = history.expected(results, "full")
    assert found["vda"] == 5 * GIB


some_runs = st.lists(
    st.builds(
        lambda peak, grant, how: (
            run(disk(peak, grant)) if how == "succeeded" else failed(disk(peak, grant), code=how)
        ),
        st.integers(0, 8).map(lambda peak: peak * GIB),
        st.integers(0, 8).map(lambda grant: grant * GIB),
        st.sampled_from(["succeeded", FULL, "target-full"]),
    ),
    max_size=15,
)


@given(some_runs, st.integers(0, 20))
def test_the_last_success_bounds_from_below_and_all_peaks_and_grants_from_above(
    results: list[Document], peak: int
) -> None:
    most = max((max(d["fleecing_peak_bytes"], d["grant_bytes"]) for r in results for d in r["disks"]), default=0)
    for document in (run(disk(peak * GIB)), failed(disk(peak * GIB, peak * GIB))):
        expected = history.expected([*results, document], "full").get("vda", 0)
        least = 2 * peak * GIB if document["error"] else peak * GIB * 5 // 4
        assert least <= expected <= max(2 * most, least)


@given(some_runs)
def test_ten_good_runs_make_all_before_them_forgotten(results: list[Document]) -> None:
    assert history.expected([*results, *succeeded(*[1] * 10)], "full") == {"vda": GIB * 5 // 4}
