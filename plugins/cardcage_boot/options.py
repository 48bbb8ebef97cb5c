"""Options of the boot protocols: what the ``[boot]`` table may say for each."""

from __future__ import annotations

from attrs import field
from attrs.validators import ge, in_
from cardcage.values import frozen

__all__ = ["AutoOptions", "FirmwareOptions", "LinuxOptions", "MultibootOptions", "PvhOptions", "RawOptions"]


def _paths(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) and given else list(given)


@frozen
class LinuxOptions:
    """Protocol ``linux``.

    Attributes:
        kernel: path of a bzImage, or of a 64-bit ELF kernel (a ``vmlinux``).
        initrd: path, or several that are joined (each may be an archive of its own).
        append: kernel command line.
    """

    kernel: str
    initrd: str | list[str] = ""
    append: str = ""

    def initrds(self) -> list[str]:
        """The initrd paths as a list."""
        return _paths(self.initrd)


@frozen
class PvhOptions:
    """Protocol ``pvh``: as ``linux``, but *kernel* is an ELF file with a PVH entry note (a ``vmlinux``)."""

    kernel: str
    initrd: str | list[str] = ""
    append: str = ""

    def initrds(self) -> list[str]:
        """The initrd paths as a list."""
        return _paths(self.initrd)


@frozen
class MultibootOptions:
    """Protocol ``multiboot``.

    Attributes:
        kernel: path of a Multiboot 1 kernel, ELF or flat.
        modules: each a path, then after a space the module's own command line.
        append: command line; the kernel sees its path, a space, and this.
    """

    kernel: str
    modules: list[str] = field(factory=list)
    append: str = ""


@frozen
class RawOptions:
    """Protocol ``raw``.

    Attributes:
        image: path of a flat binary.
        address: where it is loaded, bytes, guest-physical.
        entry: where it is entered, the load address by default.
        mode: bits at entry: 16 (real mode, entry below 1 MiB), 32 (flat, no paging) or 64 (identity map of 4 GiB).
    """

    image: str
    address: int = field(default=0x7C00, validator=ge(0))
    entry: int | None = None
    mode: int = field(default=16, validator=in_((16, 32, 64)))


@frozen
class FirmwareOptions:
    """Protocol ``firmware``: *firmware* is the path of a ROM image that ends with the reset vector."""

    firmware: str


@frozen
class AutoOptions:
    """Protocol ``auto``, the default: detects the protocol by the kernel file's magic number, and takes its options.

    Attributes:
        kernel: bzImage, ELF with a PVH note, or Multiboot 1 kernel.
        initrd: path or list of paths (Multiboot: modules).
        append: command line.
        modules: Multiboot modules.
        firmware: ROM image, in place of a kernel.
    """

    kernel: str = ""
    initrd: str | list[str] = ""
    append: str = ""
    modules: list[str] = field(factory=list)
    firmware: str = ""

    def initrds(self) -> list[str]:
        """The initrd paths as a list."""
        return _paths(self.initrd)
