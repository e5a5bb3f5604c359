"""What a command finds out by itself, from state_dir, where no daemon answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.admission.accounts import Accounts
from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.config import Config
from orchestrator.service import drivers, overview
from orchestrator.service.status import Status
from orchestrator.state.catalogue import Catalogue


def past_results(config: Config, vm: str) -> Sequence[Mapping[str, Any]]:
    """The results of a VM's ended runs, oldest first; may be asked while another vmfleece works."""
    if not Catalogue.path(config.daemon.state_dir).exists():
        return []
    return Catalogue(config.daemon.state_dir).results(vm)


async def status(config: Config) -> Status:
    """What can be said while no vmfleece runs: the storages, and what dead runs hold. Raises StateError."""
    storages = drivers.storages(config)
    accounts = Accounts(storages)
    path = SqliteLedger.path(config.daemon.state_dir)
    if path.exists():
        ledger = SqliteLedger(path)
        accounts.stranded = {holding.owner.run: holding for holding in await ledger.holdings()}
        await ledger.close()
    return Status(process=None, started=None, storages=overview.storage_statuses(storages, accounts))
