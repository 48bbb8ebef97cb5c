"""Seeds of cloud-init's data source NoCloud: ``user-data``, ``meta-data`` and the like on a disk labelled CIDATA."""

from __future__ import annotations

import hashlib
import json
import os
import re
from email.message import Message
from typing import TYPE_CHECKING, Any

from attrs import field
from cardcage.config import HostPath
from cardcage.errors import ConfigError
from cardcage.files import read_file
from cardcage.values import frozen
from cardcage_block.readonly import ReadOnly

from cardcage_cloudinit.fat import make_fat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.device import Slot

__all__ = ["Seed", "SeedOptions", "files_of", "open_seed", "parse_key_flag", "parse_source", "parse_source_flag"]

MOST = 1 << 20
"""Bytes of one file."""
OPTIONAL = ("meta-data", "vendor-data", "network-config")
BEGINNINGS = (
    "#cloud-",
    "#!",
    "#include",
    "#part-handler",
    "#upstart-job",
    "## template:",
    "Content-Type:",
    "MIME-Version:",
)
"""How user data begin that cloud-init understands; it passes over all others without a word."""
GZIP = b"\x1f\x8b"
KEY = re.compile(r"(?:[^\s\"]+(?:\"[^\"]*\"\S*)?\s+)?((?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+\s+[A-Za-z0-9+/=]+(?:\s.*)?)")


@frozen
class SeedOptions:
    """Options of ``block:cloud-init``, and keys of ``[policy.cloud_init]``.

    Attributes:
        source: a file with user data, or a directory with ``user-data`` and, if there are any, ``meta-data``,
            ``vendor-data`` and ``network-config``.
        user_data: the user data themselves, as text, in place of *source*.
        vendor_data: text of vendor data, besides those of *source*.
        ssh_keys: files of public keys, which the image's own user lets in.
        key_files: the same, as ``--ssh-key`` gives them: each file with ``true``.
    """

    source: HostPath = ""
    user_data: str = ""
    vendor_data: str = ""
    ssh_keys: tuple[HostPath, ...] = ()
    key_files: dict[str, bool] = field(factory=dict)


def parse_source(text: str) -> dict[str, object]:
    """Shorthand: ``"cloud-init:DIR"``."""
    return {"source": text}


def parse_source_flag(text: str) -> dict[str, Any]:
    """``--cloud-init DIR|FILE``."""
    return {"policy": {"cloud_init": {"source": text}}}


def parse_key_flag(text: str) -> dict[str, Any]:
    """``--ssh-key FILE``."""
    return {"policy": {"cloud_init": {"key_files": {text: True}}}}


