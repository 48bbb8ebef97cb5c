"""Migration by the command line, of machines in their jails, and by QEMU's monitor protocol."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.abilities import has
from cardcage.host import Host
from cardcage_migrate.disks import Movable
from cardcage_migrate.reach import Program, _descendants
from cardcage_nbd.disk import NbdDisk
from cardcage_snapshot.restoring import given
from cardcage_snapshot.state import capture, restore
from migrate_kit import Coming
from qmp_kit import Client
from snapshot_kit import CODE, count, counting, counts_on

PROGRAM = "import sys; from cardcage_cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key and the roster of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for one in found:
        one.kill()
        one.communicate()


def cardcage(started: list[subprocess.Popen[str]], *words: str) -> subprocess.Popen[str]:
    """A command that goes on."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *words], text=True, **pipes))
    return started[-1]


def said(process: subprocess.Popen[str], mark: str) -> str:
    """The line on standard error that has the mark."""
    assert process.stderr is not None
    for line in process.stderr:
        if mark in line:
            return line
    raise AssertionError(f"no {mark!r}")


@pytest.mark.once
def test_by_the_command_line(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """A machine of ``cardcage run``, in its jail, moves to ``cardcage incoming`` by TCP, and says so at its end; from
    there it goes into a file, stands still until it is recovered, and is shown; what is wrong is told in one line."""
    name = f"moves{os.getpid()}"
    (tmp_path / "counter.bin").write_bytes(CODE)
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "vm.toml").write_text(f"""
        machine = {{ name = "{name}", memory = "8M", accel = ["tcg"], platform = "pc" }}
        boot = {{ protocol = "raw", image = "counter.bin", address = 0x7C00, mode = 16 }}
        [[device]]
        type = "debugcon"
        char = "null"
        [[device]]
        type = "virtio-blk"
        drive = {{ file = "disk.raw", format = "raw" }}
    """)
    here = cardcage(started, "run", str(tmp_path / "vm.toml"))
    said(here, "accelerator")
    there = cardcage(started, "incoming", "tcp:127.0.0.1:0", "--name", f"{name}-there")
    found = re.search(r"port (\d+)", said(there, "waiting at"))
    assert found

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)

    while (tried := run("migrate", name, f"tcp:127.0.0.1:{found[1]}", "--json", "--downtime", "20s")).returncode == 2:
        assert f'no machine "{name}"' in tried.stderr, tried.stderr  # it is not on the roster yet
    assert tried.returncode == 0, tried.stderr
    assert json.loads(tried.stdout)["status"] == "completed"
    assert "migrated to tcp" in here.communicate()[1]
    assert here.returncode == 0
    said(there, "accelerator")
    name += "-there"
    for words, why in (
        (("migrate", name, "tcp:1"), "expected tcp:HOST:PORT"),
        (("migrate", name, "unix:/nowhere"), "unix:/nowhere: No such file"),
        (("migrate", "recover", name), "waits to be recovered"),
        (("migrate", "cancel", name), "is not being migrated"),
    ):
        done = run(*words)
        assert (done.returncode != 0, done.stderr.count("\n"), "Traceback" in done.stderr) == (True, 1, False)
        assert why in done.stderr
    done = run("migrate", name, f"file:{tmp_path}/kept")
    assert (done.returncode, "stands still here" in done.stderr) == (0, True)
    assert "migrate recover" in run("resume", name).stderr
    assert json.loads(run("migrate", "--json", "show", name).stdout)["status"] == "given up"
    assert run("migrate", "recover", name).returncode == 0
    assert run("stop", name).returncode == 0
    there.communicate()


