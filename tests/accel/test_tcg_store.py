"""The translator's kept template store and its code buffer."""

from __future__ import annotations

import os
from pathlib import Path
from struct import pack_into

import pytest
from cardcage.accelerator import MemorySlot, VmSpec
from cardcage.errors import AcceleratorError, ConfigError
from cardcage.memory import RamBlock
from cardcage.vcpu import Exit
from cardcage.x86 import Segment
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from cardcage_tcg.translate.store import STORE_SIZE
from cardcage_tcg.vm import TcgOptions, TcgVm


class NoOps:
    """No device answers; nothing here asks."""


def run(code: bytes, templates: Path, *, room: int = 0, **options: int) -> tuple[TcgVm, int]:
    """Run 32-bit flat *code* at 0x1000 until HLT, with *room* bytes left in the store; the closed VM and EAX."""
    vm = TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates=str(templates), **options)))
    if room:
        pack_into("<I", vm.blocks.store.area.view, L.STORE_USED, STORE_SIZE - room)
    ram = RamBlock(1 << 20)
    vm.map_memory(MemorySlot(0, ram.size, ram.host_address))
    ram.view[0x1000 : 0x1000 + len(code)] = code
    cpu = vm.create_vcpu(0)
    state = cpu.get_state()
    state.system.cr0 = 0x11
    state.system.cs = Segment.flat(8, code=True)
    state.system.ds = state.system.es = state.system.ss = Segment.flat(16)
    state.registers.rip, state.registers.rsp = 0x1000, 0x8000
    cpu.set_state(state)
    assert cpu.run(NoOps()).reason is Exit.HALTED
    eax = cpu.get_state().registers.rax
    vm.close()
    ram.close()
    return vm, eax


ADD_UP = bytes.fromhex("31c0 b9e8030000 01c8 e2fc f4")  # xor eax,eax; mov ecx,1000; L: add eax,ecx; loop L; hlt


def many() -> bytes:
    """So many different instructions that the store is worth keeping."""
    shapes = b"".join(bytes((op, 0x80 | reg << 3 | base)) + (0x2000).to_bytes(4, "little")
                      for op in (0x01, 0x03, 0x09, 0x0B, 0x21, 0x23, 0x31, 0x33, 0x39, 0x3B, 0x85, 0x89, 0x8B)
                      for reg in (0, 1, 2, 3, 6) for base in (3, 6, 7) if base != 4)  # fmt: skip
    return bytes.fromhex("31db 31f6 31ff") + shapes * 1 + bytes.fromhex("b802000000 f4")


def test_store_is_kept_and_taken(tmp_path: Path) -> None:
    """A second VM begins with the templates that the first one made."""
    first, eax = run(many(), tmp_path)
    assert eax == 2
    assert first.blocks.translator.made > 100
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o77 == 0
    second, eax = run(many(), tmp_path)
    assert (eax, second.blocks.translator.made) == (2, 0)


@pytest.mark.parametrize("harm", ["cut", "changed", "writable by others"])
def test_store_that_cannot_be_trusted_is_not_run(tmp_path: Path, harm: str) -> None:
    """A store that is cut short, changed, or writable by somebody else is made anew instead of run."""
    run(many(), tmp_path)
    (kept,) = tmp_path.iterdir()
    data = kept.read_bytes()
    if harm == "cut":
        kept.write_bytes(data[:-100])
    elif harm == "changed":
        kept.write_bytes(data[:-5000] + b"\xcc" * 10 + data[-4990:])
    else:
        kept.chmod(0o666)
    again, eax = run(many(), tmp_path)
    assert eax == 2
    assert again.blocks.translator.made > 100


def test_full_store_begins_anew(tmp_path: Path) -> None:
    """A guest that fills the template store goes on with an empty one."""
    vm, eax = run(many(), tmp_path / "none", room=2000)
    assert eax == 2
    assert vm.blocks.translator.made > 100


def test_store_of_no_use_is_no_error(tmp_path: Path) -> None:
    """A directory for the store that cannot be written costs time later and nothing else."""
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    _, eax = run(ADD_UP, blocked)
    assert eax == 500500


def test_single_instruction_blocks_mean_the_same(tmp_path: Path) -> None:
    """Blocks of one instruction give what long blocks give."""
    assert run(ADD_UP, tmp_path, block_size=1)[1] == run(ADD_UP, tmp_path)[1] == 500500


def test_options_are_checked() -> None:
    """A code cache outside 8 to 1024 MiB is refused with what was expected."""
    with pytest.raises(ValueError, match="expected 8 to 1024"):
        TcgOptions(code_cache=4)


def test_full_irqchip_is_refused() -> None:
    """The translator says that a full irqchip is KVM's."""
    with pytest.raises(AcceleratorError, match="split"):
        Tcg().create_vm(VmSpec(irqchip="full"))


def test_unknown_cpu_model_and_feature_name_near_matches() -> None:
    """An unknown CPU model or feature is a configuration error with a near match."""
    with pytest.raises(ConfigError, match='"max"'):
        Tcg().create_vm(VmSpec(cpu="maxx"))
    with pytest.raises(ConfigError, match='"avx2"'):
        Tcg().create_vm(VmSpec(features={"avx22": True}))


def test_close_is_idempotent_and_vms_are_independent(tmp_path: Path) -> None:
    """Two VMs live side by side, and closing twice is closing once."""
    one = Tcg().create_vm(VmSpec(options=TcgOptions(templates="none")))
    two = Tcg().create_vm(VmSpec(options=TcgOptions(templates="none")))
    one.create_vcpu(0)
    two.create_vcpu(0)
    one.close()
    one.close()
    two.inject_nmi(0)
    two.close()


def test_code_is_never_writable_and_executable() -> None:
    """No mapping of a process that translates is both writable and executable."""
    vm = Tcg().create_vm(VmSpec(options=TcgOptions(templates="none")))
    maps = Path(f"/proc/{os.getpid()}/maps").read_text().splitlines()
    vm.close()
    assert not [line for line in maps if "wx" in line.split()[1]]
