"""A kernel and a busybox to boot with, when none were given: from the cache, the host, or its own archive."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, frozen
from cardcage.errors import ConfigError, HostError

from cardcage_boot.apt import Apt, depends, unpack
from cardcage_boot.cache import locked, publish_file, publish_folder
from cardcage_boot.elf import EM_X86_64, read_elf
from cardcage_boot.files import BootFile
from cardcage_boot.initramfs import WANTED, build

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["KERNELS", "Kernel", "Shelf", "distribution", "is_static_busybox"]

KERNELS = {"debian": ("linux-image-cloud-amd64", "linux-image-amd64"), "ubuntu": ("linux-image-virtual",)}
"""By distribution: packages that depend on its newest kernel, the smallest first."""


@frozen
class Kernel:
    """A kernel file, its ``uname -r``, its modules folder (if any), and in words where it came from."""

    path: Path
    release: str
    modules: Path | None
    source: str


def is_static_busybox(path: Path) -> bool:
    """True if *path* is an x86-64 program that needs no dynamic loader."""
    try:
        file = BootFile(str(path), path.read_bytes(), "busybox")
        return file.u16(18, "the ELF machine") == EM_X86_64 and not read_elf(file).interpreter
    except (OSError, ConfigError):
        return False


@define
class Shelf:
    """Kernels and busybox to boot with, kept in the cache.

    Args:
        root: the cache folder.
        progress: called with (what, percent) during downloads.
        say: called with one line for the person who waits.
        packages: that depend on the kernel to fetch, the first that there is; by default the distribution's smallest.
    """

    root: Path
    progress: Callable[[str, float], None]
    say: Callable[[str], None]
    packages: tuple[str, ...] = ()

    def kernel(self, *, refresh: bool = False) -> Kernel:
        """The distribution's kernel, fetched once. *refresh* looks for a newer kernel.

        Raises HostError with what to give instead, where this host's distribution is not known or the archive fails.
        """
        name, version, likes = distribution()
        known = next((one for one in (name, *likes) if one in KERNELS), None)
        if known is None:
            raise HostError(
                f"no kernel given, and fetching a kernel is only supported on Debian and Ubuntu (this host: {name}): "
                "give --kernel and --initrd"
            )
        home = self.root / f"{name}-{version}"
        if not refresh and (there := self.kept_kernel()):
            return there
        with locked(self.root / "lock", self._wait):
            if not refresh and (there := self.kept_kernel()):  # another run has just fetched it
                return there
            self._fetch_kernel(home, self.packages or KERNELS[known])
        if there := self.kept_kernel():
            return there
        raise HostError(f"the kernel package had no /boot/vmlinuz-*: look into {home}")

    def _wait(self) -> None:
        self.say("waiting for another cardcage process that is fetching")

    def kept_kernel(self) -> Kernel | None:
        """The kernel that an earlier run fetched for this distribution."""
        name, version, _ = distribution()
        tree = self.root / f"{name}-{version}" / "kernel"
        kernels = sorted(tree.glob("boot/vmlinuz-*"))
        if not kernels:
            return None
        release = kernels[-1].name.removeprefix("vmlinuz-")
        modules = [tree / top / "modules" / release for top in ("lib", "usr/lib")]
        found = next((one for one in modules if one.is_dir()), None)
        return Kernel(kernels[-1], release, found, f"fetched from {name.capitalize()}")

    def _fetch_kernel(self, home: Path, metas: tuple[str, ...]) -> None:
        if self.kept_kernel() is None:
            self.say("no kernel is in the cache yet: it is fetched from where this host's apt gets its packages, once")
        apt = Apt(self.root / "apt", self.progress, self.say)
        apt.update()
        for meta in metas:
            image = depends(apt.show(meta) or {}, r"linux-image-\d")
            if image is not None:
                break
        else:
            raise HostError(
                f"the sources of this host's apt have no {' or '.join(metas)} (or cannot be reached): "
                "give --kernel and --initrd"
            )
        # Ubuntu keeps the modules in a package of their own.
        modules = depends(apt.show(image) or {}, r"linux-modules-\d")
        with publish_folder(home / "kernel") as fresh:
            for package in (image, *([modules] if modules else [])):
                archive = apt.download(package, fresh)
                unpack(archive, fresh)
                archive.unlink()
            shutil.rmtree(fresh / "usr/share", ignore_errors=True)

    def host_busybox(self) -> Path | None:
        """The host's own static busybox."""
        on_path = shutil.which("busybox")
        return Path(on_path) if on_path is not None and is_static_busybox(Path(on_path)) else None

    def kept_busybox(self) -> Path | None:
        """The host's own static busybox, or the busybox that an earlier run fetched."""
        kept = self.root / "busybox"
        return self.host_busybox() or (kept if kept.exists() else None)

    def busybox(self) -> Path:
        """A static busybox: the host's, else the distribution's package ``busybox-static``."""
        if there := self.kept_busybox():
            return there
        kept = self.root / "busybox"
        with locked(self.root / "lock", self._wait):
            if not kept.exists():
                self._fetch_busybox(kept)
        return kept

    def _fetch_busybox(self, kept: Path) -> None:
        self.say("this host has no static busybox: the package busybox-static is fetched, once")
        apt = Apt(self.root / "apt", self.progress, self.say)
        apt.update()
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".new-") as name:
            fresh = Path(name)
            unpack(apt.download("busybox-static", fresh), fresh)
            found = next((one for one in (fresh / "bin/busybox", fresh / "usr/bin/busybox") if one.is_file()), None)
            if found is None or not is_static_busybox(found):
                raise HostError("the package busybox-static holds no static busybox: give --initrd")
            os.replace(found, kept)

    def initramfs(self, kernel: Kernel, init: str = "init.sh", programs: Mapping[str, bytes] | None = None) -> Path:
        """The initramfs for *kernel* with the script *init*, built once for each set of ingredients.

        *programs* are started by ``init.sh``, by name.
        """
        busybox = self.busybox()
        made_of = [files("cardcage_boot").joinpath(name).read_bytes() for name in (init, "dhcp.sh", "initramfs.py")]
        made_of.append(repr((WANTED, kernel.release, str(kernel.modules), str(busybox))).encode())
        for path in (busybox, kernel.modules):
            if path is not None:
                known = path.stat()
                made_of.append(f"{known.st_size} {known.st_mtime_ns} {known.st_ino}".encode())
        made_of += [part for name, data in sorted((programs or {}).items()) for part in (name.encode(), data)]
        key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:32]
        kept = self.root / "initramfs" / f"{kernel.release}-{key}.cpio"
        if not kept.exists():
            publish_file(kept, build(busybox, kernel.modules, kernel.release, init, programs))
        return kept


def distribution() -> tuple[str, str, list[str]]:
    """This host's distribution: name, version, and what it is like (os-release(5))."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return release.get("ID", "unknown"), release.get("VERSION_ID", "rolling"), release.get("ID_LIKE", "").split()
