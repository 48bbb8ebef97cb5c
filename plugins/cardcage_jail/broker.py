"""The broker: a small process outside the jail, which does for those inside what they may ask for, and ends with them.

It believes nothing of what it is told. Who asks, it knows of the kernel; what may be had was stated by cards before the
guest's first instruction (:class:`cardcage.security.Needs`), and is looked up by the very text of the path and opened
below directories that were opened then; the machine's security checkers, as they were then, are asked before each act.
Nothing of a request outlives it.

An operator's process may lend it open files for the machine (:func:`cardcage_jail.lend`), for as long as it stays
connected: whoever has a file open could hand it over anyway. The checkers are asked whether the operator may ``add`` to
the machine.

A process is begun in the jail by leave of the broker only, which the kernel asks it for (seccomp_unotify(2)): it counts
them. A new one is known from its setsid(2) on, which comes here in the same way, so that its end is noticed; one that
never calls it is counted for ever.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import stat
import warnings
from contextlib import suppress
from pathlib import Path
from struct import pack, unpack
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, HostError
from cardcage.security import OPERATOR, Act

from cardcage_jail.calls import NUMBERS
from cardcage_jail.outside import FILES, bound, is_ours

if TYPE_CHECKING:
    from collections.abc import Iterable
    from subprocess import Popen

    from cardcage.machine import Machine
    from cardcage.security import Needs

__all__ = ["begin"]

REQUEST = 8192
"""Bytes of a request: a path has at most 4096."""
NAME = 100
"""Bytes of a socket's name."""
LENDERS = 8
"""Operators' processes that may lend files at once."""
BORROWED = os.O_NONBLOCK | os.O_DIRECT | os.O_DSYNC | os.O_NOFOLLOW
"""Flags that a lent file may be opened with, besides the way that it is read or written."""
ROOM = 1 << 20
"""Bytes of the buffers of a socket that a program is given, each way."""
OF_A_PROCESS = frozenset(f"/proc/self/{name}" for name in ("maps", "pagemap"))
"""Opened for the process that asks, of its own."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
NOTIF_RECV, NOTIF_SEND, NOTIF_ID_VALID = 0xC0502100, 0xC0182101, 0x40082102
CONTINUE = 1
NAMES = {number: name for name, number in NUMBERS.items() if name in ("clone", "kill", "setsid", "tgkill")}


def begin(machine: Machine, stated: list[tuple[str, Needs]], log: int) -> socket.socket:
    """Start the broker of a process that is about to enter its jail; return the way to it.

    Args:
        stated: what may be asked for, and with whose label. Where a card put sockets that listen, and their paths,
            into the host's share ``jail:lenders``, files are lent there.
        log: descriptor that numbers of refused calls go to, as the handler of SIGSYS writes them.

    Raises HostError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = os.getpid()
    if machine.host.owns_process:  # what there is stays, and pages that no collection writes are one for both
        gc.freeze()
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of threads: the child takes no lock that one of them may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    except OSError as error:
        ours.close()
        theirs.close()
        raise HostError(f"jail: no broker can be started: {error.strerror}") from error
    if pid:
        theirs.close()
        for one, _ in lenders_of(machine):
            one.close()
        return ours
    status = 1
    try:
        gc.freeze()
        gc.disable()
        _alone(theirs.fileno(), log, *(one.fileno() for one, _ in lenders_of(machine)))
        Broker(theirs, machine, stated, log, root).run()
        status = 0
    finally:
        os._exit(status)  # nothing of the machine's is this process's to end


def lenders_of(machine: Machine) -> list[tuple[socket.socket, str]]:
    """Sockets at which files are lent, and where they are."""
    found: list[tuple[socket.socket, str]] = machine.host.share("jail:lenders", list)
    return found


