"""``cardcage-qemu`` as a program in QEMU's place: the same words, the same guest; and those who drive it."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cardcage.device import Slot
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage_qemu import translate
from cardcage_qemu.program import _run
from iso import make_iso
from listens import listens
from qmp_kit import Client

ROM = Path("/usr/share/seabios/bios-256k.bin")
SAYS_AND_ENDS = bytes.fromhex("baf803 b063 ee b064 ee b00a ee ba0406 b80020 ef f4")
"""Writes "cd" to COM1, and powers off."""
PROGRAM = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
UUID = "12345678-1234-1234-1234-123456789abc"
ASKED = "uname -r; nproc; cat /proc/cmdline /sys/class/dmi/id/product_uuid; ls /sys/block; cat /sys/block/vda/size"


@contextmanager
def started(words: list[str], **keys: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block."""
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **keys) as process:
        kill = threading.Timer(240, process.kill)
        kill.start()
        try:
            yield process
        finally:
            kill.cancel()
            process.kill()


def conversation(words: list[str], command: str) -> list[str]:
    """What a guest's shell on the serial port answers to *command*, before it powers off."""
    with started(words) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        while b"~ # " not in said:
            data = os.read(process.stdout.fileno(), 65536)
            assert data, said.decode("utf-8", "replace")[-2000:]
            said += data
        process.stdin.write(f"echo be''gin; {command}; echo e''nd; poweroff -f\n".encode())
        process.stdin.flush()
        said = process.stdout.read()
        assert process.wait() == 0
    text = said.decode("utf-8", "replace").replace("\r", "")
    return text.partition("\nbegin\n")[2].partition("\nend\n")[0].splitlines()


