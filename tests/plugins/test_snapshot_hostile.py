"""A snapshot is anybody's file: damage is found and named, and nothing in it reaches further than its directory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cardcage.errors import CardcageError, ConfigError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_snapshot import arriving, manifest, sealing
from cardcage_snapshot.places import Folder
from cardcage_snapshot.restoring import check_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_kit import count, counting, counts_on, rewrite

GOLDEN = Path(__file__).parent / "golden-snapshot-1"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host with the installed cards."""
    with Host() as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Snapshots and the key of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    """A snapshot of a PC with two devices on its bus, which tests copy."""
    folder = tmp_path_factory.mktemp("saved")
    devices = [{"type": "virtio-rng"}, {"type": "virtio-console", "char": "null"}]
    with counting(folder, host, platform="pc", devices=devices, memory="4M") as vm:
        vm.start()
        counts_on(vm, 10)
        vm.snapshot(folder / "one")
    return folder / "one"


@pytest.fixture
def one(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "one"))


def restored(where: Any, **keys: Any) -> Machine:
    made: Machine = Machine.restore(where, **keys)  # type: ignore[attr-defined]  # found by its entry point
    return made


def restate(path: Path, data: bytes) -> None:
    """Put another state in, with its sum."""
    (path / "state.json").write_bytes(data)
    sum = hashlib.blake2b(data, digest_size=16).hexdigest()
    rewrite(path, lambda table: table.update(state={"size": len(data), "sum": sum}))


def test_the_golden_snapshot_goes_on(host: Host) -> None:
    """A snapshot of format 1, made by the release that introduced it, goes on under each later one."""
    with Folder(GOLDEN) as folder:
        check_files(folder, manifest.read(folder)[0])
    with restored(GOLDEN, trust=True, host=host, accel="tcg", any_cpu=True) as vm:
        began = count(vm)
        assert began > 1000
        counts_on(vm, began + 1000)
        assert {one.type for one in vm.devices.values()} >= {"virtio-rng", "virtio-console", "isa-serial", "hpet"}


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "ram"])
def test_a_damaged_byte_is_found_and_named(one: Path, host: Host, file: str) -> None:
    """Wherever a bit is turned over, the file is named; RAM's place too."""
    data = (one / file).read_bytes()
    for at in (0, len(data) // 3, len(data) - 2) if file != "ram" else (0x5000, 3 << 20):
        with (one / file).open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([data[at] ^ 0x10]))
        with pytest.raises(ConfigError) as caught:
            restored(one, host=host, verify=True)
        assert str(caught.value).startswith(f"{one}/{file}: ")
        (one / file).write_bytes(data)
    (one / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=str(one / file)):
        restored(one, host=host)
    (one / file).unlink()
    with pytest.raises(ConfigError, match="cannot be opened: No such file"):
        restored(one, host=host)


def test_what_does_not_fit_is_named(one: Path, host: Host, tmp_path: Path) -> None:
    """Another format, a card that is missing, another amount of RAM or processors, and another card's state are each
    refused in one line that names it."""
    kept = tmp_path / "kept"
    shutil.copytree(one, kept)

    def refused(pattern: str, **keys: Any) -> None:
        with pytest.raises(ConfigError, match=pattern) as caught:
            restored(one, **{"trust": True, "host": host, **keys})
        assert "\n" not in str(caught.value)
        shutil.rmtree(one)
        shutil.copytree(kept, one)

    outer = json.loads((one / "manifest.json").read_text())
    (one / "manifest.json").write_text(json.dumps({**outer, "cardcage snapshot": 7}))
    refused(r"is of format 7 \(written by cardcage '.*'\): this cardcage reads format 2")
    card = {"id": "x", "type": "flux", "card": "flux_card", "distribution": "flux", "release": "2.1"}
    rewrite(one, lambda table: table["devices"].append(card))
    refused(r'device "x" is of type "flux" \(card flux_card, flux 2.1\), which is not installed here')
    rewrite(one, lambda table: table["config"]["machine"].update(memory=8 << 20))
    refused(r"ram: has 4 MiB: expected 8 MiB, the machine's memory")
    rewrite(one, lambda table: table["config"]["machine"].update(cpus=2))
    refused("state.json: the saved machine's number of vCPUs is 1, this one's 2")
    rewrite(one, lambda table: table["config"]["device"].pop())
    refused("the saved machine's devices with state is")
    rewrite(one, lambda table: table["config"]["machine"].update(cpu="x86-64-v2"))
    refused("the saved machine's CPU model is max, this one's x86-64-v2")
    state = json.loads((one / "state.json").read_text())
    state["devices"]["hpet"]["version"] = 9
    restate(one, json.dumps(state).encode())
    refused('state.json: the state of device "hpet" is of hpet version 9; this machine has hpet version 1')
    state["devices"]["hpet"] = state["devices"]["pit"]
    restate(one, json.dumps(state).encode())
    refused('the state of device "hpet" is of pit version 1')


