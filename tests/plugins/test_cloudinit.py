"""Seeds of cloud-init: their files, the disk that they are on, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from email import message_from_bytes
from pathlib import Path

import pytest
from cardcage import Machine
from cardcage.abilities import has
from cardcage.device import Forkable
from cardcage.errors import CardError, ConfigError
from cardcage_cli import main
from cardcage_cloudinit.fat import LARGEST, make_fat
from cardcage_cloudinit.programs import FOLDER, boothook
from cardcage_cloudinit.seed import Seed, SeedOptions, files_of
from cardcage_testing import check_block_backend
from hypothesis import given, settings
from hypothesis import strategies as st

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8 me@host"
USER = "#cloud-config\nhostname: x\n"


def read_fat(image: bytes) -> dict[str, bytes]:
    """The files of a FAT12 image by their long names: an independent reading, for hosts without mtools."""
    per, reserved, fats, entries = image[13], 1, image[16], int.from_bytes(image[17:19], "little")
    size = int.from_bytes(image[22:24], "little")
    table = image[512 : 512 + size * 512]
    assert image[512 + size * 512 : 512 + 2 * size * 512] == table
    root = (reserved + fats * size) * 512
    data = root + entries * 32
    found, name = {}, ""
    for at in range(root, data, 32):
        entry = image[at : at + 32]
        if entry[0] == 0:
            break
        if entry[11] == 0x0F:
            name = (entry[1:11] + entry[14:26] + entry[28:32]).decode("utf-16-le").split("\0")[0].rstrip(
                "\uffff"
            ) + name
        elif entry[11] & 8:
            assert entry[:11] == b"CIDATA     "
        else:
            cluster, length = int.from_bytes(entry[26:28], "little"), int.from_bytes(entry[28:32], "little")
            content = b""
            while 2 <= cluster < 0xFF8:
                place = data + (cluster - 2) * per * 512
                content += image[place : place + per * 512]
                pair = int.from_bytes(table[cluster * 3 // 2 : cluster * 3 // 2 + 2], "little")
                cluster = pair >> 4 if cluster & 1 else pair & 0xFFF
            found[name], name = content[:length], ""
    return found


NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=40)


@given(files=st.dictionaries(NAMES, st.binary(max_size=2000), max_size=12))
@settings(max_examples=60)
def test_files_are_found_on_the_disk(files: dict[str, bytes]) -> None:
    """Whatever the files, they are there under their names, and the image is whole sectors."""
    image = make_fat(files, "CIDATA", 1)
    assert read_fat(image) == files
    assert len(image) % 512 == 0


def test_other_programs_read_the_disk(tmp_path: Path) -> None:
    """dosfstools finds no fault in the file system, and mtools its files, of megabytes too."""
    if not (shutil.which("mtype") and shutil.which("fsck.fat", path="/usr/sbin:/sbin:/usr/bin")):
        pytest.skip("needs mtools dosfstools")
    files = {"user-data": b"x" * 5_000_000, "meta-data": b"", "network-config": b"y" * 513, "a" * 26: b"z"}
    image = tmp_path / "seed"
    image.write_bytes(make_fat(files, "CIDATA", 0x12345678))
    program = shutil.which("fsck.fat", path="/usr/sbin:/sbin:/usr/bin")
    done = subprocess.run([str(program), "-n", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for name, data in files.items():
        read = subprocess.run(["mtype", "-i", image, f"::{name}"], capture_output=True, check=True)
        assert read.stdout == data
    label = subprocess.run(["mlabel", "-s", "-i", image], capture_output=True, text=True, check=True)
    assert "CIDATA" in label.stdout


def test_a_disk_has_its_bounds() -> None:
    """More than its most bytes or files is refused."""
    with pytest.raises(ValueError, match="expected at most"):
        make_fat({"a": bytes(LARGEST + 1)}, "CIDATA", 1)
    with pytest.raises(ValueError, match="more than the directory"):
        make_fat({f"{at:099}": b"" for at in range(40)}, "CIDATA", 1)


def test_a_seed_has_user_data_and_keys(tmp_path: Path) -> None:
    """Of a file, a directory or keys alone: user-data and meta-data are there; other contents are another instance."""
    (tmp_path / "u").write_text(USER)
    (tmp_path / "k").write_text(f'# mine\n{KEY}\nrestrict,command="a b" {KEY}\n')
    found = files_of(SeedOptions(source=str(tmp_path / "u")), "vm")
    meta = json.loads(found["meta-data"])
    assert found["user-data"] == USER.encode()
    assert meta["local-hostname"] == "vm"
    alone = files_of(SeedOptions(key_files={str(tmp_path / "k"): True}), "vm")
    table = json.loads(alone["meta-data"])
    assert alone["user-data"].startswith(b"#cloud-config\n")
    assert [key.endswith(KEY) for key in table["public-keys"]] == [True, True]
    assert table["instance-id"] != meta["instance-id"]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "user-data").write_text("#!/bin/sh\n")
    (tmp_path / "d" / "meta-data").write_text("instance-id: one\n")
    (tmp_path / "d" / "network-config").write_text("version: 2\n")
    both = files_of(SeedOptions(source=str(tmp_path / "d"), ssh_keys=(str(tmp_path / "k"),)), "vm")
    assert set(both) == {"user-data", "meta-data", "network-config"}
    assert both["meta-data"].startswith(b"instance-id: one\npublic-keys: [")


def test_vendor_data_come_beside_those_of_the_source(tmp_path: Path) -> None:
    """Both are parts of one message, which make no other instance; what is a message already is refused."""
    source = tmp_path / "d"
    source.mkdir()
    (source / "user-data").write_text(USER)
    given = SeedOptions(source=str(source), vendor_data="#cloud-boothook\nours \u00e4\n")
    assert files_of(given, "vm")["vendor-data"].decode() == given.vendor_data
    (source / "vendor-data").write_text("#cloud-config\n{}\n")
    found = files_of(given, "vm")
    parts = message_from_bytes(found["vendor-data"]).get_payload()
    texts = [bytes(part.get_payload(decode=True)).decode() for part in parts]
    assert texts == ["#cloud-config\n{}\n", given.vendor_data]
    assert found["meta-data"] == files_of(SeedOptions(source=str(source)), "vm")["meta-data"]
    for data in (b"MIME-Version: 1.0\n", b"\x1f\x8b\x08\xff"):
        (source / "vendor-data").write_bytes(data)
        with pytest.raises(ConfigError, match="its vendor-data is no plain text"):
            files_of(given, "vm")


def test_user_data_are_a_source_or_text(tmp_path: Path) -> None:
    """Text is taken as it is; both at once, and text that cloud-init would pass over, are refused."""
    assert files_of(SeedOptions(user_data=USER), "vm")["user-data"] == USER.encode()
    (tmp_path / "u").write_text(USER)
    with pytest.raises(ConfigError, match="expected either a source or user_data"):
        files_of(SeedOptions(source=str(tmp_path / "u"), user_data=USER), "vm")
    with pytest.raises(ConfigError, match="no user data of cloud-init") as caught:
        files_of(SeedOptions(user_data="hostname: x\n"), "vm")
    assert caught.value.key == "user_data"


@pytest.mark.once
@pytest.mark.timeout(60)
def test_the_script_in_the_seed_starts_the_programs(tmp_path: Path) -> None:
    """Each program is there as it was given and runs, at the next boot with another in its place too."""
    fifo = tmp_path / "said"
    os.mkfifo(fifo)
    for word in ("one", "other"):
        script = boothook({"prog": f"#!/bin/sh\necho {word} > {fifo}\n".encode(), "empty": b"#!/bin/sh\n" * 200})
        assert script.startswith("#cloud-boothook\n#!/bin/sh\n")
        script = script.replace(FOLDER, str(tmp_path / "bin")).replace("/run/systemd/system", str(tmp_path / "none"))
        subprocess.run(["/bin/sh", "-c", script], check=True)
        assert fifo.read_text() == f"{word}\n"
        assert sorted(os.listdir(tmp_path / "bin")) == ["cardcage-empty", "cardcage-prog"]
    with pytest.raises(CardError, match="expected at most"):
        boothook({"large": bytes(1 << 20)})


def test_programs_come_with_their_devices(tmp_path: Path) -> None:
    """``programs`` in the configuration adds the agent's port once; another value than true or false is refused."""
    (tmp_path / "off").write_bytes(bytes.fromhex("ba0406b80020eff4"))
    boot = {"protocol": "raw", "image": str(tmp_path / "off")}
    fragments = [{"policy": {"cloud_init": {"programs": True}}}]
    with Machine(boot=boot, memory="1M", accel="tcg", fragments=fragments) as vm:
        assert {"agent", "cloud-init"} <= set(vm.devices)
    port = {"type": "virtio-console", "id": "agent", "char": "null", "ports": [{"name": "x", "char": "null"}]}
    with Machine(boot=boot, memory="1M", accel="tcg", devices=[port], fragments=fragments) as vm:
        assert "agent" not in vm.services
    with pytest.raises(ConfigError, match=r"policy\.cloud_init\.programs: expected true or false"):
        Machine(boot=boot, memory="1M", accel="tcg", fragments=[{"policy": {"cloud_init": {"programs": 1}}}])


