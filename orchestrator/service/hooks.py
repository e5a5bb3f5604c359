"""The program that a job has called at its phases, with arguments and environment of vzdump's hook scripts.

    job-init, job-start             before anything is done; if one of them fails, the job ends there
    backup-start snapshot VM        before each run; if it fails, so does the run
    backup-end | backup-abort snapshot VM, then log-end snapshot VM
    job-end | job-abort             at last; job-abort if the job was stopped or cancelled

Of vzdump's phases pre-stop, pre-restart and post-restart never come: no VM is stopped. What a hook prints is
logged. Where it can change nothing any more its failure is logged, and that is all. A hook that is cancelled, or
takes longer than its deadline, is ended with all that it started.
"""

import asyncio
import contextlib
import json
import os
import signal
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import structlog

from orchestrator import aio
from orchestrator.config.settings import Hook, JobSettings, TargetSettings
from orchestrator.errors import HookError
from orchestrator.model import RunResult

log = structlog.get_logger(__name__)

MODE = "snapshot"
MOST_LINES = 200
"""Of a hook's output are logged."""
LONGEST_LINE_BYTES = 2000


class JobHook:
    """What a job calls; nothing if it has no hook."""

    def __init__(self, job: JobSettings, target: TargetSettings) -> None:
        self._hook = job.hook
        self._environment = {
            "VMTYPE": "qemu",
            "STOREID": target.name,
            "DUMPDIR": target.place,
            "VMFLEECE_JOB": job.name,
        }

    async def job_started(self) -> None:
        """Raises HookError if the job must not go on."""
        for phase in ("job-init", "job-start"):
            await self._call((phase,), {})

    async def job_ended(self, *, aborted: bool) -> None:
        await self._tell(("job-abort" if aborted else "job-end",), {})

    async def run_started(self, vm: str, run: str) -> None:
        """Raises HookError if the run must not go on."""
        await self._call(("backup-start", MODE, vm), {"HOSTNAME": vm, "VMFLEECE_RUN": run})

    async def run_ended(self, result: RunResult) -> None:
        if self._hook is None:
            return
        with tempfile.NamedTemporaryFile(
            "w", prefix="vmfleece-", suffix=".json"
        ) as file:  # nobody else may read it
            json.dump(result.as_json(), file)
            file.flush()
            more = {
                "HOSTNAME": result.vm,
                "TARGET": result.snapshot or "",
                "LOGFILE": file.name,
                "VMFLEECE_RUN": result.run,
                "VMFLEECE_CODE": result.error.code if result.error else "",
            }
            ended = "backup-end" if result.error is None else "backup-abort"
            for phase in (ended, "log-end"):
                await self._tell((phase, MODE, result.vm), more)

    async def _tell(self, arguments: tuple[str, ...], more: Mapping[str, str]) -> None:
        try:
            await self._call(arguments, more)
        except HookError as error:
            log.warning("hook.failed", phase=arguments[0], error=str(error))

    async def _call(self, arguments: tuple[str, ...], more: Mapping[str, str]) -> None:
        if self._hook is None:
            return
        await asyncio.to_thread(_check_safe, self._hook.path)
        environment = {**os.environ, **self._environment, **more}
        process = await _started(self._hook.path, arguments, environment)
        try:
            async with asyncio.timeout(self._hook.timeout_seconds), asyncio.TaskGroup() as group:
                group.create_task(_log_output(process, arguments[0]))
                code = await process.wait()
                _end_group(process)
        except TimeoutError as error:
            raise _failed(self._hook, arguments, f"did not end within {self._hook.timeout_seconds:g} s") from error
        finally:
            await aio.finish(_end(process))
        if code != 0:
            why = f"exit code {code}" if code > 0 else f"signal {-code}"
            raise _failed(self._hook, arguments, f"ended with {why}")


def _check_safe(path: Path) -> None:
    """It runs with our rights: nobody else may be able to change it. Blocks; raises HookError."""
    try:
        status = path.stat()
    except OSError as error:
        raise HookError(
            f"the hook {path} cannot be called: {error.strerror}", hint="correct job.NAME.hook"
        ) from error
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.X_OK):
        raise HookError(f"the hook {path} is no file that can be executed", hint=f"chmod +x {path}")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HookError(
            f"the hook {path} can be changed by others, and would run with vmfleece's rights",
            hint=f"chown root {path}; chmod go-w {path}",
        )


async def _started(
    path: Path, arguments: tuple[str, ...], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    try:
        return await aio.acquire(
            asyncio.create_subprocess_exec(
                *(str(path), *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                limit=LONGEST_LINE_BYTES,
                start_new_session=True,  # a process group of its own, which can be ended as one
            ),
            _end,
        )
    except OSError as error:  # no such interpreter, say
        raise HookError(
            f"the hook {path} cannot be started: {error.strerror}",
            hint="see that its first line, #!, names a program that is there",
        ) from error


async def _log_output(process: asyncio.subprocess.Process, phase: str) -> None:
    assert process.stdout is not None  # noqa: S101  it is a pipe
    lines = 0
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:  # longer than the limit: what there is of it is thrown away
            continue
        if not line:
            return
        lines += 1
        if lines <= MOST_LINES and (text := line.decode(errors="replace").rstrip()):
            log.info("hook.said", phase=phase, line=text)


async def _end(process: asyncio.subprocess.Process) -> None:
    _end_group(process)
    await process.wait()


def _end_group(process: asyncio.subprocess.Process) -> None:
    """What it left running in the background ends with it: that would hold its output open, and more."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _failed(hook: Hook, arguments: tuple[str, ...], what: str) -> HookError:
    return HookError(
        f"the hook {hook.path} {what} when it was called as {' '.join(arguments)}",
        hint="see in the log what it printed (hook.said)",
    )
