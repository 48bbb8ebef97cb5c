"""A running machine moves: it goes on there, stops here, and there are never two of it, nor none."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError, Denied, HostError, StateError, UsageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import RamBlock
from cardcage_migrate import incoming, wire
from cardcage_migrate.leaving import migrate, migrate_cancel
from cardcage_migrate.outgoing import Cancelled, Limits
from cardcage_migrate.progress import Progress, migrate_progress
from cardcage_migrate.reach import parse, tls_context
from cardcage_migrate.wire import Frame, Kind, LinkLost, Refused
from cardcage_snapshot.creating import snapshot
from cardcage_snapshot.sealing import prepared
from migrate_kit import Coming, Cut, certificates, dead, over
from snapshot_kit import count, counting, counts_on

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with the installed cards."""
    with Host() as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the guest's program."""
    return tmp_path_factory.mktemp("guest")


@pytest.fixture
def vm(folder: Path, host: Host) -> Iterator[Machine]:
    """A guest that counts."""
    with counting(folder, host, memory="2M") as made:
        made.start()
        counts_on(made, 10)
        yield made


class Listening:
    """``Machine.incoming(uri)`` on a thread of its own, by the public door."""

    def __init__(self, uri: str, **keys: Any) -> None:
        self._ready, self.port = threading.Event(), 0
        self._found: list[Any] = []
        self._thread = threading.Thread(target=self._take, args=(uri,), kwargs=keys)
        self._thread.start()
        assert self._ready.wait(60)

    def _take(self, uri: str, **keys: Any) -> None:
        def waiting(door: Any) -> None:
            self.port = door.port if door.place.scheme == "tcp" else 0
            self._ready.set()

        try:
            self._found.append(Machine.incoming(uri, waiting=waiting, **keys))  # type: ignore[attr-defined]  # a maker
        except BaseException as error:
            self._found.append(error)
        self._ready.set()

    def machine(self) -> Machine:
        """The machine. Raises what it raised there."""
        self._thread.join()
        found = self._found[0]
        if isinstance(found, BaseException):
            raise found
        made: Machine = found
        return made


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_it_goes_on_there(folder: Path, tmp_path: Path, host: Host, accel: str, scheme: str) -> None:
    """A machine with RAM that it wrote, and a disk that both sides share, goes on from the count that it had; its
    source has ended and says where it went; and it moves on from there, or is saved, like any other."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    drive = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    keys: dict[str, Any] = {"accel": accel, "memory": "8M", "platform": "pc", "devices": [drive]}
    told: list[str] = []
    with counting(folder, host, **keys) as vm:
        noise = os.urandom(1 << 20)
        vm.memory.write(4 << 20, noise)
        vm.start()
        counts_on(vm, 10)
        there = Listening("tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/door", host=host)
        uri = f"tcp:127.0.0.1:{there.port}" if scheme == "tcp" else f"unix:{tmp_path}/door"
        done = migrate(vm, uri, downtime=5, progress=lambda one: told.append(one.status))
        assert (done.status, done.remaining) == ("completed", 0)
        assert done.sent > len(noise)
        assert told[-1] == "completed"
        assert f"migrated to {uri}" in str(vm.outcome)
        at = count(vm)
        with there.machine() as moved:
            assert count(moved) >= at
            counts_on(moved, at)
            assert moved.memory.read(4 << 20, len(noise)) == noise
            snapshot(moved, tmp_path / "saved")
            with Coming(host) as again:
                over(moved, again.link)
                counts_on(again.done().machine, at)


def test_all_that_is_written_meanwhile_goes_over(folder: Path, host: Host) -> None:
    """What the guest and devices write while RAM goes over is there byte by byte; what is all zeros costs nothing."""
    with counting(folder, host, memory="64M") as vm, Coming(host) as there:
        vm.start()
        wrote: list[bytes] = []

        def write(progress: Progress) -> None:
            if progress.status == "active":
                wrote.append(os.urandom(16))
                vm.memory.write((20 << 20) + len(wrote) * 5000, wrote[-1])

        vm.memory.write(32 << 20, os.urandom(4 << 20))
        vm.memory.write(40 << 20, bytes(8 << 20))  # touched, and zero
        done = over(vm, there.link, Limits(downtime=5, bandwidth=40 << 20), write)
        moved = there.done().machine
        moved.pause()
        assert wrote
        ours, theirs = bytearray(vm.memory.ranges[0].block.view), bytearray(moved.memory.ranges[0].block.view)
        ours[0x5000:0x6000] = theirs[0x5000:0x6000] = bytes(4096)  # where it counts on
        assert ours == theirs
        assert done.sent < 6 << 20


def test_another_pass_makes_the_stop_shorter(folder: Path, host: Host) -> None:
    """RAM that was written during the first pass goes over while the guest runs, where it is much less than that pass
    had, also where the guest may stand still for all of it; and the destination is ready to start before any comes."""
    did: list[str] = []
    with counting(folder, host, memory="64M") as vm, Coming(host) as there, pytest.MonkeyPatch.context() as patch:
        call, take = host.phases.call, incoming.put

        def called(phase: str, machine: Machine) -> list[Any]:
            did.append(phase)
            return call(phase, machine)

        def taken(block: RamBlock, frame: Frame) -> None:
            did.append("RAM")
            take(block, frame)

        patch.setattr(host.phases, "call", called)
        patch.setattr(incoming, "put", taken)
        vm.start()
        did.clear()
        vm.memory.write(32 << 20, os.urandom(12 << 20))
        once = iter([os.urandom(4 << 20)])

        def write(progress: Progress) -> None:
            if progress.status == "active" and progress.passes == 1 and progress.sent > 1 << 20:
                for data in once:
                    vm.memory.write(20 << 20, data)

        done = over(vm, there.link, Limits(downtime=5, bandwidth=60 << 20), write)
        assert next(once, None) is None
        assert done.passes > 1
        moved = there.done().machine
        assert vm.memory.read(20 << 20, 4 << 20) == moved.memory.read(20 << 20, 4 << 20)
    assert "starting" in did[: did.index("RAM")]


MOMENTS = [
    (Kind.HELLO, False),
    (Kind.HELLO, True),
    (Kind.ACCEPT, False),
    (Kind.ACCEPT, True),
    (Kind.PAGES, False),
    (Kind.PAGES, True),
    (Kind.PONG, True),
    (Kind.STATE, False),
    (Kind.END, True),
    (Kind.READY, False),
    (Kind.READY, True),
    (Kind.COMMIT, False),
    (Kind.COMMIT, True),
    (Kind.STARTED, False),
    (Kind.STARTED, True),
]
THEIRS = {Kind.ACCEPT, Kind.PONG, Kind.READY, Kind.STARTED}


@pytest.mark.parametrize(("kind", "after"), MOMENTS if LONG else [MOMENTS[at] for at in (5, 8, 9, 10, 11, 12, 13, 14)])
def test_a_link_that_breaks_leaves_one(vm: Machine, host: Host, kind: Kind, after: bool) -> None:
    """Whenever the link breaks, at most one copy runs; where none does, exactly one that stands still goes on when it
    is recovered, and a copy that may not go on refuses until then."""
    cut = partial(Cut, kind=kind, after=after, then=dead)
    with Coming(host, cut if kind in THEIRS else None) as there:
        link: Any = there.link if kind in THEIRS else cut(there.link)
        with suppress(HostError):
            over(vm, link)
        there.done()
        here, copy = vm.state == "running", there.machine
        running = [one for one in (vm, copy) if one is not None and one.state == "running"]
        assert len(running) <= 1
        given_up = migrate_progress(vm).status == "given up"  # type: ignore[union-attr]  # there was one
        if kind in (Kind.COMMIT, Kind.STARTED) and not (kind is Kind.STARTED and after):
            # its answer may have been on its way already
            assert given_up or (kind is Kind.COMMIT and after and copy in running)
            assert not here
        if not running:
            assert given_up
            assert copy is not None
            for one in (vm, copy):
                with pytest.raises(Denied, match="migrate recover"):
                    (one.resume if one is vm else one.start)()
            one = copy if after else vm
            one.migrate_recover()
            running = [one]
        elif copy is not None and not here and given_up:
            with pytest.raises(Denied, match="migrate recover"):
                vm.resume()
        counts_on(running[0], count(running[0]))


def test_a_disk_is_the_witness(folder: Path, tmp_path: Path, host: Host) -> None:
    """Where the link broke in the switch, a machine with a disk goes on once: the other copy is refused, since the disk
    is another's then, or was written since; before the source let go of it, nobody else gets it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    drive = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    cut = partial(Cut, kind=Kind.COMMIT, after=False, then=dead)
    with counting(folder, host, platform="pc", memory="8M", devices=[drive]) as vm:
        vm.start()
        for first in ("there", "here"):
            with Coming(host) as there:
                with pytest.raises(LinkLost, match="stands still here"):
                    over(vm, cut(there.link))
                with pytest.raises(StateError, match="being migrated already"):
                    over(vm, there.link)
                copy = there.done().machine
                if first == "there":
                    copy.migrate_recover()
                    counts_on(copy, count(copy))
                    with pytest.raises(HostError, match="writing this image"):
                        vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
                    copy.close()
                    os.utime(disk)
                    with pytest.raises(HostError, match="has written it since"):
                        vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
                    return_to(disk, vm)
                vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
                counts_on(vm, count(vm))
                if first == "here":
                    with pytest.raises(HostError, match=r"in use|writing this image"):
                        copy.migrate_recover()


