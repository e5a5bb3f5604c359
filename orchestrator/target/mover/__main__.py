"""`python -m orchestrator.target.mover FD`: the worker process. FD is its end of a socket; see `process.Mover`."""

import asyncio
import signal
import socket
import sys

import uvloop

from orchestrator.target.mover.worker import Worker


def main() -> int:
    """Serve until the run that started us commits, or goes away."""
    # `restic unlock` sends SIGHUP to whom a lock names. The terminal's Ctrl-C is for the run, which tells us.
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Worker(control).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
