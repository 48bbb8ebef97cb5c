"""What Python does of a guest's instructions is loaded when the guest has the first of a kind."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from typing import TYPE_CHECKING

from cardcage import Machine
from cardcage_tcg.cpu.emulate import _tables
from cardcage_tcg.cpu.operands import Operands

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage_tcg.cpu.vcpu import TcgVCpu


def test_each_instruction_is_of_one_kind() -> None:
    """No two tables have an instruction in common, so that it does not matter which of them was loaded first."""
    with Machine(memory="1M", accel="tcg", machine={"platform": "none"}) as machine:
        cpu: TcgVCpu = machine.vcpus[0]  # type: ignore[assignment]  # a vCPU of this accelerator
        kinds = list(_tables(cpu, Operands(cpu.registers, cpu.linear)))
    assert all(kinds)
    assert [(one.keys() & other.keys()) for one, other in combinations(kinds, 2)] == [set()] * 6


def test_a_guest_with_ports_only_loads_nothing_else(tmp_path: Path) -> None:
    """A guest that only writes to a port has neither the emulator of vectors nor that of control flow loaded."""
    (tmp_path / "guest").write_bytes(bytes.fromhex("b000e6f4f4"))  # mov al, 0; out 0xf4, al; hlt
    code = (
        "import sys; from cardcage import Machine\n"
        f"boot = {{'protocol': 'raw', 'image': {str(tmp_path / 'guest')!r}}}\n"
        "devices = [{'type': 'isa-debug-exit', 'iobase': 0xf4}]\n"
        "with Machine(memory='1M', accel='tcg', machine={'platform': 'none'}, boot=boot, devices=devices) as vm:\n"
        "    vm.start()\n    vm.wait(60)\n"
        "print(sorted(one for one in sys.modules if one.startswith('cardcage_tcg.cpu.')\n"
        "    and one.endswith(('emulate', 'ports', 'flow', 'vectors'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cardcage_tcg.cpu.emulate', 'cardcage_tcg.cpu.ports']"
