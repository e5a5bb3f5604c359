"""The command `vmfleece`: from its arguments to its exit code.

`vmfleece daemon` may have to continue guests, so what comes first imports little: this, `arguments`, `daemon`.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from orchestrator.cli.arguments import make_parser
from orchestrator.errors import EXIT_FAILED, EXIT_INTERRUPTED, VmfleeceError

DAEMON_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = make_parser().parse_args(argv)
    os.umask(0o077)  # what we write holds disks of VMs
    try:
        code = _run(arguments)
    except VmfleeceError as error:
        _print_error(error, as_json=getattr(arguments, "json", False))
        code = error.exit_code
    except KeyboardInterrupt:
        print("vmfleece: interrupted; everything was put back", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_FAILED
    sys.exit(code if _output_was_read() else code or EXIT_FAILED)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "daemon":
        with _held(DAEMON_SIGNALS):
            from orchestrator.cli import daemon  # noqa: PLC0415  what the others import takes most of a second

            return daemon.daemon(arguments.config)
    from orchestrator.cli import commands  # noqa: PLC0415

    return commands.run(arguments)


@contextlib.contextmanager
def _held(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Have the kernel keep signals until somebody takes them, at the latest until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _output_was_read() -> bool:
    """Whether all output found its reader; one that has seen enough (head, less) is no error of ours."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python tries again as it ends, and would exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _print_error(error: VmfleeceError, *, as_json: bool) -> None:
    from orchestrator.cli import render  # noqa: PLC0415  tables, and all that they take, come with it

    if as_json:
        with contextlib.suppress(BrokenPipeError):
            render.print_json({"error": render.error_json(error)})
    render.complain(error)
