"""The everyday verbs with a real guest: a machine that was left running, and terminals of people."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import PROGRAM


class Person:
    """Somebody at a terminal of 33 rows and 77 columns, with a command running in it."""

    def __init__(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(33, 77)
        self.process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text, self.read = b"", 0

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def sees(self, text: bytes) -> None:
        """Wait for *text* behind what was waited for before."""
        while (at := self.text.find(text, self.read)) < 0:
            assert select.select([self.master], [], [], 60)[0], self.text
            try:
                data = os.read(self.master, 65536)
            except OSError:  # all have closed it
                data = b""
            assert data, self.text
            self.text += data
        self.read = at + len(text)

    def leaves(self) -> int:
        status = self.process.wait(120)
        os.close(self.master)
        return status


def cardcage(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *words], input=stdin, capture_output=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def guest(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Debian that was left running, in a run directory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        done = cardcage("boot", "--detach", "--accel", "tcg", "--name", "lab")
        assert (done.returncode, done.stdout) == (0, b"lab\n"), done.stderr.decode()
        yield "lab"
        cardcage("kill", "lab")


def test_a_command_has_its_streams_and_status(guest: str) -> None:
    """Input, output, errors and status of a command are its own; directory, variables and user are as asked."""
    done = cardcage("exec", guest, "--", "sh", "-c", "cat; echo err >&2; exit 3", stdin=b"in\0put")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in\0put", b"err\n")
    done = cardcage("exec", "-w", "/tmp", "-e", "A=b c", guest, "--", "sh", "-c", 'echo "$PWD $A"; kill -9 $$')
    assert (done.returncode, done.stdout) == (137, b"/tmp b c\n")
    done = cardcage("exec", guest, "--", "none")
    assert (done.returncode, done.stdout) == (127, b"")
    assert done.stderr == b"cardcage: [Errno 2] No such file or directory: 'lab:none'\n"
    data = os.urandom(1_500_000)
    done = cardcage("exec", guest, "--", "cat", stdin=data)
    assert (done.returncode, done.stdout == data) == (0, True)


def test_a_command_at_a_terminal_has_one(guest: str) -> None:
    """On a terminal the command has one too, of its size, which it follows; Ctrl-C is the guest's."""
    person = Person("exec", guest, "--", "sh", "-c", "trap 'stty size' WINCH; stty size; while :; do sleep 0.1; done")
    person.sees(b"33 77")
    person.resize(44, 88)
    person.sees(b"44 88")
    person.type(b"\x03")
    assert person.leaves() == 130


def test_a_console_is_attached_and_left(guest: str) -> None:
    """A terminal at the console types to the guest's shell and sees it; the key leaves it, and the machine goes on."""
    person = Person("console", guest)
    person.sees(b"^] leaves")
    person.type(b"\n")
    person.sees(b"# ")
    person.type(b"echo a$((6 * 7))z\n")
    person.sees(b"a42z")
    refused = cardcage("console", guest)
    assert refused.returncode == 2
    assert b"somebody else types on the console" in refused.stderr
    person.type(b"\x1d")
    person.sees(b"left lab, which goes on")
    assert person.leaves() == 0
    assert b"a42z" in cardcage("logs", guest).stdout
    assert b"a42z" in cardcage("logs", "--console", guest).stdout


def test_it_pauses_goes_on_and_ends(guest: str) -> None:
    """A paused guest answers nothing; it goes on where it was, and its end ends who follows its log."""
    assert cardcage("pause", guest).returncode == 0
    assert b"paused" in cardcage("ps").stdout
    assert cardcage("resume", guest).returncode == 0
    assert cardcage("exec", guest, "--", "true").returncode == 0
    follower = subprocess.Popen([*PROGRAM, "logs", "-f", guest], stdout=subprocess.PIPE)
    cardcage("exec", guest, "--", "poweroff", "-f")
    out, _ = follower.communicate(timeout=120)
    assert out.splitlines()[-1] == b"outcome: the guest powered off"
    assert cardcage("ps", "-q").stdout == b""
