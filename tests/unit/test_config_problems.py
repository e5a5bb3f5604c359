import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import config
from orchestrator.config.later import LATER
from orchestrator.config.schema import SECTIONS
from orchestrator.errors import ConfigError
from tests.unit.test_config import GOOD, a_repository, load, problems, with_line

CASES = [
    # wrong kinds of values
    ("daemon", "max_runs = 0", "daemon.max_runs: 0 is not allowed; allowed: at least 1"),
    ("daemon", 'max_runs = "4"', "daemon.max_runs: '4' is not allowed; allowed: a whole number"),
    ("daemon", "max_runs = true", "daemon.max_runs: true is not allowed; allowed: a whole number"),
    ("daemon", "state_dir = 3", "daemon.state_dir: 3 is not allowed; allowed: a text in quotes"),
    (
        "daemon",
        'log_level = "loud"',
        "daemon.log_level: 'loud' is not allowed; allowed: 'debug', 'info', 'warning', 'error'",
    ),
    ("daemon", "log_format = 1", "1 is not allowed; allowed: 'json', 'console'"),
    ("daemon", 'listen = "9321"', "daemon.listen: '9321' is nowhere to listen; allowed: an address and a port"),
    ("daemon", 'listen = "127.0.0.1:0"', "daemon.listen: '127.0.0.1:0' is nowhere to listen"),
    ("daemon", 'listen = "127.0.0.1:65536"', "daemon.listen: '127.0.0.1:65536' is nowhere to listen"),
    ("daemon", 'listen = "[127.0.0.1]:80x"', "daemon.listen: '[127.0.0.1]:80x' is nowhere to listen"),
    ("daemon", 'listen = "1.2.3:80"', "daemon.listen: '1.2.3:80' is nowhere to listen"),
    ("daemon", "listen = 9321", "daemon.listen: 9321 is nowhere to listen"),
    ("daemon", 'hosts = ["a:80"]', "daemon.hosts: 'a:80' is no name of a host; allowed: such as"),
    ("daemon", 'token_file = "token"', "daemon.token_file: 'token' is no path"),
    ("daemon", "ledger = 3", "daemon.ledger: 3 is not allowed; allowed: a text in quotes"),
    ("target.main", 'compress = "lz4"', "'lz4' is not allowed; allowed: 'none', 'zstd'"),
    ("target.main", 'driver = "ext4"', "main.driver: 'ext4' is not allowed; allowed: 'images', 'restic'"),
    ("vm.web01", 'extra_files = "/f"', "extra_files: '/f' is not allowed; allowed: a list"),
    ("vm.web01", 'extra_files = ["/f", "g"]', "extra_files: 'g' is no path; allowed: an absolute one"),
    ("vm.web01", "priority = 101", "vm.web01.priority: 101 is not allowed; allowed: at most 100"),
    ("vm.web01", 'latency_budget = "0s"', "'0s' is no budget for a write; allowed: from 100us to 10s"),
    ("vm.web01", 'latency_budget = "11s"', "'11s' is no budget for a write; allowed: from 100us to 10s"),
    ("vm.web01", "priority = -1", "vm.web01.priority: -1 is not allowed; allowed: at least 0"),
    ("vm.web01", 'exclude_disks = "a"', "'a' is not allowed; allowed: a list, such as"),
    ("vm.web01", "exclude_disks = [1]", "exclude_disks: 1 is not allowed; allowed: a text"),
    ("vm.web01", 'exclude_disks = [""]', "'' is not allowed; allowed: a text that is not empty"),
    ("job.nightly", "retries = 11", "job.nightly.retries: 11 is not allowed; allowed: at most 10"),
    ("job.nightly", 'repeat_missed = "yes"', "'yes' is not allowed; allowed: true or false"),
    ("job.nightly", "vms = []", "job.nightly.vms: [] is not allowed; allowed: a list that is not"),
    (
        "job.nightly",
        'consistency = "paus"',
        "job.nightly.consistency: 'paus' is not allowed; allowed: 'freeze', 'pause', 'none'",
    ),
    (
        "job.nightly",
        'fleecing_policy = "off"',
        "'off' is not allowed; allowed: 'require', 'prefer'",
    ),
    # units
    (
        "storage.local",
        'quota = "lots"',
        "storage.local.quota: 'lots' is no size; allowed: bytes as",
    ),
    ("storage.local", "quota = 1.5", "storage.local.quota: 1.5 is no size; allowed: bytes as"),
    ("storage.local", "quota = true", "storage.local.quota: True is no size; allowed: bytes as"),
    (
        "storage.local",
        'quota = "1MiB"',
        "storage.local.quota: 1.0 MiB is too small; allowed: at least 2.0 MiB, the smallest",
    ),
    ("storage.local", 'min_free = "100%"', "'100%' is no share or size; allowed: a share from 0%"),
    ("job.nightly", 'bwlimit = "fast"', "job.nightly.bwlimit: 'fast' is no rate; allowed: KiB/s"),
    ("job.nightly", 'randomized_delay = "soon"', "'soon' is no duration; allowed: seconds as"),
    ("job.nightly", "randomized_delay = nan", "nan is no duration; allowed: seconds as"),
    ("job.nightly", "randomized_delay = 2026-11-22", "is no duration; allowed: seconds as"),
    (
        "job.nightly",
        'cbw_timeout = "0"',
        "'0' would let a guest's write wait without end; allowed: whole seconds from 1s to 45s",
    ),
    (
        "job.nightly",
        "cbw_timeout = 46",
        "46 is too long: virtio on Windows gives up on a write after 60 s; allowed: whole seconds",
    ),
    ("job.nightly", 'cbw_timeout = "1500ms"', "'1500ms' is not in whole seconds; allowed: whole"),
    ("job.nightly", 'cbw_timeout = "x"', "job.nightly.cbw_timeout: 'x' is no duration; allowed:"),
    (
        "job.nightly",
        'schedule = "mon..fri 25:00"',
        "job.nightly.schedule: 'mon..fri 25:00' is no calendar expression (bad hour); allowed: a",
    ),
    ("job.nightly", 'schedule = "*-02-30"', "'*-02-30' never comes; allowed: a systemd calendar"),
    ("job.nightly", "schedule = 02:30:00", "is not allowed; allowed: a text in quotes"),
    # paths
    (
        "storage.local",
        'path = "fleecing"',
        "storage.local.path: 'fleecing' is no path; allowed: an absolute one, such as '/srv'",
    ),
    ("storage.local", 'path = "/a\\u0000b"', "is no path; allowed: an absolute one"),
    ("target.main", 'path = ""', "target.main.path: '' is no path; allowed: an absolute one"),
    ("vm.web01", f'qmp = "/{"x" * 107}"', "is 108 bytes long; allowed for a socket: 107"),
    (
        "vm.db01",
        'qmp = "/run/../run/qemu/./web01.qmp"',
        "vm.db01.qmp: '/run/../run/qemu/web01.qmp' is the socket of vm.web01.qmp too; allowed: one of",
    ),
    (
        "target.main",
        'path = "/fleecing/backup"',
        "target.main.path: '/fleecing/backup' lies inside storage.local.path, '/fleecing'; allowed",
    ),
    ("target.main", 'path = "/"', "target.main.path: '/' contains storage.local.path, '/fleecing'"),
    # what does not fit the driver
    (
        "target.main",
        'url = "s3://bucket"',
        "not for driver 'images', a folder of qcow2 files; allowed: with driver",
    ),
    ("target.main", 'password_file = "/p"', "not for driver 'images', a folder of qcow2 files; allowed: with"),
    ("target.main", 'reclaim = "daily"', "not for driver 'images', a folder of qcow2 files; allowed: with"),
    # references
    ("job.nightly", 'target = "mian"', "there is no target 'mian'; targets: main"),
    ("job.nightly", 'target = "a b"', "job.nightly.target: 'a b' is no name; allowed: 1 to 64"),
    (
        "job.nightly",
        'vms = ["web*", "mail*"]',
        "job.nightly.vms: no VM is called 'mail*'; VMs: web01, db01",
    ),
    (
        "job.nightly",
        'exclude = ["w*"]',
        "job.nightly.exclude: ['w*'] leaves none of the job's VMs; VMs: web01, db01",
    ),
    # fleecing
    (
        "job.nightly",
        'fleecing = "enabled=1,storage=ssd"',
        "job.nightly.fleecing.storage: there is no storage 'ssd'; storages: local",
    ),
    ("job.nightly", 'fleecing = {storage = "ssd"}', "no storage 'ssd'; storages: local"),
    (
        "job.nightly",
        'fleecing = "enabled"',
        "job.nightly.fleecing: 'enabled': 'enabled' is no property; allowed: \"enabled=1\"",
    ),
    ("job.nightly", 'fleecing = ""', "'' is no property; allowed: \"enabled=1\""),
    ("job.nightly", 'fleecing = "enabled=1,"', "'' is no property; allowed: \"enabled=1\""),
    ("job.nightly", 'fleecing = "1,storage="', "'storage=' is no property; allowed:"),
    ("job.nightly", 'fleecing = "enabled=2"', "enabled is '2'; allowed: 1 or 0"),
    ("job.nightly", 'fleecing = "enabled=1,enabled=0"', "gives enabled twice; allowed:"),
    ("job.nightly", 'fleecing = "speed=1"', "'speed' is not known; allowed: \"enabled=1\""),
    ("job.nightly", "fleecing = true", 'True says nothing about fleecing; allowed: "enabled=1"'),
    (
        "job.nightly",
        "fleecing = {enabled = 1}",
        "job.nightly.fleecing.enabled: 1 is not allowed; allowed: true or false",
    ),
    (
        "job.nightly",
        "fleecing = {enable = true}",
        "job.nightly.fleecing.enable: unknown; did you mean 'enabled'?",
    ),
    (
        "job.nightly",
        'fleecing = "enabled=0,storage=local"',
        "storage 'local' is given but fleecing is off; allowed: enabled=1 with a storage",
    ),
    # retention
    (
        "job.nightly",
        'prune_backups = "keep-last=3,keep-dayly=13"',
        "job.nightly.prune_backups: 'keep-last=3,keep-dayly=13': 'keep-dayly' is not known; allowed: \"keep",
    ),
    (
        "job.nightly",
        'prune_backups = ""',
        "job.nightly.prune_backups: '': '' is no property; allowed: \"keep-last",
    ),
    (
        "job.nightly",
        'prune_backups = "keep-last=0"',
        "'keep-last=0' would keep nothing; allowed: a number above 0",
    ),
    ("job.nightly", 'prune_backups = "keep-last=x"', "keep-last is 'x'; allowed: a whole number"),
    (
        "job.nightly",
        "prune_backups = 3",
        '3 says nothing about what is kept; allowed: "keep-last=3,keep-daily=13"',
    ),
    (
        "job.nightly",
        "prune_backups = {keep-last = 3}",
        "{'keep-last': 3} says nothing about what is kept; allowed:",
    ),
    # unknown keys
    ("daemon", "max_run = 1", "daemon.max_run: unknown; did you mean 'max_runs'?"),
    ("job.nightly", 'shedule = "daily"', "job.nightly.shedule: unknown; did you mean 'schedule'?"),
    (
        "vm.web01",
        "zzz = 1",
        "vm.web01.zzz: unknown; allowed: qmp, agent, priority, latency_budget, exclude_disks, extra_files",
    ),
]


