"""The guest goes first, and its memory follows: nothing of it is lost, and never are there two of it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import Denied, HostError, StateError, UsageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_migrate.leaving import migrate, migrate_start_postcopy
from cardcage_migrate.limits import Limits
from cardcage_migrate.outgoing import Outgoing
from cardcage_migrate.progress import Progress
from cardcage_migrate.wire import Kind, LinkLost, Refused
from migrate_kit import Coming, Cut, certificates, dead
from postcopy_kit import Breaking, Side, dial, gone_over, possible
from snapshot_kit import count, counting, counts_on

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
AT, SIZE = 8 << 20, 8 << 20
"""Where RAM has noise."""

pytestmark = possible


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with the installed cards."""
    with Host() as made:
        yield made


@pytest.fixture
def vm(tmp_path: Path, host: Host) -> Iterator[Machine]:
    """A guest that counts, in 32 MiB that have noise."""
    with made(tmp_path, host) as vm:
        yield vm


def made(folder: Path, host: Host, **keys: Any) -> Machine:
    """The same with other keys; it runs."""
    vm = counting(folder, host, **{"memory": "32M", **keys})
    vm.memory.write(AT, random.Random(1).randbytes(SIZE))
    vm.start()
    counts_on(vm, 10)
    return vm


def noise(side: Side) -> bool:
    """The noise is there."""
    wanted = hashlib.blake2b(random.Random(1).randbytes(SIZE)).hexdigest()
    return bool(side.ask("sum", "sum", at=AT, size=SIZE)["sum"] == wanted)


def runs_on(side: Side, beyond: int) -> None:
    """It counts past *beyond* there."""
    while side.ask("state", "state")["count"] <= beyond:
        pass


def until(side: Side, status: str) -> dict[str, Any]:
    """Wait until that is how the migration is there."""
    while (found := side.ask("status", "status"))["status"] != status:
        pass
    return found


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_the_guest_goes_first(tmp_path: Path, host: Host, accel: str, scheme: str) -> None:
    """The guest goes on there from the count that it had, with a disk that both sides share, before its memory is
    there; a thread of Python that needs a page waits for it; in the end all of it is what it was, and both say so."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    drive = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    told: list[tuple[str, int]] = []
    with (
        made(tmp_path, host, accel=accel, platform="pc", devices=[drive]) as vm,
        Side(tmp_path, "tcp:127.0.0.1:0" if scheme == "tcp" else "") as there,
    ):
        at = count(vm)

        def tell(one: Progress) -> None:
            if not told:
                there.hear("done")
                assert noise(there)
            told.append((one.status, one.remaining))

        done = Outgoing(vm, there.uri, Limits(downtime=60, mode="postcopy", bandwidth=4 << 20), tell).over(
            lambda: (dial(there.uri), False)
        )
        assert (done.status, done.mode, done.remaining) == ("completed", "postcopy", 0)
        assert done.asked
        assert told[0][0] == "postcopy-active"
        assert told[-1] == ("completed", 0)
        assert f"migrated to {there.uri}" in str(vm.outcome)
        runs_on(there, at)
        assert until(there, "completed")["mode"] == "postcopy"


def test_by_the_public_door(vm: Machine, tmp_path: Path) -> None:
    """``migrate(mode="postcopy")`` does all of it, and the socket's file is gone afterwards."""
    with Side(tmp_path) as there:
        assert migrate(vm, there.uri, mode="postcopy", downtime=60).status == "completed"
        there.hear("done")
        assert noise(there)
        until(there, "completed")
        while (tmp_path / "door").exists():
            pass


def test_tls(vm: Machine, tmp_path: Path) -> None:
    """Pages go over TLS like all else."""
    keys = certificates(tmp_path)
    with Side(tmp_path, "tcp:127.0.0.1:0", tls_dir=str(keys)) as there:
        done = migrate(vm, there.uri, mode="postcopy", downtime=60, tls_dir=keys, tls_hostname="machines.test")
        assert done.status == "completed"
        assert noise(there)


def test_precopy_goes_over_when_told(vm: Machine, tmp_path: Path) -> None:
    """A migration with the mode ``hybrid`` sends memory first, and the guest before the rest of it once it is told to;
    one with another mode refuses that."""
    with Side(tmp_path) as there:
        passes = []

        def tell(one: Progress) -> None:
            if one.status == "active" and one.sent > SIZE // 4:
                migrate_start_postcopy(vm)
            elif one.status == "postcopy-active":
                passes.append(one.passes)

        with pytest.raises(StateError, match="is not being migrated"):
            migrate_start_postcopy(vm)
        done = migrate(vm, there.uri, mode="hybrid", bandwidth=8 << 20, downtime=60, progress=tell)
        assert (done.status, done.passes, set(passes)) == ("completed", 1, {1})
        assert SIZE <= done.sent < SIZE + SIZE // 2
        assert noise(there)


