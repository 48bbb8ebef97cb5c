"""Build ``_native.so`` from the C sources here: ``python -m cardcage_virtio.native.build``.

It runs when a wheel is made or an editable installation (``hatch_build.py`` loads this file by its path), and by hand
after a change of the sources. The library is freestanding: it needs no C library. Any gcc or clang from Debian 12 on
will do, and so does ``ziglang`` from PyPI. Without the library disks are served by Python alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["BuildError", "build", "build_in_place", "compiler", "digest", "main"]

HERE = Path(__file__).parent
LIBRARY = "_native.so"
FLAGS = (
    *("-O2", "-g0", "-shared", "-fPIC", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fvisibility=hidden"),
    *("-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fcf-protection=none", "-fno-sanitize=all"),
    *("-fno-strict-aliasing", "-ffile-prefix-map=" + str(HERE) + "=.", "-Wall", "-Wextra", "-std=gnu11"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,now", "-Wl,--hash-style=gnu", "-Wl,-z,defs", "-Wl,-s"),
)


class BuildError(Exception):
    """The library cannot be built; the message is one line that says why."""


def compiler() -> str:
    """The command of a C compiler: ``$CC``, else gcc, clang or cc, else PyPI's ``ziglang``. Raises BuildError."""
    import shlex
    import shutil
    from importlib.util import find_spec

    named = os.environ.get("CC", "").strip() or next((cc for cc in ("gcc", "clang", "cc") if shutil.which(cc)), "")
    if named:
        return named
    found = find_spec("ziglang")
    if found is None or not found.submodule_search_locations:
        raise BuildError("no C compiler: install gcc or clang, or PyPI's: pip install ziglang")
    return shlex.join([str(Path(found.submodule_search_locations[0], "zig")), "cc"])


def digest() -> str:
    """A hash of the sources, in hexadecimal; behind the library is that of what it was made from.

    By the module beneath hashlib, which loads OpenSSL: that takes longer than all we hash.
    """
    try:
        from _blake2 import blake2b
    except ImportError:  # an interpreter that was built without
        from hashlib import blake2b
    found = blake2b(digest_size=32)
    for name in sorted(os.listdir(HERE)):
        if name.endswith((".c", "build.py")):
            data = (HERE / name).read_bytes()
            found.update(f"{name} {len(data)}\n".encode() + data)
    return found.hexdigest()


def build(target: Path, cc: str = "", *, more: tuple[str, ...] = ()) -> None:
    """Compile into *target* by the compiler *cc*, by default :func:`compiler`'s, with *more* arguments at the end.

    Raises BuildError; a file that was there is still as it was.
    """
    import shlex
    import subprocess
    import tempfile

    words = shlex.split(cc or compiler())
    # the least of x86-64, whatever the compiler was configured for; zig has another name for that
    is_zig = "ziglang" in words or any(Path(word).name == "zig" for word in words)
    least = ("-target", "x86_64-linux-gnu", "-Wno-unused-command-line-argument") if is_zig else ("-march=x86-64",)
    sources = [str(one) for one in sorted(HERE.glob("*.c"))]
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, LIBRARY)
        caches = {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
        command = [*words, *least, *FLAGS, "-o", str(made), *sources, *more]
        try:
            subprocess.run(command, check=True, env={**os.environ, **caches})
        except OSError as error:
            raise BuildError(f"C compiler {words[0]}: {error.strerror}") from error
        except subprocess.CalledProcessError as error:
            raise BuildError(f"C compiler {words[0]}: ended with status {error.returncode}") from error
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        # behind the library, where no linker leaves it out and no loader looks
        beside.write_bytes(made.read_bytes() + f"\nsources {digest()}\n".encode())
        beside.chmod(0o755)
        beside.replace(target)  # in one step: a process that has the old one mapped keeps it


def build_in_place(cc: str = "") -> None:
    """Build where the package is imported from."""
    build(HERE.parent / LIBRARY, cc)


def main() -> int:
    """Build in place."""
    try:
        build_in_place()
    except BuildError as error:
        print(f"cardcage_virtio: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
