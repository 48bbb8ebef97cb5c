"""Disk images that boot by a BIOS, by ``Machine.image()`` and ``cardcage boot --firmware --exec``: small ones, and one
with cloud-init as clouds have it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cardcage.errors import ConfigError, HostError
from cardcage.outcome import PoweredOff
from cardcage_agent import Machine, NoAgent
from cardcage_boot.by_agent import AgentCommand
from cardcage_boot.firmware import find_bios
from debian_guest import CLOUD, debian_guest
from installed import PROGRAM

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
WRITES = bytes.fromhex("31c0 8ec0 b80103 b90200 b600 bb007c cd13 ba0406 b80020 ef f4").ljust(510, b"\0") + b"\x55\xaa"
"""A boot sector that copies itself to the next sector by INT 13h, and powers off."""

needs_bios = pytest.mark.skipif(not find_bios(), reason="needs Debian's package seabios")


@needs_bios
@pytest.mark.parametrize("write", [False, True])
def test_an_image_is_written_when_asked_only(tmp_path: Path, write: bool) -> None:
    """The image's own boot sector runs; what it writes is in the image afterwards with ``write``, else nowhere."""
    image = tmp_path / "disk.img"
    whole = WRITES.ljust(1 << 20, b"\0")
    image.write_bytes(whole)
    drive = {"file": str(image), "format": "raw"}
    with Machine.image(drive, memory="64M", accel="tcg", write=write) as vm:
        assert {"agent", "qga", "cloud-init"} <= set(vm.devices)
        vm.start()
        assert vm.wait(60) == PoweredOff()
    assert image.read_bytes() == (2 * WRITES).ljust(1 << 20, b"\0") if write else whole


@needs_bios
def test_what_an_image_lacks_is_a_line(tmp_path: Path) -> None:
    """No image, user data that are none, and a guest without either agent are errors that say so."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes.fromhex("f4 ebfd").ljust(510, b"\0") + b"\x55\xaa")
    with pytest.raises(ConfigError, match=r"none: .*No such file"):
        Machine.image(tmp_path / "none", accel="tcg")
    with pytest.raises(ConfigError, match="no user data of cloud-init: expected"):
        Machine.image(image, user_data="hostname: x\n", accel="tcg")
    with Machine.image(image, memory="64M", accel="tcg", user_data={"hostname": "x"}) as vm:
        vm.start()
        with pytest.raises(NoAgent, match="image: no agent has answered within 0 s: the guest has none"):
            vm.run("true", timeout=0)
        with pytest.raises(NoAgent, match="image: no qemu-guest-agent has answered within 0 s"):
            vm.qga.ping(timeout=0)


def test_without_a_bios_an_image_cannot_boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no SeaBIOS is installed the error says what to install."""
    monkeypatch.setattr("cardcage_boot.firmware.BIOS", (str(tmp_path / "none"),))
    with pytest.raises(HostError, match=r"no SeaBIOS is installed here \(Debian: seabios\)"):
        Machine.image("disk.img")


def by_agent(machine: Machine, command: str, *, given: bytes, read: bool) -> tuple[str, bytes, bytes]:
    """The word about the status of a command that AgentCommand runs in *machine*, its output and its errors."""
    source = os.memfd_create("input")
    os.write(source, given)
    os.lseek(source, 0, os.SEEK_SET)
    (out, to_out), (err, to_err), (told, tells) = (os.pipe() for _ in range(3))
    with open(out, "rb") as output, open(err, "rb") as errors, open(told, "rb") as status:
        if not read:
            output.close()
        running = AgentCommand(machine, command, tells, (source, to_out, to_err))
        machine.start()
        machine.wait(300)
        running.join()
        for one in (source, to_out, to_err, tells):
            os.close(one)
        return status.read().decode(), output.read() if read else b"", errors.read()


@pytest.mark.parametrize(
    ("command", "read", "found"),
    [
        ("cat; echo why >&2; exit 3", True, ("status 3\n", b"given\0", b"why\n")),
        ("cat /dev/zero", False, ("status 141\n", b"", b"")),
        ("poweroff -f; sleep 1000", True, ("", b"", b"")),
    ],
)
def test_a_command_by_the_agent(kernel: Path, command: str, read: bool, found: tuple[str, bytes, bytes]) -> None:
    """Its input, output, errors and status pass; then the machine ends. A guest that ends before has told nothing."""
    with Machine.debian(memory="128M", accel="tcg", machine={"stop_timeout": 0}) as vm:
        assert by_agent(vm, command, given=b"given\0", read=read) == found


@needs_bios
def test_an_image_that_ends_before_the_command(tmp_path: Path) -> None:
    """``--exec`` of a guest that powers off without an agent is a failure that says so."""
    image = tmp_path / "disk.img"
    image.write_bytes(WRITES.ljust(1 << 20, b"\0"))
    words = ["boot", "--accel", "tcg", "-m", "64M", "--firmware", find_bios(), "--drive", f"file={image},format=raw"]
    done = subprocess.run([*PROGRAM, *words, "--exec", "true"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (70, ""), done.stderr
    assert done.stderr.endswith("cardcage: the guest ended before the command did\n")


@needs_bios
@pytest.mark.skipif(not LONG, reason="makes an image and boots it by systemd, in minutes: set CARDCAGE_LONG_TESTS")
@pytest.mark.timeout(1800)
def test_a_cloud_image_has_our_agent_and_its_own(tmp_path: Path) -> None:
    """By its seed the agent runs, and user data and keys are in force; qemu-guest-agent answers, and ssh works."""
    guest = debian_guest(CLOUD)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    data = {"write_files": [{"path": "/root/hello", "content": "from user data\n"}], "runcmd": [["touch", "/root/ran"]]}
    network = {"type": "virtio-net", "net": {"type": "egress"}}  # the image waits for an address
    keys = {"ssh_key": tmp_path / "key.pub", "devices": [network], "memory": "512M", "accel": "tcg", "name": "cloud"}
    with Machine.image(guest.disk, user_data=data, **keys) as vm:
        vm.start()
        vm.agent.wait(900)
        vm.run("until [ -e /root/ran ]; do sleep 1; done", timeout=600)
        log = vm.files.read("/var/log/cloud-init.log").decode(errors="replace")
        assert vm.run("uname -n; cat /root/hello", text=True).stdout == "cloud\nfrom user data\n", log
        assert b"ssh-ed25519" in vm.files.read("/home/debian/.ssh/authorized_keys"), log
        assert vm.qga.run(["/bin/uname", "-n"], timeout=120).stdout == b"cloud\n"
        words = ["ssh", "-F", str(vm.ssh_config()), "cloud", "id -un"]
        assert subprocess.run(words, capture_output=True, check=True).stdout == b"root\n"
    words = ["boot", "--accel", "tcg", "--firmware", find_bios(), "--drive", f"temporary:{guest.disk}"]
    words += ["--device", "virtio-net,net=egress", "--exec", "cat; uname -n >&2; exit 4"]
    done = subprocess.run([*PROGRAM, *words], input=b"given", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (4, b"given"), done.stderr
    assert b"\nfirmware\n" in done.stderr
