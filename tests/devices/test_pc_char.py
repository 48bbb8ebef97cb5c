"""Character back ends on real terminals, sockets, files and pipes."""

from __future__ import annotations

import os
import pty
import select
import socket
import stat
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import ConfigError
from cardcage_pc.char.fd import FileOptions, Null, Sink, open_file, open_null
from cardcage_pc.char.pty import Pty, PtyOptions
from cardcage_pc.char.socket import Socket, SocketOptions
from cardcage_pc.char.stdio import Stdio, StdioOptions
from cardcage_testing import TestSlot
from pc_kit import SECOND

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Loop(TestSlot):
    """A slot whose readers are called when the test asks for it."""

    @property
    def stopped(self) -> list[str]:
        """Reasons of requests to stop."""
        return [one[1] for one in self.power.requests if one[0] == "stop"]

    def run(self) -> None:
        """Serve what is ready until nothing is."""
        while True:
            while self.loop.soon:
                self.loop.soon.popleft()()
            poll = select.poll()
            for fd in self.loop.readers:
                poll.register(fd, select.POLLIN)
            ready = poll.poll(0)
            if not ready:
                return
            for fd, _ in ready:
                if fd in self.loop.readers:
                    self.loop.readers[fd]()


@pytest.fixture
def loop() -> Any:
    return Loop()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: the person's end, and the process's."""
    person, process = pty.openpty()
    yield person, process
    for fd in (person, process):
        os.close(fd)


def test_stdio_makes_the_terminal_raw_and_puts_it_back(loop: Any, terminal: tuple[int, int]) -> None:
    """Keys come one by one, unechoed and without signals; close restores every setting."""
    person, process = terminal
    before = termios.tcgetattr(process)
    got: list[bytes] = []
    stdio = Stdio(loop, StdioOptions(), stdin=process, stdout=process)
    stdio.start(got.append)
    assert termios.tcgetattr(process)[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    os.write(person, b"\x03\rx")
    loop.run()
    stdio.write(b"out")
    assert (b"".join(got), os.read(person, 100)) == (b"\x03\rx", b"out")
    stdio.close()
    assert termios.tcgetattr(process) == before
    assert loop.loop.readers == {}


def test_the_escape_key_stops_the_machine(loop: Any, terminal: tuple[int, int]) -> None:
    """Ctrl-] restores the terminal and stops; what was typed before it still arrives, what follows does not."""
    person, process = terminal
    before = termios.tcgetattr(process)
    got: list[bytes] = []
    stdio = Stdio(loop, StdioOptions(), stdin=process, stdout=process)
    stdio.start(got.append)
    os.write(person, b"ab\x1dcd")
    loop.run()
    assert (b"".join(got), len(loop.stopped)) == (b"ab", 1)
    assert termios.tcgetattr(process) == before
    stdio.close()


def test_stdio_reads_a_pipe_to_its_end(loop: Any) -> None:
    """Input from a pipe is passed on unchanged, the escape key too, and its end is no error."""
    read, write = os.pipe()
    got: list[bytes] = []
    stdio = Stdio(loop, StdioOptions(), stdin=read, stdout=1)
    stdio.start(got.append)
    os.write(write, b"x\x1dy")
    os.close(write)
    loop.run()
    assert (b"".join(got), loop.loop.readers, loop.stopped) == (b"x\x1dy", {}, [])
    stdio.close()
    os.close(read)


@pytest.mark.parametrize("name", ["file", "/dev/null"])
def test_stdio_reads_what_epoll_refuses(loop: Any, tmp_path: Path, name: str) -> None:
    """A regular file is read to its end, /dev/null ends at once."""
    path = tmp_path / name if name == "file" else name
    data = b"line\n" * 3000 if name == "file" else b""
    if name == "file":
        (tmp_path / name).write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    got: list[bytes] = []
    stdio = Stdio(loop, StdioOptions(), stdin=fd, stdout=1)
    stdio.start(got.append)
    loop.run()
    assert b"".join(got) == data
    stdio.close()
    os.close(fd)


def test_stdio_without_stdin_and_stdout(loop: Any) -> None:
    """Closed descriptors mean nothing to read and nowhere to write, not an error."""
    stdio = Stdio(loop, StdioOptions(), stdin=987654, stdout=987655)
    stdio.start(lambda data: None)
    stdio.write(b"lost")
    loop.run()
    stdio.close()


def test_a_sink_drops_what_nobody_reads_and_says_so_once() -> None:
    """A full pipe costs bytes, not time; a reader that comes back gets what is written then."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, bytes(4096))
        except BlockingIOError:
            break
    log = TestSlot().log
    sink = Sink(write, log)
    sink._stuck = True  # the second's patience is spent
    sink.write(b"dropped")
    assert os.read(read, 1 << 20)[-7:] == bytes(7)
    sink.write(b"seen")
    assert (os.read(read, 100), log.entries) == (b"seen", [])
    os.close(read)
    sink.write(b"nobody")
    sink.write(b"there")
    assert (sink.dead, [one[0] for one in log.entries]) == (True, ["warning"])
    os.close(write)