def test_a_machine_that_goes_on_has_its_seed(tmp_path: Path) -> None:
    """From a snapshot it has the seed and the devices that it was made with, and no second ones."""
    (tmp_path / "off").write_bytes(bytes.fromhex("f4ebfd"))
    boot = {"protocol": "raw", "image": str(tmp_path / "off")}
    fragments = [{"policy": {"cloud_init": {"programs": True, "user_data": USER}}}]
    with Machine(boot=boot, memory="1M", accel="tcg", fragments=fragments) as vm:
        before = set(vm.devices)
        vm.start()
        vm.pause()
        vm.snapshot(tmp_path / "snapshot")
    with Machine.restore(tmp_path / "snapshot", start=False) as vm:
        assert set(vm.devices) == before


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("user", "hostname: x\n", "no user data of cloud-init"),
        ("key", "-----BEGIN OPENSSH PRIVATE KEY-----\n", "a private key: expected the public one"),
        ("key", "hello\n", "key 1 is no public key of SSH"),
        ("key", "# none\n", "no key in it"),
    ],
)
def test_what_is_no_seed_is_refused(name: str, text: str, why: str, tmp_path: Path) -> None:
    """User data that cloud-init would pass over, a private key, or a file without keys is an error that names it."""
    (tmp_path / "x").write_text(text)
    path = str(tmp_path / "x")
    options = SeedOptions(source=path) if name == "user" else SeedOptions(ssh_keys=(path,))
    with pytest.raises(ConfigError, match=why) as caught:
        files_of(options, "vm")
    assert caught.value.file == path