@pytest.mark.parametrize(("section", "line", "expected"), CASES)
def test_a_problem_says_where_it_is_what_was_given_and_what_is_allowed(
    tmp_path: Path, section: str, line: str, expected: str
) -> None:
    text = with_line(section, line)
    (problem,) = problems(tmp_path, text)
    assert expected in problem
    line_number = text.splitlines().index(line) + 1
    key = line.split("=", maxsplit=1)[0].strip()
    assert problem.startswith(f"{line_number}: {section}.{key}")


def test_a_job_cannot_freeze_vms_without_an_agent(tmp_path: Path) -> None:
    text = with_line("job.nightly", 'consistency = "freeze"').replace('vms = ["web*"]', 'vms = ["*"]')
    text = text.replace("[vm.web01]", '[vm.web01]\nagent = "/run/qemu/web01.qga"')
    (problem,) = problems(tmp_path, text)
    assert "job.nightly.consistency: 'freeze' needs a guest agent, and there is none of db01" in problem
    assert "web01" not in problem.partition("none of")[2]


def test_a_socket_is_of_one_thing_only(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, with_line("vm.db01", 'agent = "/run/qemu/web01.qmp"'))
    assert (
        "vm.db01.agent: '/run/qemu/web01.qmp' is the socket of vm.web01.qmp too; allowed: one of its own"
        in problem
    )


