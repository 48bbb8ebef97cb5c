"""Images as the root of a guest: tar archives and OCI image layouts, damaged and hostile ones too."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError
from cardcage_boot import cpio, roots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

File = tuple[str, dict[str, Any]]


def archive(*files: File, mode: Any = "w") -> bytes:
    """A tar archive of these names, each with its attributes; ``data`` is what is in it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for name, keys in files:
            data = keys.pop("data", b"")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in keys.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def layout(folder: Path, *layers: bytes, platform: Any = None, **more: Any) -> Path:
    """An image layout of these layers."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, **keys: Any) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", **keys}

    manifest = blob(json.dumps({"layers": [blob(one, **more) for one in layers]}).encode(), platform=platform)
    (folder / "oci-layout").write_text("{}")
    (folder / "index.json").write_text(json.dumps({"manifests": [manifest]}))
    return folder


def found(path: Path) -> dict[str, cpio.Entry]:
    """What comes into the initramfs, by its name in the image."""
    return {one.name.removeprefix("image/"): one for one in cpio.parse(roots.image(path))}


def test_a_tar_archive_is_a_root(tmp_path: Path) -> None:
    """Files, links and devices keep their modes, owners and times."""
    path = tmp_path / "root.tar.xz"
    path.write_bytes(
        archive(
            ("./etc/name", {"data": b"alpha", "mode": 0o4750, "uid": 7, "gid": 8, "mtime": 9}),
            ("/lib", {"type": tarfile.SYMTYPE, "linkname": "usr/lib"}),
            ("same", {"type": tarfile.LNKTYPE, "linkname": "etc/name"}),
            ("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3, "mode": 0o666}),
            mode="w:xz",
        )
    )
    assert roots.is_image(path)
    files = found(path)
    assert (files["etc/name"].data, files["etc/name"].mode, files["etc/name"].uid) == (b"alpha", 0o104750, 7)
    assert files["lib"].data == b"usr/lib"
    assert files["same"].data == b"alpha"
    assert (files["null"].mode, files["null"].device) == (0o020666, (1, 3))


def test_layers_lie_upon_one_another(tmp_path: Path) -> None:
    """Whiteouts remove what is below, opaque directories all of it, and a file replaces what was there."""
    first = archive(
        ("gone", {"data": b"1"}),
        ("tree/a", {"data": b"1"}),
        ("tree/b", {"data": b"1"}),
        ("whole/a", {"data": b"1"}),
        ("was/a/directory", {"data": b"1"}),
        mode="w:gz",
    )
    second = archive(
        (".wh.gone", {}),
        ("tree/c", {"data": b"2"}),
        ("tree/.wh..wh..opq", {}),
        (".wh.whole", {}),
        ("was", {"data": b"2"}),
    )
    path = layout(tmp_path, first, second, platform={"os": "linux", "architecture": "amd64"})
    assert roots.is_image(path)
    files = {name: one.data for name, one in found(path).items() if one.data}
    assert files == {"tree/c": b"2", "was": b"2"}


def test_what_is_no_image_is_refused_in_words(tmp_path: Path) -> None:
    """Each error names the file; nothing is read that its digest does not vouch for."""
    (tmp_path / "text").write_text("no archive")
    (tmp_path / "out.tar").write_bytes(archive(("../out", {"data": b"x"})))
    (tmp_path / "link.tar").write_bytes(archive(("a", {"type": tarfile.LNKTYPE, "linkname": "b"})))
    for name, words in {
        "text": "not a tar archive",
        "out.tar": "expected a path inside the image",
        "link.tar": "a link to b, which is not there",
    }.items():
        with pytest.raises(ConfigError, match=words) as error:
            roots.image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(ConfigError, match="expected a directory, a tar archive or an OCI image layout"):
        roots.is_image(tmp_path / "none")
    other = layout(tmp_path / "arm", b"", platform={"os": "linux", "architecture": "arm64"})
    with pytest.raises(ConfigError, match="no image for linux/amd64"):
        roots.image(other)
    packed = layout(tmp_path / "zstd", b"x", mediaType="application/vnd.oci.image.layer.v1.tar+zstd")
    with pytest.raises(ConfigError, match="compressed with zstd"):
        roots.image(packed)
    damaged = layout(tmp_path / "damaged", archive(("a", {"data": b"x"})))
    for blob in (damaged / "blobs" / "sha256").iterdir():
        if b'"layers"' not in blob.read_bytes():
            blob.write_bytes(b"other")
    with pytest.raises(ConfigError, match="its digest is not that of its name"):
        roots.image(damaged)
    (damaged / "index.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not the JSON of an OCI image layout"):
        roots.image(damaged)
    (damaged / "index.json").write_text(json.dumps({"manifests": [{"digest": "sha256:../../../etc/passwd"}]}))
    with pytest.raises(ConfigError, match="expected sha256"):
        roots.image(damaged)


def test_a_lower_layer_is_removed_however_it_was_made(tmp_path: Path) -> None:
    """A whiteout removes directories that no entry made; in the layer of their own, files are left alone by one."""
    first = archive(("a/b/c/d", {"data": b"1"}), ("a/b/e", {"data": b"1"}), ("k", {"data": b"1"}))
    second = archive(("a/b/n", {"data": b"2"}), ("a/.wh.b", {}), (".wh.nothing", {}))
    third = archive(("a/b/c/d", {"data": b"3"}))
    files = {name: one.data for name, one in found(layout(tmp_path, first, second, third)).items() if one.data}
    assert files == {"a/b/n": b"2", "a/b/c/d": b"3", "k": b"1"}


def test_numbers_that_no_file_has_are_refused(tmp_path: Path) -> None:
    """A negative size, a device number of more than 32 bits and a path longer than Linux takes are errors."""
    device = {"type": tarfile.CHRTYPE, "devmajor": -1, "devminor": 3}
    with tarfile.open(tmp_path / "device.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("null")
        for key, value in device.items():
            setattr(member, key, value)
        tar.addfile(member)
    member = tarfile.TarInfo("a")
    member.size = -512
    (tmp_path / "size.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    (tmp_path / "long.tar").write_bytes(archive(("a/" * 3000, {"data": b"x"})))
    for name, words in {
        "device": "null: a device -1:3",
        "size": "a: a size of -512 bytes",
        "long": "a file called",
    }.items():
        with pytest.raises(ConfigError, match=words):
            roots.image(tmp_path / f"{name}.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_headers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """However an archive is compressed, its files come whole, and its headers are not kept whatever their size."""
    data = bytes(range(256)) * 9000
    path = tmp_path / "a.tar"
    path.write_bytes(archive(("a", {"data": data}), ("b" * 300, {"data": b"x", "uid": 5}), mode=mode))
    files = found(path)
    assert files["a"].data == data
    assert files["b" * 300].uid == 5
    path.write_bytes(archive(("a", {"pax_headers": {"comment": "x" * (2 << 20)}}), mode=mode))
    with pytest.raises(ConfigError, match="headers of more than 1048576 bytes"):
        roots.image(path)
    path.write_bytes(archive(*((".wh.a", {}) for _ in range(20)), mode=mode))
    monkeypatch.setattr(roots, "ENTRIES", 19)
    with pytest.raises(ConfigError, match="more than 19 files"):  # those that remove count, too
        roots.image(path)


def test_more_than_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of an image, and their number, are bounded, whatever it unpacks to."""
    path = tmp_path / "big.tar.gz"
    path.write_bytes(archive(("a", {"data": bytes(1 << 20)}), ("b", {"data": b"x"}), mode="w:gz"))
    monkeypatch.setattr(roots, "MOST", 1 << 20)
    with pytest.raises(ConfigError, match="GiB of files"):
        roots.image(path)
    links = [(name, {"type": tarfile.LNKTYPE, "linkname": "a"}) for name in "bcd"]
    (tmp_path / "links.tar").write_bytes(archive(("a", {"data": bytes(1 << 19)}), *links))
    with pytest.raises(ConfigError, match="GiB of files"):  # each link is a copy in the guest's memory
        roots.image(tmp_path / "links.tar")
    monkeypatch.setattr(roots, "MOST", 1 << 21)
    monkeypatch.setattr(roots, "ENTRIES", 1)
    with pytest.raises(ConfigError, match="more than 1 files"):
        roots.image(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), data=st.binary(max_size=600), cut=st.integers(0, 12000))
def test_a_damaged_archive_is_a_configuration_error(tmp_path: Path, at: int, data: bytes, cut: int) -> None:
    """Whatever is overwritten or cut off, it is read or refused."""
    whole = archive(
        ("a/b", {"data": b"x" * 700}), ("l", {"type": tarfile.SYMTYPE, "linkname": "a"}), ("\u00e9" * 90, {})
    )
    path = tmp_path / "damaged.tar"
    path.write_bytes((whole[:at] + data + whole[at + len(data) :])[:cut])
    with suppress(ConfigError):
        roots.image(path)
