"""Paths in a TOML file are relative to its folder, wherever the program runs; all others to the current directory."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import attrs
import pytest
from cardcage.config import Draft, HostPath, beside
from cardcage.errors import ConfigError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import BackendOffer, DeviceOffer, MemoryOffer, Offer, SecurityOffer
from cardcage.security import Mediator
from guarded import Guard

PATHS = {"path", "paths", "file", "uds", "socket", "link", "dump", "state"}
"""Names of options that are paths."""

VM = """
[machine]
accel = "tcg"
memory = "2M"

[memory]
type = "file"
path = "ram"

[boot]
protocol = "raw"
image = "code.bin"

[[device]]
type = "virtio-blk"
id = "text"
drive = "one.img"

[[device]]
type = "virtio-blk"
id = "table"
drive = { file = "sub/two.img", format = "raw" }

[[device]]
type = "virtio-fs"
path = "sub"

[[device]]
type = "virtio-vsock"
cid = 3
uds = "guest.sock"

[[device]]
type = "virtio-net"
net = { type = "stream", listen = "unix:net.sock", dump = "net.pcap" }

[[device]]
type = "fw_cfg"
paths = { "opt/org/x" = "code.bin" }

[[device]]
type = "isa-serial"
port = 0x2f8
irq = 3
char = "file:log.txt"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what :data:`VM` names, below the one in which the test runs."""
    made = tmp_path / "machines of mine"
    (made / "sub").mkdir(parents=True)
    (made / "vm.toml").write_text(VM)
    (made / "code.bin").write_bytes(b"\xf4" * 512)
    for name in ("one.img", "sub/two.img"):
        (made / name).write_bytes(bytes(1 << 16))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize("absolute", [False, True])
def test_a_machine_finds_its_files_beside_its_toml(folder: Path, absolute: bool) -> None:
    """Every kind of file that a TOML names, read or made, is beside it: nothing appears in the current directory."""
    toml = (folder if absolute else folder.relative_to(Path.cwd())) / "vm.toml"
    with Machine.from_toml(toml):
        made = {one.relative_to(folder).as_posix() for one in folder.rglob("*")}
        assert {"ram", "guest.sock", "net.sock", "net.pcap", "log.txt"} <= made
    assert [one.name for one in Path.cwd().iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("name", "key"), [("code.bin", "boot"), ("one.img", "drive"), ("sub/two.img", "drive.file"), ("sub", "path")]
)
def test_a_missing_file_is_named_with_its_folder(folder: Path, name: str, key: str) -> None:
    """The error about a file that is not there says where it was looked for."""
    target = folder / name
    target.rename(folder / "gone")
    with pytest.raises(ConfigError) as caught:
        Machine.from_toml("machines of mine/vm.toml")
    assert str(target) in str(caught.value)


def test_security_is_asked_about_the_files_that_are_opened(folder: Path) -> None:
    """Permission is asked for the path that is opened, not for one of the same name in the current directory."""
    guard = Guard()
    with (
        Host(mediator=Mediator((guard,))) as host,
        Machine.from_toml(folder / "vm.toml", host=host),
    ):
        asked = {one.target for one in guard.asked if one.tclass == "image"}
    for name in ("code.bin", "one.img", "sub/two.img", "sub", "log.txt", "ram"):
        assert f"{folder}/{name}" in asked
    assert not [one for one in asked if not one.startswith(f"{folder}/")]


def test_what_others_say_is_relative_to_the_current_directory(folder: Path) -> None:
    """``--set``, flags and Python name files from the current directory on, also for a device of a TOML file."""
    (folder.parent / "here.img").write_bytes(bytes(1 << 16))
    with Machine.from_toml(folder / "vm.toml", set=["device.table.drive.file=here.img", "boot.image=here.img"]) as vm:
        assert vm.config.boot is not None
        assert vm.config.boot["image"] == "here.img"
    (folder / "one.img").unlink()
    with pytest.raises(ConfigError, match=r"^--set: device\[1\]\.drive: nowhere\.img|nowhere\.img"):
        Machine.from_toml(folder / "vm.toml", set=["device.text.drive=nowhere.img"])


def test_an_absolute_path_stays(folder: Path) -> None:
    """An absolute path in a TOML file means what it says, and empty text is no path."""
    draft = Draft()
    (folder / "a.toml").write_text('[boot]\nkernel = "/boot/k"\nimage = ""\nname = "k"\nat = "unix:s"\n')
    draft.add_file(folder / "a.toml")
    boot = draft.config().boot or {}
    assert [beside(boot[key]) for key in ("kernel", "image", "name")] == ["/boot/k", "", f"{folder}/k"]
    assert (beside(boot["at"], "unix:"), beside(boot["name"], "unix:")) == (f"unix:{folder}/s", "k")
    assert beside("k") == "k"


def test_files_that_are_merged_keep_their_own_folders(folder: Path) -> None:
    """Of several files each names its own neighbours."""
    draft = Draft()
    (folder / "a.toml").write_text('[boot]\nkernel = "k"\n')
    (folder / "sub" / "b.toml").write_text('[boot]\ninitrd = ["i", "j"]\n')
    draft.add_file(folder / "a.toml")
    draft.add_file(folder / "sub" / "b.toml")
    boot = draft.config().boot or {}
    assert beside(boot["kernel"]) == f"{folder}/k"
    assert [beside(one) for one in boot["initrd"]] == [f"{folder}/sub/i", f"{folder}/sub/j"]


def _offers() -> list[Offer]:
    registry = Host().registry
    kinds = (BackendOffer, DeviceOffer, MemoryOffer, SecurityOffer)
    return [one for kind in kinds for one in registry.offers(kind) if one.options is not None]


OTHERWISE = {("gdb", "socket"), ("qmp", "socket"), ("snapshot", "file")}
"""``unix:PATH``, which ``beside()`` knows; the name of a file in the option's directory."""


@pytest.mark.parametrize("offer", _offers(), ids=lambda one: f"{one.kind}-{one.name}")
def test_each_option_that_is_a_path_says_so(offer: Offer) -> None:
    """An option of an installed card that has a path's name has a path's type, so that it is found beside its file."""
    cls: Any = offer.load_options()
    types = typing.get_type_hints(cls, include_extras=True)
    for one in attrs.fields(cls):
        if one.name in PATHS and (offer.name, one.name) not in OTHERWISE:
            kind = types[one.name]
            parts = {kind, *typing.get_args(kind)}
            assert parts & {HostPath, Path} or kind is bool, f"{offer.name}: {one.name}: {kind}"