LATER_CASES = [
    ("daemon", 'ledger = "postgresql://db"', "'postgresql://db' is not available yet; allowed: 's"),
    ("storage.local", 'driver = "lvm"', "'lvm' is not available yet; allowed: 'directory'"),
    ("vm.web01", 'libvirt = "qemu:///system"', "libvirt: not available yet; give qmp, a monitor"),
]


@pytest.mark.parametrize(("section", "line", "expected"), LATER_CASES)
def test_what_comes_later_is_refused(tmp_path: Path, section: str, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, with_line(section, line))
    assert expected in problem


def test_everything_in_the_table_of_later_is_tested() -> None:
    tested = {(section.split(".")[0], line.split(" = ", maxsplit=1)[0]) for section, line, _ in LATER_CASES}
    assert tested == {(each.section, each.key) for each in LATER}


@pytest.mark.parametrize("name", ["..", ".", "", "-a", "a/b", "a b", "ä", "a\\n", "x" * 65, "%s", ".hidden"])
@pytest.mark.parametrize("section", ["storage", "target", "vm", "job"])
def test_names_are_checked_before_they_become_paths(tmp_path: Path, section: str, name: str) -> None:
    content = {
        "storage": 'path = "/s"\nquota = "1GiB"',
        "target": 'path = "/t"',
        "vm": 'qmp = "/q"',
        "job": 'vms = ["web*"]\ntarget = "main"',
    }[section]
    (problem,) = problems(tmp_path, f'{GOOD}\n[{section}."{name}"]\n{content}\n')
    assert re.match(rf"18: {section}\..+ is no name; allowed: 1 to 64 letters, digits", problem)


