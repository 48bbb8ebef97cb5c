"""The initramfs writer and builder: archives that other tools read, and modules in the order they need each other."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from cardcage.errors import CardcageError, ConfigError, HostError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.registry import Registry
from cardcage_boot import GuestProgramOffer, cpio
from cardcage_boot.fetch import is_static_busybox
from cardcage_boot.files import BootFile, open_file
from cardcage_boot.initramfs import build, driver_script, programs_of
from cardcage_boot.modules import Module, collect, decompress
from hypothesis import given
from hypothesis import strategies as st

names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
        lambda part: part not in (".", "..")
    ),
    min_size=1,
    max_size=3,
).map("/".join)
entries = st.lists(
    st.builds(
        cpio.Entry,
        names,
        st.integers(0, 0o37777),
        st.binary(max_size=50),
        st.tuples(st.integers(0, 4095), st.integers(0, 1 << 20)),
        st.integers(0, 70000),
        st.integers(0, 70000),
        st.integers(0, 0xFFFFFFFF),
    ),
    max_size=6,
)


@given(entries)
def test_archive_comes_back_as_it_went_in(given_entries: list[cpio.Entry]) -> None:
    """What pack writes, parse reads: the same entries in the same order, besides the parent folders that pack adds."""
    found = cpio.parse(cpio.pack(given_entries))
    assert [one for one in found if one in given_entries] == given_entries
    made: set[str] = set()
    for one in found:
        parent = one.name.rpartition("/")[0]
        assert not parent or parent in made
        made.add(one.name)


@given(st.binary(max_size=300), st.integers(0, 600), st.binary(max_size=4))
def test_damaged_archive_only_raises_config_error(noise: bytes, cut: int, patch: bytes) -> None:
    """No bytes make the parser raise anything but ConfigError."""
    good = cpio.pack([cpio.file("a/b", noise), cpio.symlink("l", "a")])
    damaged = bytearray(good[:cut])
    damaged[cut // 2 : cut // 2 + len(patch)] = patch
    for data in (noise, bytes(damaged), good + noise):
        try:
            cpio.parse(data)
        except ConfigError as error:
            assert error.file == "initramfs"  # noqa: PT017  every failure names the file


@pytest.mark.parametrize("name", ["", "/etc/x", "a//b", "../x", "a/../b", "a/", "a\0b"])
def test_names_that_an_archive_cannot_hold(name: str) -> None:
    """Absolute, empty and upward paths are refused."""
    with pytest.raises(ConfigError, match="clean relative path"):
        cpio.pack([cpio.file(name, b"")])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_cpio_lists_and_unpacks_the_archive(tmp_path: Path) -> None:
    """GNU cpio reads the archive: the same names, contents, modes and links."""
    archive = cpio.pack(
        [cpio.file("bin/tool", b"text", 0o755), cpio.symlink("bin/sh", "tool"), cpio.directory("tmp", 0o1777)]
    )
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True).stdout
    assert listed.split() == [b"bin", b"bin/tool", b"bin/sh", b"tmp"]
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "bin/sh").read_bytes() == b"text"
    assert (tmp_path / "bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_same_input_gives_the_same_archive() -> None:
    """Nothing of the host or the time gets into an archive."""
    assert cpio.pack([cpio.file("a", b"x")]) == cpio.pack([cpio.file("a", b"x")])


def kernel_module(*pairs: str) -> bytes:
    """A relocatable ELF64 object with a .modinfo section."""
    info, texts = b"".join(pair.encode() + b"\0" for pair in pairs), b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(texts)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, 64, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(texts), 0, 0, 1, 0)
    return head + info + texts + sections


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Modules of a kernel: virtio_blk needs virtio, which needs virtio_ring; one is xz, one gzip."""
    root = tmp_path / "6.1.0"
    (root / "kernel/drivers").mkdir(parents=True)
    folder = root / "kernel/drivers"
    (folder / "virtio-ring.ko").write_bytes(kernel_module("depends="))
    (folder / "virtio.ko.xz").write_bytes(lzma.compress(kernel_module("depends=virtio-ring")))
    (folder / "virtio_blk.ko.gz").write_bytes(
        gzip.compress(kernel_module("alias=virtio:d00000002v*", "depends=virtio,virtio_ring", "softdep=pre: crc_x"))
    )
    (folder / "crc_x.ko").write_bytes(kernel_module("depends="))
    (folder / "other.ko").write_bytes(b"never read")
    return root


def test_modules_come_after_what_they_need(tree: Path) -> None:
    """Wanted modules are found in any compression, each after its hard and soft dependencies; no other is read."""
    found = collect(tree, ("virtio_blk", "not_in_this_kernel"))
    order = [one.name for one in found]
    assert sorted(order) == ["crc_x", "virtio", "virtio_blk", "virtio_ring"]
    assert order.index("virtio_ring") < order.index("virtio") < order.index("virtio_blk")
    assert order.index("crc_x") < order.index("virtio_blk")
    assert all(one.data.startswith(b"\x7fELF") for one in found)


def test_driver_script_inserts_in_order(tree: Path) -> None:
    """The generated shell function inserts a device's modules in order, and only for a matching id."""
    script = driver_script(collect(tree, ("virtio_blk",)))
    text = f"insert() {{ echo $*; }}\n{script}\ndriver virtio:d00000002v00001AF4\ndriver virtio:d00000001v00001AF4\n"
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["virtio_ring virtio crc_x virtio_blk"]


