"""Machines that are built to become one that comes, as QEMU's ``-incoming`` has it: in QMP's words, and a program's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.host import Host
from cardcage_migrate import MEANT, Machine
from cardcage_migrate.expecting import expected, waiting_drive
from cardcage_qemu import translate
from cardcage_qemu.program import _become
from cardcage_qmp import control_of
from listens import listens
from migrate_kit import certificates
from qmp_kit import Client
from snapshot_kit import count, counting, counts_on

pytestmark = pytest.mark.once

PROGRAM = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
COUNTS = bytes.fromhex("31c08ed8 66ff060050 ebf9")
"""Counts at 0x5000 (snapshot_kit), in real mode."""
ON = [{"capability": "events", "state": True}, {"capability": "return-path", "state": True}]


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key and the roster of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        yield made


def devices(tmp_path: Path, name: str, drive: Any) -> list[dict[str, Any]]:
    """A monitor at *name*, and a disk."""
    return [
        {"type": "qmp", "id": "monitor", "socket": f"unix:{tmp_path}/{name}"},
        {"type": "virtio-blk", "id": "disk", "drive": drive},
    ]


def machine(tmp_path: Path, host: Host, name: str, *, waits: bool, disk: str = "disk.raw") -> Machine:
    """One of two with the same disk; *waits*: it is to become the other."""
    drive = {"file": f"{tmp_path}/{disk}", "format": "raw"}
    host.share(MEANT, dict).update(incoming=waits)
    made = devices(tmp_path, name, waiting_drive(drive) if waits else drive)
    return counting(tmp_path, host, name=name, memory="8M", platform="pc", devices=made)


class Becoming:
    """The main thread of ``cardcage-qemu -incoming defer -S``."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            _become(self.vm, control_of(self.vm), expected(self.vm), frozen=True)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Becoming:
        return self

    def __exit__(self, *_: object) -> None:
        control_of(self.vm).quitted.set()
        control_of(self.vm).began.set()  # as at the end of a machine that runs
        self.vm.dismantle()
        self.thread.join()


def until(peer: Client, *statuses: str) -> str:
    """The first of the *statuses* that an event tells of."""
    while (found := peer.event("MIGRATION")["data"]["status"]) not in statuses:
        pass
    return str(found)


def status(peer: Client) -> str:
    """What ``query-status`` says."""
    return str(peer.ask("query-status")["return"]["status"])