def test_a_strangers_configuration_is_not_taken_by_itself(one: Path, host: Host, tmp_path: Path) -> None:
    """A configuration that no machine of this account had is refused, unless it is trusted, or another is given; a
    change makes one of ours a stranger's."""
    (tmp_path / "secret").write_bytes(b"a secret")
    drive = {"type": "virtio-blk", "drive": str(tmp_path / "secret")}
    own = copy.deepcopy(json.loads((one / "manifest.json").read_text())["manifest"]["config"])
    with restored(one, host=host, start=False) as vm:
        assert vm.state == "built"
    rewrite(one, lambda table: table["config"]["device"].append(drive))
    with pytest.raises(ConfigError, match="was not made by this account"):
        restored(one, host=host)
    rewrite(one, lambda table: table.update(config=own, label="trusted_t"))
    with pytest.raises(ConfigError, match="was not made by this account"):
        restored(one, host=host)
    rewrite(one, lambda table: table.update(config={}, label=table["machine"]))
    given = {name: value for name, value in own.items() if name != "defaults" and value}
    with restored(one, host=host, config=given) as vm:
        counts_on(vm, count(vm))


@pytest.mark.parametrize("name", ["../one/ram", "/etc/passwd", "", ".", "..", "a/b", ".hidden", "x\0y", "x" * 300])
def test_names_of_files_stay_inside(one: Path, host: Host, name: str) -> None:
    """The file of RAM is one of the directory, whatever the manifest calls it."""
    rewrite(one, lambda table: table["ram"].update(file=name))
    with pytest.raises(CardcageError):
        restored(one, host=host, trust=True)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device"])
def test_only_regular_files_are_parts(one: Path, host: Host, tmp_path: Path, kind: str) -> None:
    """A link is not followed, a pipe not waited for, and a directory or a device is no part of a snapshot."""
    for file in ("ram", "state.json", "manifest.json"):
        (one / file).rename(tmp_path / file)
        if kind == "link":
            (one / file).symlink_to(tmp_path / file)
        elif kind == "fifo":
            os.mkfifo(one / file)
        elif kind == "directory":
            (one / file).mkdir()
        else:
            (one / file).symlink_to("/dev/zero")
        with pytest.raises(ConfigError, match=r"is a link|expected a regular file"):
            restored(one, host=host)
        (one / file).rmdir() if kind == "directory" else (one / file).unlink()
        (tmp_path / file).rename(one / file)


@pytest.mark.parametrize(
    ("memory", "ram", "line"),
    [
        (4 << 20, {"chunk": 1 << 20, "chunks": [[0, 10**30, 100, "0" * 32]]}, "piece 0 of RAM is out of place"),
        (1 << 48, {"chunk": 1 << 48, "chunks": [[0, 0, 1 << 48, "0" * 32]]}, "ram.chunk: .*expected at most"),
        (1 << 48, {"chunk": 1 << 36, "chunks": [[0, 0, 1 << 36, "0" * 32]]}, "the file ends before"),
    ],
)
def test_pieces_of_any_size_take_no_memory(one: Path, memory: int, ram: dict[str, Any], line: str) -> None:
    """A piece of RAM that is said to be far away, larger than pieces are, or than the file, is refused unread."""
    rewrite(one, lambda table: table.update(memory=memory, ram={"file": "ram", "compression": "zstd", **ram}))
    with Folder(one) as folder, pytest.raises(ConfigError, match=line):
        check_files(folder, manifest.read(folder)[0])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM is unpacked before the machine runs, as where the kernel's faults cannot be caught."""

    def refused() -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(arriving, "opened_faults", refused)


@pytest.mark.usefixtures("at_once")
def test_a_bomb_is_not_unpacked(one: Path, host: Host) -> None:
    """A frame that says, or turns out, to hold more than its piece of RAM is refused before it is unpacked."""
    for data in (zstandard.ZstdCompressor().compress(bytes(64 << 20)), bomb(), b"no frame at all"):
        (one / "ram.zst").write_bytes(data)
        sum = hashlib.blake2b(data, digest_size=16).hexdigest()
        packed = {"file": "ram.zst", "compression": "zstd", "chunk": 1 << 20, "chunks": [[1, 0, len(data), sum]]}
        rewrite(one, lambda table, packed=packed: table.update(ram=packed))
        with pytest.raises(ConfigError, match="RAM at 0x100000-0x1fffff is damaged"):
            restored(one, host=host, trust=True)


