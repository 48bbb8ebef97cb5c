"""Backing files: which of what an image names is opened, how it is asked about, and that names are read as QEMU's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cardcage import Machine
from cardcage.errors import ConfigError
from cardcage.host import Host
from cardcage_block.chain import Fence, find_below
from cardcage_block.drive import Drive, open_image, parse_drive_flag
from cardcage_block.make import Qcow2Shape, create_qcow2, create_raw, resize
from test_block_tool import image as tool

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20
QEMU = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

OPENED: list[str] = []


def _watch(event: str, values: tuple[Any, ...]) -> None:
    if event == "open":
        OPENED.append(os.fsdecode(values[0]) if isinstance(values[0], str | bytes) else str(values[0]))


sys.addaudithook(_watch)  # which cannot be taken back, and costs next to nothing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image ``a.qcow2`` to be made, beside a secret, and the secret's links in it."""
    (tmp_path / "secret").write_bytes(b"secret".ljust(SIZE, b"!"))
    inside = tmp_path / "images"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub" / "file").write_bytes(b"secret".ljust(SIZE, b"!"))
    (inside / ".netrc").write_bytes(b"secret".ljust(SIZE, b"!"))
    (inside / "link").symlink_to("../secret")
    (inside / "folder").symlink_to("..")
    (inside / "base").write_bytes(b"base".ljust(SIZE, b"."))
    (inside / "alias").symlink_to("base")
    return inside


def hostile(folder: Path, name: str, form: str | None = "raw") -> str:
    path = str(folder / "a.qcow2")
    create_qcow2(path, SIZE, Qcow2Shape(backing_file=name, backing_format=form), force=True)
    return path


