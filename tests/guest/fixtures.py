"""Pytest fixtures for tests with a real guest: `pytest_plugins = ["tests.guest.fixtures"]`."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.guest import build
from tests.guest.vm import DiskSpec, GuestVm, Workload


class Boot(Protocol):
    """Starts a guest, waits until it writes; options are GuestVm's."""

    async def __call__(
        self,
        disks: Sequence[DiskSpec] = ...,
        workload: Workload = ...,
        **options: Any,
    ) -> GuestVm: ...


@pytest.fixture(scope="session")
def guest_files() -> build.GuestFiles:
    """Kernel and initramfs. Fails, never skips, where they cannot be built."""
    return build.ensure()


@pytest.fixture
async def boot(tmp_path: Path, guest_files: build.GuestFiles) -> AsyncIterator[Boot]:  # noqa: ARG001
    """Yield a function that boots guests; all are ended after the test."""
    vms: list[GuestVm] = []

    async def start(
        disks: Sequence[DiskSpec] = (DiskSpec("vda"),),
        workload: Workload = Workload(),  # noqa: B008  (frozen)
        **options: Any,
    ) -> GuestVm:
        vm = GuestVm(tmp_path / f"vm{len(vms)}", disks, workload, **options)
        vms.append(vm)
        await vm.start()
        if not vm.initially_paused:
            await vm.wait_ready()
        return vm

    try:
        yield start
    finally:
        for vm in vms:
            await vm.stop()