def test_there_and_back_in_qmps_words(tmp_path: Path, host: Host) -> None:
    """A machine of ``-incoming defer`` waits for ``migrate-incoming``, hears nobody who is no source, becomes the one
    that comes, and runs after ``cont``; the source stands still, refuses to go on while the other has the disk, and
    after ``cont`` at an end that no other copy has seen it goes on."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    with machine(tmp_path, host, "a", waits=False) as vm, Becoming(machine(tmp_path, host, "b", waits=True)) as there:
        vm.start()
        counts_on(vm, 10)
        with Client(tmp_path / "a") as here, Client(tmp_path / "b") as peer:
            assert status(peer) == "inmigrate"
            assert peer.ask("query-migrate") == {"return": {}}
            assert "not specified" in here.ask("migrate-incoming", uri=f"unix:{tmp_path}/door")["error"]["desc"]
            assert "expected unix:PATH" in peer.ask("migrate-incoming", uri="nowhere")["error"]["desc"]
            assert "No such file" in peer.ask("migrate-incoming", uri="unix:/nowhere/door")["error"]["desc"]
            for one in (here, peer):
                assert one.ask("migrate-set-capabilities", capabilities=ON) == {"return": {}}
            assert peer.ask("migrate-incoming", uri=f"unix:{tmp_path}/door") == {"return": {}}
            assert peer.event("MIGRATION")["data"] == {"status": "setup"}
            assert "already" in peer.ask("migrate-incoming", uri=f"unix:{tmp_path}/door")["error"]["desc"]
            with socket.socket(socket.AF_UNIX) as nobody:
                nobody.connect(f"{tmp_path}/door")
                nobody.sendall(bytes(64))
                with suppress(ConnectionResetError):
                    assert nobody.recv(1) == b""
            for key in ("resume", "blk", "inc"):
                assert key in here.ask("migrate", uri="unix:/nowhere", **{key: True})["error"]["desc"]
            ours, theirs = socket.socketpair()
            with ours, theirs:
                request = json.dumps({"execute": "getfd", "arguments": {"fdname": "silent"}}).encode()
                socket.send_fds(here.socket, [request], [theirs.fileno()])
                assert here.answer() == {"return": {}}
                assert here.ask("migrate", uri="fd:silent") == {"return": {}}
                assert "in progress" in here.ask("migrate", uri=f"unix:{tmp_path}/door")["error"]["desc"]
            assert until(here, "failed") == "failed"
            assert status(here) == "running"
            answer = here.ask("migrate", uri=f"unix:{tmp_path}/door", detach=True, resume=False)
            assert answer == {"return": {}}
            assert [one["data"]["status"] for one in here.events if one["event"] == "MIGRATION"][:1] == ["setup"]
            assert until(here, "completed", "failed") == "completed", here.ask("query-migrate")
            assert until(peer, "completed", "failed") == "completed"
            assert (status(here), status(peer)) == ("postmigrate", "paused")
            assert peer.ask("query-migrate") == {"return": {"status": "completed"}}
            assert peer.ask("query-block")["return"][0]["inserted"]["file"] == f"{tmp_path}/disk.raw"
            assert "is writing this image" in here.ask("cont")["error"]["desc"]
            assert "has been migrated already" in here.ask("migrate", uri="exec:cat")["error"]["desc"]
            assert peer.ask("cont") == {"return": {}}
            peer.event("RESUME")
            assert status(peer) == "running"
            counts_on(there.vm, count(vm))
            assert peer.ask("stop") == {"return": {}}
            assert peer.ask("migrate", uri=f"file:{tmp_path}/kept") == {"return": {}}
            assert until(peer, "completed", "failed") == "completed"
            assert status(peer) == "postmigrate"
            assert peer.ask("cont") == {"return": {}}
            assert status(peer) == "running"
            counts_on(there.vm, count(there.vm))
            assert there.error is None


def test_a_machine_that_does_not_fit_does_not_come(tmp_path: Path, host: Host) -> None:
    """Another size of memory, or of a disk, is told to the source, which goes on, and ends the machine that waited; one
    that is ended while it waits ends at once."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    with machine(tmp_path, host, "a", waits=False) as vm, Client(tmp_path / "a") as here:
        vm.start()
        (tmp_path / "other.raw").write_bytes(bytes(1 << 20))
        with Becoming(machine(tmp_path, host, "b", waits=True, disk="other.raw")) as there:
            with Client(tmp_path / "b") as peer:
                assert peer.ask("migrate-incoming", uri=f"unix:{tmp_path}/door") == {"return": {}}
                here.ask("migrate-set-capabilities", capabilities=ON)
                assert here.ask("migrate", uri=f"unix:{tmp_path}/door") == {"return": {}}
                assert until(here, "completed", "failed") == "failed"
            there.thread.join()
            assert "is another file" in str(there.error)
            assert "is another file" in here.ask("query-migrate")["return"]["error-desc"]
            assert status(here) == "running"
        with Becoming(machine(tmp_path, host, "c", waits=True)) as there, Client(tmp_path / "c") as peer:
            assert peer.ask("migrate-incoming", uri="tcp:127.0.0.1:0") == {"return": {}}
            assert peer.ask("cont") == {"return": {}}
            assert peer.ask("quit") == {"return": {}}
            there.thread.join()
            assert there.error is None


