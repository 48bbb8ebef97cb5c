"""The main job: the distribution's unmodified kernel boots under the translator, from one command."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cardcage import Machine
from cardcage.errors import GuestError
from cardcage.outcome import Panicked, PoweredOff
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf
from installed import PROGRAM


def boot(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "120", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


@pytest.mark.parametrize("cpus", [1, 2])
def test_command_runs_in_the_guest(kernel: Path, cpus: int) -> None:
    """The guest has the kernel and processors asked for; output is exact, and the status is the command's."""
    script = "uname -r; nproc; echo problem >&2; seq 20000 > /tmp/x; md5sum < /tmp/x; cat /tmp/x; exit 7"
    done = boot("--cpus", str(cpus), "--exec", script)
    numbers = "".join(f"{at}\n" for at in range(1, 20001))
    digest = hashlib.md5(numbers.encode(), usedforsecurity=False).hexdigest()
    release = kernel.name.removeprefix("vmlinuz-")
    assert done.stdout.decode() == f"{release}\n{cpus}\n{digest}  -\n{numbers}", done.stderr.decode()
    assert done.returncode == 7
    assert b"\nproblem\n" in done.stderr
    assert done.stderr.endswith(b"outcome: the guest powered off\n")


@pytest.mark.once
def test_commands_come_from_a_pipe(kernel: Path) -> None:
    """Without a terminal the shell reads standard input to its end, and the machine powers off."""
    done = boot(stdin=b"x=1\nfor i in 1 2; do\necho $((x + i))\ndone\n")
    assert (done.returncode, done.stdout) == (0, b"2\n3\n"), done.stderr.decode()


@pytest.mark.once
def test_guest_panic_is_an_outcome(kernel: Path) -> None:
    """A panic of the real kernel ends with status 10 and its message."""
    done = boot("--exec", "echo c > /proc/sysrq-trigger")
    assert done.returncode == 10, done.stderr.decode()
    assert b"outcome: the guest panicked: sysrq triggered crash" in done.stderr


@pytest.mark.once
def test_an_early_panic_ends_any_machine(kernel: Path) -> None:
    """A kernel without a root ends ``cardcage run`` with its own line, after its trace, whatever ``panic=`` says."""
    command = [*PROGRAM, "run", "--accel", "tcg", "--timeout", "120", "--kernel", str(kernel), "--append"]
    for more in ("panic=-1", "panic=5", ""):
        done = subprocess.run([*command, f"console=ttyS0 {more}"], input=b"", capture_output=True, check=False)
        assert done.returncode == 10, done.stderr.decode()
        why = b"VFS: Unable to mount root fs on unknown-block(0,0)"
        assert done.stderr.endswith(b"outcome: the guest panicked: " + why + b"\n")
        assert b"Call Trace:" in done.stdout.partition(b"Kernel panic - not syncing: " + why)[2]


@pytest.mark.once
def test_the_awaited_text_does_not_come_after_a_panic(kernel: Path) -> None:
    """``expect`` raises with the panic's line last, also when it is pvpanic that ends the machine."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    found = shelf.kernel()
    with Machine(
        kernel=found.path, initrd=shelf.initramfs(found), append=f"{COMMAND_LINE} quiet", memory="256M", accel="tcg"
    ) as machine:
        machine.start()
        machine.console.expect("~ # ", timeout=120)
        machine.console.send("ls -d /sys/module/pvpanic*; echo c > /proc/sysrq-trigger\r")
        with pytest.raises(GuestError, match=r"\(the guest panicked: sysrq triggered crash\) before") as raised:
            machine.console.expect("never", timeout=120)
        assert str(raised.value).endswith("Kernel panic - not syncing: sysrq triggered crash")
        assert "/sys/module/pvpanic" in machine.console.output
        assert machine.wait(60) == Panicked("sysrq triggered crash")


@pytest.mark.once
def test_reboot_replays_the_boot(kernel: Path) -> None:
    """The guest's own reboot starts the same kernel and initramfs again, from Python too, with fresh memory."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    found = shelf.kernel()
    with Machine(
        kernel=found.path, initrd=shelf.initramfs(found), append=f"{COMMAND_LINE} quiet", memory="256M", accel="tcg"
    ) as machine:
        machine.start()
        machine.console.expect("~ # ", timeout=120)
        machine.console.send("echo gone > /tmp/file; reboot -f\r")
        machine.console.expect("cardcage: init", timeout=120)
        machine.console.expect("~ # ", timeout=120)
        machine.console.send("ls /tmp/file; poweroff -f\r")
        machine.console.expect("No such file", timeout=60)
        assert machine.wait(120) == PoweredOff()


def test_shell_on_a_terminal(kernel: Path) -> None:
    """On a terminal there is a shell with job control: Ctrl-C reaches the guest, and its exit ends the machine."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "120", "--append", "quiet"])
    seen = bytearray()

    def until(pattern: bytes) -> None:
        limit = time.monotonic() + 120
        while not (found := re.search(pattern, seen)):
            assert time.monotonic() < limit, bytes(seen)
            if select.select([terminal], [], [], 1)[0]:
                try:
                    seen.extend(os.read(terminal, 4096))
                except OSError:  # the other side is closed: Linux's way to say so
                    pytest.fail(f"cardcage ended: {bytes(seen)!r}")
        del seen[: found.end()]

    try:
        until(rb"~ # ")
        # One job: between two, Ctrl-C can meet a shell that has started the second and not yet given it the terminal.
        os.write(terminal, b"sh -c 'tty; exec sleep 1000'\r")
        until(rb"/dev/ttyS0\r+\n")
        os.write(terminal, b"\x03")
        until(rb"~ # ")
        os.write(terminal, b"echo $((6 * 7))-$?\r")
        until(rb"\n42-130\r+\n")
        os.write(terminal, b"exit\r")
        until(rb"outcome: the guest powered off")
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -1, 129)  # the terminal may hang up before the process is gone
