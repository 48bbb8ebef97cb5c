"""Disks whose image stays as it is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from cardcage.errors import ConfigError
from cardcage_block.drive import Drive
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_block.temporary import open_temporary
from cardcage_qemu import translate
from cardcage_testing import TestSlot, check_block_backend

MIB = 1 << 20


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_the_image_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """It keeps to the contract of block back ends; the image is the same afterwards, and no file is left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = tmp_path / "disk"
    if form == "raw":
        path.write_bytes(os.urandom(MIB))
    else:
        create_qcow2(str(path), MIB, Qcow2Shape())
    before = path.read_bytes()
    path.chmod(0o400)
    slot = TestSlot()
    check_block_backend(lambda: open_temporary(slot, Drive(str(path), format=form)))  # type: ignore[arg-type]  # a test's slot
    made = open_temporary(slot, Drive(str(path), format=form))  # type: ignore[arg-type]  # likewise
    assert list(scratch.iterdir()) == []
    assert made.info.size == MIB
    made.writev(0, [memoryview(b"w" * 512)])
    made.close()
    assert path.read_bytes() == before
    slot.close()


def test_no_room_for_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder for temporary files there is one error, that names the image."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    (tmp_path / "disk").write_bytes(bytes(MIB))
    slot = TestSlot()
    with pytest.raises(ConfigError, match="disk: no temporary file can be made"):
        open_temporary(slot, Drive(str(tmp_path / "disk"), format="raw"))
    slot.close()


def test_words_of_qemu() -> None:
    """-snapshot makes all disks so, ``snapshot=on`` one; what is only read, and the drives of discs, are left alone."""
    words = "-kernel k -drive file=a,if=virtio{} -drive file=b,if=virtio,readonly=on -drive file=d,if=virtio -cdrom c"
    found = [one["drive"] for one in translate(words.format(",snapshot=on").split()).config()["device"]]
    assert [one.get("type") for one in found] == ["temporary", None, None, None]
    found = [one["drive"] for one in translate(["-snapshot", *words.format("").split()]).config()["device"]]
    assert [one.get("type") for one in found] == ["temporary", None, "temporary", None]
    (disk,) = translate("-kernel k -hda disk.img".split()).config()["device"]
    assert (disk["type"], disk["drive"]["file"]) == ("virtio-blk", "disk.img")
