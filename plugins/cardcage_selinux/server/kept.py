"""Compiled policies that are kept between runs, in the user's cache: compiling takes as long as all else of a start.

A file holds the tables as plain data (``marshal``, which runs nothing of what it reads), for exactly these texts, this
compiler and this Python. It decides what machines may do, so only a file of ours that nobody else can write is taken;
whatever is wrong with one, the policy is compiled again, and one that cannot be written costs only time later.
"""

from __future__ import annotations

import gc
import hashlib
import marshal
import os
import stat
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage_selinux.server.context import Level, Names, Range
from cardcage_selinux.server.policy import Policy, compiled, texts
from cardcage_selinux.server.tables import Class, Defaults, Tables

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["kept", "store"]

LARGEST = 64 << 20
"""Bytes of a file that is looked at."""

FILES = 8
"""Policies that are kept; the policy written longest ago goes first."""

DIGEST = hashlib.sha256().digest_size


def store() -> str:
    """The directory: ``$XDG_CACHE_HOME/cardcage/selinux``, or below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "cardcage", "selinux")


def kept(sources: Iterable[str | os.PathLike[str]]) -> Policy:
    """:func:`~cardcage_selinux.server.policy.load`, by the kept tables where there are some. Raises what that raises.

    The policy has no :attr:`~cardcage_selinux.server.policy.Policy.origins`.
    """
    found = texts(sources)
    key = _key(found)
    path = os.path.join(store(), f"policy-{key.hex()[:32]}")
    tables = _take(path, key)
    if tables is None:
        tables = _compile(found)
        _keep(path, key, tables)
    return Policy(tables)


def _compile(found: list[tuple[str, str]]) -> Tables:
    collecting = gc.isenabled()
    gc.disable()  # a compiler makes many objects that stay: looking for garbage among them doubles its time
    try:
        return compiled(found).tables
    finally:
        if collecting:
            gc.enable()


def _key(found: list[tuple[str, str]]) -> bytes:
    """Return the inputs of a compiled policy: the texts in order, the compiler, the Python whose marshal wrote it."""
    digest = hashlib.sha256(f"{sys.version} {marshal.version}".encode())
    here = os.path.dirname(os.path.dirname(__file__))
    for folder in ("cil", "server"):
        for one in sorted(os.scandir(os.path.join(here, folder)), key=lambda one: one.name):
            if one.name.endswith(".py"):
                about = one.stat()
                digest.update(f" {one.name} {about.st_size} {about.st_mtime_ns}".encode())
    for _, text in found:
        data = text.encode("utf-8", "surrogateescape")
        digest.update(f" {len(data)} ".encode())
        digest.update(data)
    return digest.digest()


def _take(path: str, key: bytes) -> Tables | None:
    """The tables in *path*, None when there is no such file, or it is not ours, not for *key*, or damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
                return None
            data = file.read(LARGEST + 1)
    except OSError:
        return None
    told, digest, body = data[:DIGEST], data[DIGEST : 2 * DIGEST], data[2 * DIGEST :]
    # A file of ours under another's name, or one half written, is one that we did not write for this.
    if len(data) > LARGEST or told != key or digest != hashlib.sha256(key + body).digest():
        return None
    return thawed(marshal.loads(body))


def _keep(path: str, key: bytes, tables: Tables) -> None:
    body = marshal.dumps(frozen(tables))
    part = f"{path}.{os.getpid()}.part"
    with suppress(OSError):  # a full disk, a cache that is not ours
        os.makedirs(folder := os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(key + hashlib.sha256(key + body).digest() + body)
            os.replace(part, path)
        except OSError:
            with suppress(OSError):
                os.unlink(part)
            return
        old = [entry for entry in os.scandir(folder) if entry.name.startswith("policy-")]
        for entry in sorted(old, key=lambda one: one.stat().st_mtime, reverse=True)[FILES:]:
            os.unlink(entry.path)


def frozen(tables: Tables) -> dict[str, Any]:
    """The tables as plain data, by field."""
    plain: dict[str, Any] = dict(vars(tables))
    plain["classes"] = [(one.name, one.index, one.permissions) for one in tables.classes.values()]
    plain["levels"] = tuple(tables.levels)
    plain["defaults"] = {key: tuple(one) for key, one in tables.defaults.items()}
    for name in ("user_ranges", "range_transitions"):
        plain[name] = {key: [tuple(level) for level in one] for key, one in plain[name].items()}
    return plain


def thawed(plain: dict[str, Any]) -> Tables:
    """The inverse of :func:`frozen`."""
    plain["classes"] = {name: Class(name, index, permissions) for name, index, permissions in plain["classes"]}
    plain["levels"] = Names(*plain["levels"])
    plain["defaults"] = {key: Defaults(*one) for key, one in plain["defaults"].items()}
    for name in ("user_ranges", "range_transitions"):
        plain[name] = {key: Range(*(Level(*level) for level in one)) for key, one in plain[name].items()}
    tables = Tables()
    vars(tables).update(plain)
    return tables
