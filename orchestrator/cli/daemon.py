"""`vmfleece daemon`."""

import argparse

from orchestrator.config import Config
from orchestrator.errors import EXIT_OK
from orchestrator.service.daemon import serve


async def daemon(config: Config, _arguments: argparse.Namespace) -> int:
    """Serve until told to stop; EXIT_FAILED and EXIT_INTERRUPTED if runs had to be left as they were."""
    await serve(config)
    return EXIT_OK