def test_by_the_command_line(tmp_path: Path, host: Host) -> None:
    """``cardcage-qemu -incoming file:PATH`` goes on with what was sent there, without being told; what is no machine,
    and no place, are told in one line."""
    (tmp_path / "rom").write_bytes(COUNTS.ljust(0xFFF0, b"\0") + bytes.fromhex("ea000000f0").ljust(16, b"\0"))
    words = f"-accel tcg -m 8M -bios {tmp_path}/rom -nodefaults -qmp unix:{tmp_path}/qmp,server=on,wait=off".split()
    with Machine.from_config(Draft.of(translate(words).config()).config(), host=host) as vm:
        vm.start()
        counts_on(vm, 10)
        assert vm.migrate(f"file:{tmp_path}/kept").status == "given up"
    with subprocess.Popen([*PROGRAM, *words, "-incoming", f"file:{tmp_path}/kept"], stderr=subprocess.PIPE) as process:
        try:
            while not listens(tmp_path / "qmp"):
                assert process.poll() is None
            with Client(tmp_path / "qmp") as peer:
                while (found := status(peer)) in ("inmigrate", "paused"):
                    pass
                assert found == "running"
                assert peer.ask("quit") == {"return": {}}
            assert process.wait() == 0
        finally:
            process.kill()
    (tmp_path / "nothing").write_bytes(bytes(64))
    for uri, why in ((f"file:{tmp_path}/nothing", "no machine of cardcage's"), ("x:y", '-incoming: "x:y": expected')):
        done = subprocess.run([*PROGRAM, *words, "-incoming", uri], capture_output=True, text=True, timeout=120)
        assert (done.returncode != 0, done.stderr.count("\n"), "Traceback" in done.stderr) == (True, 1, False)
        assert why in done.stderr


def test_through_a_program(tmp_path: Path, host: Host) -> None:
    """``migrate "exec:gzip -c > FILE"`` sends it one way, and is over once the program has ended;
    ``-incoming "exec:gzip -dc FILE"`` goes on with it. A program that fails makes the migration fail: the machine
    stands still, until ``cont``. With ``return-path`` the program's words are the destination's. In its jail the
    process starts none, and says so."""
    (tmp_path / "rom").write_bytes(COUNTS.ljust(0xFFF0, b"\0") + bytes.fromhex("ea000000f0").ljust(16, b"\0"))
    words = f"-accel tcg -m 8M -bios {tmp_path}/rom -nodefaults -qmp unix:{tmp_path}/qmp,server=on,wait=off".split()
    with Machine.from_config(Draft.of(translate(words).config()).config(), host=host) as vm:
        counts_on(vm.start(), 10)
        with Client(tmp_path / "qmp") as here:

            def moved(command: str) -> str:
                line = f'migrate -d "exec:{command}"'
                assert here.ask("human-monitor-command", command_line=line) == {"return": ""}
                return until(here, "completed", "failed")

            here.ask("migrate-set-capabilities", capabilities=ON)
            assert moved("cat") == "failed"  # what it sent came back
            assert "no frame where one is expected" in here.ask("query-migrate")["return"]["error-desc"]
            assert status(here) == "running"
            here.ask("migrate-set-capabilities", capabilities=[ON[0], {**ON[1], "state": False}])
            assert moved("cat > /dev/null; exit 3") == "failed"
            assert "the program ended with status 3" in here.ask("query-migrate")["return"]["error-desc"]
            assert status(here) == "postmigrate"
            assert here.ask("cont") == {"return": {}}
            counts_on(vm, count(vm))
            os.mkfifo(tmp_path / "end")
            assert here.ask("migrate", uri=f"exec:gzip -c > {tmp_path}/kept; cat {tmp_path}/end") == {"return": {}}
            with (tmp_path / "end").open("w"):  # the program waits for us
                assert here.ask("migrate_cancel") == {"return": {}}
                assert here.ask("query-migrate")["return"]["status"] == "device"
            assert until(here, "completed", "failed") == "completed"
            assert status(here) == "postmigrate"
    there = [*PROGRAM, *words, "-incoming", f"exec:gzip -dc {tmp_path}/kept"]
    with subprocess.Popen(there, stderr=subprocess.PIPE) as process:
        try:
            while not listens(tmp_path / "qmp"):
                assert process.poll() is None
            with Client(tmp_path / "qmp") as peer:
                while (found := status(peer)) in ("inmigrate", "paused"):
                    pass
                assert found == "running"
                assert "in its jail" in peer.ask("migrate", uri="exec:cat")["error"]["desc"]
                assert peer.ask("quit") == {"return": {}}
            assert process.wait() == 0
        finally:
            process.kill()


