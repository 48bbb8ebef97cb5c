"""libvirt's own daemon, unmodified, with ``cardcage-qemu`` as its emulator."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tty
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cardcage_block.make import create_qcow2
from listens import listens

pytestmark = pytest.mark.once  # libvirt's words are the same to each Python

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


LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


class Daemon:
    """A session daemon of the test's own, with folders of its own below *folder*, as a user has them."""

    def __init__(self, folder: Path, number: int = 1) -> None:
        if any(shutil.which(one, path=PATH) is None for one in TOOLS):
            pytest.skip(f"needs {', '.join(TOOLS)}")
        if subprocess.run([*USER, sys.executable, "-c", ""], capture_output=True).returncode:
            pytest.skip("needs user namespaces")
        self.folder = folder
        self._virsh, libvirtd = (shutil.which(one, path=PATH) or one for one in ("virsh", "libvirtd"))
        # libvirt probes each QEMU on its path, which takes long
        self._environment = {**os.environ, "PATH": str(folder), "HOME": str(folder)}
        for name in ("CONFIG", "CACHE", "DATA"):
            self._environment[f"XDG_{name}_HOME"] = str(folder / name.lower())
        runtime = folder / "run"
        self._environment["XDG_RUNTIME_DIR"] = str(runtime)
        runtime.mkdir(mode=0o700)
        (folder / "config" / "libvirt").mkdir(parents=True)
        settings = f'security_driver = "none"\nseccomp_sandbox = 0\nbridge_helper = "{folder}/bridge-helper"\n'
        (folder / "config" / "libvirt" / "qemu.conf").write_text(settings)
        host = f'host_uuid = "00000000-0000-4000-8000-{number:012}"\n'
        (folder / "config" / "libvirt" / "libvirtd.conf").write_text(host)
        self.socket = runtime / "libvirt" / "libvirt-sock"
        words = [*USER, libvirtd, "-t", "60"]
        self._daemon = subprocess.Popen(words, env=self._environment, stderr=subprocess.DEVNULL)
        while not listens(self.socket):
            assert self._daemon.poll() is None

    def __call__(self, *words: str, status: int = 0) -> str:
        """Runs virsh; returns what it says."""
        done = self._run(*words, timeout=120)
        logs = [one.read_text()[-3000:] for one in self.folder.glob("cache/libvirt/qemu/log/*.log")]
        assert done.returncode == status, (done.stdout, done.stderr, logs)
        return (done.stdout + done.stderr).strip()

    def _run(self, *words: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*USER, self._virsh, "-q", "-c", "qemu:///session", *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def close(self) -> None:
        """End its machine, and it."""
        self._run("destroy", "ours")
        self._daemon.terminate()
        self._daemon.wait()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def virsh(folder: Path, kernel: Path, initramfs: Path) -> Iterator[Daemon]:
    """Runs virsh against a session daemon of the test's own, with an emulator that is cardcage."""
    (folder / "bridge-helper").write_text(f"#!{sys.executable}\n{HELPER}")
    (folder / "bridge-helper").chmod(0o755)
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    emulator = folder / "cardcage-qemu"
    # libvirt keeps the run directory from it; in the account's own, another machine of this name may be on the roster
    apart = f"import os, sys\nos.environ['XDG_RUNTIME_DIR'] = '{folder}/run'\n"
    emulator.write_text(f"#!{sys.executable}\n{apart}from cardcage_qemu import main\nsys.exit(main())\n")
    emulator.chmod(0o755)
    (folder / "domain.xml").write_text(DOMAIN.format(folder, kernel, initramfs))
    with Daemon(folder) as daemon:
        yield daemon


class Guest:
    """The shell on the guest's serial port."""

    fd = -1

    def __init__(self, terminal: str) -> None:
        self.connect(terminal)
        self.until(b"~ # ")

    def connect(self, terminal: str) -> None:
        """Talk to it there from now on."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd)
        self.said = b""

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


def test_a_machines_life_by_libvirt(virsh: Daemon, folder: Path) -> None:
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


def test_a_machine_is_saved_and_moves_by_libvirt(virsh: Daemon, folder: Path) -> None:
    """libvirt saves the machine into a file and restores it, saves it in its own place and starts it from there, makes
    a snapshot and goes back to it, and moves it while it runs to another daemon, and in the long form back: what the
    guest has in memory, and on its disk, is there."""
    create_qcow2(str(folder / "disk.qcow2"), 1 << 20)
    text = (folder / "domain.xml").read_text().replace("type='raw'/><source", "type='qcow2'/><source")
    (folder / "domain.xml").write_text(text.replace("disk.img", "disk.qcow2"))
    virsh("define", str(folder / "domain.xml"))
    virsh("start", "ours")
    guest = Guest(virsh("ttyconsole", "ours"))
    guest.wait("modprobe virtio_blk && echo kept | tee /tmp/word > /dev/vda && sync")
    virsh("save", "ours", str(folder / "saved"))
    assert virsh("domstate", "ours", "--reason") == "shut off (saved)"
    virsh("restore", str(folder / "saved"))
    assert virsh("domstate", "ours", "--reason") == "running (restored)"
    guest.connect(virsh("ttyconsole", "ours"))
    guest.wait("test $(cat /tmp/word) = kept && test $(head -c 4 /dev/vda) = kept")
    virsh("managedsave", "ours")
    virsh("start", "ours")
    assert virsh("domstate", "ours", "--reason") == "running (restored)"
    virsh("snapshot-create-as", "ours", "first")
    guest.connect(virsh("ttyconsole", "ours"))
    guest.wait("echo gone | tee /tmp/word > /dev/vda && sync")
    virsh("snapshot-revert", "ours", "first")
    assert virsh("domstate", "ours", "--reason") == "running (from snapshot)"
    guest.connect(virsh("ttyconsole", "ours"))
    guest.wait("test $(cat /tmp/word) = kept && test $(head -c 4 /dev/vda) = kept")
    virsh("snapshot-delete", "ours", "first")
    assert not virsh("snapshot-list", "ours")
    there = folder / "there"
    shutil.copytree(folder / "cache", there / "cache")  # what libvirt knows of the emulator, which it would probe again
    with Daemon(there, 2) as other:
        virsh("migrate", "--live", "--unsafe", "ours", uri(other), "--migrateuri", f"unix://{folder}/door")
        assert virsh("domstate", "ours", "--reason") == "shut off (migrated)"
        assert other("domstate", "ours", "--reason") == "running (migrated)"
        guest.connect(other("ttyconsole", "ours"))
        guest.wait("test $(cat /tmp/word) = kept && echo moved > /dev/vda && sync")
        if not LONG:
            return
        other("suspend", "ours")
        other("migrate", "--live", "--p2p", "--unsafe", "ours", uri(virsh), "--migrateuri", "tcp://127.0.0.1")
        assert virsh("domstate", "ours") == "paused"
        virsh("resume", "ours")
        guest.connect(virsh("ttyconsole", "ours"))
        guest.wait("test $(head -c 5 /dev/vda) = moved")
    virsh("dump", "ours", str(folder / "dump"))
    assert virsh("domstate", "ours") == "running"


def test_disks_have_overlays_by_libvirt(virsh: Daemon, folder: Path) -> None:
    """libvirt has the disk of a guest that runs stand on an overlay (``snapshot-create --disk-only``), and merges that
    into the image below again (``blockcommit --active --pivot``): what the guest wrote before, meanwhile and after is
    there."""
    virsh("define", str(folder / "domain.xml"))
    virsh("start", "ours")
    guest = Guest(virsh("ttyconsole", "ours"))
    guest.wait("modprobe virtio_blk && echo before > /dev/vda && sync")
    spec = f"vda,snapshot=external,file={folder}/over.qcow2"
    virsh("snapshot-create-as", "ours", "first", "--disk-only", "--no-metadata", "--diskspec", spec)
    assert f"{folder}/over.qcow2" in virsh("domblklist", "ours")
    guest.wait("test $(head -c 6 /dev/vda) = before && echo during > /dev/vda && sync")
    assert (folder / "disk.img").read_bytes()[:6] == b"before"
    virsh("blockcommit", "ours", "vda", "--active", "--pivot", "--wait")
    assert f"{folder}/disk.img" in virsh("domblklist", "ours")
    guest.wait("test $(head -c 6 /dev/vda) = during && echo last > /dev/vda && sync")
    virsh("destroy", "ours")
    assert (folder / "disk.img").read_bytes()[:4] == b"last"


def uri(daemon: Daemon) -> str:
    """The way to another daemon."""
    return f"qemu+unix:///session?socket={daemon.socket}"
