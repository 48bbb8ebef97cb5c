"""A stranger's cards as they come from outside: a distribution on the path, run by the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from attrs import field, frozen

MAIN = "import sys; from cardcage_cli import main; sys.exit(main())"
GUEST = bytes.fromhex("e490 b000 e6f4 f4")
"""``in al,0x90; mov al,0; out 0xf4,al; hlt``: a read of a device at port 0x90, then the end with status 1."""

MACHINE = """
[machine]
memory = "4M"
platform = "none"
accel = "tcg"
[boot]
protocol = "raw"
image = "guest.bin"
[[device]]
type = "isa-debug-exit"
iobase = 0xf4
"""

HEAD = """
from attrs import field, frozen
from cardcage.device import Pio
from cardcage.errors import *
from cardcage.hookspecs import hookimpl
"""
HEAD_LINES = HEAD.count("\n")


@frozen
class Result:
    """How a command ended: its status, the lines of standard output and standard error."""

    status: int
    out: list[str]
    err: list[str]

    @property
    def outcome(self) -> str:
        """The one line of standard error that begins with ``outcome: ``."""
        (line,) = [one for one in self.err if one.startswith("outcome: ")]
        return line


@frozen
class Shop:
    """A directory with distributions of strangers and a machine's file, from which commands are run."""

    folder: Path
    environment: dict[str, str] = field(factory=dict)

    def card(self, name: str, code: str, *, entry: str = "", group: str = "cardcage") -> Path:
        """Install distribution *name* 1.0, whose card *name* is a module of that name; returns the module's file."""
        module = self.folder / f"{name}.py"
        module.write_text(HEAD + textwrap.dedent(code))
        info = self.folder / f"{name}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry or f'{name} = {name}'}\n")
        return module

    def machine(self, text: str = "") -> str:
        """Write a machine's file, with *text* after what all of them have; returns its name."""
        (self.folder / "guest.bin").write_bytes(GUEST)
        (self.folder / "vm.toml").write_text(MACHINE + text)
        return "vm.toml"

    def run(self, *words: str, timeout: float = 120) -> Result:
        """Run ``cardcage`` with *words*, as a process of its own."""
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONDONTWRITEBYTECODE": "1",
                **self.environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())