def test_certificates_in_qmps_words(tmp_path: Path, host: Host) -> None:
    """With ``tls-creds-x509`` objects at both ends, which ``tls-creds`` names, it moves over TCP; a source without, or
    of another authority, or that wants another name, gets nothing, and who waits goes on waiting. An object of the
    other endpoint, one that is not there, and one whose files are not, are told of."""
    keys = certificates(tmp_path)
    (tmp_path / "rom").write_bytes(COUNTS.ljust(0xFFF0, b"\0") + bytes.fromhex("ea000000f0").ljust(16, b"\0"))
    words = f"-accel tcg -m 8M -bios {tmp_path}/rom -nodefaults -qmp unix:{tmp_path}".split()
    here = [*words[:-1], f"{words[-1]}/here,server=on,wait=off"]
    made = "-object tls-creds-x509,id=served,endpoint=server,verify-peer=on,dir="
    there = [*words[:-1], f"{words[-1]}/there,server=on,wait=off", *f"{made}{keys} -incoming defer".split()]

    def refused(peer: Client, name: str, **arguments: Any) -> str:
        return str(peer.ask(name, **arguments)["error"]["desc"])

    def added(peer: Client, id: str, **more: Any) -> Any:
        return peer.ask("object-add", qom_type="tls-creds-x509", id=id, **{"dir": str(keys), **more})

    with (
        Machine.from_config(Draft.of(translate(here).config()).config(), host=host) as vm,
        subprocess.Popen([*PROGRAM, *there]) as process,
    ):
        try:
            counts_on(vm.start(), 10)
            while not listens(tmp_path / "there"):
                assert process.poll() is None
            with Client(tmp_path / "here") as source, Client(tmp_path / "there") as target:
                assert "client-cert.pem" in added(source, "bad", dir="/nowhere")["error"]["desc"].replace(
                    "ca-", "client-"
                )
                assert "always" in added(source, "bad", verify_peer=False)["error"]["desc"]
                for id, more in (("own", {}), ("server", {"endpoint": "server"}), ("other", {"dir": f"{keys}/other"})):
                    assert added(source, id, **more) == {"return": {}}
                target.ask("migrate-set-parameters", tls_creds="served")
                assert target.ask("migrate-incoming", uri="tcp:127.0.0.1:0") == {"return": {}}
                (at,) = target.ask("query-migrate")["return"]["socket-address"]
                uri = f"tcp:{at['host']}:{at['port']}"
                source.ask("migrate-set-capabilities", capabilities=ON)
                assert source.ask("migrate", uri=uri) == {"return": {}}  # it is plain, and finds out
                assert until(source, "completed", "failed") == "failed"
                for creds, name, why in (
                    ("none", "", "No TLS credentials with id 'none'"),
                    ("server", "", "Expected TLS credentials for a client endpoint"),
                    ("own", "", "mismatch"),
                    ("other", "machines.test", "certificate"),
                ):
                    source.ask("migrate-set-parameters", tls_creds=creds, tls_hostname=name)
                    assert why in refused(source, "migrate", uri=uri)
                assert "TLS is for tcp: and unix:" in refused(source, "migrate", uri="exec:cat")
                assert vm.state == "running"
                source.ask("migrate-set-parameters", tls_creds="own", tls_hostname="machines.test")
                found = source.ask("query-migrate-parameters")["return"]
                assert (found["tls-creds"], found["tls-hostname"]) == ("own", "machines.test")
                assert source.ask("migrate", uri=uri) == {"return": {}}
                assert until(source, "completed", "failed") == "completed"
                while (now := status(target)) in ("inmigrate", "paused"):
                    pass
                assert now == "running"
                assert source.ask("object-del", id="own") == {"return": {}}
                assert source.ask("object-del", id="own")["error"]["desc"] == "object 'own' not found"
                assert target.ask("quit") == {"return": {}}
            assert process.wait() == 0
        finally:
            process.kill()
