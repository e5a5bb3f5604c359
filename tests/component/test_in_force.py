"""A configuration takes the place of another: what stays, what is new, and what is let go, without an engine."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator import config
from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.memory import MemoryLedger
from orchestrator.config import Config
from orchestrator.errors import ConfigError
from orchestrator.qemu.builds import Builds
from orchestrator.run.backup import Means
from orchestrator.service import drivers
from orchestrator.service.in_force import InForce, Setup
from orchestrator.state.journal import Journal

CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
max_runs = 2
[storage.local]
path = "{folder}/fleecing"
quota = "1GiB"
[target.main]
path = "{folder}/backups"
[target.other]
path = "{folder}/others"
max_runs = 3
[vm.web01]
qmp = "/run/qemu/web01.qmp"
"""

Loaded = Callable[..., Config]


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    """The configuration with something put in the place of something else."""

    def load(*replace: tuple[str, str]) -> Config:
        text = CONFIG.format(folder=tmp_path)
        for old, new in replace:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "vmfleece.toml"
        path.write_text(text)
        return config.load(path)

    return load


@pytest.fixture
def controller() -> Controller:
    return Controller({}, MemoryLedger(), max_runs=None, target_max_runs={})


@pytest.fixture
def in_force(loaded: Loaded, controller: Controller, tmp_path: Path) -> InForce:
    first = loaded()
    storages = drivers.storages(first)
    means = Means(
        storages=drivers.storages_for_plans(first, storages, lambda _vm: [{"vm": "web01"}], lambda _storage: 7),
        targets=drivers.targets(first),
        controller=controller,
        is_ours=lambda run: run == "0000abcd",
        journal=Journal(tmp_path),
        builds=Builds(),
    )
    return InForce(Setup(first, storages, means), controller)


def test_what_did_not_change_goes_on_and_the_rest_is_new(in_force: InForce, loaded: Loaded) -> None:
    before = in_force.now
    change = in_force.take(loaded(("others", "elsewhere"), ('"1GiB"', '"2GiB"\nfirst_grant = "1GiB"')))
    assert change.changed == ("storage.local", "target.other")
    now = in_force.now
    assert now.storages["local"] is before.storages["local"]
    assert now.storages["local"].quota_bytes == 2 << 30
    assert now.targets["main"] is before.targets["main"]
    assert now.targets["other"] is not before.targets["other"]
    assert now.means.storages.by_name == now.storages
    assert now.means.storages.first_shares == {"local": 1 << 30}


def test_what_runs_share_beside_storages_and_targets_stays(in_force: InForce, loaded: Loaded) -> None:
    before = in_force.now.means
    in_force.take(loaded(("others", "elsewhere")))
    now = in_force.now.means
    for name in ("controller", "is_ours", "journal", "connect"):
        assert getattr(now, name) is getattr(before, name)
    assert (now.storages.past_results("web01"), now.storages.used_bytes("local")) == ([{"vm": "web01"}], 7)


def test_admission_knows_all_that_anybody_uses(in_force: InForce, loaded: Loaded, controller: Controller) -> None:
    assert set(controller.accounts.storages) == {"local"}
    before = in_force.now
    with in_force.using(before):
        in_force.take(loaded(("storage.local", "storage.new"), ("/fleecing", "/new")))
        assert set(controller.accounts.storages) == {"local", "new"}
        with in_force.using(before), in_force.using(in_force.now):
            assert set(controller.accounts.storages) == {"local", "new"}
        assert set(controller.accounts.storages) == {"local", "new"}
    assert set(controller.accounts.storages) == {"new"}
    assert not in_force.busy


def test_admission_forgets_what_was_used_until_something_failed(
    in_force: InForce, loaded: Loaded, controller: Controller
) -> None:
    with suppress(ZeroDivisionError), in_force.using(in_force.now):
        in_force.take(loaded(("storage.local", "storage.new"), ("/fleecing", "/new")))
        raise ZeroDivisionError
    assert set(controller.accounts.storages) == {"new"}
    assert not in_force.busy


def test_what_is_let_go_may_be_used_again_for_a_while(
    in_force: InForce, loaded: Loaded, controller: Controller
) -> None:
    """Work that was begun before a reload, and is not done with when it begins another part."""
    before = in_force.now
    in_force.take(loaded(("storage.local", "storage.new"), ("/fleecing", "/new")))
    assert set(controller.accounts.storages) == {"new"}
    with in_force.using(before):
        assert set(controller.accounts.storages) == {"local", "new"}
    assert set(controller.accounts.storages) == {"new"}


def test_a_folder_is_exchanged_only_while_nobody_uses_it(in_force: InForce, loaded: Loaded) -> None:
    moved = loaded(("/fleecing", "/elsewhere"))
    before = in_force.now
    with in_force.using(before), pytest.raises(ConfigError) as refused:
        in_force.check(moved)
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["storage.local.path"]
    assert in_force.now is before
    in_force.check(moved)
    in_force.take(moved)
    assert in_force.now.storages["local"] is not before.storages["local"]


def test_what_takes_effect_was_not_refused(in_force: InForce, loaded: Loaded) -> None:
    in_force.refused, since = ("vm.web01: unknown key 'qpm'",), in_force.since
    assert not in_force.take(loaded())
    assert in_force.refused == ()
    assert in_force.since > since