def test_by_qmp(tmp_path: Path) -> None:
    """``getfd`` and ``migrate`` move a machine, and ``query-migrate`` and the events tell of it; limits are kept, and
    what is no place is told."""
    monitor = {"type": "qmp", "socket": f"unix:{tmp_path}/qmp"}
    with (
        Host() as host,
        counting(tmp_path, host, devices=[monitor]) as vm,
        Coming(
            host,
            name="moved",
            config={
                "machine": {"platform": "none", "memory": "1M", "accel": ["tcg"]},
                "device": [{"type": "debugcon", "id": "debugcon0", "char": "null"}],
            },
        ) as there,
    ):
        vm.start()
        counts_on(vm, 10)
        with Client(tmp_path / "qmp") as client:
            assert client.ask("query-migrate") == {"return": {}}
            assert client.ask("migrate-set-parameters", downtime_limit=5000, max_bandwidth=1 << 30) == {"return": {}}
            assert client.ask("migrate-set-parameters", max_bandwidth=1)["error"]["class"] == "GenericError"
            told = client.ask("query-migrate-parameters")["return"]
            assert told == {"downtime-limit": 5000, "max-bandwidth": 1 << 30, "tls-creds": "", "tls-hostname": ""}
            on = [{"capability": "events", "state": True}]
            assert client.ask("migrate-set-capabilities", capabilities=on) == {"return": {}}
            assert "expected unix:PATH" in client.ask("migrate", uri="nowhere")["error"]["desc"]
            assert "fd9" in client.ask("migrate", uri="fd:fd9")["error"]["desc"]
            request = json.dumps({"execute": "getfd", "arguments": {"fdname": "link"}}).encode()
            socket.send_fds(client.socket, [request], [there.link.fileno()])
            assert client.answer() == {"return": {}}
            assert client.ask("migrate", uri="fd:link", detach=True) == {"return": {}}
            statuses = []
            while not statuses or statuses[-1] not in ("completed", "failed"):
                statuses.append(client.event("MIGRATION")["data"]["status"])
            there.link.close()
            print(there.done().error)
            assert statuses[-1] == "completed", client.ask("query-migrate")
            found = client.ask("query-migrate")["return"]
            assert found["status"] == "completed"
            assert found["ram"]["total"] == 1 << 20
            assert found["downtime"] <= found["total-time"]
        counts_on(there.done().machine, count(vm))


def test_what_cannot_move_reaches_nobody(tmp_path: Path, host: Host) -> None:
    """A machine whose disk cannot change hands is refused in one line, in QMP's words and by the command line, before a
    file is emptied, a descriptor used up, or a door knocked at."""
    kept, name = tmp_path / "kept", f"stays{os.getpid()}"
    kept.write_text("of somebody else's")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    drive = {"file": f"{tmp_path}/disk", "format": "raw", "cache": "unsafe"}
    devices = [{"type": "virtio-blk", "id": "d", "drive": drive}, {"type": "qmp", "socket": f"unix:{tmp_path}/qmp"}]
    door = socket.socket(socket.AF_UNIX)
    door.bind(f"{tmp_path}/door")
    door.listen()
    door.setblocking(False)
    with (
        door,
        counting(tmp_path, host, name=name, memory="8M", platform="pc", devices=devices) as vm,
        Client(tmp_path / "qmp") as client,
    ):
        vm.start()
        request = json.dumps({"execute": "getfd", "arguments": {"fdname": "link"}}).encode()
        socket.send_fds(client.socket, [request], [door.fileno()])
        assert client.answer() == {"return": {}}
        for uri in (f"file:{kept}", f"unix:{tmp_path}/door", "fd:link"):
            assert "flushes are ignored" in client.ask("migrate", uri=uri)["error"]["desc"]
        assert client.ask("closefd", fdname="link") == {"return": {}}
        for uri in (f"file:{kept}", f"unix:{tmp_path}/door"):
            done = subprocess.run([sys.executable, "-c", PROGRAM, "migrate", name, uri], capture_output=True, text=True)
            assert done.returncode != 0
            assert "flushes are ignored" in done.stderr
        assert kept.read_text() == "of somebody else's"
        with pytest.raises(BlockingIOError):
            door.accept()