def return_to(disk: Path, vm: Any) -> None:
    """Let the image be as it was left, for the sake of the test."""
    from cardcage_migrate.hold import _ways

    ((_, stamp),) = _ways[vm].here.__self__._left  # type: ignore[attr-defined]  # a bound method
    os.utime(disk, ns=(stamp.modified, stamp.modified))


def test_a_destination_that_fails_last_gives_it_back(folder: Path, tmp_path: Path, host: Host) -> None:
    """Where the destination cannot have the disk after the source let go of it, it says so, and the source goes on with
    its disk."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    drive = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}

    def grab(peer: socket.socket) -> None:
        os.utime(disk, ns=(1, 1))  # another file, as it seems: it is not shared

    with counting(folder, host, platform="pc", memory="8M", devices=[drive]) as vm:
        vm.start()
        stamp = disk.stat().st_mtime_ns
        with Coming(host) as there:
            with pytest.raises((Refused, HostError), match=r"not shared|written it since"):
                over(vm, Cut(there.link, Kind.COMMIT, False, grab))
            assert "not shared" in str(there.done().error)
        assert vm.state == "paused"  # the same that made the destination refuse
        os.utime(disk, ns=(stamp, stamp))
        return_to(disk, vm)
        vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
        counts_on(vm, count(vm))


def test_what_cannot_move_is_refused_before_anything_stops(folder: Path, tmp_path: Path, host: Host) -> None:
    """In one line: a disk that is not there for the destination, one that ignores flushes, a back end that does not
    say how it changes hands, a limit that cannot be kept, another configuration."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    keys: dict[str, Any] = {"platform": "pc", "memory": "8M"}
    unsafe = {"type": "virtio-blk", "id": "d", "drive": {"file": str(disk), "format": "raw", "cache": "unsafe"}}
    slow = {"type": "virtio-blk", "id": "d", "drive": {"type": "throttle", "bps": 1000, "drive": str(disk)}}
    for drive, why in ((unsafe, "flushes are ignored"), (slow, "does not name it alone")):
        with counting(folder, host, devices=[drive], **keys) as vm:
            vm.start()
            with pytest.raises(StateError, match=why):
                migrate(vm, "unix:/nowhere")
            assert vm.state == "running"
    plain = {"type": "virtio-blk", "id": "d", "drive": {"file": str(disk), "format": "raw"}}
    with counting(folder, host, devices=[plain], **keys) as vm:
        vm.start()
        for config, why in (
            ({"machine": {"memory": "8M", "platform": "pc"}}, 'no device "d" with a drive'),
            ({"machine": {"memory": "8M", "platform": "pc"}, "device": [{**plain, "drive": "/nowhere"}]}, "not shared"),
            ({"machine": {"memory": "4M", "platform": "pc"}, "device": [plain]}, "8388608 bytes of memory"),
        ):
            with Coming(host, config=config) as there:
                with pytest.raises(Refused, match=why):
                    over(vm, there.link)
                assert why in str(there.done().error)
        with Coming(host) as there, pytest.raises(UsageError, match="at the least: downtime is 0 ms"):
            over(vm, there.link, Limits(downtime=0.0001))
        with pytest.raises(HostError, match="No such file"):
            migrate(vm, f"unix:{tmp_path}/nobody")
        assert vm.state == "running"
        counts_on(vm, count(vm))


