"""The translator's native library, by each compiler that is here, and what is said where it was not built."""

from __future__ import annotations

import ast
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from struct import iter_unpack, unpack_from

import cardcage_tcg
import pytest
from cardcage_tcg import NOT_BUILT, library
from cardcage_tcg.native import build
from iced_x86 import CpuidFeature, Decoder, Instruction, InstructionInfoFactory, Mnemonic, RegisterExt

PACKAGE = Path(cardcage_tcg.__file__).parent
MADE = ("_native.so", "layout.py")
ON_PURPOSE = {
    *(Mnemonic.FXSAVE64, Mnemonic.FXRSTOR64, Mnemonic.XSAVE64, Mnemonic.XRSTOR64, Mnemonic.VZEROUPPER),
    *(Mnemonic.FNINIT, Mnemonic.LDMXCSR, Mnemonic.STMXCSR),
}
"""What entry.S and xsave.c have for changing from the host's vector state to the guest's and back."""


def copy(target: Path) -> Path:
    """The package below *target*, without what was built."""
    package = target / "cardcage_tcg"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", *MADE))
    return package


def python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where *package* is the translator."""
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["gcc", "clang", "ziglang"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the library that one compiler made, warnings being errors."""
    cc = build.zig() if request.param == "ziglang" else request.param
    if not cc or not build.can(cc):
        pytest.skip(f"{request.param} is not installed")
    package = copy(tmp_path_factory.mktemp(request.param))
    build.build(package / "_native.so", package / "layout.py", cc, more=("-Werror",))
    return package