@pytest.mark.usefixtures("at_once")
def test_of_damaged_pieces_the_first_is_named(one: Path, host: Host) -> None:
    """Pieces are unpacked at once by several threads, and of those that are damaged the first in RAM is named."""
    frame = zstandard.ZstdCompressor().compress(b"x" * (1 << 20))
    sum = hashlib.blake2b(frame, digest_size=16).hexdigest()
    (one / "ram.zst").write_bytes(frame * 4)
    chunks = [[at, at * len(frame), len(frame), "0" * 32 if at in (1, 3) else sum] for at in range(4)]
    packed = {"file": "ram.zst", "compression": "zstd", "chunk": 1 << 20, "chunks": chunks}
    rewrite(one, lambda table: table.update(ram=packed))
    for _ in range(10):
        with pytest.raises(ConfigError, match="RAM at 0x100000-0x1fffff is damaged"):
            restored(one, host=host, trust=True)


def bomb() -> bytes:
    """A frame that does not say how much is in it."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_manifest_is_read_or_refused(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever a manifest holds, with sums that are right, it is read, or refused as a bad configuration."""
    outer = json.loads((saved / "manifest.json").read_text())
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    anything = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
    for _ in range(data.draw(st.integers(1, 3))):
        table = outer["manifest"]
        while True:
            keys = list(table) if isinstance(table, dict) else list(range(len(table)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(table[key], dict | list) and table[key] and data.draw(st.booleans()):
                table = table[key]
                continue
            table[key] = data.draw(anything)
            break
    text = sealing.canonical(outer["manifest"])
    outer["sum"] = hashlib.sha256(text).hexdigest()
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "manifest.json").write_text(json.dumps(outer))
    with Folder(folder) as opened, suppress(ConfigError):
        manifest.read(opened)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | st.just(b"[" * 100_000) | st.just(b'{"a":' * 90)
)
def test_any_bytes_are_no_manifest(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Bytes of any kind, deeply nested ones too, are refused as a bad configuration."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "manifest.json").write_bytes(data)
    with Folder(folder) as opened, pytest.raises(ConfigError):
        manifest.read(opened)


@settings(
    max_examples=200 if os.environ.get("CARDCAGE_LONG_TESTS") else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_state_is_loaded_or_refused(one: Path, saved: Path, host: Host, data: st.DataObject) -> None:
    """Whatever numbers, text and lists a state holds, the machine goes on for a moment, or is refused in one line that
    names the file; nothing else happens to this process."""
    state = json.loads((saved / "state.json").read_text())
    odd = (
        st.integers(-1, 1 << 70) | st.none() | st.booleans() | st.text(max_size=9) | st.lists(st.integers(), max_size=4)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        table: Any = state["devices"] if data.draw(st.booleans()) else state
        while True:
            key = data.draw(st.sampled_from(list(table) if isinstance(table, dict) else list(range(len(table)))))
            if isinstance(table[key], dict | list) and table[key]:
                table = table[key]
                continue
            table[key] = data.draw(odd)
            break
    restate(one, json.dumps(state).encode())
    try:
        vm = restored(one, host=host, trust=True, start=False)
    except CardcageError as error:
        said = str(error)
    else:
        said = ""
        try:
            vm.start(boot=False)
            vm.wait(0.02)
        except Exception:  # a card that stumbles over it stops the machine, which is all that it may do
            said = "" if vm.state == "stopped" else "still there\n"
        finally:
            vm.dismantle()
    assert "\n" not in said


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(machine="a\nb"),
        lambda table: table["devices"][0].update(type="\x1b[2J"),
        lambda table: table["devices"][0].update(distribution="x\r"),
        lambda table: table.update(processor="\x07"),
    ],
)
def test_what_a_manifest_says_is_one_line(one: Path, host: Host, change: Callable[[dict[str, Any]], object]) -> None:
    """Text of a manifest that would begin lines, or move a terminal's cursor, is refused in one line."""
    rewrite(one, change)
    with pytest.raises(ConfigError, match="does not fit: invalid value @") as caught:
        restored(one, host=host, trust=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("key", "value"), [("cpu", "a\nb"), ("irqchip", "\x1b[2J"), ("type", "x\r\n")])
def test_what_a_state_says_is_one_line(one: Path, host: Host, key: str, value: str) -> None:
    """Text of a state that is not this machine's is told in one line, without what moves a terminal's cursor."""
    state = json.loads((one / "state.json").read_text())
    (next(iter(state["devices"].values())) if key == "type" else state)[key] = value
    restate(one, json.dumps(state).encode())
    with pytest.raises(ConfigError) as caught:
        restored(one, host=host, trust=True)
    assert str(caught.value).isprintable()
