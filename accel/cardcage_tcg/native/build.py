"""Build ``_native.so`` and ``layout.py`` from the C sources here: ``python -m cardcage_tcg.native.build``.

It runs when a wheel is made or an editable installation (``hatch_build.py`` loads this file by its path, without the
package and what that needs), and by hand after a change of the sources. Any gcc or clang from Debian 12 on will do,
and so does ``ziglang`` from PyPI. The library is freestanding: it needs no C library, neither here nor where it runs.

With ``--check`` the library asserts its invariants (``check.c``) and is instrumented with gcc's AddressSanitizer and
bounds checks: the process must have ``libasan.so`` preloaded, as the hostile-guest fuzzer does.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path

# The translator loads this file for digest() at each start: what only compiling needs is imported where it is done.

__all__ = ["BuildError", "build", "build_in_place", "digest", "main", "system_compiler", "zig"]

HERE = Path(__file__).parent
# Guest code runs with its own vector and x87 registers while C code of ours does: no compiler may touch them. Each kind
# is named, since zig's clang takes -mgeneral-regs-only and does not obey; cpu.h refuses to be compiled with one left.
FLAGS = (
    *("-O2", "-g0", "-ffreestanding", "-fPIC", "-nostdlib", "-mno-red-zone", "-fno-stack-protector"),
    *("-mgeneral-regs-only", "-mno-sse", "-mno-sse2", "-mno-mmx", "-mno-80387", "-fno-sanitize=all"),
    *("-fvisibility=hidden", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fcf-protection=none"),
    *("-ffile-prefix-map=" + str(HERE) + "=.", "-Wall", "-Wextra", "-std=gnu11"),
)
LINK = (
    "-shared",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,now",
    "-Wl,-Bsymbolic",
    "-Wl,--hash-style=gnu",
    "-Wl,-z,defs",  # the last two are not for --check, which calls libasan.so and has symbols
    "-Wl,-s",
)
PREFIXES = (
    "MODE DEBUG ARMED POINT STOP SHADOW R H STUB TLB JC XTLB MAX K T KEY STORE TRANSLATE ACCESS RESUME MAKE AS"
    " CHUNK HEADER".split()
)
CHECKS = ("check.c",)
CHECK_FLAGS = (
    *("-DTCG_CHECK", "-g1", "-fsanitize=address", "--param=asan-globals=0", "-fno-sanitize-recover=all"),
    "-fsanitize=bounds-strict,shift,integer-divide-by-zero,signed-integer-overflow,bool,enum,vla-bound",
)
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
    "dirty_log": "DIRTY_LOG_",
    "dirty_area": "DIRTY_AREA_",
    "point": "POINT_",
    "points": "POINTS_",
}


PROBE = {
    "probe.S": ".intel_syntax noprefix\n.globl probe\nprobe: mov rax, [rsp+8]\nret\n",
    "probe.c": '_Static_assert(sizeof(void *) == 8, "");\nlong probe(void);\nlong other(void) { return probe(); }\n',
}


class BuildError(Exception):
    """The library cannot be built; the message is one line that says why."""


def run(cc: str, *arguments: str) -> None:
    """Run the compiler *cc*. Raises BuildError, after what it wrote to standard error."""
    import shlex
    import subprocess
    import tempfile

    words = shlex.split(cc)
    # The least of x86-64, whatever the compiler was configured for; zig has other names for that and for everything.
    is_zig = "ziglang" in words or any(Path(word).name == "zig" for word in words)
    quiet = "-Wno-unused-command-line-argument"  # which zig itself adds
    target = ("-target", "x86_64-linux-gnu", quiet) if is_zig else ("-march=x86-64",)
    with tempfile.TemporaryDirectory() as scratch:
        caches = {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
        try:
            subprocess.run([*words, *target, *arguments], check=True, env={**os.environ, **caches})
        except OSError as error:
            raise BuildError(f"C compiler {cc}: {error.strerror}") from error
        except subprocess.CalledProcessError as error:
            raise BuildError(f"C compiler {cc}: ended with status {error.returncode}") from error


@cache
def can(cc: str) -> bool:
    """Tell if *cc* makes a library of what ours is made of: C, assembly in Intel's syntax, our flags."""
    import shlex
    import shutil
    import tempfile

    if shutil.which(shlex.split(cc)[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in PROBE.items():
            Path(scratch, name).write_text(text)
        sources = [str(Path(scratch, name)) for name in PROBE]
        try:
            run(cc, *FLAGS, *LINK, "-o", str(Path(scratch, "probe.so")), *sources)
        except BuildError:
            return False
    return True


def system_compiler() -> str:
    """The command of this system's C compiler: ``$CC`` where that is set, else gcc, clang or cc; empty if none is.

    One that cannot make such a library (no linker, another processor) is passed over, after what it wrote to standard
    error; an unusable ``$CC`` raises BuildError.
    """
    if chosen := os.environ.get("CC", "").strip():
        if not can(chosen):
            raise BuildError(f"CC={chosen}: it cannot be run, or cannot build a shared library for Linux on x86-64")
        return chosen
    return next((cc for cc in ("gcc", "clang", "cc") if can(cc)), "")


def zig() -> str:
    """The command of the compiler in PyPI's ``ziglang``; empty where that is not installed for this interpreter."""
    import shlex
    from importlib.util import find_spec

    found = find_spec("ziglang")
    if found is None or not found.submodule_search_locations:
        return ""
    return shlex.join([str(Path(found.submodule_search_locations[0], "zig")), "cc"])


def hash_of(folder: str, endings: tuple[str, ...], beside: str = "") -> str:
    """BLAKE2 over the files below *folder* whose names have such an *ending*, in hexadecimal; text *beside* goes first.

    By the module beneath hashlib, which loads OpenSSL: that takes longer than all we hash.
    """
    try:
        from _blake2 import blake2b
    except ImportError:  # an interpreter that was built without
        from hashlib import blake2b
    made = blake2b(beside.encode(), digest_size=32)
    for path in _below(folder, endings):
        with open(path, "rb", buffering=0) as file:
            data = file.read()
        made.update(f"{path[len(folder) :]} {len(data)}\n".encode())
        made.update(data)
    return made.hexdigest()


def _below(folder: str, endings: tuple[str, ...]) -> list[str]:
    with os.scandir(folder) as entries:
        found = [one for one in entries if one.name.endswith(endings) or one.is_dir()]
    parts = ([one.path] if one.is_file() else _below(one.path, endings) for one in found)
    return sorted(path for part in parts for path in part)


def digest() -> str:
    """A hash of the sources: ``layout.py`` has that of what it was made from."""
    return hash_of(str(HERE), (".c", ".h", ".S", "build.py"))


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
    for struct in ("tlb", "access", "page", "tmpl", "taccess", "chunk"):
        wanted[f"SIZEOF_{struct.upper()}"] = f"sizeof(struct {struct})"
    code = re.sub(r"/\*.*?\*/", "", (HERE / "cpu.h").read_text() + (HERE / "internal.h").read_text(), flags=re.S)
    named = set(re.findall(rf"\b((?:{'|'.join(PREFIXES)})_[A-Z0-9_]+)\b", code))
    if both := sorted(named & wanted.keys()):
        raise BuildError(f"{both[0]}: a constant, and by its prefix a structure's member as well")
    wanted |= {name: name for name in sorted(named)}
    wanted |= {
        f"HLP_{name}": f"HLP_{name}"
        for name in re.findall(r"^\s*HELPER\((\w+)", (HERE / "helpers.h").read_text(), re.M)
    }
    # .ascii, since not every compiler leaves text that no assembler takes as it is
    text = '#include "cpu.h"\n#include "internal.h"\n#include "helpers.h"\nvoid f(void) {\n' + "\n".join(
        f'__asm__(".ascii \\"@@ {name} %c0@\\"" : : "i"((long)({value})));' for name, value in wanted.items()
    )
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        source, result = Path(scratch, "offsets.c"), Path(scratch, "offsets.s")
        source.write_text(text + "\n}\n")
        run(cc, "-S", *FLAGS, "-I", str(HERE), "-o", str(result), str(source))
        assembly = result.read_text()
    return {name: int(value) for name, value in re.findall(r"@@ (\w+) (-?\d+)@", assembly)}


def build(target: Path, layout: Path, cc: str = "", *, check: bool = False, more: tuple[str, ...] = ()) -> str:
    """Compile into *target*, write the Python constants into *layout*, and return the command of the compiler.

    Args:
        cc: command of the C compiler; empty for this system's, else ``ziglang``'s.
        check: the variant with assertions.
        more: arguments for it, behind those that it gets anyway.

    Raises:
        BuildError: there is no compiler, or it failed. Files that were there are still as they were.
    """
    cc = cc or system_compiler() or zig()
    if not cc:
        raise BuildError("no C compiler: install gcc or clang, or PyPI's: pip install ziglang")
    sources_are = digest()
    found = constants(cc)
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "offsets.h").write_text("".join(f"#define {name} {value}\n" for name, value in found.items()))
        left = () if check else CHECKS
        sources = [str(one) for one in sorted(HERE.rglob("*.[cS]")) if one.name not in left]
        flags = (*FLAGS, *CHECK_FLAGS, *LINK[:-2]) if check else (*FLAGS, *LINK)
        made = Path(scratch, "_native.so")
        run(cc, *flags, *more, "-I", scratch, "-I", str(HERE), "-o", str(made), *sources)
        lines = [
            '"""Offsets and constants of the native half. Made by ``cardcage_tcg.native.build`` from its C headers."""',
            "",
            f'SOURCES = "{sources_are}"',
        ]
        lines += [f"{name} = {value}" for name, value in found.items()]
        put(target, made.read_bytes())
    put(layout, ("\n".join(lines) + "\n").encode())
    return cc


def put(path: Path, data: bytes) -> None:
    """Write a file in one step: a process that has the old library mapped keeps it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.chmod(0o755 if path.suffix == ".so" else 0o644)
    beside.replace(path)


def build_in_place(*, check: bool = False) -> str:
    """Build where the package is imported from, and return the command of the compiler."""
    package = HERE.parent
    return build(package / "_native.so", package / "layout.py", check=check)


def main() -> int:
    """Build in place."""
    try:
        build_in_place(check="--check" in sys.argv[1:])
    except BuildError as error:
        print(f"cardcage_tcg: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
