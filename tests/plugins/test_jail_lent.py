"""Files that an operator lends to a machine in its jail, through the broker."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage.errors import Denied, HostError
from cardcage.security import Act, Mediator
from cardcage_jail import lend, listen_at, open_file, outside
from cardcage_jail.broker import LENDERS, Broker

pytestmark = pytest.mark.once


class Checker:
    """Lets the operator add what is not called so."""

    def check(self, act: Act, /) -> None:
        if (act.source, act.tclass, act.permissions) != ("operator", "machine", ("add",)):
            raise AssertionError(act)
        if str(act.facts["name"]).endswith("forbidden"):
            raise Denied("no")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A broker on a thread of this process, where it lends; this process asks it as a jailed one does."""
    for name in ("disk", "base", "other", "forbidden"):
        (tmp_path / name).write_text(name)
    path = str(tmp_path / "lenders")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lenders = [(listen_at(path), path)]
    machine: Any = SimpleNamespace(
        mediator=Mediator((Checker(),)), label="m", name="m", host=SimpleNamespace(share=lambda key, make: lenders)
    )
    broker = Broker(theirs, machine, [], -1, os.getpid())
    ours.send(b"begin")
    thread = threading.Thread(target=broker.run)
    thread.start()
    monkeypatch.setattr(outside, "_ways", [ours])
    yield path
    ours.close()
    thread.join()
    theirs.close()
    assert not os.path.exists(path)


def asked(path: Path, flags: int) -> str:
    """What is in the file that the broker opens."""
    with os.fdopen(outside.ask({"do": "open", "path": str(path), "flags": flags}), "rb") as file:
        return file.read().decode()


def test_a_file_is_there_while_it_is_lent(place: str, tmp_path: Path) -> None:
    """It is opened as it was lent and no better, by its own path, until the operator's process is done; what is not
    lent, and what the operator may not add, is not opened."""
    disk, base = tmp_path / "disk", tmp_path / "base"
    with lend(place, {str(disk): True, str(base): False}):
        assert [asked(disk, os.O_RDWR), asked(disk, os.O_RDONLY | os.O_NONBLOCK)] == ["disk", "disk"]
        assert asked(base, os.O_RDONLY) == "base"
        for path, flags in (
            (base, os.O_RDWR),
            (base, os.O_WRONLY),
            (disk, os.O_RDWR | os.O_TRUNC),
            (disk, os.O_RDWR | os.O_CREAT),
            (disk, os.O_RDONLY | os.O_PATH),
            (tmp_path / "other", os.O_RDONLY),
            (tmp_path / "." / "x" / ".." / "disk", os.O_RDONLY),
        ):
            with pytest.raises(PermissionError):
                asked(path, flags)
        os.close(open_file(str(disk), os.O_RDONLY))
    with pytest.raises(PermissionError):
        asked(disk, os.O_RDONLY)
    with pytest.raises(HostError, match="does not take it: no"), lend(place, {str(tmp_path / "forbidden"): False}):
        pytest.fail("it was lent")
    with pytest.raises(FileNotFoundError), lend(place, {str(tmp_path / "nothing"): False}):
        pytest.fail("it was lent")


def test_what_is_no_file_is_not_taken(place: str, tmp_path: Path) -> None:
    """A pipe, a folder, nonsense and a path without a file are refused in a line; more lenders or files than there
    may be are hung up on or refused; and the broker goes on."""
    folder, (reader, writer) = os.open(tmp_path, os.O_RDONLY), os.pipe()
    disk = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        for text, fds in (
            (b'{"lend": "/a"}', [reader]),
            (b'{"lend": "/a"}', [folder]),
            (b'{"lend": "/a"}', []),
            (b'{"lend": 3}', [disk]),
            (b"[" * 5000, [disk]),
            (b"\xff", [disk]),
        ):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(place)
                socket.send_fds(peer, [text], fds)
                assert json.loads(peer.recv(1000))["error"] == "expected a file, and its path"
    finally:
        for one in (folder, reader, writer, disk):
            os.close(one)
    many = {str(tmp_path / f"file{number}"): False for number in range(outside.FILES + 1)}
    for path in many:
        Path(path).touch()
    with pytest.raises(HostError, match=f"file{outside.FILES}: .* expected a file"), lend(place, many):
        pytest.fail("they were lent")
    peers = [socket.socket(socket.AF_UNIX) for _ in range(LENDERS)]
    try:
        for one in peers:
            one.connect(place)
        with pytest.raises(HostError, match="does not take it"), lend(place, {str(tmp_path / "disk"): False}):
            pytest.fail("it was lent")
    finally:
        for one in peers:
            one.close()


def test_a_machine_that_has_closed_is_lent_nothing(place: str, tmp_path: Path) -> None:
    """The socket goes with the machine; where there is none, nothing is lent, and nothing said."""
    outside.ask({"do": "close"})
    assert not os.path.exists(place)
    with lend(place, {str(tmp_path / "nothing"): False}):
        assert not os.path.exists(place)
