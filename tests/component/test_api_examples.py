"""The examples of docs/api.md, as they stand there."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.component.http import free_port
from tests.component.test_admission import opened
from tests.component.world import MIB, World

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
TOKEN = "0123456789abcdef0123456789abcdef"
Make = Callable[..., World]
pytestmark = pytest.mark.usefixtures("quick_images")


def example(holding: str) -> str:
    """The block of commands with this in it; without the making of a token, and not without end."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (block,) = [block for language, block in blocks if not language and "curl" in block and holding in block]
    lines = [line for line in block.splitlines() if "umask" not in line]
    return "\n".join(lines).replace("curl -sN", "curl -sN --max-time 3")


@pytest.mark.usefixtures("events_are_told")
async def test_the_examples_of_the_documentation_work(make: Make, tmp_path: Path) -> None:
    world = make(disks={"vda": MIB})
    (tmp_path / "api.token").touch(0o600)
    (tmp_path / "api.token").write_text(TOKEN)
    port = free_port()
    daemon = f'listen = "127.0.0.1:{port}"\ntoken_file = "{tmp_path}/api.token"'
    async with opened(world, supervise=True, daemon=daemon) as one:

        async def said(holding: str) -> Any:
            command = example(holding)
            for there, here in (
                ("/run/vmfleece", f"{world.folder}/run"),
                ("/etc/vmfleece", str(tmp_path)),
                ("127.0.0.1:9321", f"127.0.0.1:{port}"),
            ):
                command = command.replace(there, here)
            shell = await asyncio.create_subprocess_exec("sh", "-c", command, stdout=asyncio.subprocess.PIPE)
            output, _ = await shell.communicate()
            return json.loads(output) if output else None

        assert (await said("openapi.json"))["openapi"] == "3.1.0"
        following = asyncio.create_task(said("run.finished"))
        while not one.feed.followers:
            await asyncio.sleep(0.01)
        request = await said("--json")
        assert (request["vms"], request["state"]) == (["web01"], "under-way")
        finished = await following
        assert (finished["vm"], finished["error"]) == ("web01", None)
        assert (await said("Bearer"))["job"] == "nightly"
