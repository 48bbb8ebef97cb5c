"""The translator's kept template store and its code buffer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from struct import pack, pack_into

import pytest
from cardcage.accelerator import MemorySlot, VmSpec
from cardcage.errors import AcceleratorError, ConfigError
from cardcage.memory import RamBlock
from cardcage.vcpu import Exit
from cardcage.x86 import Segment
from cardcage_tcg import clock
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from cardcage_tcg.library import is_ours
from cardcage_tcg.translate import store
from cardcage_tcg.translate.recipes import Recipes, entries_of
from cardcage_tcg.translate.store import STORE_SIZE, latest
from cardcage_tcg.vm import TcgOptions, TcgVm
from hypothesis import given
from hypothesis import strategies as st


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


RUN = """
import json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_tcg_store import many, run
vm, eax = run(many(), Path({folder!r}))
print(json.dumps([eax, vm.blocks.translator.made]))
"""


def run_alone(folder: Path) -> tuple[int, int]:
    """Run :func:`many` in a process of its own; its EAX, and the templates that were made while it ran."""
    code = RUN.format(here=str(Path(__file__).parent), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    eax, made = json.loads(done.stdout)
    return eax, made


def test_a_process_begins_with_what_its_last_machine_made(tmp_path: Path) -> None:
    """A second VM of a process begins with the templates that the first one made."""
    first, eax = run(many(), tmp_path)
    assert eax == 2
    assert first.blocks.translator.made > 100
    second, eax = run(many(), tmp_path)
    assert (eax, second.blocks.translator.made) == (2, 0)


@pytest.mark.once
def test_code_is_kept_by_a_process_that_ran_no_guest(tmp_path: Path) -> None:
    """A run leaves the instructions that it had no templates for; the next makes them before its guest runs, and keeps
    the code; the third begins with it."""
    assert run_alone(tmp_path)[0] == 2
    (left,) = (tmp_path / "wanted").iterdir()
    assert [one.name for one in tmp_path.iterdir()] == ["wanted"], "no code was written"
    assert left.stat().st_mode & 0o77 == 0
    run_alone(tmp_path)
    assert list((tmp_path / "wanted").iterdir()) == []
    (kept,) = (one for one in tmp_path.iterdir() if one.name != "wanted")
    assert kept.stat().st_mode & 0o77 == 0
    assert run_alone(tmp_path) == (2, 0)


def test_what_the_next_process_makes_is_the_same(tmp_path: Path) -> None:
    """Templates that are made from the instructions alone are byte for byte those of the run."""
    vm, _ = run(many(), tmp_path)
    recipes = Recipes(tmp_path / "wanted", vm.blocks.store.recipes.name)
    entries = [one for name in os.listdir(tmp_path / "wanted") for one in entries_of(recipes.read(name))]
    again = TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates="none")))
    again.blocks.follow(entries)
    theirs = bytes(again.blocks.store.area.view[: again.blocks.store.used])
    again.close()
    assert theirs == latest(tmp_path / recipes.name)


@pytest.mark.parametrize("harm", ["cut", "changed", "of another kind", "writable by others"])
@pytest.mark.once
def test_store_that_cannot_be_trusted_is_not_run(tmp_path: Path, harm: str) -> None:
    """A store that is cut short, changed, no store, or writable by somebody else is made anew instead of run."""
    run_alone(tmp_path)
    run_alone(tmp_path)
    (kept,) = (one for one in tmp_path.iterdir() if one.name != "wanted")
    data = kept.read_bytes()
    if harm == "cut":
        kept.write_bytes(data[:-100])
    elif harm == "changed":
        kept.write_bytes(data[:-5000] + b"\xcc" * 10 + data[-4990:])
    elif harm == "of another kind":
        other = bytes(4) + data[4:-4]
        kept.write_bytes(other + pack("<I", zlib.crc32(other)))
    else:
        kept.chmod(0o666)
    eax, made = run_alone(tmp_path)
    assert eax == 2
    assert made > 100


VERIFIED = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_tcg_store import ADD_UP, run
from cardcage_tcg.translate import store
whole, times = store._whole, []
store._whole = lambda data: times.append(whole(data)) or times[-1]
folder = Path({folder!r})
for _ in range(3):
    run(ADD_UP, folder)
assert len(times) == 1 and times[0], times
(kept,) = folder.glob("templates-*")
kept.with_name("new").write_bytes(kept.read_bytes())
kept.with_name("new").chmod(0o600)
kept.with_name("new").rename(kept)
run(ADD_UP, folder)
assert len(times) == 2, "another file was not verified"
with kept.open("r+b") as file:
    file.write(b"\\xff" * 4)
run(ADD_UP, folder)
assert times[2:] == [0], "a file that was written was not verified"
"""