def sections(elf: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and contents of each section (System V ABI, ELF-64)."""
    (offset,), (size, count) = unpack_from("<Q", elf, 40), unpack_from("<HH", elf, 58)
    for at in range(offset, offset + size * count, size):
        _, kind, flags, _, start, length = unpack_from("<IIQQQQ", elf, at)
        yield kind, flags, b"" if kind == 8 else elf[start : start + length]  # SHT_NOBITS


def guests(instruction: Instruction, used: InstructionInfoFactory) -> bool:
    """Tell if it touches an x87, MMX, vector or mask register, or other state of the x87 unit."""
    if CpuidFeature.FPU in instruction.cpuid_features() or instruction.mnemonic in ON_PURPOSE:
        return True
    kinds = (RegisterExt.is_st, RegisterExt.is_mm, RegisterExt.is_vector_register, RegisterExt.is_k)
    return any(kind(one.register) for one in used.info(instruction).used_registers() for kind in kinds)


def test_library_leaves_the_guests_registers_alone(built: Path) -> None:
    """No instruction of the library touches vector, mask or x87 state, but for those that change it on purpose."""
    used, found, seen = InstructionInfoFactory(), set(), 0
    for _, flags, data in sections((built / "_native.so").read_bytes()):
        if flags & 4:  # SHF_EXECINSTR
            for one in Decoder(64, data):
                assert one.mnemonic != Mnemonic.INVALID
                seen += 1
                if guests(one, used):
                    found.add(one.mnemonic)
    assert found == ON_PURPOSE
    assert seen > 10_000


def test_library_exports_and_needs(built: Path) -> None:
    """The library exports all that library.py names, wants no symbol of others, and needs no other library."""
    loaded = ctypes.CDLL(str(built / "_native.so"))
    assert [name for name in library._SIGNATURES if not hasattr(loaded, name)] == []
    kinds = {kind: data for kind, _, data in sections((built / "_native.so").read_bytes())}
    assert 1 not in {tag for tag, _ in iter_unpack("<QQ", kinds[6])}  # DT_NEEDED in SHT_DYNAMIC
    symbols = list(iter_unpack("<IBBHQQ", kinds[11]))[1:]  # SHT_DYNSYM
    assert all(place for _, _, _, place, _, _ in symbols)  # none is SHN_UNDEF
    assert len(symbols) >= len(library._SIGNATURES)


def test_layout_is_the_same_by_any_compiler(built: Path) -> None:
    """Offsets and constants are those of the library that is installed here."""
    assert ast.dump(ast.parse((built / "layout.py").read_text())) == ast.dump(
        ast.parse((PACKAGE / "layout.py").read_text())
    )


def test_library_runs_a_guest(built: Path) -> None:
    """Guests run on the library, and their templates are kept and taken again."""
    tests = str(Path(__file__).with_name("test_tcg_store.py"))
    done = python(built, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "kept or single_instruction")
    assert done.returncode == 0, done.stdout
    where = python(built, "-c", "from cardcage_tcg import library; print(library.__file__)")
    assert Path(where.stdout.strip()).parent == built


def test_building_again_gives_the_same(built: Path, tmp_path: Path) -> None:
    """A compiler makes the same library from the same sources, wherever they are."""
    cc = build.zig() if "ziglang" in str(built) else "gcc" if "gcc" in str(built) else "clang"
    package = copy(tmp_path / "elsewhere")
    code = f"from cardcage_tcg.native import build as b; b.build(b.HERE.parent / '_native.so', b.HERE / 'x', {cc!r})"
    done = python(package, "-c", code)
    assert done.returncode == 0, done.stderr
    assert (package / "_native.so").read_bytes() == (built / "_native.so").read_bytes()


PROBE = "from cardcage_tcg.accel import Tcg; print(Tcg().probe().reason)"


def test_where_nothing_was_built_it_says_what_builds_it(tmp_path: Path) -> None:
    """A tree without the library says in one line which command makes it, whatever is imported, and that does."""
    package = copy(tmp_path)
    assert python(package, "-c", PROBE).stdout == f"tcg: {NOT_BUILT}\n"
    assert python(package, "-c", "import cardcage_tcg.vm").stderr.endswith(f"\nImportError: {NOT_BUILT}\n")
    if not build.system_compiler() and not build.zig():
        pytest.skip("no compiler is installed")
    done = python(package, "-m", NOT_BUILT.rpartition("python -m ")[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert python(package, "-c", PROBE).stdout == "binary translation\n"


def test_library_of_other_sources_is_not_run(tmp_path: Path) -> None:
    """Once its sources changed, a library is refused until it is built again."""
    package = copy(tmp_path)
    for name in MADE:
        shutil.copy(PACKAGE / name, package / name)
    assert python(package, "-c", PROBE).stdout == "binary translation\n"
    with (package / "native" / "cpu.h").open("a") as header:
        header.write("\n")
    assert "was built from other sources" in python(package, "-c", PROBE).stdout


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that is all of PATH, without CC."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    build.can.cache_clear()
    yield tmp_path
    build.can.cache_clear()


def tool(directory: Path, name: str, text: str) -> None:
    """A program in *directory*; what is known of it is forgotten."""
    build.can.cache_clear()
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def test_compiler_is_one_that_can(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$CC comes first, with its arguments; then gcc, clang and cc, but for those that fail; then there is none."""
    assert build.system_compiler() == ""
    tool(tools, "gcc", "exit 1")
    tool(tools, "cc", "exit 0")
    assert build.system_compiler() == "cc"
    tool(tools, "mine", 'test "$1" = --fast')
    monkeypatch.setenv("CC", "mine --fast")
    assert build.system_compiler() == "mine --fast"


@pytest.mark.parametrize("chosen", ["missing", "broken"])
def test_chosen_compiler_is_not_replaced(tools: Path, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """A $CC that is not there, or that fails, is an error that names it, although another compiler would do."""
    tool(tools, "gcc", "exit 0")
    tool(tools, "broken", "exit 1")
    monkeypatch.setenv("CC", chosen)
    with pytest.raises(build.BuildError, match=f"CC={chosen}: it cannot be run"):
        build.system_compiler()


def test_failed_build_leaves_what_was_there(tmp_path: Path) -> None:
    """A compiler that fails is named in one line, and changes neither file."""
    library, layout = tmp_path / "_native.so", tmp_path / "layout.py"
    library.write_text("old")
    with pytest.raises(build.BuildError, match="C compiler false: ended with status 1"):
        build.build(library, layout, "false")
    assert library.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [library]
