"""`vmfleece daemon`."""

from pathlib import Path

from orchestrator import config, log
from orchestrator.cli.running import on_loop
from orchestrator.errors import EXIT_OK
from orchestrator.service import starting


def daemon(path: Path | None) -> int:
    """Serve until told to stop. Raises what `starting.serve` does."""
    loaded = config.load(path or config.default_path())
    log.configure(log_format=loaded.daemon.log_format, level=loaded.daemon.log_level)
    on_loop(starting.serve(loaded))
    return EXIT_OK