def test_pty_is_a_raw_terminal_that_people_come_and_go_on(loop: Any, tmp_path: Path) -> None:
    """Bytes written while nobody is there are dropped; each visitor's bytes go both ways."""
    link = tmp_path / "console"
    back = Pty(loop, PtyOptions(link=str(link)))
    got: list[bytes] = []
    back.start(got.append)
    assert os.readlink(link) == back.path
    for visit in range(2):
        back.write(b"to nobody")
        person = os.open(back.path, os.O_RDWR | os.O_NOCTTY)
        loop.clock.advance(SECOND)
        os.write(person, b"in%d\r" % visit)
        loop.run()
        back.write(b"out\n")
        assert os.read(person, 100) == b"out\n"
        os.close(person)
        loop.run()
        assert loop.loop.readers == {}
    assert b"".join(got) == b"in0\rin1\r"
    back.close()
    assert not link.is_symlink()


def test_socket_serves_one_peer_after_another(loop: Any, tmp_path: Path) -> None:
    """A peer talks both ways; after it has gone the next one is served, and the name goes away at close."""
    path = str(tmp_path / "s")
    back = Socket(loop, SocketOptions(path))
    got: list[bytes] = []
    back.start(got.append)
    back.write(b"to nobody")
    for visit in range(2):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(path)
            loop.run()
            peer.sendall(b"in%d" % visit)
            loop.run()
            back.write(b"out")
            assert peer.recv(100) == b"out"
        loop.run()
    assert b"".join(got) == b"in0in1"
    back.close()
    assert (loop.loop.readers, os.path.exists(path)) == ({}, False)


def test_socket_as_client(loop: Any, tmp_path: Path) -> None:
    """With ``server = false`` it connects, and a missing server is an OSError."""
    path = str(tmp_path / "s")
    with pytest.raises(OSError, match="No such file"):
        Socket(loop, SocketOptions(path, server=False))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        back = Socket(loop, SocketOptions(path, server=False))
        back.start(lambda data: None)
        peer, _ = server.accept()
        back.write(b"hello")
        with peer:
            assert peer.recv(10) == b"hello"
    back.close()


@pytest.mark.parametrize("server", [True, False])
@pytest.mark.parametrize("name", ["none/s", "x" * 120])
def test_socket_that_cannot_be_had_is_named(loop: Any, tmp_path: Path, server: bool, name: str) -> None:
    """A path where no socket can be, or that is too long for one, is in the error."""
    with pytest.raises(OSError, match=r"AF_UNIX path too long|No such file or directory") as caught:
        Socket(loop, SocketOptions(f"{tmp_path}/{name}", server=server))
    assert caught.value.filename == f"{tmp_path}/{name}"


