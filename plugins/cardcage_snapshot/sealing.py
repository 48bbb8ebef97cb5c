"""The configuration of a machine as a snapshot keeps it, and the seal that says whose it is.

Every machine that may be in a jail is sealed before, so this imports little.
"""

from __future__ import annotations

import json
import os
from _blake2 import blake2b  # as hashlib has it, without loading OpenSSL
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cardcage.errors import HostError

from cardcage_snapshot.places import state_directory
from cardcage_snapshot.tables import ids_of, tables_of

if TYPE_CHECKING:
    from cardcage.config import Config
    from cardcage.machine import Machine

__all__ = ["canonical", "is_ours", "original", "prepared"]

_originals: WeakKeyDictionary[Machine, dict[str, Any]] = WeakKeyDictionary()
_prepared: WeakKeyDictionary[Machine, tuple[Config, dict[str, Any], str]] = WeakKeyDictionary()


def original(machine: Machine, tables: dict[str, Any]) -> None:
    """*machine* was restored: its next snapshot has the configuration *tables*, not overlays and maps of this one."""
    _originals[machine] = tables


def prepared(machine: Machine) -> tuple[dict[str, Any], str]:
    """The configuration of a machine as tables, and its seal: made before a jail where there is one."""
    found = _prepared.get(machine)
    if found is None or found[0] is not machine.config:
        tables = _tables(machine)
        found = machine.config, tables, _sealed(tables, machine.label)
        _prepared[machine] = found
    return found[1], found[2]


def _tables(machine: Machine) -> dict[str, Any]:
    """The configuration; of a restored machine as it was, but for devices that were added or taken out since."""
    tables = tables_of(machine.config, ids_of(machine))
    before = _originals.get(machine)
    if before is None:
        return tables
    devices = {one.get("id"): one for one in before.get("device", []) if isinstance(one, dict)}
    found = [devices.get(one["id"], one) for one in tables["device"]]
    return {**before, "device": found}


def canonical(table: Any) -> bytes:
    """JSON that is the same for equal tables."""
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()


def _key(make: bool) -> bytes | None:
    """The account's key, None where there is none and none is made. Raises HostError."""
    path = state_directory() / "snapshot.key"
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(2):
        with suppress(FileNotFoundError):
            try:
                with open(os.open(path, os.O_RDONLY | flags), "rb") as file:
                    if os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
                        return None
                    return file.read(64)
            except PermissionError:
                return None
        if not make:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            hidden = path.with_name(f".{path.name}.{os.getpid()}")
            with open(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600), "wb") as file:
                file.write(os.urandom(32))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(hidden, path)
            os.unlink(hidden)
        except OSError as error:
            raise HostError(f"{path}: the key that seals snapshots cannot be made: {error.strerror}") from error
    return None


def _sealed(config: dict[str, Any], label: str) -> str:
    """The seal of a configuration; empty where this process cannot have the key."""
    try:
        key = _key(make=True)
    except HostError:
        return ""
    return _seal(key, config, label) if key else ""


def _seal(key: bytes, config: dict[str, Any], label: str) -> str:
    return blake2b(canonical([config, label]), key=key[:64], digest_size=32).hexdigest()


def is_ours(config: dict[str, Any], label: str, seal: str) -> bool:
    """True where the *seal* says that the configuration is that of a machine of this account."""
    from hmac import compare_digest  # which loads OpenSSL

    key = _key(make=False) if seal else None
    return key is not None and compare_digest(_seal(key, config, label), seal)


def before_jail(machine: Machine) -> None:
    """Seal the configuration, and open what the kernel tells writes by, while this process still may."""
    from cardcage_snapshot.watching import keep_open

    prepared(machine)
    keep_open(machine)
    if os.stat(__file__).st_uid not in (0, os.geteuid()):  # code that only root's capabilities may be able to read
        import cardcage_snapshot.running  # noqa: F401  to have it loaded: it is used by its name later