def test_precopy_goes_over_when_it_does_not_converge(
    vm: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mode ``hybrid``, one that does not converge goes over after a few passes, and no vCPU is held up; one
    that converges is a pre-copy, and has nothing to follow."""
    monkeypatch.setattr("cardcage_migrate.outgoing.LITTLE", 0)
    monkeypatch.setattr("cardcage_migrate.outgoing.SLOW", 0)
    with Side(tmp_path) as there:
        done = migrate(vm, there.uri, mode="hybrid", bandwidth=1 << 30, downtime=0.2)
        assert (done.status, done.throttle) == ("completed", 0)
        assert noise(there)


def test_one_that_converges_is_a_precopy(vm: Machine, tmp_path: Path) -> None:
    """With the mode ``hybrid``, one that converges has nothing to follow, and may be saved at once."""
    with Side(tmp_path) as there:
        done = migrate(vm, there.uri, mode="hybrid", downtime=60)
        assert (done.status, done.asked) == ("completed", 0)
        there.hear("done")
        assert there.ask("error", "try", what="snapshot")["error"] == ""
        assert noise(there)


def test_cut_links_are_recovered(tmp_path: Path, host: Host) -> None:
    """A connection for pages that breaks, at whatever byte, loses nothing: both sides keep what they have, and say so;
    the source lets nobody go on with its own, and sends the rest once it is told to recover; all memory is what it
    was."""
    draw = random.Random(15)
    for number in range(20 if LONG else 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (
            made(folder, host, name=f"cut-{number}") as vm,
            Side(folder, "tcp:127.0.0.1:0" if number % 2 else "") as there,
        ):
            at = count(vm)
            with pytest.raises(LinkLost, match=r"runs at .*, and about .* of its memory are here alone"):
                gone_over(vm, there.uri, draw.randrange(SIZE // 4))
            there.hear("done")
            assert vm.migrate_progress().status == "postcopy-paused"  # type: ignore[attr-defined]  # a verb
            left = until(there, "postcopy-paused")["remaining"]
            with pytest.raises(Denied, match="it runs at"):
                vm.resume()
            again = Breaking(dial(there.uri), draw.randrange(100, 100 + left // 2))
            with pytest.raises(LinkLost, match="are here alone"):
                resume(vm, again)
            until(there, "postcopy-paused")
            vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
            assert "migrated to" in str(vm.outcome)
            runs_on(there, at)
            assert noise(there)
            until(there, "completed")


def resume(vm: Machine, peer: Any) -> None:
    """Recover over this connection."""
    from cardcage_migrate.hold import standing

    ways = standing(vm)
    assert ways is not None
    assert ways.resume is not None
    ways.resume(lambda: peer)


def test_nothing_is_made_of_a_part(vm: Machine, tmp_path: Path) -> None:
    """While memory is still coming in, the machine is not saved, forked, kept or moved on, in one line that says why;
    afterwards it is."""
    with Side(tmp_path) as there:
        with pytest.raises(LinkLost):
            gone_over(vm, there.uri, 1 << 20)
        there.hear("done")
        until(there, "postcopy-paused")
        for what in ("snapshot", "fork", "checkpoint", "migrate"):
            assert "its memory is still coming in" in there.ask("error", "try", what=what)["error"], what
        vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
        until(there, "completed")
        for what in ("snapshot", "checkpoint"):
            assert there.ask("error", "try", what=what)["error"] == ""


def test_a_destination_that_is_stopped(vm: Machine, tmp_path: Path) -> None:
    """A machine that is stopped while its source cannot be reached ends: nobody waits for pages that do not come."""
    with Side(tmp_path) as there:
        with pytest.raises(LinkLost):
            gone_over(vm, there.uri, 1 << 20)
        there.hear("done")
        until(there, "postcopy-paused")
        assert there.ask("error", "try", what="stop")["error"] == ""
        there.ask("ended", "wait")
        there.close()
        assert there.process.returncode == 0
    with pytest.raises(HostError):
        vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
    assert vm.state == "paused"


def test_a_destination_that_is_killed(vm: Machine, tmp_path: Path) -> None:
    """A destination that is killed in the middle takes the machine along: the source says that it is lost, and lets
    nobody go on with memory that is out of date."""
    with Side(tmp_path) as there:

        def tell(one: Progress) -> None:
            if one.status == "postcopy-active":
                there.process.kill()

        with pytest.raises((Refused, LinkLost), match=r"is lost: its process has ended there|are here alone"):
            Outgoing(vm, there.uri, Limits(downtime=60, mode="postcopy", bandwidth=1 << 20), tell).over(
                lambda: (dial(there.uri), False)
            )
        assert vm.state == "paused"
        with pytest.raises(Denied):
            vm.resume()
        with pytest.raises((StateError, HostError)):
            vm.migrate_recover()  # type: ignore[attr-defined]  # a verb


def test_a_pager_that_is_killed(vm: Machine, tmp_path: Path) -> None:
    """A destination whose pager is killed loses the machine, which ends and says why."""
    with Side(tmp_path) as there:
        with pytest.raises(LinkLost):
            gone_over(vm, there.uri, 1 << 20)
        there.hear("done")
        until(there, "postcopy-paused")
        there.process.stdin.write('{"do": "pager"}\n')  # type: ignore[union-attr]  # it is a pipe
        assert "its memory is lost: its pager has ended" in there.ask("ended", "wait")["ended"]


def test_a_destination_that_fails_before(vm: Machine, tmp_path: Path) -> None:
    """One that cannot take the machine says so while it runs at the source, which goes on."""
    at = count(vm)
    there = {"config": config(tmp_path, memory='type = "memfd"')}
    with Side(tmp_path, **there) as side, pytest.raises(Refused, match='memory of type "memfd" cannot come later'):
        migrate(vm, side.uri, mode="postcopy", downtime=60)
    counts_on(vm, at)


def config(folder: Path, memory: str) -> str:
    """The machine's configuration with another table ``[memory]``."""
    path = folder / "there.toml"
    path.write_text(
        '[machine]\nname = "count"\nmemory = "32M"\nplatform = "none"\naccel = ["tcg"]\n'
        f'[memory]\n{memory}\n[[device]]\ntype = "debugcon"\nchar = "null"\n'
    )
    return str(path)


def test_the_link_breaks_before(vm: Machine, tmp_path: Path) -> None:
    """Where the connection for pages breaks before the machine was given up, it goes on at the source, and nothing is
    left of it at the destination."""
    with Side(tmp_path) as there:
        with pytest.raises(LinkLost):
            gone_over(vm, there.uri, 20, late=False)
        assert there.hear("done")["error"]
    counts_on(vm, count(vm))


@pytest.mark.parametrize("most", [80, 2000, 100000])
def test_the_link_breaks_in_the_switch(vm: Machine, tmp_path: Path, most: int) -> None:
    """Where the connection for pages breaks in the moment of the switch, one copy is left: the source's, and the
    destination waits for no page; or the destination's, and the source stands still until it sends the rest."""
    with Side(tmp_path) as there:
        with pytest.raises(LinkLost):
            gone_over(vm, there.uri, most, late=False)
        if there.hear("done")["error"]:
            counts_on(vm, count(vm))
        else:
            assert vm.state == "paused"
            vm.migrate_recover()  # type: ignore[attr-defined]  # a verb
            assert noise(there)
        there.close()
        assert there.process.returncode == 0


def test_the_last_word_is_lost(vm: Machine, tmp_path: Path) -> None:
    """Where the source has given the machine up, and the destination does not hear it, both stand still; recovered
    there, it goes on, its source sends the rest of its memory, and ends."""
    with Side(tmp_path) as there:
        links: list[Any] = []

        def link() -> tuple[Any, bool]:
            links.append(dial(there.uri) if links else Cut(dial(there.uri), Kind.COMMIT, False, dead))
            return links[-1], False

        with pytest.raises(LinkLost, match="was given up to"):
            Outgoing(vm, there.uri, Limits(downtime=60, mode="postcopy", patience=5, bandwidth=1 << 20), None).over(
                link
            )
        assert "stands still" in there.hear("done")["error"]
        assert vm.state == "paused"
        at = count(vm)
        assert there.ask("error", "try", what="recover")["error"] == ""
        runs_on(there, at)
        assert noise(there)
        assert "migrated to" in str(vm.wait(60))


def test_refused_in_one_line(vm: Machine, host: Host, tmp_path: Path) -> None:
    """A paused machine, a place where nobody can come twice, a way on which nothing comes back, and a destination in
    the source's own process are refused, and the machine goes on."""
    with pytest.raises(UsageError, match='mode "both": expected precopy, postcopy, hybrid'):
        Limits(mode="both")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(UsageError, match="nothing can come back"):
        migrate(vm, f"file:{tmp_path}/file", mode="postcopy")
    outgoing = Outgoing(vm, "there", Limits(downtime=60, mode="postcopy"))
    with Coming(host) as there, pytest.raises(Refused, match="the source is this very process"):
        outgoing.over(lambda: (there.link, False))
    counts_on(vm, count(vm))
    vm.pause()
    with pytest.raises(StateError, match="by post-copy: the machine is paused"):
        migrate(vm, f"unix:{tmp_path}/door", mode="postcopy")


def test_a_host_that_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not catch the kernel's faults is told what would allow it."""
    import ctypes

    from cardcage_migrate import faults as ours
    from cardcage_snapshot import faults

    class Forbidding:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def syscall(self, *_: int) -> int:
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Forbidding)
    monkeypatch.setattr(faults, "DEVICE", "/nowhere/userfaultfd")
    with pytest.raises(HostError, match=r"give it /dev/userfaultfd .*, or set vm.unprivileged_userfaultfd=1"):
        ours.open_faults()
