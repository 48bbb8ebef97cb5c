"""Command line shorthands: ``--device TYPE``, ``--share DIR`` and ``--vsock CID``."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from cardcage.errors import near
from cardcage.pairs import parse_pairs

__all__ = ["parse_device", "parse_share", "parse_vsock"]


def _known(pairs: dict[str, str], keys: tuple[str, ...]) -> None:
    for key in pairs:
        if key not in keys:
            raise ValueError(f'no key "{key}".{near(key, keys) or " Known: " + ", ".join(keys)}')


def parse_device(text: str) -> dict[str, Any]:
    """``--device TYPE[,key=value]...``, any device: numbers, ``true`` and ``false`` are what they look like.

    A dot leads into a table: ``drive.type=ram,drive.size=1M``. Raises :exc:`ValueError`.
    """
    pairs = parse_pairs(text, first="type")
    if not pairs.get("type"):
        raise ValueError("expected the name of a device")
    device: dict[str, Any] = {}
    for path, value in pairs.items():
        *tables, key = path.split(".")
        table = device
        for one in tables:
            table = table.setdefault(one, {})
            if not isinstance(table, dict):
                raise ValueError(f'"{path}": "{one}" is already given as text')
        if isinstance(table.get(key), dict):
            raise ValueError(f'"{path}" is already given as a table')
        table[key] = value if key == "type" else _value(value)
    return {"device": [device]}


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text, 0)
    except ValueError:
        return text


def parse_share(text: str) -> dict[str, Any]:
    """``--share DIR[,tag=share][,readonly=on][,type=9p]`` as ``virtio-fs`` or ``virtio-9p``.

    Raises :exc:`ValueError`.
    """
    pairs = parse_pairs(text, first="path")
    _known(pairs, ("path", "tag", "readonly", "type"))
    kinds = {"virtiofs": "virtio-fs", "9p": "virtio-9p"}
    if (kind := kinds.get(pairs.get("type", "virtiofs"))) is None:
        raise ValueError(f"type={pairs['type']}: expected virtiofs or 9p")
    if not os.path.isdir(pairs.get("path", "")):
        raise ValueError(f"expected a directory, got {pairs.get('path', '')!r}")
    device: dict[str, Any] = {"type": kind, "path": pairs["path"], "tag": pairs.get("tag", "share")}
    if "readonly" in pairs:
        if pairs["readonly"] not in ("on", "off"):
            raise ValueError(f"readonly={pairs['readonly']}: expected on or off")
        device["readonly"] = pairs["readonly"] == "on"
    return {"device": [device]}


def parse_vsock(text: str) -> dict[str, Any]:
    """``--vsock CID[,uds=PATH]`` as a ``virtio-vsock`` device. Raises :exc:`ValueError`.

    Without ``uds`` the socket is ``cardcage-vsock-CID.sock`` in ``$XDG_RUNTIME_DIR``, else in the directory for
    temporary files.
    """
    pairs = parse_pairs(text, first="cid")
    _known(pairs, ("cid", "uds"))
    if not pairs.get("cid", "").isdigit():
        raise ValueError(f"expected the guest's number, 3 or more, got {pairs.get('cid', '')!r}")
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    uds = pairs.get("uds") or os.path.join(folder, f"cardcage-vsock-{pairs['cid']}.sock")
    return {"device": [{"type": "virtio-vsock", "cid": int(pairs["cid"]), "uds": uds}]}