def test_driver_script_keeps_odd_aliases_out() -> None:
    """An alias with characters that mean something to a shell never reaches the script."""
    module = Module("m", b"", (), ("pci:$(reboot)", "pci:v1;x", "of:N*T*Ca,bC*"))
    assert "reboot" not in driver_script([module])
    assert "of:N*T*Ca,bC*) insert m" in driver_script([module])


def test_damaged_modules_are_one_clear_error(tree: Path) -> None:
    """A module that is no ELF file, is damaged, or needs itself is named."""
    with pytest.raises(ConfigError, match=r"other\.ko: "):
        collect(tree, ("other",))
    (tree / "bad.ko.xz").write_bytes(b"\xfd7zXZ\0junk")
    with pytest.raises(ConfigError, match=r"bad\.ko\.xz: damaged compressed kernel module"):
        collect(tree, ("bad",))
    (tree / "loop.ko").write_bytes(kernel_module("depends=loop"))
    with pytest.raises(ConfigError, match="needs itself"):
        collect(tree, ("loop",))


@given(st.binary(max_size=200), st.sampled_from([".ko.xz", ".ko.gz"]))
def test_any_compressed_bytes_are_an_error_or_data(data: bytes, ending: str) -> None:
    """Decompression of damaged data raises nothing but the project's errors."""
    try:
        decompress(BootFile(f"m{ending}", data, "kernel module"))
    except CardcageError:
        return


def zstd_frame(data: bytes) -> bytes:
    """A Zstandard frame of one raw block (RFC 8878, 3.1.1)."""
    head = bytes.fromhex("28b52ffd") + b"\xa0" + len(data).to_bytes(4, "little")
    return head + (len(data) << 3 | 1).to_bytes(3, "little") + data


@pytest.mark.parametrize("tool", ["zstd", "dpkg-deb"])
def test_zstd_modules_are_read_by_either_program(tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .ko.zst is decompressed by zstd, else by dpkg-deb; damage is named, and a host with neither gets a hint."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"needs the program {tool}")
    monkeypatch.setattr(shutil, "which", lambda name: found if name == tool else None)
    path = tmp_path / "a.ko.zst"
    path.write_bytes(zstd_frame(b"module" * 100))
    assert decompress(open_file(str(path), "kernel module")).data == b"module" * 100
    path.write_bytes(zstd_frame(b"module")[:-3])
    with pytest.raises(ConfigError, match=r"a\.ko\.zst: damaged"):
        decompress(open_file(str(path), "kernel module"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HostError, match="install the program zstd"):
        decompress(open_file(str(path), "kernel module"))


def busybox() -> Path | None:
    found = shutil.which("busybox")
    return Path(found) if found is not None and is_static_busybox(Path(found)) else None


@pytest.mark.skipif(busybox() is None, reason="needs a static busybox on this host")
def test_built_initramfs_holds_what_init_uses(tree: Path) -> None:
    """The image has init, busybox with its names, the drivers with their list, and is the same each time."""
    program = busybox()
    assert program is not None
    image = build(program, tree, "6.1.0")
    assert image == build(program, tree, "6.1.0")
    found = {one.name: one for one in cpio.parse(image)}
    assert found["init"].mode & 0o111
    assert found["bin/busybox"].data == program.read_bytes()
    assert found["bin/sh"].data == b"busybox"
    assert found["dev/console"].device == (5, 1)
    assert found["lib/modules/6.1.0/virtio_blk.ko"].data.startswith(b"\x7fELF")
    assert b"virtio_blk.ko: crc_x.ko virtio.ko virtio_ring.ko" in found["lib/modules/6.1.0/modules.dep"].data
    applets = {name.rpartition("/")[2] for name in found}
    script = found["init"].data.decode()
    used = {
        "mount",
        "mkdir",
        "ln",
        "hostname",
        "ip",
        "insmod",
        "dmesg",
        "stty",
        "setsid",
        "cttyhack",
        "poweroff",
        "sync",
    }
    assert used <= applets
    assert all(word in script for word in used)


def test_what_is_no_static_busybox(tmp_path: Path) -> None:
    """A script, a missing file and a dynamically linked program are told apart from a static one."""
    script = tmp_path / "busybox"
    script.write_text("#!/bin/sh\n")
    assert not is_static_busybox(script)
    assert not is_static_busybox(tmp_path / "nothing")
    assert not is_static_busybox(Path("/bin/sh").resolve()) or busybox() == Path("/bin/sh").resolve()


def test_programs_of_cards_are_put_in(tmp_path: Path) -> None:
    """What cards offer for the guest is an executable below /cardcage/programs, which init starts; nothing else is."""
    busybox = shutil.which("busybox")
    if busybox is None or not is_static_busybox(Path(busybox)):
        pytest.skip("needs busybox-static")
    programs = programs_of(Host([OffersPrograms()], installed=False).registry)
    made = cpio.parse(build(Path(busybox), None, "6.1", programs=programs))
    found = {one.name: one for one in made if one.name.startswith("cardcage/programs/")}
    assert {name: (one.data, one.mode & 0o777) for name, one in found.items()} == {
        "cardcage/programs/greeter": (b"\x7fELF", 0o755)
    }
    assert not [one for one in cpio.parse(build(Path(busybox), None, "6.1")) if "programs" in one.name]


class OffersPrograms:
    """A card with a program for guests."""

    __name__ = "greeter"

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.add(GuestProgramOffer("greeter", lambda: b"\x7fELF"))
