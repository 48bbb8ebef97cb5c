"""Programs that run systems in QEMU, unmodified, with ``cardcage-qemu`` as their QEMU: debvm from Debian, labgrid from
PyPI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from debian_guest import START, debian_guest

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
pytestmark = [
    pytest.mark.once,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not LONG, reason="takes minutes: set CARDCAGE_LONG_TESTS"),
]
LABGRID = """
import sys
from labgrid import Environment
driver = Environment(sys.argv[1]).get_target("main").get_driver("QEMUDriver")
driver.on()
assert driver.monitor_command("query-status")["status"] == "running"
for again in (True, False):
    driver.expect("Enter 'help'", timeout=200)  # of this start: labgrid keeps what it has read before
    driver.expect("~ # ", timeout=200)
    driver.sendline("echo it runs $(uname -r)")
    driver.expect("it runs [0-9]", timeout=100)
    driver.cycle() if again else driver.off()
"""


@pytest.fixture
def emulator(tmp_path: Path) -> Path:
    """``cardcage-qemu`` by QEMU's name. Where KVM is asked for it is the translator: KVM may be emulated here."""
    path = tmp_path / "qemu-system-x86_64"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom cardcage_qemu import main\n"
        "words = [one.replace('accel=kvm:tcg', 'accel=tcg') for one in sys.argv if one != '-enable-kvm']\n"
        "for at, one in enumerate(words):\n"
        "    if words[at - 1] == '-cpu':\n"
        "        words[at] = 'max'\n"
        "sys.argv = words\nsys.exit(main())\n"
    )
    path.chmod(0o755)
    return path


def found(name: str) -> str:
    """The runner, or the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def test_debvm(tmp_path: Path, emulator: Path) -> None:
    """``debvm-run`` boots an image of the distribution's root file system, whose shell hears what is typed."""
    runner, raw = found("debvm-run"), tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", debian_guest().disk, raw], check=True)
    image = tmp_path / "image"
    with raw.open("rb") as source, image.open("wb") as target:
        source.seek(START)
        shutil.copyfileobj(source, target, 1 << 20)
    raw.unlink()
    subprocess.run([shutil.which("e2label", path="/sbin:/usr/sbin") or "e2label", image, "debvm"], check=True)
    fstab = tmp_path / "fstab"
    fstab.write_text("LABEL=debvm / ext4 defaults 0 0\n")
    debugfs = shutil.which("debugfs", path="/sbin:/usr/sbin") or "debugfs"
    for words in ("rm /etc/fstab", f"write {fstab} /etc/fstab"):
        subprocess.run([debugfs, "-w", "-R", words, image], check=True, capture_output=True)
    environment = os.environ | {"PATH": f"{emulator.parent}:{os.environ['PATH']}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([runner, "-i", image], env=environment, **pipes) as process:  # type: ignore[call-overload]  # pipes
        said = b""
        for mark, line in ((b" login: ", b"root\n"), (b"# ", b"echo runs $((6 * 7)); poweroff\n"), (b"runs 42", b"")):
            while mark not in said:
                data = process.stdout.read1(1 << 16)
                assert data, said[-2000:]
                said += data
            said = said.partition(mark)[2]
            process.stdin.write(line)
            process.stdin.flush()
        said += process.stdout.read()
    assert b"outcome: the guest powered off" in said


def test_labgrid(tmp_path: Path, emulator: Path, kernel: Path, initramfs: Path) -> None:
    """labgrid's QEMUDriver switches a target on, speaks QMP and to its serial port, resets it and switches it off."""
    python = os.environ.get("LABGRID_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import labgrid"], capture_output=True).returncode:
        pytest.skip("needs labgrid (pip install labgrid; LABGRID_PYTHON names another Python that has it)")
    (tmp_path / "env.yaml").write_text(f"""
targets:
  main:
    drivers:
      QEMUDriver:
        qemu_bin: qemu
        machine: pc
        cpu: max
        memory: 256M
        kernel: kernel
        boot_args: console=ttyS0 panic=-1 quiet
        extra_args: "-accel tcg -nodefaults -initrd {initramfs}"
tools:
  qemu: {emulator}
images:
  kernel: {kernel}
""")
    words = [python, "-c", LABGRID, f"{tmp_path}/env.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
