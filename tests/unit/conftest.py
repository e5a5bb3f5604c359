"""What holds for all unit tests: logging is as the library comes, whatever ran before."""

import pytest
import structlog


@pytest.fixture(autouse=True)
def _every_log_line() -> None:
    structlog.reset_defaults()