class Seed(ReadOnly):
    """The disk, in memory. Satisfies :class:`cardcage.backends.BlockBackend`, and refuses to be written."""

    def __init__(self, data: bytes) -> None:
        super().__init__(len(data), "the seed of cloud-init")
        self._data = memoryview(data)

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Fill the writable *buffers* one after another."""
        for one in buffers:
            one[:] = self._data[offset : offset + len(one)]
            offset += len(one)

    def try_readv(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """The same: it is in memory."""
        self.readv(offset, buffers)
        return True


def open_seed(slot: Slot, options: SeedOptions) -> Seed:
    """Back end ``block:cloud-init``. Raises ConfigError, which names the file that is wrong."""
    for path in (options.source, *options.ssh_keys, *options.key_files):
        if path:
            slot.host.ask("image", os.path.realpath(path), ("open", "read"))
    files = files_of(options, slot.machine)
    serial = int.from_bytes(hashlib.sha256(repr(files).encode()).digest()[:4], "little")
    try:
        return Seed(make_fat(files, "CIDATA", serial))
    except ValueError as error:
        raise ConfigError(str(error), file=options.source or None) from error


def files_of(options: SeedOptions, name: str) -> dict[str, bytes]:
    """The seed's files, for a machine called *name*. Raises ConfigError."""
    source, files = options.source, {"user-data": (options.user_data or "#cloud-config\n{}\n").encode()}
    if source and options.user_data:
        raise ConfigError("expected either a source or user_data", file=source)
    if source and os.path.isdir(source):
        files = {"user-data": read_file(os.path.join(source, "user-data"), MOST, "user data of cloud-init")}
        present = [one for one in OPTIONAL if os.path.exists(os.path.join(source, one))]
        files |= {one: read_file(os.path.join(source, one), MOST, one) for one in present}
    elif source:
        files = {"user-data": read_file(source, MOST, "user data of cloud-init")}
    data = files["user-data"]
    known = data.startswith(GZIP) or any(data.startswith(one.encode()) for one in BEGINNINGS)
    if data.strip() and not known:
        where: dict[str, str] = {"file": source} if source else {"key": "user_data"}
        raise ConfigError('no user data of cloud-init: expected "#cloud-config" or "#!" in its first line', **where)
    keys = [key for path in (*options.ssh_keys, *options.key_files) for key in keys_of(path)]
    digest = hashlib.sha256(repr((sorted(files.items()), keys)).encode()).hexdigest()[:16]
    made = json.dumps({"instance-id": f"{name}-{digest}", "local-hostname": name}).encode()
    meta = files.get("meta-data", made)
    files["meta-data"] = with_keys(meta, keys, source) if keys else meta
    if options.vendor_data:  # not in the digest: what we add must not make another instance of a disk that is kept
        given = files.get("vendor-data", b"")
        ours = options.vendor_data
        files["vendor-data"] = both_vendors(given, ours, source) if given else ours.encode()
    return files


def both_vendors(given: bytes, ours: str, source: str) -> bytes:
    """Vendor data and those that we add, in one message of MIME. Raises ConfigError for *given* that is one already."""
    try:
        text = given.decode()
    except UnicodeDecodeError:  # such as gzip
        text = "MIME-Version:"
    if text.startswith(("MIME-Version:", "Content-Type:")):
        raise ConfigError("its vendor-data is no plain text, to which programs could be added", file=source)
    whole = Message()
    whole.add_header("Content-Type", "multipart/mixed", boundary=hashlib.sha256(given).hexdigest()[:32])
    whole.add_header("MIME-Version", "1.0")
    for one in (text, ours):
        part = Message()
        part.add_header("Content-Type", "text/plain")  # cloud-init looks at how it begins
        part.set_payload(one, "utf-8")
        whole.attach(part)
    return whole.as_bytes()


def keys_of(path: str) -> list[str]:
    """The public keys in a file: ``id_ed25519.pub``, or ``authorized_keys``. Raises ConfigError."""
    text = read_file(path, MOST, "public key").decode("utf-8", "replace")
    if "PRIVATE KEY-----" in text:
        raise ConfigError(f"a private key: expected the public one, such as {path}.pub", file=path)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for number, line in enumerate(lines, 1):
        if not KEY.fullmatch(line):
            raise ConfigError(
                f"key {number} is no public key of SSH: expected ssh-ed25519 AAAA... or the like", file=path
            )
    if not lines:
        raise ConfigError("no key in it: expected a public key of SSH", file=path)
    return lines


def with_keys(meta: bytes, keys: list[str], source: str) -> bytes:
    """Meta data with keys besides; YAML in its block form, or JSON. Raises ConfigError for keys that are there."""
    if b"public-keys" in meta or b"public_keys" in meta:
        raise ConfigError("its meta-data has public-keys already: add the keys there", file=source)
    if meta.lstrip().startswith(b"{"):
        try:
            table = json.loads(meta)
        except ValueError as error:
            raise ConfigError(f"its meta-data is no JSON that keys can be added to: {error}", file=source) from error
        return json.dumps({**table, "public-keys": keys}).encode()
    return meta.rstrip(b"\n") + b"\npublic-keys: " + json.dumps(keys).encode() + b"\n"