def test_the_same_words_are_the_same_guest(kernel: Path, initramfs: Path, tmp_path: Path) -> None:
    """One command line boots the distribution's kernel under QEMU and under cardcage, and the guests find the same."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64")
    with open(tmp_path / "disk.img", "wb") as disk:
        disk.truncate(3 << 20)
    words = f"""-machine pc,accel=tcg,usb=off -cpu max -m 256M -smp 2,sockets=2 -kernel {kernel} -initrd {initramfs}
        -drive file={tmp_path}/disk.img,if=none,id=d,format=raw,cache=unsafe
        -device virtio-blk-pci,drive=d,serial=S1,addr=0x5
        -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r -uuid {UUID} -name guest=same
        -nodefaults -display none -vga none -serial stdio -monitor none -no-reboot -append""".split()
    words += ["console=ttyS0 panic=-1 no_timer_check quiet"]
    ours, theirs = conversation([*PROGRAM, *words], ASKED), conversation(["qemu-system-x86_64", *words], ASKED)
    assert ours == theirs
    assert UUID in ours
    assert ours[-2:] == ["vda", "6144"]


@pytest.mark.skipif(not ROM.exists(), reason="needs Debian's package seabios")
@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd")
def test_a_disc_that_is_booted_beside_a_disk_of_qemu_nbd(tmp_path: Path) -> None:
    """-cdrom is booted by SeaBIOS, and a disk of qemu-nbd is a disk; QMP tells of both, and of a tray."""
    (tmp_path / "cd.iso").write_bytes(make_iso(SAYS_AND_ENDS, b""))
    with open(tmp_path / "disk.img", "wb") as disk:
        disk.truncate(1 << 20)
    server = ["qemu-nbd", "-f", "raw", "-k", str(tmp_path / "nbd"), "-x", "e", str(tmp_path / "disk.img")]
    words = f"""-S -accel tcg -m 32M -bios {ROM} -cdrom {tmp_path}/cd.iso -serial stdio -monitor none -boot order=d
        -drive file=nbd:unix:{tmp_path}/nbd:exportname=e,format=raw,if=virtio,id=n
        -qmp unix:{tmp_path}/qmp,server=on,wait=on""".split()
    with started(server) as nbd:
        while not listens(tmp_path / "nbd"):
            assert nbd.poll() is None
        with started([*PROGRAM, *words], stderr=subprocess.PIPE) as process:
            while not listens(tmp_path / "qmp"):
                assert process.poll() is None
            with Client(tmp_path / "qmp") as peer:
                found = {one["device"]: one for one in peer.ask("query-block")["return"]}
                assert found["n"]["inserted"]["drv"] == "nbd"
                assert found["n"]["inserted"]["image"]["virtual-size"] == 1 << 20
                assert found["n"]["inserted"]["file"] == f"nbd+unix:///e?socket={tmp_path}/nbd"
                assert (found["n"]["removable"], found["cd0"]["removable"]) == (False, True)
                assert found["cd0"]["inserted"]["file"] == f"{tmp_path}/cd.iso"
                assert "not locked" in peer.ask("human-monitor-command", command_line="info block")["return"]
                peer.ask("cont")
            assert process.stdout is not None
            assert re.search(rb"c[.\r\n]*d\n$", process.stdout.read())  # SeaBIOS may have its dots to write yet
            assert process.wait() == 0


def multiboot(code: str) -> bytes:
    """A Multiboot kernel, flat, of *code*."""
    magic, flags = 0x1BADB002, 0x10000
    head = struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, *(0x100000,) * 2, 0, 0, 0x100020)
    return (head + bytes.fromhex(code)).ljust(4096, b"\0")


@pytest.fixture
def off(tmp_path: Path) -> Path:
    """A Multiboot kernel that powers off by ACPI."""
    path = tmp_path / "off"
    path.write_bytes(multiboot("66ba040666b8002066eff4ebfd"))
    return path


def test_a_probe_in_the_background(tmp_path: Path) -> None:
    """libvirt's own words for its probe: the program returns once its socket is there, and goes on in the background
    until it is told to quit; the number in its file is its own."""
    words = f"""-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg
        -qmp unix:{tmp_path}/qmp,server=on,wait=off -pidfile {tmp_path}/pid -daemonize""".split()
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    number = int((tmp_path / "pid").read_text())
    with Client(tmp_path / "qmp") as peer:
        assert peer.ask("query-status")["return"]["status"] == "prelaunch"
        options = {one["option"] for one in peer.ask("query-command-line-options")["return"]}
        assert {"machine", "drive", "mon"} <= options
        assert Path(f"/proc/{number}").exists()
        assert peer.ask("quit") == {"return": {}}
        assert peer.event("SHUTDOWN")["data"]["reason"] == "host-qmp-quit"
        assert peer.line() is None


def test_a_failure_in_the_background(tmp_path: Path) -> None:
    """What goes wrong before the start is the status and the error of the program that was called."""
    words = ["-daemonize", "-machine", "none", "-qmp", f"unix:{tmp_path}/no/qmp,server=on"]
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 2
    assert "No such file" in done.stderr


class Breaking:
    """A device whose own thread breaks."""

    def plug(self, slot: Slot, /) -> None:
        self._thread = threading.Thread(target=self._go)

    def _go(self) -> None:
        raise ZeroDivisionError("a card's mistake")

    def begin(self) -> None:
        self._thread.start()

    def unplug(self) -> None:
        self._thread.join()

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None: ...


class Card:
    """Offers it, and has it begin with the machine."""

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("breaking", Breaking)

    @hookimpl
    def cardcage_starting(self, machine: Machine) -> None:
        machine.devices["breaking"].device.begin()
        self.late = threading.Timer(60, machine.stop)
        self.late.start()


def test_a_cards_thread_that_breaks(tmp_path: Path) -> None:
    """As under `cardcage run`, a machine whose card has lost a thread ends with that error, and does not run on."""
    (tmp_path / "halt").write_bytes(multiboot("f4ebfd"))
    card = Card()
    line = translate(["-accel", "tcg", "-m", "16M", "-kernel", f"{tmp_path}/halt"])
    line.devices.append({"type": "breaking"})
    interval = sys.getswitchinterval()
    try:
        with pytest.raises(ZeroDivisionError, match="a card's mistake"):
            _run(Host([card]), line, line.config())
    finally:
        sys.setswitchinterval(interval)
        card.late.cancel()


def test_started_by_cont_and_kept_after_its_end(off: Path, tmp_path: Path) -> None:
    """With -S nothing runs before cont; with -no-shutdown the machine is there after its guest's power-off, until
    quit, and a reset and cont start it again."""
    words = f"-S -no-shutdown -accel tcg -m 16M -kernel {off} -qmp unix:{tmp_path}/qmp,server=on,wait=on".split()
    with started([*PROGRAM, *words], stderr=subprocess.PIPE) as process:
        while not listens(tmp_path / "qmp"):
            assert process.poll() is None
        with Client(tmp_path / "qmp") as peer:
            assert peer.ask("query-status")["return"]["status"] == "prelaunch"
            assert peer.ask("cont") == {"return": {}}
            assert peer.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
            assert peer.ask("query-status")["return"]["status"] == "shutdown"
            assert "Resetting" in peer.ask("cont")["error"]["desc"]
            assert peer.ask("system_reset") == {"return": {}}
            peer.event("RESET")
            assert peer.ask("query-status")["return"]["status"] == "paused"
            assert peer.ask("cont") == {"return": {}}
            assert peer.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
            assert process.poll() is None
            assert peer.ask("quit") == {"return": {}}
        assert process.stderr is not None
        assert b"outcome: the guest powered off" in process.stderr.read()
        assert process.wait() == 0
