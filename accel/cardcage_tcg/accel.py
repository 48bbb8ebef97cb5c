"""The accelerator ``tcg``: guest code translated block by block; needs no /dev/kvm."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cardcage.accelerator import Probe
from cardcage.errors import CardcageError

from cardcage_tcg import CODE_MEMORY

if TYPE_CHECKING:
    from cardcage.accelerator import VmSpec

    from cardcage_tcg.vm import TcgVm

__all__ = ["Tcg"]


class Tcg:
    """Satisfies :class:`cardcage.accelerator.Accelerator`."""

    name = "tcg"

    def probe(self) -> Probe:
        machine = os.uname().machine  # without the module platform, for start-up's sake
        if sys.platform != "linux" or machine != "x86_64":
            return Probe(False, "translated", f"needs Linux on x86-64, this is {sys.platform} on {machine}")
        try:
            from cardcage_tcg.library import CodeBuffer, load

            load()
            CodeBuffer(4096).close()
        except CardcageError as error:
            return Probe(False, "translated", str(error))
        return Probe(True, "translated", "binary translation", executable=True, code_memory=CODE_MEMORY)

    def create_vm(self, spec: VmSpec, /) -> TcgVm:
        from cardcage_tcg.vm import TcgVm

        return TcgVm(spec)
