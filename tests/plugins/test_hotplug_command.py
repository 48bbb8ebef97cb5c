"""``cardcage device``: the devices of a machine that runs, from another process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cardcage import Machine
from cardcage.errors import HostError, UsageError
from cardcage.host import Host
from cardcage_fleet import command, find
from cardcage_hotplug.command import _table
from cardcage_hotplug.control import add_device, list_device, remove_device
from hotplug_kit import LETS_GO
from installed import PROGRAM, open_files


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "image").write_bytes(LETS_GO)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    return tmp_path


@pytest.fixture
def vm(where: Path) -> Iterator[Machine]:
    boot = {"protocol": "raw", "image": str(where / "image")}
    with Machine(boot=boot, memory="16M", accel="tcg", name="hot") as machine:
        yield machine.start()


def device(where: Path, *words: str) -> tuple[int, str]:
    """Status and output of ``cardcage device``, called in *where*."""
    done = subprocess.run([*PROGRAM, "device", *words], cwd=where, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_disk_is_added_listed_and_removed(where: Path, vm: Machine) -> None:
    """A path is the caller's; the id and the place are printed; the list has it, and no longer once it is removed."""
    assert device(where, "add", "hot", "virtio-blk,drive.file=disk.img,drive.format=raw,id=spare") == (
        0,
        "spare at 02.0\n",
    )
    assert vm.config.devices[-1].options["drive"] == {"file": str(where / "disk.img"), "format": "raw"}
    listed = json.loads(device(where, "list", "hot", "--json")[1])
    assert listed[-1] == {"id": "spare", "type": "virtio-blk", "address": "02.0"}
    assert {"id": "i440fx", "type": "i440fx", "address": "00.0"} in listed
    assert device(where, "remove", "hot", "spare", "--timeout", "50s") == (0, "")
    assert "spare" not in device(where, "list", "hot")[1]


def test_only_paths_are_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is called as an id, a serial number or a format does not make a path of it."""
    for name in ("disk", "raw", "a.img"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with Host() as host:
        made = _table(host, "virtio-blk,drive.file=a.img,id=disk,serial=disk,drive.format=raw")
    assert (made["type"], made["id"], made["serial"]) == ("virtio-blk", "disk", "disk")
    assert str(tmp_path / "a.img") in str(made["drive"])
    assert str(tmp_path / "raw") not in str(made)


@pytest.mark.once
def test_what_is_wrong_is_one_line(where: Path, vm: Machine) -> None:
    """An unknown machine, device, type, key or time: what was expected, and a status that is not 0."""
    for words, said in (
        (("list", "hut"), 'no machine "hut"'),
        (("remove", "hot", "nonesuch"), 'this machine has no device "nonesuch"'),
        (("remove", "hot", "pic"), 'device "pic" cannot be taken out'),
        (("remove", "hot", "pic", "--timeout", "2h"), "at most 3600 seconds"),
        (("add", "hot", "virtio-bulk"), "virtio-bulk"),
        (("add", "hot", "virtio-blk,dive=a"), 'no key "dive"'),
        (("add", "hot", "isa-serial,port=0x2f8,char=null"), "before the machine starts"),
    ):
        status, text = device(where, *words)
        assert (status != 0, text.count("\n"), said in text) == (True, 1, True), text


def test_arguments_of_strangers_are_checked(vm: Machine) -> None:
    """Whoever speaks to the control socket is told what was expected."""
    for call, arguments in (
        (list_device, {"a": 1}),
        (add_device, {"id": "a"}),
        (remove_device, {"id": 3}),
        (remove_device, {"id": "a", "timeout": -1}),
        (remove_device, {"id": "a", "timeout": float("nan")}),
        (remove_device, {"id": "a", "force": True}),
    ):
        with pytest.raises(UsageError, match="device-"):
            call(vm, arguments)


@pytest.mark.once
def test_a_jailed_process_opens_nothing_new(where: Path) -> None:
    """The refusal names what the device needs and the jail; the machine goes on, and a device that needs nothing of the
    host is added all the same; so is a disk whose directory ``security.open_later`` names, and one that the command
    lends it, with what it stands on, which is as good as gone when the command has ended."""
    keys = f'name = "inside"\nmemory = "16M"\naccel = ["tcg"]\n[boot]\nprotocol = "raw"\nimage = "{where / "image"}"\n'
    (where / "later").mkdir()
    (where / "later" / "disk.img").write_bytes(bytes(1 << 20))
    (where / "vm.toml").write_text(f'[machine]\n{keys}[security]\nopen_later = ["later"]\n')
    over = [*PROGRAM, "image", "create", "-f", "qcow2", "-b", "disk.img", "-F", "raw", "over.qcow2"]
    subprocess.run(over, cwd=where, check=True, capture_output=True)
    run = [*PROGRAM, "run", str(where / "vm.toml")]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while process.poll() is None and device(where, "list", "inside")[0]:
                pass
            entry, disk = find("inside"), {"type": "virtio-blk", "drive": str(where / "disk.img")}
            with pytest.raises(HostError, match=f"needs image {where}/disk.img: .* is in its jail"):
                command(entry, "device-add", disk)
            for wanted, what in (
                ("virtio-net,net=user", "program"),
                ("virtio-vsock,cid=3,uds=a", "socket unix:a"),
            ):
                status, text = device(where, "add", "inside", wanted)
                assert (status, f"needs {what}" in text, "is in its jail" in text) == (70, True, True), text
            assert device(where, "add", "inside", "virtio-blk,drive=later/disk.img") == (0, "virtio-blk at 02.0\n")
            assert device(where, "remove", "inside", "virtio-blk") == (0, "")
            assert device(where, "add", "inside", "virtio-blk,drive=over.qcow2") == (0, "virtio-blk at 02.0\n")
            assert {str(where / one) for one in ("over.qcow2", "disk.img")} <= set(open_files(process.pid))
            assert device(where, "remove", "inside", "virtio-blk") == (0, "")
            with pytest.raises(HostError, match="is in its jail"):
                command(entry, "device-add", disk)
            assert device(where, "add", "inside", "virtio-rng") == (0, "virtio-rng at 02.0\n")
            assert device(where, "remove", "inside", "virtio-rng") == (0, "")
        finally:
            process.terminate()
            process.communicate()
