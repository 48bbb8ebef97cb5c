"""--share and --vsock."""

from __future__ import annotations

from pathlib import Path

import pytest
from cardcage.host import Host
from cardcage_virtio.flags import parse_device, parse_share, parse_vsock

HOST = Host()


def test_share_is_a_file_system_device(tmp_path: Path) -> None:
    """A directory, with tag and readonly where wanted."""
    device = {"type": "virtio-fs", "path": str(tmp_path), "tag": "share"}
    assert parse_share(str(tmp_path), HOST) == {"device": [device]}
    assert parse_share(f"{tmp_path},type=9p", HOST) == {"device": [device | {"type": "virtio-9p"}]}
    assert parse_share(f"{tmp_path},tag=x,readonly=on", HOST) == {"device": [device | {"tag": "x", "readonly": True}]}


def test_vsock_is_a_device_with_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A number is enough; the socket then has a name made of it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    device = {"type": "virtio-vsock", "cid": 5, "uds": "/run/user/1/cardcage-vsock-5.sock"}
    assert parse_vsock("5", HOST) == {"device": [device]}
    assert parse_vsock("5,uds=/x", HOST) == {"device": [device | {"uds": "/x"}]}


@pytest.mark.parametrize("text", ["", "/nonexistent", ".,colour=red", ".,readonly=maybe"])
def test_bad_shares_are_refused(text: str) -> None:
    """What is no directory, or no key, is named."""
    with pytest.raises(ValueError, match=r"expected|no key"):
        parse_share(text, HOST)


@pytest.mark.parametrize("text", ["", "x", "5,path=/x"])
def test_bad_vsocks_are_refused(text: str) -> None:
    """What is no number, or no key, is named."""
    with pytest.raises(ValueError, match=r"expected|no key"):
        parse_vsock(text, HOST)


def test_any_device_can_be_added() -> None:
    """Type first, then its keys, each of which is what the device's options say it is."""
    table = {"type": "virtio-vsock", "cid": 64, "address": "03.0", "uds": "7"}
    assert parse_device("virtio-vsock,cid=0x40,address=03.0,uds=7", HOST) == {"device": [table]}
    with pytest.raises(ValueError, match="name of a device"):
        parse_device("", HOST)


def test_a_dot_leads_into_a_table() -> None:
    """What is inside a table is written with dots; a key is text or a table, not both."""
    drive = {"type": "qcow2", "options": {"lazy": True}}
    assert parse_device("virtio-blk,drive.type=qcow2,drive.options.lazy=true", HOST) == {
        "device": [{"type": "virtio-blk", "drive": drive}]
    }
    for text in ("virtio-blk,drive=raw,drive.size=1", "virtio-blk,drive.size=1,drive=raw"):
        with pytest.raises(ValueError, match="is already given as"):
            parse_device(text, HOST)
