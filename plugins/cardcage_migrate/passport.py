"""The first word of a migration: what machine it is, and what it is made of. It is hostile input: bounded and typed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_origin

from attrs import Factory, define, field
from attrs.validators import and_, ge, le, matches_re, max_len
from cardcage.errors import ConfigError
from cardcage_snapshot.manifest import DeviceCard, converter, decoded, in_one_line
from cardcage_snapshot.places import printable

from cardcage_migrate.wire import BrokenStream

__all__ = ["MovedDisk", "Passport", "Stamp", "boot_id", "this_process"]

WHERE = "the stream"


@define
class MovedDisk:
    """A disk that the guest can write, which stays where it is.

    Attributes:
        device: id. size, block_size: bytes. discard, write_zeroes: what it can (:class:`cardcage.backends.BlockInfo`).
        path: of the image; empty where the back end has none. file: device and inode of it on the source's host.
    """

    device: str = field(validator=and_(max_len(256), in_one_line))
    size: int = field(validator=[ge(0), le(1 << 60)])
    block_size: int = field(validator=[ge(1), le(1 << 20)])
    discard: bool
    write_zeroes: bool
    path: str = field(default="", validator=max_len(4096))
    file: list[int] = Factory(list)


@define
class Stamp:
    """The image of a disk once its source had let go of it: bytes, and when it was changed last, nanoseconds."""

    device: str = field(validator=in_one_line)
    size: int
    modified: int


@define
class Passport:
    """All that is said of a machine before its RAM.

    Attributes:
        cardcage: the release that sends. machine: its name. label: security label. memory: bytes. cpus: number.
        accelerator: that runs it. config: tables as of a TOML file. seal: see :mod:`cardcage_snapshot.manifest`.
        devices: in their order. disks: that it can write. host: the boot id of the source's kernel.
        agent: an agent answered in the guest. one_way: nothing is heard from the destination. paused: it was, and is
            to be. postcopy: memory may come after the machine. process: then, a word for the source's.
    """

    cardcage: str = field(validator=and_(max_len(256), in_one_line))
    machine: str = field(validator=and_(max_len(256), in_one_line))
    label: str = field(validator=and_(max_len(4096), in_one_line))
    memory: int = field(validator=[ge(1 << 12), le(1 << 48)])
    cpus: int = field(validator=[ge(1), le(255)])
    accelerator: str = field(validator=in_one_line)
    config: dict[str, Any]
    devices: list[DeviceCard]
    seal: str = field(default="", validator=matches_re(r"([0-9a-f]{64})?"))
    disks: list[MovedDisk] = Factory(list)
    host: str = field(default="", validator=and_(max_len(64), in_one_line))
    agent: bool = False
    one_way: bool = False
    paused: bool = False
    postcopy: bool = False
    process: str = field(default="", validator=and_(max_len(64), in_one_line))

    def written(self) -> bytes:
        """As JSON."""
        import json

        table = converter().unstructure(self)
        if not self.postcopy:  # and a destination that does not know it takes it
            del table["postcopy"], table["process"]
        return json.dumps(table).encode()

    @classmethod
    def read(cls, data: bytes) -> Passport:
        """From JSON. Raises BrokenStream."""
        found = structured(data, cls)
        assert isinstance(found, Passport)
        return found


def structured(data: bytes, kind: Any) -> Any:
    """An object of attrs class *kind*, or a list of such, from JSON. Raises BrokenStream."""
    try:
        found = decoded(data, WHERE)
        if get_origin(kind) is list and not isinstance(found, list):
            raise BrokenStream(f"{WHERE} does not fit: expected a list")
        return converter().structure(found, kind)
    except BrokenStream:
        raise
    except ConfigError as error:
        raise BrokenStream(str(error)) from error
    except Exception as error:  # what is not trusted can be wrong in every way that cattrs knows
        from cattrs import transform_error

        why = printable("; ".join(transform_error(error)))[:500]
        raise BrokenStream(f"{WHERE} does not fit: {why}") from error


_drawn = os.urandom(16).hex()


def this_process() -> str:
    """A word for this process that no other has, nor a copy of it by fork."""
    return f"{_drawn}-{os.getpid()}"


def boot_id() -> str:
    """The number that this host has since it was booted, and no other (random(4)); empty where none is told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