def test_flags_add_one_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--cloud-init`` and ``--ssh-key`` together make one disk; what is wrong with one is the command's error."""
    (tmp_path / "u").write_text(USER)
    (tmp_path / "k").write_text(KEY)
    (tmp_path / "off").write_bytes(bytes.fromhex("ba0406b80020eff4"))
    words = ["run", "--accel", "tcg", "--set", "boot.protocol=raw", "--set", f"boot.image={tmp_path / 'off'}"]
    (tmp_path / "vm.toml").write_text("")
    words = [*words, str(tmp_path / "vm.toml"), "--cloud-init", str(tmp_path / "u"), "--ssh-key", str(tmp_path / "k")]
    assert main(words) == 0, capsys.readouterr().err
    assert main([*words, "--ssh-key", str(tmp_path / "none")]) == 2
    assert "none: public key cannot be read: No such file" in capsys.readouterr().err


def test_the_disk_is_only_read_and_a_copy_of_its_machine_has_it_too() -> None:
    """It keeps the contract of block back ends, refuses each change, and can be forked."""
    image = make_fat({"user-data": b"#cloud-config\n"}, "CIDATA", 1)
    check_block_backend(lambda: Seed(image))
    seed = Seed(image)
    for change in (
        lambda: seed.writev(0, [memoryview(bytes(512))]),
        lambda: seed.discard(0, 512),
        lambda: seed.write_zeroes(0, 512, unmap=True),
    ):
        with pytest.raises(OSError, match="the seed of cloud-init is only read"):
            change()
    assert has(seed, Forkable)
    assert seed.may_fork() == ""