def test_a_name_of_64_characters_is_allowed(tmp_path: Path) -> None:
    name = "0." + "x" * 62
    assert list(load(tmp_path, GOOD.replace("[vm.db01]", f'[vm."{name}"]')).vm) == ["web01", name]


def test_two_storages_or_targets_with_one_folder(tmp_path: Path) -> None:
    text = GOOD + '[storage.b]\npath = "/fleecing/"\nquota = "1GiB"\n[target.b]\npath = "/x/../backup"\n'
    same, apart = "is the same folder as", "allowed: a folder apart from all other storages and targets"
    assert problems(tmp_path, text) == [
        f"18: storage.b.path: '/fleecing' {same} storage.local.path, '/fleecing'; {apart}",
        f"21: target.b.path: '/x/../backup' {same} target.main.path, '/backup'; {apart}",
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('path = "/b"\nurl = "s3://bucket"', "8: target.main.url: path is given, too; allowed: one of them"),
        ("", "5: target.main.path: missing, but needed: Folder of the backups. For example"),
        ('path = "b"', "7: target.main.path: 'b' is no path; allowed: an absolute one"),
        (
            'path = "/b"\ncompress = "none"',
            "8: target.main.compress: 'none' is not allowed: what is in a repository is always compressed;",
        ),
        ('path = "/b"\nreclaim = "never"', "8: target.main.reclaim: 'never' is no calendar expression"),
        ('path = "/fleecing/b"', "7: target.main.path: '/fleecing/b' lies inside storage.local.path, '/fleecing'"),
        *(
            (f'url = "{url}"', f"7: target.main.url: '{url}' is no address of a repository; allowed: s3://")
            for url in (
                "/b", "s3://", "s3://b", "s3://bucket//x", "s3:bucket", "http://bucket", "s3://bucket/../x",
                "s3://bucket/x/.", "s3://Bucket", "s3://bucket/a b",
            )
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_repository(tmp_path: Path, lines: str, expected: str) -> None:
    (problem,) = problems(tmp_path, a_repository(lines))
    assert problem.startswith(expected)


@pytest.mark.parametrize("url", ["s3://key:hidden@bucket/prefix", "s3://bucket?secret=hidden"])
def test_an_address_that_may_hold_a_secret_is_not_repeated(tmp_path: Path, url: str) -> None:
    (problem,) = problems(tmp_path, a_repository(f'url = "{url}"'))
    assert "7: target.main.url: an address with '@' or '?'; keys of a bucket come from the environment" in problem
    assert "hidden" not in problem


def test_two_repositories_with_one_address(tmp_path: Path) -> None:
    text = a_repository('url = "s3://bucket/a"')
    for name, url in (("same", "s3://bucket/a/"), ("inside", "s3://bucket/a/b"), ("around", "s3://bucket")):
        (problem,) = problems(tmp_path, f'{text}[target.{name}]\ndriver = "restic"\nurl = "{url}"\n')
        assert problem.startswith(f"20: target.{name}.url: ")
        assert "target.main.url, 's3://bucket/a'; allowed: a folder apart" in problem
    load(tmp_path, f'{text}[target.beside]\ndriver = "restic"\nurl = "s3://bucket/ab"\n')


NEEDS_FLEECING = "target 'main' is a repository, which is written chunk by chunk and cannot be read back by QEMU"


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ('fleecing = "enabled=0"', "so it needs a fleecing image; allowed: enabled=1"),
        ('fleecing_policy = "prefer"', "so it needs a fleecing image; allowed: 'require'"),
    ],
)
def test_a_repository_is_not_written_without_fleecing(tmp_path: Path, line: str, allowed: str) -> None:
    (problem,) = problems(tmp_path, a_repository('path = "/b"') + line)
    assert problem == f"18: job.nightly.{line.split(' = ', maxsplit=1)[0]}: {NEEDS_FLEECING}, {allowed}"


