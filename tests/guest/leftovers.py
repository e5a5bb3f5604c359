"""What the product has left behind in a QEMU: after each run and each failure this must be empty.

Bitmaps are no leftovers: incremental backups keep theirs on purpose.
"""

from typing import Any

from tests.guest.vm import GuestVm

PREFIXES = ("vmf-", "vmfleece")


async def leftovers(vm: GuestVm) -> list[str]:
    """Return a line for each thing that was not there, or not so, before the product came."""
    found: list[str] = []
    for command, key in (
        ("query-named-block-nodes", "node-name"),
        ("query-jobs", "id"),
        ("query-block-exports", "id"),
        ("query-chardev", "label"),
    ):
        found += [f"{command}: {name}" for name in _ours(await vm.execute(command), key)]
    objects = await vm.execute("qom-list", {"path": "/objects"})
    found += [f"object: {name}" for name in _ours(objects, "name")]
    for fdset in await vm.execute("query-fdsets"):
        found.append(f"fdset: {fdset['fdset-id']} with {len(fdset['fds'])} descriptors")
    for disk, node in (await vm.current_nodes()).items():
        if node != vm.first_nodes[disk]:
            found.append(f"disk {disk} is on node {node}, not on {vm.first_nodes[disk]}")
    status = (await vm.execute("query-status"))["status"]
    if status != vm.expected_status:
        found.append(f"the VM is {status}, not {vm.expected_status}")
    return found


def _ours(entries: list[dict[str, Any]], key: str) -> list[str]:
    return [str(entry[key]) for entry in entries if str(entry.get(key, "")).startswith(PREFIXES)]