def test_a_program_goes_with_all_that_it_started(tmp_path: Path) -> None:
    """A program that stays once its connection is closed is ended, and those that it has started, however deep, though
    they leave SIGTERM alone."""
    script = f"trap '' TERM; (sleep 1000; true) & sh -c 'sleep 1000; true' & echo $$ > {tmp_path}/pid; wait; wait"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cardcage_migrate.reach.LAST", 0.1)
        program = Program(f"sh -c {shlex.quote(script)}; true")
        while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text().strip()):
            pass
        left = set(_descendants(int(pid)))
        while len(left) < 5:
            left = set(_descendants(int(pid)))
        program.close()
    while any(runs(one) for one in left):  # a signal is on its way
        pass


def runs(pid: int) -> bool:
    """True while there is a process of this number that has not ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.once
def test_under_the_policy_that_ships(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """With ``security = "default"`` a machine comes to ``cardcage incoming`` by a socket, and goes from there; a file
    that is not there is told in one line."""
    name, door = f"guarded{os.getpid()}", tmp_path / "door"
    (tmp_path / "counter.bin").write_bytes(CODE)
    (tmp_path / "vm.toml").write_text(f"""
        security = "default"
        machine = {{ name = "{name}", memory = "8M", accel = ["tcg"], platform = "pc" }}
        boot = {{ protocol = "raw", image = "counter.bin", address = 0x7C00, mode = 16 }}
        [[device]]
        type = "debugcon"
        char = "null"
    """)
    here = cardcage(started, "run", str(tmp_path / "vm.toml"))
    said(here, "accelerator")
    there = cardcage(started, "--security", "default", "incoming", f"unix:{door}", "--name", f"{name}-there")
    said(there, "waiting at")
    words = [sys.executable, "-c", PROGRAM, "--security", "default", "migrate", name, f"unix:{door}", "--json"]
    done = subprocess.run([*words, "--downtime", "20s"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"
    assert "migrated to unix" in here.communicate()[1]
    said(there, "accelerator")
    missing = [sys.executable, "-c", PROGRAM, "--security", "default", "incoming", f"file:{tmp_path}/nowhere"]
    assert "nowhere: No such file or directory" in subprocess.run(missing, capture_output=True, text=True).stderr


def test_a_servers_disk_is_movable() -> None:
    """Disks of NBD servers take part."""
    assert has(NbdDisk.__new__(NbdDisk), Movable)


def test_a_configuration_of_a_file_is_plain(tmp_path: Path) -> None:
    """The tables of a configuration that is given as a file, with devices, are JSON's kinds, and can be copied."""
    path = tmp_path / "vm.toml"
    path.write_text('[[device]]\ntype = "debugcon"\nchar = "null"\n[[device]]\ntype = "virtio-rng"\n')

    def kinds(value: Any) -> set[type]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {type(value)}.union(*map(kinds, inner))

    tables = given(path)
    assert kinds(tables) <= {dict, list, str, int, bool, float}
    assert copy.deepcopy(tables) == tables


def test_nothing_is_done_before_it_goes_on(tmp_path: Path) -> None:
    """A device of a machine that was built, and given a state, serves no request of that before the machine starts:
    another copy may go on instead."""
    disk = {"type": "virtio-blk", "drive": {"file": str(tmp_path / "disk.raw"), "format": "raw"}}
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    order: list[str] = []
    with Host() as host:
        with counting(tmp_path, host, platform="pc", memory="8M", devices=[disk]) as vm:
            vm.start()
            counts_on(vm, 10)
            vm.pause()
            state = capture(vm)
        with counting(tmp_path, host, platform="pc", memory="8M", devices=[disk]) as vm:
            (device,) = (one.device for one in vm.devices.values() if one.type == "virtio-blk")
            for name in ("pause", "load", "resume"):
                call = getattr(device, name)
                setattr(device, name, lambda *some, call=call, name=name: (order.append(name), call(*some)))
            restore(vm, state)
            assert order == ["pause", "load"]
            vm.start(boot=False)
            assert order == ["pause", "load", "resume"]
