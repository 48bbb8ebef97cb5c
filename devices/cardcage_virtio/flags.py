"""Command line shorthands: ``--device TYPE``, ``--share DIR`` and ``--vsock CID``."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from attrs import frozen
from cardcage.pairs import parse_pairs, parse_repeated, typed_pairs
from cardcage.registry import DeviceOffer

if TYPE_CHECKING:
    from cardcage.host import Host

__all__ = ["parse_device", "parse_share", "parse_vsock"]


SHARES = {"virtiofs": "virtio-fs", "9p": "virtio-9p"}
"""Other names of our own devices that share a directory, after the file system that the guest mounts."""


def parse_device(text: str, host: Host) -> dict[str, Any]:
    """``--device TYPE[,key=value]...``, any device: its options say what each text is.

    A dot leads into a table, where numbers, ``true`` and ``false`` are what they look like:
    ``drive.type=ram,drive.size=1M``. Raises :exc:`ValueError`, or NotOffered.
    """
    pairs = parse_repeated(text, first="type")
    name = next((value for key, value in pairs if key == "type"), "")
    if not name:
        raise ValueError("expected the name of a device")
    cls = host.registry.get(DeviceOffer, name).load_options()
    common = [pair for pair in pairs if pair[0] in DeviceOffer.keys]
    own = [pair for pair in pairs if pair[0] not in DeviceOffer.keys]
    return {"device": [{**typed_pairs(common, _Machines), **typed_pairs(own, cls)}]}


@frozen
class _Machines:
    """The keys that a device has of its machine."""

    type: str
    id: str = ""
    port: Any = None
    address: Any = None
    irq: Any = None
    bus: str = ""
    label: str = ""


def parse_share(text: str, host: Host) -> dict[str, Any]:
    """``--share DIR[,tag=share][,readonly=on][,type=9p]`` as ``virtio-fs``, ``virtio-9p`` or any card's device.

    The other keys are the device's options. Raises :exc:`ValueError`, or NotOffered.
    """
    pairs = parse_pairs(text, first="path")
    kind = pairs.pop("type", "virtiofs")
    name = SHARES.get(kind, kind)
    offers = [one for one in host.registry.offers(DeviceOffer) if one.mounts]
    cls = next((one.load_options() for one in offers if one.name == name), None)
    if cls is None:
        raise ValueError(f"type={kind}: expected {', '.join([*SHARES, *(one.name for one in offers)])}")
    if not os.path.isdir(pairs.get("path", "")):
        raise ValueError(f"expected a directory, got {pairs.get('path', '')!r}")
    return {"device": [{"type": name, **typed_pairs({"tag": "share", **pairs}.items(), cls)}]}


def parse_vsock(text: str, host: Host) -> dict[str, Any]:
    """``--vsock CID[,uds=PATH]`` as a ``virtio-vsock`` device, with its options. Raises :exc:`ValueError`.

    Without ``uds`` the socket is ``cardcage-vsock-CID.sock`` in ``$XDG_RUNTIME_DIR``, else in the directory for
    temporary files.
    """
    pairs = parse_pairs(text, first="cid")
    if not pairs.get("cid", "").isdigit():
        raise ValueError(f"expected the guest's number, 3 or more, got {pairs.get('cid', '')!r}")
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    given = {"uds": os.path.join(folder, f"cardcage-vsock-{pairs['cid']}.sock"), **pairs}
    cls = host.registry.get(DeviceOffer, "virtio-vsock").load_options()
    return {"device": [{"type": "virtio-vsock", **typed_pairs(given.items(), cls)}]}
