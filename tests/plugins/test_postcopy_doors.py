"""Post-copy by the command line, of machines in their jails, and by QEMU's monitor protocol."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_migrate import qmp
from cardcage_migrate.reach import connect
from cardcage_qemu import translate
from listens import listens
from migrate_kit import certificates
from postcopy_kit import Breaking, possible
from qmp_kit import Client
from snapshot_kit import CODE, count, counts_on

pytestmark = [pytest.mark.once, possible]

CARDCAGE = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]
QEMU = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
COUNTS = bytes.fromhex("31c08ed8 66ff060050 ebf9")
"""Counts at 0x5000, in real mode."""
ON = [{"capability": "events", "state": True}, {"capability": "postcopy-ram", "state": True}]


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key and the roster of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for one in found:
        one.kill()
        one.communicate()


def said(process: subprocess.Popen[str], mark: str) -> str:
    """The line on standard error that has the mark."""
    assert process.stderr is not None
    for line in process.stderr:
        if mark in line:
            return line
    raise AssertionError(f"no {mark!r}")


def test_by_the_command_line(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """A machine of ``cardcage run``, in its jail, moves to ``cardcage incoming``, which is in one too, with TLS and
    ``--postcopy``; and from there with ``--mode hybrid``, once ``migrate postcopy`` says so; no call is refused in
    the jail, and the socket's file goes. What is wrong is told in one line."""
    keys, name = certificates(tmp_path), f"moves{os.getpid()}"
    (tmp_path / "counter.bin").write_bytes(CODE)
    (tmp_path / "vm.toml").write_text(f"""
        machine = {{ name = "{name}", memory = "8M", accel = ["tcg"], platform = "none" }}
        boot = {{ protocol = "raw", image = "counter.bin", address = 0x7C00, mode = 16 }}
        [[device]]
        type = "debugcon"
        char = "null"
    """)

    def cardcage(*words: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([*CARDCAGE, *words], text=True, **pipes))
        return started[-1]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*CARDCAGE, *words], capture_output=True, text=True)

    here = cardcage("run", str(tmp_path / "vm.toml"))
    said(here, "accelerator")
    there = cardcage("incoming", "tcp:127.0.0.1:0", "--name", f"{name}b", "--tls-dir", str(keys))
    found = re.search(r"port (\d+)", said(there, "waiting at"))
    assert found
    words = ["migrate", name, f"tcp:127.0.0.1:{found[1]}", "--json", "--downtime", "60s", "--postcopy"]
    words += ["--tls-dir", str(keys), "--tls-hostname", "machines.test"]
    while (tried := run(*words)).returncode == 2:
        assert f'no machine "{name}"' in tried.stderr, tried.stderr  # it is not on the roster yet
    assert tried.returncode == 0, tried.stderr
    told = json.loads(tried.stdout)
    assert (told["status"], told["mode"]) == ("completed", "postcopy")
    assert "migrated to tcp" in here.communicate()[1]
    said(there, "accelerator")
    name += "b"
    while run("migrate", "show", name).returncode:  # it is on the roster soon
        assert there.poll() is None
    for line, why in (
        (("migrate", name, "unix:/nowhere", "unix:/elsewhere"), "expected NAME and one URI"),
        (("migrate", "postcopy", name), "is not being migrated"),
        (("migrate", "recover", name, "unix:/nowhere"), "unix:/nowhere: No such file"),
        (("migrate", name, f"file:{tmp_path}/file", "--postcopy"), "nothing can come back"),
    ):
        done = run(*line)
        assert (done.returncode != 0, "Traceback" in done.stderr) == (True, False)
        assert why in done.stderr.splitlines()[-1]
    last = cardcage("incoming", f"unix:{tmp_path}/door", "--name", f"{name}c")
    said(last, "waiting at")
    slow = ["--mode", "hybrid", "--bandwidth", "4K", "--downtime", "60s", "--json"]
    moving = cardcage("migrate", name, f"unix:{tmp_path}/door", *slow)
    while run("migrate", "postcopy", name).returncode:
        assert moving.poll() is None
    assert json.loads(moving.communicate()[0])["mode"] == "hybrid"
    said(last, "accelerator")
    assert "migrated to unix" in there.communicate()[1]
    while (tmp_path / "door").exists():
        assert last.poll() is None
    while run("stop", f"{name}c").returncode:
        assert last.poll() is None
    assert "refused" not in last.communicate()[1]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Options of a source and of a destination, whose program goes with the test."""
    (tmp_path / "rom").write_bytes(COUNTS.ljust(0xFFF0, b"\0") + bytes.fromhex("ea000000f0").ljust(16, b"\0"))
    words = f"-accel tcg -m 8M -bios {tmp_path}/rom -nodefaults -qmp".split()
    here = [*words, f"unix:{tmp_path}/here,server=on,wait=off"]
    there = [*words, f"unix:{tmp_path}/there,server=on,wait=off", "-incoming", "defer"]
    keys = certificates(tmp_path)
    there += ["-object", f"tls-creds-x509,id=served,endpoint=server,dir={keys}"]
    with subprocess.Popen([*QEMU, *there]) as process:
        try:
            while not listens(tmp_path / "there"):
                assert process.poll() is None
            yield here, there
            assert process.wait() == 0
        finally:
            process.kill()


def statuses(peer: Client, last: str) -> list[str]:
    """Those that events tell of, until *last*."""
    found: list[str] = []
    while not found or found[-1] != last:
        found.append(peer.event("MIGRATION")["data"]["status"])
        assert found[-1] != "failed", peer.ask("query-migrate")
    return found


def filled(words: list[str], host: Host) -> Machine:
    """The source, which has written some memory."""
    vm = Machine.from_config(Draft.of(translate(words).config()).config(), host=host)
    vm.memory.write(1 << 20, os.urandom(4 << 20))
    counts_on(vm.start(), 10)
    return vm


def test_in_qmps_words(tmp_path: Path, programs: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``postcopy-ram``, ``migrate-start-postcopy`` lets the guest go over, and events tell of ``postcopy-active``.
    A link that is cut is ``postcopy-paused`` at both ends, and ``migrate`` with ``resume`` connects anew; the source
    then stands still, and ``cont`` there is refused. A descriptor of ``getfd`` is one connection, and is not enough."""
    links: list[Any] = []

    def breaking(*words: Any, **keys: Any) -> tuple[Any, bool]:
        peer, one_way = connect(*words, **keys)
        links.append(peer if len(links) != 1 else Breaking(peer, 1 << 20))
        return links[-1], one_way

    monkeypatch.setattr(qmp, "connect", breaking)
    with Host() as host, filled(programs[0], host) as vm:
        with Client(tmp_path / "here") as here, Client(tmp_path / "there") as there:
            for one in (here, there):
                assert "Enable postcopy" in one.ask("migrate-start-postcopy")["error"]["desc"]
                assert one.ask("migrate-set-capabilities", capabilities=ON) == {"return": {}}
            known = {one["capability"]: one["state"] for one in here.ask("query-migrate-capabilities")["return"]}
            assert known["postcopy-ram"]
            assert "is not being migrated" in here.ask("migrate-start-postcopy")["error"]["desc"]
            ours, theirs = socket.socketpair()
            with ours, theirs:
                request = json.dumps({"execute": "getfd", "arguments": {"fdname": "link"}}).encode()
                socket.send_fds(here.socket, [request], [ours.fileno()])
                assert here.answer() == {"return": {}}
                assert "takes two connections" in here.ask("migrate", uri="fd:link")["error"]["desc"]
            assert here.ask("migrate-set-parameters", downtime_limit=60000, max_bandwidth=1 << 20) == {"return": {}}
            assert there.ask("migrate-incoming", uri=f"unix:{tmp_path}/door") == {"return": {}}
            assert "no post-copy" in here.ask("migrate", uri=f"unix:{tmp_path}/door", resume=True)["error"]["desc"]
            assert here.ask("migrate", uri=f"unix:{tmp_path}/door") == {"return": {}}
            while here.ask("migrate-start-postcopy") != {"return": {}}:
                pass
            assert statuses(here, "postcopy-paused")[-2:] == ["postcopy-active", "postcopy-paused"]
            assert statuses(there, "postcopy-paused")[-2:] == ["postcopy-active", "postcopy-paused"]
            for one in (here, there):
                assert one.ask("query-migrate")["return"]["status"] == "postcopy-paused"
            assert "runs where it was migrated to" in here.ask("cont")["error"]["desc"]
            assert here.ask("migrate", uri=f"unix:{tmp_path}/door", resume=True) == {"return": {}}
            assert "postcopy-recover" in statuses(here, "completed")
            assert statuses(there, "completed")[-1] == "completed"
            assert here.ask("query-migrate")["return"]["ram"]["remaining"] == 0
            assert here.ask("query-status")["return"]["status"] == "postmigrate"
            assert "runs where it was migrated to" in here.ask("cont")["error"]["desc"]
            assert there.ask("query-status")["return"]["status"] == "running"
            assert there.ask("quit") == {"return": {}}
        assert vm.state == "paused"
        assert count(vm)


def test_with_certificates_in_qmps_words(tmp_path: Path, programs: tuple[list[str], list[str]]) -> None:
    """``tls-creds`` is for the pages too."""
    host = Host()
    with host, filled(programs[0], host), Client(tmp_path / "here") as here, Client(tmp_path / "there") as there:
        assert here.ask("migrate-set-capabilities", capabilities=ON) == {"return": {}}
        made = here.ask("object-add", qom_type="tls-creds-x509", id="own", dir=str(tmp_path), endpoint="client")
        assert made == {"return": {}}
        there.ask("migrate-set-parameters", tls_creds="served")
        assert there.ask("migrate-incoming", uri=f"unix:{tmp_path}/door") == {"return": {}}
        here.ask("migrate-set-parameters", tls_creds="own", tls_hostname="machines.test", downtime_limit=60000)
        here.ask("migrate-set-parameters", max_bandwidth=1 << 20)
        assert here.ask("migrate", uri=f"unix:{tmp_path}/door") == {"return": {}}
        while here.ask("migrate-start-postcopy") != {"return": {}}:
            pass
        assert "postcopy-active" in statuses(here, "completed")
        assert there.ask("quit") == {"return": {}}