@pytest.mark.parametrize("uri", ["", "unix", "unix:", "tcp:1", "tcp:host:port", "tcp:h:70000", "fd:x", "ssh:there"])
def test_a_uri_is_held_to_its_form(uri: str) -> None:
    """What is none says what would be."""
    with pytest.raises(UsageError, match="expected"):
        parse(uri)


def test_a_stranger_is_not_trusted(vm: Machine, host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A configuration without this account's seal is not used, unless somebody says so."""
    prepared(vm)  # sealed by this account
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with Coming(host) as there, pytest.raises(Refused, match="--trust"):
        over(vm, there.link)
    with Coming(host, trust=True) as there:
        over(vm, there.link)
        counts_on(there.done().machine, 10)


def test_cancel_and_timeout(vm: Machine, host: Host) -> None:
    """A migration is cancelled, or gives up after its time, and the machine goes on; with ``force`` it goes over."""
    vm.memory.write(1 << 20, os.urandom(1 << 19))
    with Coming(host) as there:

        def cancel(progress: Progress) -> None:
            if progress.status == "active":
                migrate_cancel(vm)

        with pytest.raises(Cancelled, match="was cancelled"):
            over(vm, there.link, Limits(bandwidth=1 << 20, downtime=5), cancel)
        assert "the source goes on" in str(there.done().error)
    assert migrate_progress(vm).status == "cancelled"  # type: ignore[union-attr]  # there was one
    with pytest.raises(StateError, match="not being migrated"):
        migrate_cancel(vm)
    counts_on(vm, count(vm))
    limits = {"timeout": 1e-6, "downtime": 0.9}
    for strategy, fails in (("cancel", True), ("force", False)):
        with Coming(host) as there:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("cardcage_migrate.outgoing.DISK", 0)
                try:
                    over(vm, there.link, Limits(**limits, strategy=strategy), never_little(patch))  # type: ignore[arg-type]  # a Literal
                    assert not fails
                except Cancelled:
                    assert fails
            if not fails:
                counts_on(there.done().machine, 10)


def never_little(patch: pytest.MonkeyPatch) -> None:
    """Let the source believe that too much is always left."""
    patch.setattr("cardcage_migrate.outgoing.held", lambda runs: 1 << 40)


def test_vcpus_that_write_too_fast_are_held_up(folder: Path, host: Host) -> None:
    """Where passes do not get there, vCPUs are held up more and more, which the progress says; guest time goes on, and
    once it is over nobody is held up."""
    seen: list[int] = []
    with counting(folder, host, memory="2M") as vm, Coming(host) as there, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cardcage_migrate.outgoing.TELL", 0)
        vm.start()
        never_little(patch)

        def tell(progress: Progress) -> None:
            seen.append(progress.throttle)
            if progress.throttle == 40 and seen.count(40) == 1:
                at = count(vm), vm.clock.now()
                counts_on(vm, at[0])
                assert vm.clock.now() > at[1]
                patch.undo()

        over(vm, there.link, Limits(downtime=5), tell)
        steps = list(dict.fromkeys(seen))
        assert steps in ([0, 20, 30, 40], [0, 20, 30, 40, 50])  # this pass was decided before it was told, or after
        counts_on(there.done().machine, 10)
    assert not [one for one in threading.enumerate() if "throttle" in one.name]


def test_one_way_to_a_file(vm: Machine, host: Host, tmp_path: Path) -> None:
    """A machine goes into a file, or through a pipe; it stands still here until it is recovered, and others go on from
    the file; one that was paused is built there, and goes on when it is told to."""
    done = migrate(vm, f"file:{tmp_path}/saved")
    assert done.status == "given up"
    at = count(vm)
    with pytest.raises(Denied, match="migrate recover"):
        vm.resume()
    for _ in range(2):
        with Listening(f"file:{tmp_path}/saved", host=host).machine() as moved:
            counts_on(moved, at)
    vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
    counts_on(vm, at)
    vm.pause()
    at = count(vm)
    read, write = os.pipe()
    there = threading.Thread(target=migrate, args=(vm, f"fd:{write}"))
    there.start()
    with Machine.incoming(f"fd:{read}", host=host) as moved:  # type: ignore[attr-defined]  # a maker
        there.join()
        assert (moved.state, count(moved)) == ("built", at)
        moved.start(boot=False)
        counts_on(moved, at)
    os.close(read)
    os.close(write)


def test_by_a_command(vm: Machine, host: Host, tmp_path: Path) -> None:
    """``exec:`` speaks to a command's standard input and output."""
    there = Listening(f"unix:{tmp_path}/door", host=host)
    relay = (
        "import socket,sys,threading,os; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "def f(g,p):\n while d:=g(65536): p(d)\n s.shutdown(1) if p is s.sendall else None\n"
        "t=threading.Thread(target=f,args=(lambda n: os.read(0,n),s.sendall)); t.start()\n"
        "f(s.recv,lambda d: os.write(1,d)); os._exit(0)"
    )
    script = tmp_path / "relay.py"
    script.write_text(relay)
    migrate(vm, f"exec:exec {sys.executable} {script} {tmp_path}/door", downtime=5)
    with there.machine() as moved:
        counts_on(moved, 10)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates by QEMU's names, and those of another authority in ``other``."""
    return certificates(tmp_path_factory.mktemp("tls"))


def test_tls(vm: Machine, host: Host, keys: Path) -> None:
    """With certificates it moves; a destination of another name or authority, a source of another authority, and one
    without TLS get nothing, and who waits goes on waiting."""
    there = Listening("tcp:127.0.0.1:0", host=host, tls_dir=keys)
    uri = f"tcp:127.0.0.1:{there.port}"
    for tls, name, why in (
        (keys, "elsewhere.test", "hostname mismatch"),
        (keys / "other", "machines.test", "self.signed certificate|unable to get local issuer"),
        (None, "", "hung up|broke"),
    ):
        with pytest.raises(HostError, match=why):
            migrate(vm, uri, downtime=5, tls_dir=tls, tls_hostname=name)
        assert vm.state == "running"
    migrate(vm, uri, downtime=5, tls_dir=keys, tls_hostname="machines.test")
    with there.machine() as moved:
        counts_on(moved, 10)
    (keys / "other" / "client-cert.pem").unlink()
    with pytest.raises(ConfigError, match=r"client-cert\.pem: expected a file in PEM"):
        tls_context(keys / "other", server=False)


def test_words_of_the_stream() -> None:
    """Each kind of frame that has a body has a largest size, and the numbers are those of version 1."""
    assert wire.VERSION == 1
    assert {one.name: int(one) for one in Kind} == {
        **{"HELLO": 1, "ACCEPT": 2, "PAGES": 3, "PING": 4, "PONG": 5, "STATE": 6, "END": 7, "READY": 8, "COMMIT": 9},
        **{"STARTED": 10, "FAILED": 11, "ABORT": 12, "MISSING": 13, "JOIN": 14, "JOINED": 15, "REQUEST": 16},
        **{"ZEROS": 17, "DONE": 18},
    }