NAMES = [
    "/etc/passwd",
    "../secret",
    "sub/../../secret",
    "sub/file",
    "link",
    "folder/secret",
    ".netrc",
    "./.netrc",
    "/dev/fd/0",
    "/dev/stdin",
    "/dev/zero",
    "/proc/self/environ",
    "/proc/self/cwd/secret",
    "/proc/1/root/etc/passwd",
    "file:/etc/passwd",
    "file:///etc/passwd",
    "nbd:unix:/run/x.sock",
    "nbd://localhost/x",
    "fat:/etc",
    "host_device:/dev/vda",
    "ssh://host/x",
    ":x",
    "a:b",
    'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    'json:{"driver":"raw","file.driver":"file","file.filename":"/etc/passwd"}',
    'json:{"driver":"raw","file":{"driver":"nbd","host":"x","port":"1"}}',
    'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"base"}}',
    'json:{"driver":"raw","file":"node"}',
    "json:[]",
    "json:{",
    "json:" + "[" * 900,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use", ["drive", "convert", "info", "create"])
def test_a_hostile_image_shows_no_file_of_the_host(
    folder: Path, name: str, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever an image calls its backing file, nothing outside its own folder is opened, and one line says so."""
    path = hostile(folder, name)
    OPENED.clear()
    if use == "info":
        assert tool("info", "--json", "--backing-chain", path) == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert told["backing-file"] == name
        assert told["backing-refused"]
    else:
        act = {
            "drive": lambda: open_image(Drive(path), warn=print),
            "convert": lambda: tool("convert", path, folder / "copy"),
            "create": lambda: tool("create", folder / "over.qcow2", "-b", path, "-F", "qcow2"),
        }[use]
        with pytest.raises(ConfigError) as caught:
            act()
        assert str(caught.value).startswith(path)
        assert "\n" not in str(caught.value)
    ours = ("copy", "over.qcow2", "a.qcow2")
    assert [one for one in OPENED if not one.endswith((*ours, ".py", ".pyc"))] == []


def test_hostile_names_are_shown_as_escapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line ends and terminal control in what a header says reach neither an error nor the output of info."""
    path = hostile(folder, "../x\n\x1b[2J\udcff", "qc\n\x1b")
    with pytest.raises(ConfigError) as caught:
        open_image(Drive(path), warn=print)
    tool("info", path)
    out = capsys.readouterr().out
    for text in (str(caught.value), out.replace("\n", "")):
        assert "\n" not in text
        assert "\x1b" not in text
    assert r"../x\n\x1b[2J\xff" in out


def read(path: str, **options: Any) -> bytes:
    opened = open_image(Drive(path, readonly=True, **options), warn=lambda _: None)
    data = bytearray(6)
    opened.readv(0, [memoryview(data)])
    opened.close()
    return bytes(data)


def test_what_backing_allows(folder: Path) -> None:
    """`backing` allows a file, a folder with all below it, several, anything or nothing; the own folder is allowed."""
    secret, inside = str(folder.parent / "secret"), str(folder / "sub")
    assert read(hostile(folder, "base")) == b"base.."
    assert read(hostile(folder, "alias")) == b"base.."
    assert read(hostile(folder, "folder/images/base")) == b"base.."
    for name, backing in (
        ("../secret", secret),
        ("link", secret),
        ("../secret", str(folder.parent)),
        ("sub/file", inside),
        ("sub/file", ("/etc", inside)),
        (".netrc", str(folder / ".netrc")),
        ("../secret", "any"),
        (f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}', secret),
    ):
        assert read(hostile(folder, name), backing=backing) == b"secret"
    for name, backing in (("base", "none"), ("../secret", inside), ("../secret", secret[:-1] + "x/..")):
        with pytest.raises(ConfigError):
            read(hostile(folder, name), backing=backing)
    with pytest.raises(ConfigError, match='backing = "gone"'):
        read(hostile(folder, "base"), backing="gone")
    with pytest.raises(ConfigError):  # a folder of the same beginning is another one
        Fence(str(folder / "a.qcow2"), inside[:-1]).admit("a", str(folder / "sub" / "file"))


def test_the_fence_is_the_top_images(folder: Path) -> None:
    """An allowed backing file's own backing file has to lie where the image's user allows, and not beside that file."""
    create_qcow2(
        str(folder / "sub" / "mid.qcow2"), SIZE, Qcow2Shape(backing_file="file", backing_format="raw"), force=True
    )
    path = hostile(folder, "sub/mid.qcow2", "qcow2")
    with pytest.raises(ConfigError, match=r"a\.qcow2: its backing file: .*mid\.qcow2: its backing file .*sub/file"):
        read(path, backing=str(folder / "sub" / "mid.qcow2"))
    assert read(path, backing=str(folder / "sub")) == b"secret"


def test_an_image_behind_a_link(folder: Path) -> None:
    """Behind a link, the folder of the link and that of the file are the image's own; a device's folder is not."""
    path = hostile(folder, "base")
    (folder / "sub" / "base").symlink_to("../base")
    (folder / "sub" / "b.qcow2").symlink_to("../a.qcow2")
    assert read(str(folder / "sub" / "b.qcow2")) == b"base.."
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ConfigError):  # /dev/fd/base is nowhere
            read(f"/dev/fd/{fd}")
    finally:
        os.close(fd)
    loops = [f"/dev/{name}" for name in os.listdir("/dev") if name.startswith(("loop", "vd", "sd"))]
    if not loops:
        pytest.skip("needs a block device")
    with pytest.raises(ConfigError):
        Fence(loops[0]).admit(loops[0], loops[0])


def test_security_is_asked_about_what_it_is(folder: Path) -> None:
    """Security is asked about a backing file's real path, for reading, and told which image names it."""
    asked: list[Any] = []
    path = hostile(folder, "alias")
    opened = open_image(
        Drive(path), warn=lambda _: None, allow=lambda name, acts, **facts: asked.append((name, acts, facts))
    )
    opened.close()
    assert asked == [
        (path, ("open", "read", "write"), {}),
        (str(folder / "base"), ("open", "read"), {"backing": path}),
    ]
    asked.clear()
    resize(
        Drive(path), 2 * SIZE, warn=lambda _: None, allow=lambda name, acts, **facts: asked.append((name, acts, facts))
    )
    assert {name for name, _, _ in asked} == {path, str(folder / "base")}


@pytest.mark.parametrize("security", [None, "default"])
def test_a_machine_with_a_hostile_image(folder: Path, security: str | None, tmp_path: Path) -> None:
    """A machine is refused a hostile image, with the default policy and without, and TOML says what is allowed."""
    path = hostile(folder, "../secret")
    place = [
        {"security": {"checkers": [{"type": "selinux", "audit": str(tmp_path / "log"), "state": str(tmp_path / "s")}]}}
    ]
    fragments = place if security else []

    def machine(drive: Any) -> Machine:
        devices = [{"type": "virtio-blk", "drive": drive}]
        return Machine(accel="tcg", memory="16M", devices=devices, fragments=fragments)

    with pytest.raises(ConfigError, match="not in the image's own folder"):
        machine(path)
    for backing in (str(tmp_path / "secret"), [str(folder), str(tmp_path)]):
        machine({"file": path, "backing": backing}).close()


def test_the_flag_and_toml_say_backing(folder: Path) -> None:
    """--drive takes `backing`, and a wrong one is an error that names it."""
    device = parse_drive_flag("a.qcow2,backing=/srv", Host())["device"][0]
    assert device["drive"] == {"file": "a.qcow2", "backing": "/srv"}
    drive = {"file": hostile(folder, "base"), "backing": 1}
    with pytest.raises(ConfigError, match=r"drive\.backing"):
        Machine(accel="tcg", memory="16M", devices=[{"type": "virtio-blk", "drive": drive}])


def test_an_external_data_file_is_not_opened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image with an external data file is refused, named with that file, which nothing opens; info tells of it."""
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    path = folder / "d.qcow2"
    options = f"data_file={folder.parent / 'data'}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M"], check=True)
    OPENED.clear()
    with pytest.raises(ConfigError, match=r"external data file \(.*data\)"):
        open_image(Drive(str(path)), warn=print)
    assert tool("info", "--json", path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["data-file"] == str(folder.parent / "data")
    assert told["unsupported"] == [f"an external data file ({folder.parent / 'data'})"]
    assert str(folder.parent / "data") not in OPENED


def test_info_names_the_chain_without_opening_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """info says where the backing file lies, even one that is missing, and opens only the image itself."""
    path = hostile(folder, "gone", "qcow2")
    OPENED.clear()
    assert tool("info", "--json", path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["full-backing-file"] == str(folder / "gone")
    assert "backing-refused" not in told
    assert [one for one in OPENED if one.startswith(str(folder))] == [path]


def test_create_says_what_a_drive_will_need(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """create takes a backing file from anywhere, since its user names it, and says what a drive of it has to allow."""
    tool("create", folder / "o.qcow2", "-b", "../secret", "-F", "raw")
    assert f"backing={folder.parent / 'secret'}" in capsys.readouterr().err
    tool("create", folder / "p.qcow2", "-b", "base", "-F", "raw")
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="allow"):
        tool("resize", folder / "o.qcow2", "2M")
    tool("resize", folder / "o.qcow2", "2M", "--allow-backing", folder.parent / "secret")


# as QEMU reads names


FORMS = [
    "base",
    "./base",
    "sub/base",
    "{here}/sub/base",
    "file:base",
    "file:{here}/sub/base",
    "file:///{here}/sub/base",
    "./a:b",
    "a:b",
    ":base",
    'json:{"driver":"raw","file":{"driver":"file","filename":"base"}}',
    'json:{"driver":"raw","file.driver":"file","file.filename":"{here}/sub/base"}',
    'json:{"file":{"driver":"file","filename":"base"}}',
    'json:{"driver":"raw","file":{"filename":"base"}}',
    "json: {'driver': 'raw', 'file': {'driver': 'file', 'filename': 'base'}}",
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}',
    'json:{"driver":"raw","file.filename":"file:base"}',
    'json:{"driver":"raw","file":"base"}',
    'json:{"driver":"raw"}',
    "json:{}",
    "json:",
    "caf\udce9",
    "n\u00fcrnberg",
]


@QEMU
@pytest.mark.parametrize("form", FORMS)
def test_names_are_read_as_qemu_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A backing file's name leads to the file that qemu-img opens for it, or is refused where qemu-img fails."""
    for number, place in enumerate(("images/base", "images/sub/base", "cwd/base", "images/a:b", "images/caf\udce9")):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(f"here {number}".encode().ljust(SIZE))
    (tmp_path / "images" / "n\u00fcrnberg").write_bytes(b"here 9".ljust(SIZE))
    monkeypatch.chdir(tmp_path / "cwd")
    name = form.replace("{here}", str(tmp_path / "images"))
    path = str(tmp_path / "images" / "a.qcow2")
    create_qcow2(path, SIZE, Qcow2Shape(backing_file=name, backing_format=None if "json" in form else "raw"))
    words = ["qemu-img", "convert", "-O", "raw", path, str(tmp_path / "out")]
    theirs = subprocess.run(words, capture_output=True).returncode
    if theirs:
        with pytest.raises(ConfigError):
            read(path, backing="any")
    else:
        assert read(path, backing="any") == (tmp_path / "out").read_bytes()[:6]


@QEMU
def test_a_name_with_its_format_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What json: says of the format counts where the header says nothing, as for qemu-img."""
    monkeypatch.chdir(tmp_path)
    create_qcow2("base", SIZE)
    head = (tmp_path / "base").read_bytes()[:6]
    for form, expected in (("raw", head), ("qcow2", bytes(6))):
        name = f'json:{{"driver":"{form}","file":{{"driver":"file","filename":"base"}}}}'
        for stated in (None, "qcow2"):
            create_qcow2("a", SIZE, Qcow2Shape(backing_file=name, backing_format=stated), force=True)
            subprocess.run(["qemu-img", "convert", "-O", "raw", "a", "out"], check=True)
            found = read(str(tmp_path / "a"))
            assert found == (tmp_path / "out").read_bytes()[:6] == (expected if stated is None else bytes(6))
    assert find_below("x", name).format == "qcow2"


@QEMU
@pytest.mark.once
def test_a_chain_of_hundreds(tmp_path: Path) -> None:
    """A chain of 600 images reads, tells where its data is, is copied on write and closes, as qemu-img reads it."""
    create_raw(str(tmp_path / "0"), SIZE)
    (tmp_path / "0").write_bytes(b"bottom".ljust(SIZE, b"."))
    for number in range(1, 601):
        form = "raw" if number == 1 else "qcow2"
        create_qcow2(str(tmp_path / str(number)), SIZE, Qcow2Shape(4096, 3, 16, False, str(number - 1), form))
    path = tmp_path / "600"
    opened = open_image(Drive(str(path)), warn=print)
    opened.writev(4096, [memoryview(b"top".ljust(512))])
    assert opened.data(0, SIZE)[0]
    opened.close()
    assert read(str(path)) == b"bottom"
    tool("convert", path, tmp_path / "ours.raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, tmp_path / "theirs.raw"], check=True)
    assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()
