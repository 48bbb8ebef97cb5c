"""Build ``_native.so`` and ``layout.py`` from the C sources here: ``python -m cardcage_tcg.native.build`` (needs gcc).

Only whoever changes the sources runs this. The library is committed, so that installing and running need no compiler;
a test builds it again and compares. With ``--check`` the library asserts its invariants (``check.c``) and is
instrumented with AddressSanitizer and bounds checks: the process must have ``libasan.so`` preloaded, as the
hostile-guest fuzzer does.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["build", "main"]

HERE = Path(__file__).parent
SOURCES = ("entry.S", "world.c", "mmu.c", "blocks.c")
FLAGS = (
    *("-O2", "-g0", "-ffreestanding", "-fPIC", "-nostdlib", "-mgeneral-regs-only", "-mno-red-zone"),
    *("-fno-stack-protector", "-fvisibility=hidden", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
    *("-ffile-prefix-map=" + str(HERE) + "=.", "-Wall", "-Wextra", "-Werror", "-std=gnu11"),
)
LINK = (
    "-shared",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,now",
    "-Wl,-Bsymbolic",
    "-Wl,--hash-style=gnu",
    "-Wl,-s",
)
PREFIXES = "MODE DEBUG ARMED SHADOW R H STUB TLB JC XTLB MAX K T KEY STORE TRANSLATE ACCESS RESUME MAKE AS".split()
CHECKS = ("check.c",)
CHECK_FLAGS = (
    *("-DTCG_CHECK", "-g1", "-fsanitize=address", "--param=asan-globals=0", "-fno-sanitize-recover=all"),
    "-fsanitize=bounds-strict,shift,integer-divide-by-zero,signed-integer-overflow,bool,enum,vla-bound",
)
CONSTANTS = re.compile(rf"\b((?:{'|'.join(PREFIXES)})_[A-Z0-9_]+)\b")
STRUCTS = {
    "cpu": "",
    "vm": "VM_",
    "slot": "SLOT_",
    "block": "BLOCK_",
    "lapic": "LAPIC_",
    "seg": "SEG_",
    "site": "SITE_",
    "store": "STORE_",
    "limit": "LIMIT_",
    "bell": "BELL_",
    "route": "ROUTE_",
    "ring": "RING_",
    "device": "DEVICE_",
    "device_access": "DEVICE_ACCESS_",
}


def fields(header: str, struct: str) -> list[str]:
    """Names of a struct's members, as the header declares them."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    body = re.search(rf"struct {struct} {{([^\n]+)}};", header) or re.search(
        rf"struct {struct} {{(.*?)^}};", header, re.S | re.M
    )
    assert body is not None, struct
    text = body[1]
    text = re.sub(r"struct {[^}]*}", "struct x", text)
    text = re.sub(r"__attribute__\(\(\w+\(\d+\)\)\)", "", text)
    found = []
    for line in text.split(";"):
        names = re.sub(r"^\s*(struct \w+|\w+)\s", "", line.strip() + " ").split(",")
        found += [re.sub(r"\[.*", "", name).strip(" *") for name in names if name.strip(" *")]
    return found


def constants(cc: str) -> dict[str, int]:
    """Ask the compiler for offsets, sizes and enumerators."""
    header = (HERE / "cpu.h").read_text() + (HERE / "internal.h").read_text()
    wanted: dict[str, str] = {}
    for struct, prefix in STRUCTS.items():
        wanted |= {f"{prefix}{one.upper()}": f"offsetof(struct {struct}, {one})" for one in fields(header, struct)}
        wanted[f"SIZEOF_{struct.upper()}"] = f"sizeof(struct {struct})"
    for struct in ("tlb", "access", "page", "tmpl", "taccess"):
        wanted[f"SIZEOF_{struct.upper()}"] = f"sizeof(struct {struct})"
    code = re.sub(r"/\*.*?\*/", "", (HERE / "cpu.h").read_text() + (HERE / "internal.h").read_text(), flags=re.S)
    wanted |= {name: name for name in CONSTANTS.findall(code) if name not in wanted}
    wanted |= {
        f"HLP_{name}": f"HLP_{name}"
        for name in re.findall(r"^\s*HELPER\((\w+)", (HERE / "helpers.h").read_text(), re.M)
    }
    text = '#include "cpu.h"\n#include "internal.h"\n#include "helpers.h"\nvoid f(void) {\n' + "\n".join(
        f'__asm__("@@ {name} %0" : : "i"((long)({value})));' for name, value in wanted.items()
    )
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "offsets.c")
        source.write_text(text + "\n}\n")
        assembly = subprocess.run(
            [cc, "-S", "-O1", "-std=gnu11", "-I", str(HERE), "-o", "-", str(source)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"@@ (\w+) \$(-?\d+)", assembly)}


def build(target: Path, layout: Path, cc: str = "gcc", *, check: bool = False) -> None:
    """Compile into *target* and write the Python constants into *layout*; *check* for the variant with assertions."""
    found = constants(cc)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "offsets.h").write_text("".join(f"#define {name} {value}\n" for name, value in found.items()))
        names = {*SOURCES, *(one.name for one in HERE.glob("*.c") if check or one.name not in CHECKS)}
        sources = [str(HERE / name) for name in sorted(names)]
        flags = (*FLAGS, *CHECK_FLAGS, *LINK[:-1]) if check else (*FLAGS, *LINK)
        subprocess.run([cc, *flags, "-I", scratch, "-I", str(HERE), "-o", str(target), *sources], check=True)
    lines = [
        '"""Offsets and constants of the native half. Made by ``cardcage_tcg.native.build`` from its C headers."""',
        "",
    ]
    lines += [f"{name} = {value}" for name, value in found.items()]
    layout.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Build in place."""
    package = HERE.parent
    build(package / "_native.so", package / "layout.py", check="--check" in sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
