"""QEMU's own client library, and a stranger's commands from a distribution of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cardcage.machine import Machine
from installed import PROGRAM, install
from qmp_kit import Client, machines

pytestmark = pytest.mark.usefixtures("runtime")  # the name of a machine is in what is told

pytest.importorskip("qemu.qmp")
EXAMPLE = Path(__file__).parents[2] / "examples" / "qmp-card"
MACHINE = """
[machine]
platform = "none"
memory = "4M"
accel = "tcg"
[boot]
protocol = "raw"
image = "halt.bin"
[[device]]
type = "qmp"
socket = "unix:qmp"
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    yield from machines(tmp_path)


def test_qemus_own_client(make: Callable[..., Machine], tmp_path: Path) -> None:
    """qemu.qmp connects, negotiates, has its errors as exceptions, and hears of events."""
    from qemu.qmp import ExecuteError, QMPClient

    make().start()

    async def talk() -> list[Any]:
        client = QMPClient("test")
        await client.connect(str(tmp_path / "qmp"))
        found: list[Any] = [await client.execute("query-status"), await client.execute("stop")]
        found.append((await client.events.get())["event"])
        with pytest.raises(ExecuteError, match="has not been found") as caught:
            await client.execute("device_add", {"driver": "virtio-blk-pci"})
        found.append(caught.value.error_class)
        await client.disconnect()
        return found

    running = {"running": True, "singlestep": False, "status": "running"}
    assert asyncio.run(talk()) == [running, {}, "STOP", "CommandNotFound"]


@contextmanager
def process_ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """It does not outlive a test that failed."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def test_a_strangers_command(tmp_path: Path) -> None:
    """A card from an installed wheel adds a command and an event: schema, checks, errors and all, in the jail too."""
    install(EXAMPLE, tmp_path / "site")
    (tmp_path / "vm.toml").write_text(MACHINE)
    (tmp_path / "halt.bin").write_bytes(b"\xf4\xeb\xfd a needle of ours")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {PROGRAM[2]}"
    with (
        subprocess.Popen(
            [sys.executable, "-c", code, "run", "vm.toml"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as process,
        process_ended(process),
    ):
        assert process.stderr is not None
        assert "accelerator: tcg" in process.stderr.readline()
        with Client(tmp_path / "qmp") as peer:
            while peer.ask("query-status")["return"]["status"] == "prelaunch":
                pass
            schema = {one["name"]: one for one in peer.ask("query-qmp-schema")["return"]}
            members = {one["name"]: one["type"] for one in schema[schema["x-search-memory"]["arg-type"]]["members"]}
            assert list(members) == ["text", "encoding", "start", "all-places"]
            assert schema[members["encoding"]]["values"] == ["ascii", "utf-16-le"]
            assert "does not accept value" in peer.ask("x-search-memory", text="", encoding="x")["error"]["desc"]
            assert "4 to 64" in peer.ask("x-search-memory", text="a")["error"]["desc"]
            assert peer.ask("x-search-memory", text="no such text")["error"]["class"] == "DeviceNotFound"
            (found,) = peer.ask("x-search-memory", text="a needle of ours")["return"]
            assert found == {"guest-address": 0x7C04, "encoding": "ascii"}
            assert peer.event("X_SEARCH_FOUND")["data"] == found
            for line, answer in (
                ("x_search 'a needle of ours'", "0x7c04\r\n"),
                ("x_search", "Error: expected x_search TEXT\r\n"),
            ):
                assert peer.ask("human-monitor-command", command_line=line)["return"] == answer
            peer.ask("quit")
        assert json.dumps(process.stderr.read()).count("stopped by the host (quit)") == 1
        assert process.wait() == 0


def test_under_the_policy_that_is_shipped(tmp_path: Path) -> None:
    """With security = "default" the socket is there, and its commands are the operator's."""
    monitor = {"type": "qmp", "socket": f"unix:{tmp_path}/qmp"}
    keys = {"platform": "none", "accel": ["tcg"], "memory": "1M", "name": "vm"}
    with (
        Machine(machine=keys, devices=[monitor], fragments=[{"security": "default"}]),
        Client(tmp_path / "qmp") as peer,
    ):
        assert peer.ask("query-name") == {"return": {"name": "vm"}}
