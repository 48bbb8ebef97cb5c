"""The command line in a process of its own, and cards as pip would install them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]
"""Also where the console script is not on the path."""


def cardcage(*words: str, sites: tuple[Path, ...] = (), folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line with what is installed in *sites* too."""
    return subprocess.run(
        [*PROGRAM, *words],
        env={**os.environ, **({"PYTHONPATH": os.pathsep.join(map(str, sites))} if sites else {})},
        capture_output=True,
        text=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


def open_files(pid: int) -> list[str]:
    """What process *pid* has open; what it closes meanwhile is left out."""
    found = []
    for one in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{one}"))
    return found


def install(project: Path, site: Path) -> Path:
    """Build a wheel of *project* and unpack it in *site*, as pip does; returns *site*."""
    from hatchling.builders.wheel import WheelBuilder

    (made,) = WheelBuilder(str(project)).build(directory=str(site.parent / f"{site.name}-dist"), versions=["standard"])
    with zipfile.ZipFile(made) as archive:
        archive.extractall(site)
    return site
