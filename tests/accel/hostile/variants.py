"""Builds of the translator for the fuzzer: as it is, with patches, or with checks; each in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cardcage_tcg
from attrs import define, field

__all__ = ["ROOT", "Variant", "make"]

ROOT = Path(__file__).parents[3]
ROOMS = ("core", "accel", "devices", "plugins")
ASAN = (
    "detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0:handle_sigill=0:handle_abort=0:use_sigaltstack=0"
    ":detect_stack_use_after_return=0:allow_user_segv_handler=1:abort_on_error=0:exitcode=86:quarantine_size_mb=16"
)


@define
class Variant:
    """Where a worker finds the packages, and what its environment must hold."""

    accel: Path
    extra: dict[str, str] = field(factory=dict)
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def environment(self) -> dict[str, str]:
        """The environment of a worker."""
        path = [
            str(self.accel),
            *(str(ROOT / room) for room in ROOMS if room != "accel"),
            str(ROOT / "tests" / "accel"),
        ]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", **self.extra}


def make(kind: str = "product", patches: tuple[Path, ...] = (), root: Path = ROOT) -> Variant:
    """Build one.

    Args:
        kind: ``product`` (the translator that is imported here, or its like when there are *patches* or another
            *root*), ``check`` (invariants, bounds of arrays, AddressSanitizer, fences around the translator's memory).
        patches: for ``patch -p1`` in the repository's root; only below ``accel/``. Lines may have moved, not changed.
        root: whose ``accel`` it is.
    """
    if kind == "product" and not patches and root == ROOT:
        return Variant(Path(cardcage_tcg.__file__).parents[1])
    scratch = tempfile.TemporaryDirectory(prefix="hostile-build-")
    accel = Path(scratch.name, "accel")
    shutil.copytree(root / "accel", accel, ignore=shutil.ignore_patterns("__pycache__"))
    for patch in patches:
        with patch.open("rb") as text:
            subprocess.run(
                ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch"],
                cwd=scratch.name,
                stdin=text,
                check=True,
                stdout=subprocess.DEVNULL,
            )
    command = [sys.executable, "-m", "cardcage_tcg.native.build", *(["--check"] if kind == "check" else [])]
    path = os.pathsep.join([str(accel), str(ROOT / "core")])
    chosen = {"CC": "gcc"} if kind == "check" else {}  # whose sanitizers they are
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **chosen}, check=True)
    extra = {}
    if kind == "check":
        asan = subprocess.run(
            ["gcc", "-print-file-name=libasan.so"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        extra = {
            "LD_PRELOAD": os.path.realpath(asan.strip()), "ASAN_OPTIONS": ASAN, "PYTHONMALLOC": "malloc",
            "TCG_FENCES": "1",
        }  # fmt: skip
    return Variant(accel, extra, scratch)
