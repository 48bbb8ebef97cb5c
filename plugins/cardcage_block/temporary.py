"""Disks whose image stays as it is: writes go to a file without a name, which ends with the machine."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.errors import ConfigError

from cardcage_block.drive import allowed, open_image
from cardcage_block.header import Header
from cardcage_block.hostfile import HostFile
from cardcage_block.make import create_qcow2
from cardcage_block.qcow2 import Qcow2Image
from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from cardcage.device import Slot

    from cardcage_block.drive import Drive

__all__ = ["open_temporary"]


def open_temporary(slot: Slot, options: Drive) -> Qcow2Image:
    """Back end ``block:temporary``: an image that is only read, and what is written, in the folder for temporary files.

    Raises ConfigError or HostError.
    """
    warn = slot.log.warning
    with ExitStack() as failing:
        below = open_image(evolve(options, readonly=True), warn=warn, allow=allowed(slot, options))
        failing.callback(below.close)
        try:
            fd, path = tempfile.mkstemp(prefix="cardcage-", suffix=".qcow2")
            os.close(fd)
        except OSError as error:
            raise ConfigError(f"no temporary file can be made: {error.strerror}", file=options.file) from error
        try:
            create_qcow2(path, below.info.size, force=True)
            file = HostFile(path, writable=True, stable=False)
        finally:
            os.unlink(path)
        failing.callback(file.close)
        header = Header.parse(lambda at, size: read_bytes(file, at, size), path)
        made = Qcow2Image(file, header, backing=below, discard=options.discard == "unmap", warn=warn)
        failing.pop_all()
        return made
