"""Kernels that Debian packages, fetched from the host's own archive once and kept, for the tests of boot protocols."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from cardcage.errors import HostError
from cardcage_boot.apt import Apt, depends
from cardcage_boot.cache import cache_root, locked
from cardcage_boot.fetch import distribution


def debian_file(package: str, pattern: str) -> Path:
    """The last file of *package* in /boot that *pattern* matches; skips the test where it cannot be had.

    *package* may also be one that depends on the versioned ``linux-image`` to look into.
    """
    name, version, _ = distribution()
    folder = cache_root() / "tests" / f"{name}-{version}" / package
    try:
        with locked(cache_root() / "lock", lambda: None):
            if not list(folder.glob(pattern)):
                _fetch(package, folder)
    except HostError as error:
        pytest.skip(str(error))
    found = sorted(folder.glob(pattern))
    if not found:
        pytest.skip(f"{name} {version}: no {pattern} in {package}")
    return found[-1]


def _fetch(package: str, folder: Path) -> None:
    apt = Apt(cache_root() / "apt", lambda what, percent: None)
    apt.update()
    fields = apt.show(package)
    if fields is None:
        raise HostError(f"the sources of this host's apt have no {package}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch, fresh = Path(name), Path(name) / "boot"
        archive = apt.download(depends(fields, r"linux-image-\d") or package, scratch)
        fresh.mkdir()
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacking,
            tarfile.open(fileobj=unpacking.stdout, mode="r|") as files,
        ):
            for one in files:
                path = Path(one.name)
                if one.isfile() and path.parts[:1] == ("boot",) and (data := files.extractfile(one)) is not None:
                    (fresh / path.name).write_bytes(data.read())
        fresh.rename(folder)
