"""What becomes of a configuration in force when its file was changed, held against what was written into it."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.config import Config, change

NAMES = ("a1", "a2", "b1")
TIMES = ("02:30", "04:00", None)


@dataclass(frozen=True)
class Written:
    """What a file says: tables and keys by their names. All VMs of a job are on one target."""

    daemon: dict[str, Any]
    tables: dict[str, dict[str, Any]]

    def parts(self) -> dict[str, Any]:
        """What counts of each table: of a job's patterns, which VMs they mean, in the file's order."""
        vms = [name.removeprefix("vm.") for name in self.tables if name.startswith("vm.")]
        return {f"daemon.{key}": value for key, value in self.daemon.items()} | {
            name: table | {"vms": [vm for vm in vms if fnmatchcase(vm, table["vms"])]} if "vms" in table else table
            for name, table in self.tables.items()
        }

    def text(self, *, backwards: bool) -> str:
        """As a file; backwards but for VMs, which jobs take in their order."""
        vms = [one for one in self.tables.items() if one[0].startswith("vm.")]
        others = [one for one in self.tables.items() if one not in vms]
        lines = [f"# {len(self.tables)} tables", "[daemon]", *_lines(self.daemon)]
        for name, table in [*vms, *reversed(others)] if backwards else [*others, *vms]:
            lines += ["", f"[{name}]", *_lines(table)]
        return "\n".join(lines)

    def loaded(self, *, backwards: bool = False) -> Config:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "vmfleece.toml"
            path.write_text(self.text(backwards=backwards))
            return config.load(path)


def _lines(table: dict[str, Any]) -> list[str]:
    texts = {key: [value] if key == "vms" else value for key, value in table.items() if value is not None}
    return [f"{key} = {str(value).replace(chr(39), chr(34))}" for key, value in texts.items()]


def quoted(*values: str) -> st.SearchStrategy[str]:
    return st.sampled_from([f'"{value}"' for value in values])


def some(section: str, tables: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, dict[str, Any]]]:
    names = st.sampled_from(NAMES).map(lambda name: f"{section}.{name}")
    return st.dictionaries(names, tables, max_size=3)


@st.composite
def files(draw: st.DrawFn) -> Written:
    daemon = {
        "state_dir": draw(quoted("/var/a", "/var/a", "/var/b")),
        "run_dir": draw(quoted("/run/a", "/run/a", "/run/b")),
        "max_runs": draw(st.integers(1, 3)),
        "stop_timeout": draw(quoted("60s", "2min")),
        "log_level": draw(quoted("info", "debug")),
    }
    storage = st.fixed_dictionaries({"path": quoted("/f/a", "/f/b"), "quota": quoted("1GiB", "2GiB")})
    target = st.fixed_dictionaries({"path": quoted("/b/a", "/b/b"), "max_runs": st.sampled_from([None, 1, 2])})
    vm = st.fixed_dictionaries({"priority": st.integers(1, 2)})
    tables = draw(some("storage", storage))
    for number, (name, table) in enumerate(tables.items()):
        table["path"] = table["path"].replace("/f/", f"/f{number if name else ''}/")
    targets = draw(some("target", target).filter(bool))
    for number, table in enumerate(targets.values()):
        table["path"] = table["path"].replace("/b/", f"/b{number}/")
    vms = draw(some("vm", vm).filter(bool))
    for name, table in vms.items():
        table["qmp"] = f'"/run/{name}.qmp"'
    patterns = ["*", *(f"{name.removeprefix('vm.')[0]}*" for name in vms)]
    jobs = draw(
        some(
            "job",
            st.fixed_dictionaries(
                {
                    "schedule": st.sampled_from(TIMES).map(lambda at: f'"{at}"' if at else None),
                    "vms": st.sampled_from(patterns),
                    "target": st.sampled_from([f'"{name.removeprefix("target.")}"' for name in targets]),
                    "fleecing": st.just('"enabled=0"'),
                    "fleecing_policy": st.just('"prefer"'),
                }
            ),
        )
    )
    return Written(daemon, tables | targets | vms | jobs)


@settings(max_examples=60, deadline=None)
@given(files(), files())
def test_what_was_added_changed_and_removed_is_what_was_written(before: Written, after: Written) -> None:
    old, new = before.loaded(), after.loaded()
    was, is_now = before.parts(), after.parts()
    found = change.between(old, new)
    assert set(found.added) == is_now.keys() - was.keys()
    assert set(found.removed) == was.keys() - is_now.keys()
    assert set(found.changed) == {name for name in was.keys() & is_now.keys() if was[name] != is_now[name]}
    assert bool(found) == (was != is_now)
    back = change.between(new, old)
    assert (set(back.added), set(back.removed)) == (set(found.removed), set(found.added))
    assert set(back.changed) == set(found.changed)


@settings(max_examples=25, deadline=None)
@given(files())
def test_a_file_that_says_the_same_in_another_order_changes_nothing(written: Written) -> None:
    assert not change.between(written.loaded(), written.loaded(backwards=True))


@settings(max_examples=60, deadline=None)
@given(files(), files(), st.booleans())
def test_only_what_cannot_take_effect_is_refused(before: Written, after: Written, busy: bool) -> None:
    refused = change.refusals(before.loaded(), after.loaded(), busy=busy)
    expected = [f"daemon.{key}" for key in change.FIXED if before.daemon[key] != after.daemon[key]]
    expected += [
        f"{name}.path"
        for name in before.tables.keys() & after.tables.keys()
        if busy and name.startswith("storage.") and before.tables[name]["path"] != after.tables[name]["path"]
    ]
    assert sorted(problem.split(":")[0] for problem in refused) == sorted(expected)


@pytest.mark.parametrize("key", change.FIXED)
def test_a_refusal_names_what_is_in_force(key: str) -> None:
    job = {"schedule": '"02:30"', "vms": "*", "target": '"a"', "fleecing": '"enabled=0"'}
    tables = {"target.a": {"path": '"/b"'}, "vm.v": {"qmp": '"/run/v.qmp"'}, "job.j": job}
    old, new = (
        Written({"state_dir": '"/a"', "run_dir": '"/a"', key: f'"/{value}"'}, tables).loaded()
        for value in ("old", "new")
    )
    (problem,) = change.refusals(old, new, busy=False)
    assert problem == f"daemon.{key}: cannot be changed while vmfleece runs (in force: /old); restart it"
