import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from orchestrator import config, model
from orchestrator.config.later import LATER
from orchestrator.config.schema import SECTIONS
from orchestrator.errors import ConfigError
from orchestrator.units import GIB, MIB, Share

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config" / "vmfleece.toml"

GOOD = """\
[storage.local]
path = "/fleecing"
quota = "10GiB"

[target.main]
path = "/backup"

[vm.web01]
qmp = "/run/qemu/web01.qmp"

[vm.db01]
qmp = "/run/qemu/db01.qmp"

[job.nightly]
vms = ["web*"]
target = "main"
"""


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "vmfleece.toml"
    path.write_text(text)
    return config.load(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    found = caught.value.problems
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    assert caught.value.message == f"{count} in {tmp_path}/vmfleece.toml"
    return [each.removeprefix(f"{tmp_path}/vmfleece.toml:") for each in found]


def with_line(section: str, line: str) -> str:
    """Put `line` at the end of a table of GOOD, instead of one with the same key."""
    key = line.partition("=")[0].strip()
    head, _, tail = f"[daemon]\nmax_runs = 4\n\n{GOOD}".partition(f"[{section}]\n")
    body, _, rest = tail.partition("\n\n")
    kept = [each for each in body.splitlines() if each.partition("=")[0].strip() != key]
    return f"{head}[{section}]\n" + "\n".join([*kept, line]) + f"\n\n{rest}"


def test_defaults(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.daemon == config.DaemonSettings(
        state_dir=Path("/var/lib/vmfleece"),
        run_dir=Path("/run/vmfleece"),
        stop_timeout_seconds=60.0,
        max_runs=4,
        log_format=config.LogFormat.JSON,
        log_level=config.LogLevel.INFO,
    )
    assert loaded.storage == {
        "local": config.StorageSettings(
            "local", Path("/fleecing"), 10 * GIB, Share(10.0), Share(10.0), max_runs=None
        )
    }
    assert loaded.target == {
        "main": config.TargetSettings("main", config.TargetDriver.IMAGES, "/backup", Path("/backup"))
    }
    assert loaded.vms() == {
        "web01": model.Vm("web01", Path("/run/qemu/web01.qmp"), 50, ()),
        "db01": model.Vm("db01", Path("/run/qemu/db01.qmp"), 50, ()),
    }
    assert loaded.job_vms("nightly") == ["web01"]
    assert loaded.run_options("nightly") == model.RunOptions(
        target="main",
        fleecing=model.Fleecing(True, None, model.FleecingPolicy.PREFER),
        consistency=model.Consistency.PAUSE,
        cbw_timeout_seconds=10,
        bwlimit_bytes_per_second=0,
        job="nightly",
    )
    job = loaded.job["nightly"]
    assert (job.schedule, job.randomized_delay_seconds, job.repeat_missed, job.retries, job.keep) == (
        None,
        0,
        False,
        2,
        None,
    )


def test_an_empty_file_is_a_configuration(tmp_path: Path) -> None:
    loaded = load(tmp_path, "")
    assert (loaded.storage, loaded.target, loaded.vm, loaded.job) == ({}, {}, {}, {})


def test_the_example_has_every_value_that_design_gives() -> None:
    loaded = config.load(EXAMPLE)
    assert loaded.storage["local"].quota_bytes == 200 * GIB
    assert loaded.target["main"] == config.TargetSettings(
        "main",
        config.TargetDriver.RESTIC,
        "/srv/backup/vms",
        Path("/srv/backup/vms"),
        compress=model.Compression.ZSTD,
        password_file=Path("/etc/vmfleece/main.password"),
        reclaim="sun 04:00",
        max_runs=2,
    )
    assert loaded.vm["web01"].exclude_disks == ("scratch0",)
    assert loaded.vm["web01"].extra_files == (Path("/var/lib/qemu/web01/OVMF_VARS.fd"),)
    job = loaded.job["nightly"]
    assert job.vms == ("web01", "db01")
    assert job.schedule == "mon..fri 02:30"
    assert job.randomized_delay_seconds == 900
    assert job.repeat_missed
    assert job.keep == model.Keep(last=3, daily=13, weekly=8)
    assert job.options.fleecing == model.Fleecing(True, "local", model.FleecingPolicy.REQUIRE)


def test_what_leaves_is_frozen(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    with pytest.raises(FrozenInstanceError):
        loaded.storage["local"].quota_bytes = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "line", "read"),
    [
        ("storage.local", "quota = 67108864", lambda c: c.storage["local"].quota_bytes == 64 * MIB),
        ("storage.local", 'min_free = "5GiB"', lambda c: c.storage["local"].min_free == 5 * GIB),
        ("target.main", 'compress = "zstd"', lambda c: c.target["main"].compress == "zstd"),
        ("target.main", 'driver = "images"', lambda c: c.target["main"].driver is config.TargetDriver.IMAGES),
        ("vm.web01", 'extra_files = ["/f"]', lambda c: c.vm["web01"].extra_files == (Path("/f"),)),
        ("vm.web01", 'latency_budget = "20ms"', lambda c: c.vm["web01"].latency_budget_seconds == 0.02),
        ("vm.web01", "priority = 100", lambda c: c.vm["web01"].priority == 100),
        ("daemon", 'listen = "127.0.0.1:9321"', lambda c: c.daemon.listen == config.Address("127.0.0.1", 9321)),
        ("daemon", 'listen = "[0::1]:80"', lambda c: str(c.daemon.listen) == "[::1]:80"),
        ("daemon", 'hosts = ["b.example.org"]', lambda c: c.daemon.hosts == ("b.example.org",)),
        ("daemon", 'token_file = "/t"', lambda c: c.daemon.token_file == Path("/t")),
        ("daemon", 'log_format = "console"', lambda c: c.daemon.log_format == "console"),
        (
            "job.nightly",
            "bwlimit = 1024",
            lambda c: c.run_options("nightly").bwlimit_bytes_per_second == MIB,
        ),
        (
            "job.nightly",
            'cbw_timeout = "45s"',
            lambda c: c.run_options("nightly").cbw_timeout_seconds == 45,
        ),
        (
            "job.nightly",
            'consistency = "none"',
            lambda c: c.run_options("nightly").consistency is model.Consistency.NONE,
        ),
        (
            "job.nightly",
            'prune_backups = "keep-last=3, keep-yearly=1"',
            lambda c: c.job["nightly"].keep == model.Keep(last=3, yearly=1),
        ),
        (
            "job.nightly",
            'prune_backups = "keep-all=1"',
            lambda c: c.job["nightly"].keep == model.Keep(all=True),
        ),
        ("job.nightly", 'exclude = ["web1*"]', lambda c: c.job_vms("nightly") == ["web01"]),
        ("job.nightly", 'vms = ["*"]', lambda c: c.job_vms("nightly") == ["web01", "db01"]),
    ],
)
def test_values_are_read(tmp_path: Path, section: str, line: str, read: object) -> None:
    assert callable(read)
    assert read(load(tmp_path, with_line(section, line)))


def a_repository(*lines: str) -> str:
    """GOOD, with a repository instead of a folder of images."""
    return GOOD.replace('path = "/backup"\n', "\n".join(['driver = "restic"', *lines, ""]))


@pytest.mark.parametrize(
    ("place", "url", "path"),
    [
        ("/backup", 'path = "/backup"', Path("/backup")),
        ("s3://bucket", 'url = "s3://bucket"', None),
        ("s3://my.bucket-2/Some/pre_fix=1", 'url = "s3://my.bucket-2/Some/pre_fix=1/"', None),
    ],
)
def test_a_repository(tmp_path: Path, place: str, url: str, path: Path | None) -> None:
    loaded = load(tmp_path, a_repository(url))
    restic, zstd = config.TargetDriver.RESTIC, model.Compression.ZSTD
    assert loaded.target["main"] == config.TargetSettings("main", restic, place, path, zstd)
    rows = {each.key: (each.value, each.origin) for each in config.effective(loaded)}
    assert rows["target.main.compress"] == ("zstd", "default")
    assert rows["target.main.password_file"] == (None, "default")
    assert rows["job.nightly.fleecing_policy"] == ("require", "default")
    assert loaded.run_options("nightly").fleecing == model.Fleecing(True, None, REQUIRE)


def test_a_repository_takes_all_its_keys(tmp_path: Path) -> None:
    lines = ('path = "/b"', 'password_file = "/p"', 'reclaim = "sun 04:00"', "max_runs = 1", 'compress = "zstd"')
    settings = load(tmp_path, a_repository(*lines)).target["main"]
    assert (settings.password_file, settings.reclaim, settings.max_runs) == (Path("/p"), "sun 04:00", 1)


REQUIRE, PREFER = model.FleecingPolicy.REQUIRE, model.FleecingPolicy.PREFER


@pytest.mark.parametrize(
    ("lines", "fleecing"),
    [
        ("", model.Fleecing(True, None, PREFER)),
        ('fleecing_policy = "require"', model.Fleecing(True, None, REQUIRE)),
        ('fleecing = "enabled=1"', model.Fleecing(True, None, REQUIRE)),
        ('fleecing = "1"', model.Fleecing(True, None, REQUIRE)),
        ('fleecing = "storage=local"', model.Fleecing(True, "local", REQUIRE)),
        ('fleecing = "enabled=1, storage=local"', model.Fleecing(True, "local", REQUIRE)),
        ('fleecing = {storage = "local"}', model.Fleecing(True, "local", REQUIRE)),
        (
            'fleecing = {enabled = true, storage = "local"}\nfleecing_policy = "prefer"',
            model.Fleecing(True, "local", PREFER),
        ),
        ('fleecing = "enabled=0"', model.Fleecing(False, None, PREFER)),
        ("fleecing = {enabled = false}", model.Fleecing(False, None, PREFER)),
    ],
)
def test_fleecing(tmp_path: Path, lines: str, fleecing: model.Fleecing) -> None:
    assert load(tmp_path, GOOD + lines).run_options("nightly").fleecing == fleecing


def test_fleecing_of_a_manual_backup() -> None:
    assert config.parse_fleecing("enabled=1,storage=s") == model.Fleecing(True, "s", REQUIRE)
    assert config.parse_fleecing("off").enabled is False
    for text, reason in (
        ("enabled", "'enabled' is no property; allowed: \"enabled=1\""),
        ("enabled=0,storage=s", "fleecing is off"),
        ("storage=../s", "'../s' is no name"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            config.parse_fleecing(text)


MORE_JOBS = """prune_backups = "keep-last=3"

[target.other]
path = "/other"

[job.weekly]
vms = ["*"]
target = "main"
prune_backups = "keep-weekly=8"

[job.again]
vms = ["web*"]
target = "main"
prune_backups = "keep-last=3"

[job.elsewhere]
vms = ["*"]
target = "other"
prune_backups = "keep-all=1"

[job.manual]
vms = ["*"]
target = "main"
"""


def test_what_is_kept_of_a_vm_on_a_target_is_what_any_of_their_jobs_says(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + MORE_JOBS)
    assert loaded.keeps("main", "web01") == (model.Keep(last=3), model.Keep(weekly=8))
    assert loaded.keeps("main", "db01") == (model.Keep(weekly=8),)
    assert loaded.keeps("other", "db01") == (model.Keep(all=True),)
    assert load(tmp_path, GOOD).keeps("main", "web01") == ()


def test_a_job_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job 'weekly' in .* \(there are: nightly\)"):
        load(tmp_path, GOOD).run_options("weekly")


def test_effective_settings_say_where_they_come_from(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + 'fleecing = {enabled = true}\n[daemon]\nlog_level = "debug"\n')
    rows = {each.key: (each.value, each.origin) for each in config.effective(loaded)}
    file = tmp_path / "vmfleece.toml"
    assert rows["daemon.log_level"] == ("debug", f"{file}:19")
    assert rows["daemon.max_runs"] == (4, "default")
    assert rows["storage.local.quota"] == ("10GiB", f"{file}:3")
    assert rows["storage.local.min_free"] == ("10%", "default")
    assert rows["storage.local.max_runs"] == (None, "default")
    assert rows["job.nightly.vms"] == (["web*"], f"{file}:15")
    assert rows["job.nightly.fleecing"] == ({"enabled": True}, f"{file}:17")
    assert rows["job.nightly.fleecing_policy"] == ("require", "default")
    assert rows["vm.web01.priority"] == (50, "default")
    keys = [key for name, table in SECTIONS.items() for key in table.model_fields]
    # two VMs, and nobody who is told
    assert len(rows) == len(keys) + len(SECTIONS["vm"].model_fields) - len(SECTIONS["notify"].model_fields)


def test_the_path_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMFLEECE_CONFIG", raising=False)
    assert config.default_path() == Path("/etc/vmfleece/vmfleece.toml")
    monkeypatch.setenv("VMFLEECE_CONFIG", "/srv/v.toml")
    assert config.default_path() == Path("/srv/v.toml")


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot read {tmp_path}") as caught:
        config.load(tmp_path / name)
    assert "--config FILE" in caught.value.hint


ALL_KEYS = [(name, key) for name, table in SECTIONS.items() for key in table.model_fields]


def test_the_schema_describes_every_key_with_an_example() -> None:
    schema = config.json_schema()
    for section, key in ALL_KEYS:
        definition = schema["$defs"][SECTIONS[section].__name__]["properties"][key]
        assert definition["description"].endswith("."), (section, key)
        assert definition["examples"], (section, key)
        assert {"type", "anyOf"} & set(definition), (section, key)
    job = schema["$defs"]["JobTable"]["properties"]
    assert job["consistency"]["enum"] == ["freeze", "pause", "none"]
    assert job["full_every"]["maximum"] == 1000
    assert job["prune_backups"]["type"] == "string"
    target = schema["$defs"]["TargetTable"]
    assert target["properties"]["driver"]["enum"] == ["images", "restic"]
    assert target["oneOf"] == [{"required": ["path"]}, {"required": ["url"]}]
    assert re.fullmatch(target["properties"]["url"]["pattern"], "s3://bucket/prefix")
    assert "null" not in str(schema)
    assert "None" not in str(schema)


def test_the_schemas_examples_are_allowed() -> None:
    for section, table in SECTIONS.items():
        for key, field in table.model_fields.items():
            assert field.examples
            if section == "daemon":
                table.model_validate({key: field.examples[0]})
            else:
                required = {name: f.examples[0] for name, f in table.model_fields.items() if f.examples}
                table.model_validate(required)


def _tables(text: str) -> dict[str, str]:
    """Split a text by its headings of tables: `[job.nightly]`, or "## `[job.NAME]`"."""
    parts = re.split(r"^(?:## `)?\[(\w+)[.\]].*$", text, flags=re.MULTILINE)
    tables: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        tables[name] = tables.get(name, "") + body
    return tables


@pytest.mark.parametrize(("section", "key"), ALL_KEYS)
def test_every_key_is_explained_in_the_example_and_the_reference(section: str, key: str) -> None:
    field = SECTIONS[section].model_fields[key]
    assert field.description
    example = _tables(EXAMPLE.read_text())[section]
    assert re.search(rf"^# .*\n{key} = ", example, re.MULTILINE)
    comments = " ".join(re.findall(r"^# (.*)$", example, re.MULTILINE))
    first_words = re.split(r"[.:;,]", field.description)[0]
    assert first_words in comments
    reference = _tables((ROOT / "docs" / "configuration.md").read_text())[section]
    row = next(each for each in reference.splitlines() if each.startswith(f"| `{key}` |"))
    assert field.description in row
    if field.is_required():
        assert row.endswith("| needed |")
    elif field.default is not None:
        assert row.endswith(f"| `{json.dumps(field.default)}` |")


@pytest.mark.parametrize("later", LATER, ids=lambda each: f"{each.section}.{each.key}")
def test_what_comes_later_is_marked_in_the_example_and_the_reference(later: object) -> None:
    section, key = getattr(later, "section"), getattr(later, "key")  # noqa: B009
    example = _tables(EXAMPLE.read_text())[section]
    assert re.search(rf"not available yet\.\n(#.*\n)*(# )?{key} = ", example)
    assert f"| `{section}.{key}` |" in (ROOT / "docs" / "configuration.md").read_text()