def test_socket_names_that_are_taken(loop: Any, tmp_path: Path) -> None:
    """A dead process's socket is replaced; a living one's, or a file, is refused."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(ConfigError, match="another process listens"):
            Socket(loop, SocketOptions(str(path)))
        peers = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(8)]
        while not peers[0].connect_ex(str(path)):  # until it lets nobody in any more
            peers.append(peers.pop(0))
        with pytest.raises(ConfigError, match="another process listens"):
            Socket(loop, SocketOptions(str(path)))
        for one in peers:
            one.close()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="not a socket"):
        Socket(loop, SocketOptions(f"{tmp_path}/link"))
    Socket(loop, SocketOptions(str(path))).close()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        Socket(loop, SocketOptions(str(path)))
    assert path.read_text() == "precious"


def test_file_is_written_at_once(loop: Any, tmp_path: Path) -> None:
    """Bytes are in the file when ``write`` returns; ``append`` keeps what was there."""
    path = tmp_path / "log"
    for append, expected in ((False, b"one"), (True, b"oneone"), (False, b"one")):
        back = open_file(loop, FileOptions(str(path), append))
        back.start(lambda data: None)
        back.write(b"one")
        assert path.read_bytes() == expected
        back.close()
    assert stat.S_IMODE(path.stat().st_mode) & 0o111 == 0


def test_null_takes_everything(loop: Any) -> None:
    """The null back end does nothing."""
    back = open_null(loop)
    assert isinstance(back, Null)
    back.start(lambda data: None)
    back.write(b"x")
    back.close()


@pytest.mark.parametrize("end", ["raise SystemError('crash')", "sys.exit(3)", "pass"])
def test_the_terminal_comes_back_however_the_process_ends(terminal: tuple[int, int], end: str) -> None:
    """An exception that nobody caught, and an exit without close, leave the terminal as it was."""
    _, process = terminal
    before = termios.tcgetattr(process)
    program = f"""
import sys, termios
sys.path[:0] = {sys.path!r}
from types import SimpleNamespace
from cardcage_pc.char.stdio import Stdio, StdioOptions
stdio = Stdio(SimpleNamespace(log=None), StdioOptions())
assert not termios.tcgetattr(0)[3] & termios.ICANON
{end}
"""
    subprocess.run(
        [sys.executable, "-c", program], stdin=process, stdout=process, stderr=subprocess.DEVNULL, timeout=60
    )
    assert termios.tcgetattr(process) == before


def test_a_background_job_is_not_stopped_by_its_terminal(terminal: tuple[int, int]) -> None:
    """Where another job has the terminal, stdio neither changes nor reads it."""
    _, process = terminal
    before = termios.tcgetattr(process)
    program = f"""
import fcntl, os, sys, termios
sys.path[:0] = {sys.path!r}
from types import SimpleNamespace
from cardcage_pc.char.stdio import Stdio, StdioOptions
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
child = os.fork()
if not child:
    os.setpgid(0, 0)
    stdio = Stdio(SimpleNamespace(log=None), StdioOptions())
    stdio.start(print)
    os._exit(17)
_, status = os.waitpid(child, os.WUNTRACED)
sys.exit(os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.WEXITSTATUS(status))
"""
    run = subprocess.run([sys.executable, "-c", program], stdin=process, start_new_session=True, timeout=60)
    assert run.returncode == 17
    assert termios.tcgetattr(process) == before


def test_two_readers_of_one_input_do_not_hold_the_machine_up() -> None:
    """What opened standard input last has it; a reader that finds nothing there goes on, as another was faster."""
    read, write = os.pipe()
    first, last = Loop(), Loop()
    got: list[tuple[str, bytes]] = []
    made = [Stdio(slot, StdioOptions(), stdin=read, stdout=1) for slot in (first, last)]
    for name, one in zip(("first", "last"), made, strict=True):
        one.start(lambda data, name=name: got.append((name, data)))  # type: ignore[misc]  # this turn's name
    os.write(write, b"typed")
    first.run()
    last.run()
    made[1]._readable()  # nothing is there: this must return
    assert got == [("last", b"typed")]
    for one in made:
        one.close()
    os.close(read)
    os.close(write)