@pytest.mark.parametrize(("line", "allowed"), [("full_every = 30", "0"), ("merge_chains = true", "false")])
def test_there_are_no_chains_in_a_repository(tmp_path: Path, line: str, allowed: str) -> None:
    text = a_repository('path = "/b"')
    (problem,) = problems(tmp_path, text + line)
    expected = f"target 'main' is a repository, where no snapshot builds on another; allowed: {allowed}"
    key = line.partition(" ")[0]
    assert problem == f"18: job.nightly.{key}: {expected}"
    load(tmp_path, f"{text}{key} = {allowed}")


def test_a_repository_is_not_written_without_a_storage(tmp_path: Path) -> None:
    text = a_repository('path = "/b"')
    without = text[text.index("[target") :]
    wanted = "so it needs a fleecing image, and there is no storage; allowed: with a [storage.NAME]"
    for line in ("", 'fleecing = "1"', 'fleecing_policy = "require"'):
        assert problems(tmp_path, without + line) == [f"13: job.nightly.target: {NEEDS_FLEECING}, {wanted}"]


def test_everything_that_is_wrong_with_a_repository_is_said_at_once(tmp_path: Path) -> None:
    lines = ('path = "b"', 'url = "s3://b"', 'compress = "none"', "reclaim = 3", 'password = "p"')
    text = a_repository(*lines) + 'fleecing = "enabled=0"\n'
    assert [" ".join(each.split(": ")[:2]) for each in problems(tmp_path, text)] == [
        "7 target.main.path",
        "8 target.main.url",
        "8 target.main.url",
        "9 target.main.compress",
        "10 target.main.reclaim",
        "11 target.main.password",
        "22 job.nightly.fleecing",
    ]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    text = GOOD.replace("/fleecing", f"{tmp_path}/link").replace("/backup", f"{tmp_path}/real/b")
    (problem,) = problems(tmp_path, text)
    assert f"lies inside storage.local.path, '{tmp_path}/real'" in problem
    text = GOOD.replace("/fleecing", f"{tmp_path}/loop") + "x = 1"
    (problem,) = problems(tmp_path, text)
    assert "job.nightly.x: unknown" in problem


def test_required_fleecing_needs_a_storage(tmp_path: Path) -> None:
    without = GOOD[GOOD.index("[target") :]
    for line in ('fleecing = "1"', 'fleecing_policy = "require"'):
        (problem,) = problems(tmp_path, without + line)
        expected = "fleecing is required but there is no storage; allowed: with a [storage.NAME]"
        assert f"job.nightly.{line.split(' = ')[0]}: {expected}" in problem


def test_a_key_that_is_needed_is_missing(tmp_path: Path) -> None:
    found = problems(tmp_path, "[storage.local]\n[target.main]\n[vm.web01]\n[job.nightly]\n")
    assert [each.partition(", but needed: ")[0] for each in found] == [
        "1: storage.local.path: missing",
        "1: storage.local.quota: missing",
        "2: target.main.path: missing",
        "3: vm.web01.qmp: missing",
        "4: job.nightly.target: missing",
        "4: job.nightly.vms: missing",
    ]
    assert found[2].endswith('needed: Folder of the backups. For example "/srv/backup/vms"')


