"""Boot protocol ``auto``: the kernel file's own magic says how it wants to be booted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.values import define

from cardcage_boot.files import open_file, unpacked

if TYPE_CHECKING:
    from cardcage.boot import BootImage

    from cardcage_boot.options import AutoOptions

__all__ = ["AutoLoader"]


@define
class AutoLoader:
    """Boot protocol ``auto``: bzImage, ELF with a PVH note, other ELF Linux, Multiboot; or firmware alone."""

    options: AutoOptions

    def open(self) -> BootImage:
        """Read and check the files. Raises ConfigError naming the file and what was expected."""
        # Only the protocol that is used gets imported: start-up time counts.
        options = self.options
        if options.firmware and options.kernel:
            raise ConfigError("give a kernel or a firmware, not both", key="boot.firmware")
        if options.firmware:
            from cardcage_boot.firmware import open_firmware

            return open_firmware(open_file(options.firmware, "firmware ROM"))
        if not options.kernel:
            raise ConfigError("nothing to boot: expected a kernel or a firmware", key="boot")
        from cardcage_boot.linux import is_bzimage, linux_release, open_linux

        file = unpacked(open_file(options.kernel, "kernel"))
        if is_bzimage(file.data):
            return open_linux(file, options.initrds(), options.append)
        from cardcage_boot.elf import is_elf, read_elf
        from cardcage_boot.multiboot import find_header, open_multiboot
        from cardcage_boot.pvh import open_pvh, pvh_entry

        if is_elf(file.data) and pvh_entry(read_elf(file)) is not None:
            return open_pvh(file, options.initrds(), options.append)
        if linux_release(file):
            return open_linux(file, options.initrds(), options.append)
        if find_header(file) is not None:
            return open_multiboot(file, [*options.modules, *options.initrds()], options.append)
        raise file.error(
            "no boot protocol recognises this kernel: expected a Linux bzImage or vmlinux, ELF with a PVH note, "
            "or a Multiboot 1 header (a flat binary needs protocol raw)"
        )
