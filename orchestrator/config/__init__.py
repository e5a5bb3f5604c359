"""The configuration: one TOML file, checked as a whole before anything uses it.

    places      which line says what            [pure]
    properties  vzdump's property strings       [pure]
    values      what a value can be (pydantic)  [pure]
    schema      the tables and keys (pydantic)  [pure]
    later       what is refused for now         [pure]
    draft       tables in, problems out         [pure]
    select      which VMs a pattern means       [pure]
    checks      what no single key can tell
    load        file in, Config or every problem at once out
    change      what differs between two of them  [pure]
    settings    what leaves here: frozen, plain values; no other layer sees pydantic

Nothing is ever ignored: a key that is not known, or whose feature is not there yet, is a problem.
"""

from orchestrator.config.load import DEFAULT_PATH, default_path, effective, load, parse_fleecing
from orchestrator.config.schema import json_schema
from orchestrator.config.settings import (
    Address,
    Config,
    DaemonSettings,
    JobSettings,
    LogFormat,
    LogLevel,
    Setting,
    StorageSettings,
    TargetDriver,
    TargetSettings,
)
from orchestrator.config.values import SMALLEST_QUOTA_BYTES

__all__ = [
    "DEFAULT_PATH",
    "SMALLEST_QUOTA_BYTES",
    "Address",
    "Config",
    "DaemonSettings",
    "JobSettings",
    "LogFormat",
    "LogLevel",
    "Setting",
    "StorageSettings",
    "TargetDriver",
    "TargetSettings",
    "default_path",
    "effective",
    "json_schema",
    "load",
    "parse_fleecing",
]