def _alone(*kept: int) -> None:
    """Close what is the machine's, leave its terminal, and heed none of its signals."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for one in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    at = 3
    for fd in sorted(kept):
        os.closerange(at, fd)
        at = fd + 1
    os.closerange(at, 1 << 30)
    os.chdir("/")
    with suppress(OSError):
        Path("/proc/self/comm").write_text("jail-broker")


class Broker:
    """The process's life. A request is served whole before the next one, and none of them waits for anybody."""

    def __init__(
        self, way: socket.socket, machine: Machine, stated: list[tuple[str, Needs]], log: int, root: int
    ) -> None:
        way.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._way, self._log = way, log
        self._mediator, self._label, self._machine = machine.mediator, machine.label, machine.name
        self._scratch = _folders((path, label) for label, one in stated for path in one.scratch)
        self._writable = _folders((path, label) for label, one in stated for path in one.write)
        self._programs = {words: label for label, one in stated for words in one.programs}
        self._running: dict[tuple[str, ...], Popen[bytes]] = {}
        self._room, self._begun = sum(one.processes for _, one in stated) + 1, 1
        self._known = {root: os.pidfd_open(root)}
        self._listener = -1
        self._poll = select.poll()
        self._lenders = {one.fileno(): (one, path) for one, path in lenders_of(machine)}
        self._lent: dict[int, tuple[socket.socket, dict[str, int]]] = {}

    def run(self) -> None:
        """Serve until nobody is left inside."""
        self._listener = self._first()
        for one in (self._way.fileno(), *self._lenders, *([self._listener] if self._listener >= 0 else [])):
            self._poll.register(one, select.POLLIN)
        while True:
            for fd, event in self._poll.poll():
                if fd in self._lenders:
                    self._lender(self._lenders[fd][0])
                elif fd in self._lent:
                    self._lending(fd)
                elif fd != self._listener:
                    if not self._heard():
                        self._close()
                        return
                elif event & select.POLLIN:
                    self._notified()
                else:
                    self._poll.unregister(fd)

    def _first(self) -> int:
        """The kernel's questions come from this descriptor: the first message, from before the guest ran."""
        _, _, _, found = self._received()
        return found[0] if found else -1

    def _received(self) -> tuple[bytes, int, int, list[int]]:
        """A datagram: its bytes, none at the end, its flags, the process that sent it, and descriptors, one at most."""
        room = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4)
        data, told, flags, _ = self._way.recvmsg(REQUEST, room, socket.MSG_CMSG_CLOEXEC)
        pid, fds = -1, list[int]()
        for level, kind, value in told:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid = unpack("3i", value)[0]
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += unpack(f"{len(value) // 4}i", value[: len(value) // 4 * 4])
        return data, flags, pid, fds

    # requests

    def _heard(self) -> bool:
        """Take a request and answer it; False when nobody is left."""
        data, flags, pid, fds = self._received()
        if len(fds) == 1:
            self._answer(fds[0], data, whole=not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), pid=pid)
        else:
            for fd in fds:
                os.close(fd)
        return bool(data)

    def _answer(self, back: int, data: bytes, *, whole: bool, pid: int) -> None:
        made, number = -1, 0
        try:
            if not whole:
                raise PermissionError(errno.EACCES, "")
            made = self._done(json.loads(data), pid)
        except OSError as error:
            number = error.errno or errno.EACCES
        except Exception:  # whatever a taken-over process sent, or a checker raised: it is refused
            number = errno.EACCES
        try:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=back)
        except OSError:  # no socket
            os.close(back)
        else:
            with peer, suppress(OSError):  # whatever kind of a socket it is, nothing here waits for anybody
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 0, 0))
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pack("i", made))] if made >= 0 else []
                peer.sendmsg([b'{"errno": %d}' % number], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if made >= 0:
            os.close(made)

    def _done(self, request: Any, pid: int) -> int:
        match request:
            case {"do": "open", "path": str(path), "flags": int(flags), **rest} if not rest:
                if path in OF_A_PROCESS:
                    return self._of_a_process(path, flags, pid)
                if (lent := self._borrowed(path, flags)) >= 0:
                    return lent
                return self._nameless(path, flags)
            case {"do": "listen", "path": str(path), **rest} if not rest:
                return self._listening(path)
            case {"do": "start", "program": list(words), **rest} if not rest:
                return self._started(tuple(words))
            case {"do": "close", **rest} if not rest:
                return self._close()
        raise PermissionError(errno.EACCES, "")

    def _act(self, label: str, tclass: str, name: str, *permissions: str) -> Act:
        return Act(label, self._label, tclass, permissions, {"machine": self._machine, "name": name})

    def _nameless(self, path: str, flags: int) -> int:
        label, folder = self._scratch.get(path, ("", -1))
        if folder < 0 or flags not in (os.O_TMPFILE | os.O_RDWR, os.O_TMPFILE | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "")
        self._mediator.check(self._act(label, "image", path, "create", "write"))  # it has the machine's own label
        return nameless(folder)

    def _started(self, words: tuple[str, ...]) -> int:
        """One of the programs that were stated, anew: what is left of it from before is ended."""
        from subprocess import DEVNULL, Popen

        label = self._programs.get(words)
        if label is None:
            raise PermissionError(errno.EACCES, "")
        self._mediator.ask(self._act(label, "program", words[0], "start"), words[0])
        if (before := self._running.pop(words, None)) is not None:
            before.kill()
            before.wait()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for one in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
                with suppress(PermissionError):
                    theirs.setsockopt(socket.SOL_SOCKET, one, ROOM)
            fd = theirs.fileno()
            made = [word.replace("{fd}", str(fd)) for word in words]
            self._running[words] = Popen(made, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, pass_fds=(fd,), cwd="/")
            return ours.detach()

    def _of_a_process(self, path: str, flags: int, pid: int) -> int:
        """A file of the process that asks, and of no other that has its number meanwhile."""
        known = self._known.get(pid)
        if known is None or flags:
            raise PermissionError(errno.EACCES, "")
        fd = os.open(f"/proc/{pid}/{os.path.basename(path)}", os.O_RDONLY | os.O_CLOEXEC)
        if _ended(known):
            os.close(fd)
            raise PermissionError(errno.EACCES, "")
        return fd

    def _listening(self, path: str) -> int:
        where, name = os.path.split(path)
        label, folder = self._writable.get(where, ("", -1))
        if folder < 0 or name in ("", ".", "..") or "\0" in name or len(os.fsencode(name)) > NAME:
            raise PermissionError(errno.EACCES, "")
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise PermissionError(errno.EACCES, "")
        self._mediator.check(self._act(label, "socket", f"unix:{path}", "listen"))
        return bound(folder, name).detach()

    # files that are lent

    def _lender(self, listener: socket.socket) -> None:
        """Somebody has files to lend."""
        with suppress(OSError):  # it went away
            peer, _ = listener.accept()
            if len(self._lent) >= LENDERS or not is_ours(peer):
                peer.close()
                return
            peer.setblocking(False)
            self._lent[peer.fileno()] = peer, {}
            self._poll.register(peer, select.POLLIN)

    def _lending(self, lender: int) -> None:
        """A file comes, with its path; or the end, and the files are given back."""
        peer, files = self._lent[lender]
        try:
            data, fds, flags, _ = socket.recv_fds(peer, REQUEST, 1, socket.MSG_CMSG_CLOEXEC)
            answer = self._taken(files, data, fds, whole=not flags & socket.MSG_CTRUNC) if data else b""
            if answer:
                peer.send(answer, socket.MSG_NOSIGNAL)
                return
        except OSError:
            pass
        self._poll.unregister(lender)
        for fd in files.values():
            os.close(fd)
        del self._lent[lender]
        peer.close()

    def _taken(self, files: dict[str, int], data: bytes, fds: list[int], *, whole: bool) -> bytes:
        """Keep a file; the answer, none to hang up."""
        try:
            path = json.loads(data)["lend"]
            if not whole or not isinstance(path, str) or path in files or len(files) >= FILES:
                raise ValueError
            (fd,) = fds
            if stat.S_IFMT(os.fstat(fd).st_mode) not in (stat.S_IFREG, stat.S_IFBLK):
                raise ValueError
            act = Act(OPERATOR, self._label, "machine", ("add",), {"machine": self._machine, "name": path})
            self._mediator.check(act)
        except CardcageError as error:
            refusal = {"error": str(error)}
        except Exception:  # whatever somebody sent
            refusal = {"error": "expected a file, and its path"}
        else:
            files[path] = fd
            return b'{"error": ""}\n'
        for fd in fds:
            os.close(fd)
        return json.dumps(refusal).encode() + b"\n"

    def _borrowed(self, path: str, flags: int) -> int:
        """A lent file, opened once more, with no right that it was not lent with. -1 when there is none."""
        for _, files in self._lent.values():
            if (fd := files.get(path)) is None:
                continue
            may = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if flags & ~(os.O_ACCMODE | BORROWED) or may not in (os.O_RDWR, flags & os.O_ACCMODE):
                break
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
        return -1

    def _close(self) -> int:
        """Nothing more is lent."""
        for fd, (listener, path) in self._lenders.items():
            self._poll.unregister(fd)
            listener.close()
            with suppress(OSError):
                os.unlink(path)
        self._lenders.clear()
        return -1

    # the kernel's questions

    def _notified(self) -> None:
        """A process inside waits in a system call that the filter does not decide about."""
        heard = bytearray(80)
        try:
            fcntl.ioctl(self._listener, NOTIF_RECV, heard)
        except OSError:  # it was interrupted, or ended
            return
        id, pid, _, number, arch, _, first, second = unpack("<QIIiIQ2Q", heard[:48])
        before = self._begun
        refused = self._decide(NAMES.get(number, ""), id, pid, first & 0xFFFFFFFF, second & 0xFFFFFFFF)
        if refused == errno.EPERM:
            with suppress(OSError):  # a full pipe
                os.write(self._log, pack("<QII", 0, number, arch))
        error, flags = (-refused, 0) if refused > 0 else (0, 0 if refused < 0 else CONTINUE)
        try:
            fcntl.ioctl(self._listener, NOTIF_SEND, pack("<QqiI", id, 0, error, flags))
        except OSError:  # it was interrupted, and has not done it
            self._begun = min(self._begun, before)

    def _decide(self, call: str, id: int, pid: int, first: int, second: int) -> int:
        """0 to let it go on, an error to refuse it, -1 when it is done already."""
        if call == "clone":
            self._count()
            if self._begun >= self._room:
                return errno.EAGAIN
            self._begun += 1
            return 0
        if call == "setsid":
            self._register(id, pid)
            return 0
        if call == "tgkill" and first == _process_of(pid):  # its own thread: the filter knows the first process only
            return 0
        if call == "kill" and first in self._known and second <= signal.SIGRTMAX:
            try:
                signal.pidfd_send_signal(self._known[first], second)
            except OSError as error:
                return error.errno or errno.EPERM
            return -1
        return errno.EPERM

    def _register(self, id: int, pid: int) -> None:
        known = self._known.get(pid)
        if known is not None:
            if not _ended(known):
                return
            self._count()
        with suppress(OSError):  # a thread that is no process's first
            fd = os.pidfd_open(pid)
            try:
                fcntl.ioctl(self._listener, NOTIF_ID_VALID, pack("<Q", id))
                if len(self._known) > self._room:
                    raise OSError
            except OSError:  # it ended, and the number may be another's
                os.close(fd)
                return
            self._known[pid] = fd

    def _count(self) -> None:
        """Forget the processes that have ended."""
        for pid, fd in list(self._known.items()):
            if _ended(fd):
                os.close(fd)
                del self._known[pid]
                self._begun -= 1


def nameless(folder: int) -> int:
    """A new file without a name in an open directory. Raises OSError."""
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    name = f".copy-{os.urandom(8).hex()}"
    made = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    os.unlink(name, dir_fd=folder)
    return made


def _folders(paths: Iterable[tuple[str, str]]) -> dict[str, tuple[str, int]]:
    """Those paths that are directories: label and open directory of each."""
    found: dict[str, tuple[str, int]] = {}
    for path, label in paths:
        with suppress(OSError):
            found[os.path.abspath(path)] = label, os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return found


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _process_of(thread: int) -> int:
    """The process that *thread*, which stands in a system call, is of; 0 when it ended."""
    try:
        lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Tgid:")), 0)
