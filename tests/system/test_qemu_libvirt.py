"""libvirt's own daemon, unmodified, with ``cardcage-qemu`` as its emulator."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from listens import listens

Virsh = Callable[..., str]

TOOLS = ("libvirtd", "virsh", "unshare")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
USER = [shutil.which("unshare", path=PATH) or "unshare", "--user", "--map-user=1000", "--map-group=1000"]
"""A session daemon is an ordinary user's: whoever runs the tests is one in a namespace of its own."""
HELPER = """import ctypes, fcntl, os, socket, struct, sys
fd = next(int(word[5:]) for word in sys.argv if word.startswith("--fd="))
assert ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) == 0
tap = os.open("/dev/net/tun", os.O_RDWR)
flags = 0x1002 | (0x4000 if "--use-vnet" in sys.argv else 0)
fcntl.ioctl(tap, 0x400454CA, b"tap0".ljust(16, bytes(1)) + struct.pack("H", flags).ljust(24, bytes(1)))
socket.send_fds(socket.socket(fileno=fd), [b"x"], [tap])
"""
"""What libvirt starts in place of QEMU's own helper: hands over a tap interface, of a network namespace of its own."""
DOMAIN = """
<domain type='qemu'>
  <name>ours</name>
  <uuid>12345678-1234-1234-1234-123456789abc</uuid>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{1}</kernel><initrd>{2}</initrd><cmdline>console=ttyS0 panic=-1 no_timer_check quiet</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{0}/cardcage-qemu</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{0}/disk.img'/><target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='pty'/>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, since names of sockets are short."""
    with TemporaryDirectory(prefix="lv-", dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def virsh(folder: Path, kernel: Path, initramfs: Path) -> Iterator[Virsh]:
    """Runs virsh against a session daemon of the test's own, with an emulator that is cardcage."""
    if any(shutil.which(one, path=PATH) is None for one in TOOLS):
        pytest.skip(f"needs {', '.join(TOOLS)}")
    if subprocess.run([*USER, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    virsh, libvirtd = (shutil.which(one, path=PATH) or one for one in ("virsh", "libvirtd"))
    # libvirt probes each QEMU on its path, which takes long
    environment = {**os.environ, "PATH": str(folder), "HOME": str(folder)}
    for name in ("CONFIG", "CACHE", "DATA"):
        environment[f"XDG_{name}_HOME"] = str(folder / name.lower())
    runtime = folder / "run"
    environment["XDG_RUNTIME_DIR"] = str(runtime)
    runtime.mkdir(mode=0o700)
    (folder / "config" / "libvirt").mkdir(parents=True)
    settings = f'security_driver = "none"\nseccomp_sandbox = 0\nbridge_helper = "{folder}/bridge-helper"\n'
    (folder / "config" / "libvirt" / "qemu.conf").write_text(settings)
    (folder / "bridge-helper").write_text(f"#!{sys.executable}\n{HELPER}")
    (folder / "bridge-helper").chmod(0o755)
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    emulator = folder / "cardcage-qemu"
    emulator.write_text(f"#!{sys.executable}\nimport sys\nfrom cardcage_qemu import main\nsys.exit(main())\n")
    emulator.chmod(0o755)
    (folder / "domain.xml").write_text(DOMAIN.format(folder, kernel, initramfs))

    def run(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [*USER, virsh, "-q", "-c", "qemu:///session", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        logs = [one.read_text()[-3000:] for one in folder.glob("cache/libvirt/qemu/log/*.log")]
        assert done.returncode == status, (done.stdout, done.stderr, logs)
        return (done.stdout + done.stderr).strip()

    with subprocess.Popen([*USER, libvirtd, "-t", "60"], env=environment, stderr=subprocess.DEVNULL) as daemon:
        try:
            while not listens(runtime / "libvirt" / "libvirt-sock"):
                assert daemon.poll() is None
            yield run
        finally:
            subprocess.run(
                [*USER, virsh, "-q", "-c", "qemu:///session", "destroy", "ours"], env=environment, capture_output=True
            )
            daemon.terminate()
            daemon.wait()


class Guest:
    """The shell on the guest's serial port."""

    def __init__(self, terminal: str) -> None:
        self.fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd)
        self.said = b""
        self.until(b"~ # ")

    def until(self, word: bytes) -> bytes:
        """What it says before *word*."""
        while word not in self.said:
            assert select.select([self.fd], [], [], 120)[0], self.said[-2000:]
            self.said += os.read(self.fd, 65536)
        before, _, self.said = self.said.partition(word)
        return before

    def wait(self, condition: str) -> None:
        """Wait until *condition* holds."""
        os.write(self.fd, f"until {condition}; do usleep 50000; done; echo do''ne\n".encode())
        self.until(b"done\r\n")


def test_a_machines_life_by_libvirt(virsh: Virsh, folder: Path) -> None:
    """libvirt probes the emulator, defines and starts a machine with it, and does to it what the page says works:
    disks and network cards that come and go, a disk that grows, a guest that hears its power button."""
    found = virsh("domcapabilities", "--emulatorbin", str(folder / "cardcage-qemu"), "--virttype", "qemu")
    assert "<machine>pc-i440fx-7.2</machine>" in found
    virsh("define", str(folder / "domain.xml"))
    virsh("start", "ours")
    assert virsh("domstate", "ours") == "running"
    virsh("suspend", "ours")
    assert virsh("domstate", "ours", "--reason") == "paused (user)"
    virsh("resume", "ours")
    assert virsh("domstate", "ours", "--reason").startswith("running")
    assert "CPU(s):         2" in virsh("dominfo", "ours")
    assert str(folder / "disk.img") in virsh("domblklist", "ours")
    assert "Capacity:       1048576" in virsh("domblkinfo", "ours", "vda")
    assert "block.0.rd.bytes=0" in virsh("domstats", "ours")
    assert virsh("ttyconsole", "ours").startswith("/dev/pts/")
    assert "actual 262144" in virsh("dommemstat", "ours")
    virsh("setmem", "ours", "200M", "--live")
    guest = Guest(virsh("ttyconsole", "ours"))
    guest.wait("modprobe virtio_net")
    (folder / "b.img").write_bytes(bytes(1 << 20))
    virsh("attach-disk", "ours", str(folder / "b.img"), "vdb", "--targetbus", "virtio")
    guest.wait("test -e /dev/vdb")
    virsh("blockresize", "ours", "vdb", "2M")
    guest.wait("test $(cat /sys/block/vdb/size) = 4096")
    virsh("detach-disk", "ours", "vdb")
    guest.wait("test ! -e /sys/block/vdb")
    virsh("attach-interface", "ours", "bridge", "br0", "--model", "virtio", "--mac", "52:54:00:00:00:07")
    guest.wait("grep 52:54:00:00:00:07 /sys/class/net/*/address")
    assert "52:54:00:00:00:07" in virsh("domiflist", "ours")
    virsh("detach-interface", "ours", "bridge")
    guest.wait("! grep 52:54:00:00:00:07 /sys/class/net/*/address")
    assert virsh("qemu-monitor-command", "ours", "--hmp", "info status") == "VM status: running"
    assert "'resume' is unexpected" in virsh("save", "ours", str(folder / "saved"), status=1)
    virsh("reboot", "ours", "--mode", "acpi")
    guest.until(b"Enter 'help'")  # the shell of the second start
    guest.until(b"~ # ")
    virsh("shutdown", "ours")
    while (state := virsh("domstate", "ours", "--reason")) != "shut off (shutdown)":
        assert state.startswith(("running", "in shutdown")), state
    virsh("start", "ours")
    virsh("reset", "ours")
    virsh("destroy", "ours")
    assert virsh("domstate", "ours", "--reason") == "shut off (destroyed)"
    virsh("undefine", "ours")
