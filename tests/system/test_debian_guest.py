"""A whole Debian on a disk, on a network: it boots, works, and powers off with everything in order."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cardcage import Machine
from cardcage.errors import HostError
from cardcage.outcome import PoweredOff
from debian_guest import APPEND, DebianGuest, check_file_system, debian_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from net_lab import Namespace

ROM = Path("/usr/share/seabios/bios-256k.bin")
SERVER = "192.0.2.2"
FIO = "fio --name=v --filename=/root/f --rw=randrw --size=16M --bs=4k --direct=1 --ioengine=libaio --iodepth=16"


@pytest.fixture(scope="module")
def guest() -> DebianGuest:
    return debian_guest()


@pytest.fixture
def outside() -> Iterator[Namespace]:
    """A namespace with one address, that of the server, and a default route which leads to nothing."""
    with closing(Namespace()) as made:
        made.shell(
            "ip link add out0 type veth peer name nowhere",
            f"ip addr add {SERVER}/24 dev out0",
            "ip link set out0 up",
            "ip link set nowhere up",
            "ip route add default via 192.0.2.1",
        )
        yield made


def log_in(machine: Machine) -> None:
    machine.console.expect("login: ", timeout=240)
    machine.console.send("root\n")
    machine.console.expect("# ", timeout=60)


def said(machine: Machine, command: str) -> str:
    """What *command* writes on the guest's terminal. Fails unless its status is 0."""
    machine.console.send(f"clear; {command}; echo the end: $?\n")
    text = machine.console.expect(re.compile(r"the end: \d+\r"), timeout=120)
    assert text.endswith("the end: 0\r"), text
    return text


@pytest.mark.once
@pytest.mark.timeout(600)
def test_debian_works_on_disk_and_network(guest: DebianGuest, outside: Namespace, tmp_path: Path) -> None:
    """Debian boots from virtio-blk to a login, has its address by DHCP, reaches a server, verifies what fio wrote,
    moves data with iperf3, sees no warning of a driver, and leaves image and file system clean.
    """
    for tool in ("passt", "iperf3"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    image = guest.overlay(tmp_path / "disk.qcow2")
    (tmp_path / "word").write_text("from the server")
    devices: list[dict[str, Any]] = [
        {"type": "virtio-blk", "drive": {"file": str(image), "backing": str(guest.disk)}, "queues": 2},
        {"type": "virtio-net", "net": {"type": "user", "ipv6": False, "hostfwd": ["tcp:127.0.0.1:2222-:22"]}},
    ]

    def make() -> Machine:
        return Machine(
            kernel=guest.kernel, initrd=guest.initrd, append=APPEND, memory="512M", cpus=2, accel="tcg", devices=devices
        )

    with ExitStack() as stack:
        machine = stack.enter_context(outside.run(make))
        for words in (
            ["iperf3", "-s", "-B", SERVER],
            [sys.executable, "-m", "http.server", "--bind", SERVER, "--directory", str(tmp_path), "80"],
        ):
            server = outside.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(server.wait)
            stack.callback(server.kill)
        machine.start()
        log_in(machine)
        with pytest.raises(HostError, match="is writing this image"):
            Machine(memory="64M", accel="tcg", devices=devices[:1])
        assert "inet 10.0.2.15/24" in said(machine, "ip -o -4 addr show eth0")
        assert "from the server" in said(machine, f"busybox wget -q -O - http://{SERVER}/word")
        listening = "grep -q ':0016 .* 0A ' /proc/net/tcp /proc/net/tcp6"
        said(machine, f"(busybox nc -l -p 22 < /dev/null > came &); until {listening}; do sleep 0.1; done")
        outside.run(lambda: call_guest(b"through hostfwd"))
        assert "through hostfwd" in said(machine, "until grep . came; do sleep 0.1; done")
        said(machine, f"{FIO} --verify=crc32c --verify_fatal=1")
        assert "receiver" in said(machine, f"iperf3 -c {SERVER} -n 32M")
        assert "receiver" in said(machine, f"iperf3 -c {SERVER} -n 16M -R")
        assert said(machine, "ls /sys/block/vda/mq | tr '\\n' ' '").count("0 1 ") == 1
        warned = [one for one in said(machine, "dmesg -r | grep -E '^<[0-4]>' || :").splitlines() if "virtio" in one]
        assert not warned
        machine.console.send("poweroff\n")
        assert machine.wait(120) == PoweredOff()
    check_file_system(image, tmp_path / "raw")


def call_guest(words: bytes) -> None:
    """Send *words* through the forwarded port."""
    with socket.create_connection(("127.0.0.1", 2222), 30) as end:
        end.sendall(words)
        end.shutdown(socket.SHUT_WR)
        while end.recv(4096):
            pass


@pytest.mark.once
@pytest.mark.timeout(600)
def test_seabios_boots_grub_from_the_disk(guest: DebianGuest, tmp_path: Path) -> None:
    """SeaBIOS starts GRUB from virtio-blk, whose menu on the serial port starts Debian's kernel."""
    if not ROM.exists():
        pytest.skip("needs Debian's package seabios")
    image = guest.overlay(tmp_path / "disk.qcow2")
    devices = [{"type": "virtio-blk", "drive": {"file": str(image), "backing": str(guest.disk)}}]
    with Machine(memory="512M", accel="tcg", boot={"firmware": str(ROM)}, devices=devices) as machine:
        machine.start()
        machine.console.expect("Booting from Hard Disk", timeout=60)
        machine.console.expect("the cage's Debian", timeout=60)
        machine.console.send("\n")
        machine.console.expect("Linux version", timeout=120)
        log_in(machine)
        machine.console.send("poweroff\n")
        assert machine.wait(120) == PoweredOff()
    check_file_system(image, tmp_path / "raw")


@pytest.mark.once
@pytest.mark.timeout(600)
def test_systemd_starts_everything(guest: DebianGuest, outside: Namespace, tmp_path: Path) -> None:
    """The same Debian under systemd: every unit comes up, on disk, network and entropy of ours, and it powers off."""
    if shutil.which("passt") is None:
        pytest.skip("needs passt")
    image = guest.overlay(tmp_path / "disk.qcow2")
    devices: list[dict[str, Any]] = [
        {"type": "virtio-blk", "drive": {"file": str(image), "backing": str(guest.disk)}},
        {"type": "virtio-net", "net": {"type": "user", "ipv6": False}},
        {"type": "virtio-rng"},
    ]

    def make() -> Machine:
        append = f"{APPEND} init=/lib/systemd/systemd"
        return Machine(
            kernel=guest.kernel, initrd=guest.initrd, append=append, memory="512M", accel="tcg", devices=devices
        )

    with outside.run(make) as machine:
        machine.start()
        log_in(machine)
        text = said(machine, "systemctl is-system-running --wait; systemctl --failed --no-legend --plain; :")
        assert "running\r" in text, text
        assert "systemd" in said(machine, "cat /proc/1/comm")
        machine.console.send("systemctl poweroff\n")
        assert machine.wait(240) == PoweredOff()
    check_file_system(image, tmp_path / "raw")
