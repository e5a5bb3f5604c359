"""When retention removes snapshots: after a VM's new one, and when asked to; never beside a run of the VM."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from orchestrator.errors import VmfleeceError
from orchestrator.run.prune import OnMerge, PruneResult, prune
from orchestrator.service.in_force import InForce, Setup

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pruning:
    """The engine's parts that it needs. `lock` is a VM's, which its runs hold, too; `on_merge`: see `prune`."""

    in_force: InForce
    lock: Callable[[str], asyncio.Lock]
    on_merge: OnMerge

    async def after_run(self, target: str, vm: str, *, merge: bool) -> None:
        """Remove what is not to be kept now that there is a new snapshot. What fails is logged only."""
        setup = self.in_force.now  # what is to be kept by now
        if target in setup.targets and (keeps := setup.config.keeps(target, vm)):
            try:
                with self.in_force.using(setup):
                    async with self.lock(vm):
                        await prune(setup.targets[target], vm, keeps, merge=merge, on_merge=self.on_merge)
            except VmfleeceError as error:
                log.warning("prune.failed", vm=vm, target=target, error=str(error))

    async def carry_out(
        self, pairs: Sequence[tuple[str, str]], setup: Setup, *, merge: bool, dry_run: bool
    ) -> list[PruneResult]:
        """Remove what is not to be kept of VMs on targets, or only say what that is. Raises TargetError.

        A VM that is being backed up comes to its turn after the others, and when that is over.
        """
        results = []
        with self.in_force.using(setup):
            for target, vm in sorted(pairs, key=lambda pair: self.lock(pair[1]).locked()):
                lock = contextlib.nullcontext() if dry_run else self.lock(vm)
                if not dry_run and self.lock(vm).locked():
                    log.info("prune.waiting", vm=vm, target=target)
                async with lock:
                    results.append(
                        await prune(
                            setup.targets[target],
                            vm,
                            setup.config.keeps(target, vm),
                            merge=merge,
                            dry_run=dry_run,
                            on_merge=self.on_merge,
                        )
                    )
        return results
