"""`python -m orchestrator` is the command `vmfleece`."""

from orchestrator.cli.main import main

main()