@pytest.mark.once
def test_a_store_is_verified_once_a_process(tmp_path: Path) -> None:
    """VMs of one process map the store that the first of them verified, and verify one that was replaced or written."""
    run_alone(tmp_path)
    run_alone(tmp_path)
    code = VERIFIED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.once
def test_what_a_machine_adds_is_its_own(tmp_path: Path) -> None:
    """A VM's new templates are neither in the kept file nor in a VM beside it that began with the same file."""
    run_alone(tmp_path)
    run_alone(tmp_path)
    (kept,) = tmp_path.glob("templates-*")
    before, beside = kept.read_bytes(), TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates=str(tmp_path))))
    used = beside.blocks.store.used
    vm, _ = run(bytes.fromhex("0fc8 0fc9 0fca f4"), tmp_path)  # bswap
    assert vm.blocks.translator.made
    assert (kept.read_bytes(), beside.blocks.store.used) == (before, used)
    assert bytes(beside.blocks.store.area.view[:used]) == before[:used]
    beside.close()


def test_few_stores_are_held(tmp_path: Path) -> None:
    """A process that uses many folders for templates holds the files of the last few."""
    for at in range(store.KEPT_STORES + 2):
        run(many(), tmp_path / str(at))
    assert len(store._beginnings) == store.KEPT_STORES


def test_the_counter_is_measured_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM takes the frequency of the time-stamp counter that the first of the process measured."""
    TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates="none"))).close()
    monkeypatch.setattr(clock, "_khz", 1_234_567)
    vm = TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates="none")))
    assert vm.clock.tsc_khz == 1_234_567
    vm.close()


SPARED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from cardcage.accelerator import VmSpec
from cardcage_tcg.vm import TcgOptions, TcgVm
vm = TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates={folder!r})))
vm.create_vcpu(0)
there = {{"iced_x86", "cardcage_tcg.translate.translator"}} & set(sys.modules)
assert not there, there
vm.close()
from test_tcg_store import ADD_UP, many, run
vm, eax = run(many(), Path({folder!r}))
assert eax == 2 and vm._blocks is None, "the translator was needed"
"""


def test_a_kept_store_spares_the_decoder(tmp_path: Path) -> None:
    """A VM that begins with a kept store loads no decoder, nor does a guest that needs no other templates."""
    run_alone(tmp_path)
    run_alone(tmp_path)
    code = SPARED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_code_of_another_user_is_loaded_before_capabilities_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages in a folder of somebody else's are not ours to read later: root reads them by a capability."""
    assert is_ours("cardcage_tcg", "iced_x86")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_ours("theirs")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert is_ours("theirs") == (user == 0)
    if user == 0:
        monkeypatch.undo()
        monkeypatch.syspath_prepend(tmp_path)
        os.chown(tmp_path, 12345, 12345)
        assert not is_ours("theirs")
    assert not is_ours("no_such_package")


@given(data=st.binary(max_size=400))
def test_a_recipe_may_be_anything(data: bytes) -> None:
    """Bytes that another process left give instructions of 1 to 15 bytes with keys that there are, and no error."""
    for key, raw in entries_of(data):
        assert 1 <= len(raw) <= 15
        assert key < L.KEY_SINGLE << 1


@given(
    entries=st.lists(st.tuples(st.integers(0, (L.KEY_SINGLE << 1) - 1), st.binary(min_size=1, max_size=15)), max_size=6)
)
def test_a_hostile_recipe_is_followed_without_harm(entries: list[tuple[int, bytes]]) -> None:
    """Any instruction in any mode makes templates or none; nothing is raised, and the VM still runs guests."""
    vm = TcgVm(VmSpec(irqchip="none", options=TcgOptions(templates="none")))
    packed = b"".join(pack("<IB", key, len(raw)) + raw for key, raw in entries)
    vm.blocks.follow(entries_of(packed))
    vm.close()


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