def test_a_name_with_dots_needs_quotes(tmp_path: Path) -> None:
    text = '[vm.web01.example.org]\nqmp = "/run/qemu/web01.qmp"\n'
    assert problems(tmp_path, text)[0] == (
        '1: vm.web01.example: unknown; a name with dots needs quotes, as in [vm."web01.example"]'
    )


def test_every_problem_is_reported_at_once_in_the_files_order(tmp_path: Path) -> None:
    text = """\
[daemon]
max_runs = 0
listen = "localhost:1"

[jobs.x]

[storage.a]
path = "fleecing"
quota = "1MiB"

[storage.b]
path = "/b"
quota = "1GiB"

[target.t]
path = "/b/t"
drver = "images"

[vm.one]
qmp = "/q"
priority = "high"

[vm.two]
qmp = "/q"

[job.j]
vms = ["one", "three"]
target = "tt"
schedule = "never"
fleecing = "enabled=1,storage=c"
"""
    places = [" ".join(each.split(": ")[:2]) for each in problems(tmp_path, text)]
    assert places == [
        "2 daemon.max_runs",
        "3 daemon.listen",
        "5 jobs",
        "8 storage.a.path",
        "9 storage.a.quota",
        "16 target.t.path",
        "17 target.t.drver",
        "21 vm.one.priority",
        "24 vm.two.qmp",
        "27 job.j.vms",
        "28 job.j.target",
        "29 job.j.schedule",
        "30 job.j.fleecing.storage",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vm = 3", "1: vm: is no table; allowed: [vm.NAME]"),
        ("daemon = 3", "1: daemon: is no table; allowed: [daemon]"),
        ("[[daemon]]", "1: daemon: is no table; allowed: [daemon]"),
        ("[vm]\nweb01 = 3", "2: vm.web01: 3 is no table; allowed: [vm.web01]"),
        ("[vmm.web01]", "1: vmm: unknown; did you mean 'vm'?"),
        ("[xyz]", "1: xyz: unknown; allowed: daemon, storage, target, vm, job"),
        ("\n\n= 3", "3: not TOML: Invalid statement"),
        ("[vm.a]\n[vm.a]", "2: not TOML: Cannot declare ('vm', 'a') twice"),
        ("a = '''\n", "2: not TOML: "),
        ("a = " + "1" * 5000, "1: not TOML: "),
        ("a = " + "[" * 20000, "1: not TOML that can be read: nested too deeply"),
    ],
)
def test_what_is_no_table_or_no_toml(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(expected)


def test_what_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "vmfleece.toml").write_bytes(b"# fine\n# \xff\n")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "vmfleece.toml")
    assert caught.value.problems == (f"{tmp_path}/vmfleece.toml:2: not UTF-8, as TOML has to be",)


NASTY = [
    "1",
    "-1",
    "1" + "0" * 30,
    "1e400",
    "nan",
    "true",
    "2026-11-22",
    "02:30:00",
    '""',
    '"/x"',
    '"1GiB"',
    '"main"',
    "[]",
    "[[]]",
    "[1, {a = 2}]",
    "{}",
    '{enabled = true, storage = "local"}',
    '"\\u0000"',
    '"enabled=1,storage=local"',
    '"keep-last=3"',
]
KEYS = [f"{section}.{key}" for section, table in SECTIONS.items() for key in (*table.model_fields, "other")]
LINES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(NASTY)), max_size=8, unique_by=lambda p: p[0])


@settings(deadline=None)  # machines differ
@given(LINES)
def test_any_file_is_a_configuration_or_all_its_problems(lines: list[tuple[str, str]]) -> None:
    tables = "".join(
        f"{key.replace('.', '.x.') if not key.startswith('daemon') else key} = {value}\n" for key, value in lines
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vmfleece.toml"
        path.write_text(tables)
        try:
            found = [setting.origin for setting in config.load(path).settings]
        except ConfigError as error:
            found = list(error.problems)
    assert found
    assert all(each == "default" or each.startswith(f"{path}:") for each in found)
