"""Kernel modules: which files a driver needs, in which order, read from the modules themselves.

A kernel package has no ``modules.dep`` (depmod makes it when the package is installed), so names, dependencies and
device aliases come from each module's ``.modinfo`` section.
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

from attrs import evolve, field, frozen
from cardcage.errors import ConfigError, HostError

from cardcage_boot.elf import section
from cardcage_boot.files import BootFile, open_file

__all__ = ["Module", "collect", "decompress", "module_index"]


@frozen
class Module:
    """One module.

    Attributes:
        name: with underscores, as ``/sys/module`` has it.
        data: the uncompressed ELF object.
        needs: names of the modules that must be there before.
        aliases: patterns of device ids it drives.
    """

    name: str
    data: bytes = field(repr=False)
    needs: tuple[str, ...]
    aliases: tuple[str, ...]


def module_index(root: Path) -> dict[str, Path]:
    """Module files below *root* (``lib/modules/RELEASE``) by name; ``.ko``, plain or compressed."""
    found: dict[str, Path] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            stem, dot, rest = name.partition(".ko")
            if dot and rest in ("", ".xz", ".zst", ".gz"):
                found[stem.replace("-", "_")] = Path(folder, name)
    return found


def decompress(file: BootFile) -> BootFile:
    """The file uncompressed, by its name's ending. Raises ConfigError for damaged data, HostError without zstd."""
    try:
        if file.path.endswith(".xz"):
            return evolve(file, data=lzma.decompress(file.data))
        if file.path.endswith(".gz"):
            return evolve(file, data=gzip.decompress(file.data))
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise file.error(f"damaged compressed kernel module: {error}") from error
    if file.path.endswith(".zst"):
        return evolve(file, data=_unzstd(file))
    return file


def _unzstd(file: BootFile) -> bytes:
    """By the program zstd, else by dpkg-deb, which has zstd built in and is there wherever Ubuntu's kernels are."""
    with tempfile.NamedTemporaryFile(prefix="cardcage-", suffix=".deb") as package:
        if zstd := shutil.which("zstd"):
            command = [zstd, "-dcq", file.path]
        elif dpkg := shutil.which("dpkg-deb"):
            package.write(b"!<arch>\n")
            for name, data in (("debian-binary", b"2.0\n"), ("control.tar", bytes(10240)), ("data.tar.zst", file.data)):
                head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
                package.write(head.encode() + data + b"\n" * (len(data) % 2))
            package.flush()
            command = [dpkg, "--fsys-tarfile", package.name]
        else:
            raise HostError(f"{file.path}: this kernel's modules are compressed with zstd: install the program zstd")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise file.error(f"damaged compressed kernel module: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout


def _read(path: Path, name: str) -> Module:
    file = decompress(open_file(str(path), "kernel module"))
    info = section(file, ".modinfo")
    if info is None:
        raise file.error("not a kernel module: expected an ELF file with a .modinfo section")
    pairs = [line.partition("=")[::2] for line in info.decode("utf-8", "replace").split("\0")]
    listed = [value.split(",") for key, value in pairs if key == "depends"]
    soft = [value[4:].split() for key, value in pairs if key == "softdep" and value.startswith("pre:")]
    needs = tuple(one.replace("-", "_") for names in (*listed, *soft) for one in names if one)
    return Module(name, file.data, needs, tuple(value for key, value in pairs if key == "alias"))


def collect(root: Path, wanted: tuple[str, ...]) -> list[Module]:
    """Those of *wanted* that exist below *root*, with all they need, each after what it needs.

    A wanted module that is not there is built into this kernel or not offered by it: it is left out. Raises
    ConfigError for a damaged module.
    """
    index = module_index(root)
    done: dict[str, Module] = {}
    busy: set[str] = set()

    def visit(name: str) -> None:
        path = index.get(name)
        if path is None or name in done:
            return
        if name in busy:
            raise ConfigError(f"kernel module {name} needs itself", file=str(path))
        busy.add(name)
        module = _read(path, name)
        for need in module.needs:
            visit(need)
        done[name] = module

    for name in wanted:
        visit(name)
    return list(done.values())
