"""The code blocks of README and docs, and a reader who runs them as printed, with a home that was empty before."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field, frozen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

OFF = bytes.fromhex("ba0406b80020eff4")
"""A boot sector that powers off by ACPI."""
UP = bytes.fromhex("baf803b075eeb070eeb00aeefaf4")
"""A boot sector that writes "up" to COM1 and halts."""
EXIT = struct.pack("<8I", 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000) & 0xFFFFFFFF, *(0x100000,) * 2, 0, 0, 0x100020)
EXIT += bytes.fromhex("66baf40031c0eff4")
"""A Multiboot kernel, flat, that writes 0 to port 0xF4."""
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(one for one in sorted((ROOT / "docs").glob("*.md")) if not one.match("*.in.md"))]
"""What a reader sees: ``*.in.md`` are parts that ``docs/reference.py`` makes pages of."""
RUN = ("toml", "sh", "console", "python")
"""Languages of blocks that are run; ``text`` and ``cil`` are shown."""
SCRIPT = "#!{python}\nimport sys\nfrom cardcage_cli import main\nsys.exit(main())\n"
LIMIT = 900
"""Seconds for one block: a guest on a busy host."""


@frozen
class Block:
    """A block: its page's name, its place among those of the page that are run, from 1, its language and its text."""

    page: str
    number: int
    language: str
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.page}-{self.number}-{self.language}"


def fenced(page: Path) -> list[tuple[str, str]]:
    """All blocks of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run."""
    found = [(language, text) for language, text in fenced(page) if language in RUN]
    return [Block(page.name, at + 1, *one) for at, one in enumerate(found)]


def block(page: str, number: int) -> Block:
    """One block."""
    return next(one for path in PAGES if path.name == page for one in blocks(path) if one.number == number)


@define
class Reader:
    """Somebody who has installed cardcage and follows a page.

    Attributes:
        folder: where the reader is. home: empty at first; what is fetched lies in it, for all readers of a session.
        sites: folders with cards installed besides. state: ``XDG_STATE_HOME``, where what a reader keeps by a name lies
            (snapshots); that of *home* if None.
    """

    folder: Path
    home: Path
    sites: list[Path] = field(factory=list)
    state: Path | None = None

    def __attrs_post_init__(self) -> None:
        programs = self.home.parent / "bin"
        for one in (self.folder, self.home, programs, self.home.parent / "run"):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        scripts = {
            "cardcage": SCRIPT.format(python=sys.executable),
            "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        }
        for name, text in scripts.items():
            if not (programs / name).exists():
                (programs / name).write_text(text)
                (programs / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """The environment: nothing of ours but where the programs are."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "CARDCAGE_", "PYTHON"))
        }
        path = f"{self.home.parent / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin:/usr/lib/qemu"
        run = str(self.home.parent / "run")
        more = {"HOME": str(self.home), "XDG_RUNTIME_DIR": run, "PATH": path, "PYTHONUNBUFFERED": "1"}
        if self.state is not None:
            more["XDG_STATE_HOME"] = str(self.state)
        return {**kept, **more, **({"PYTHONPATH": os.pathsep.join(map(str, self.sites))} if self.sites else {})}

    def run(
        self,
        script: str,
        *,
        status: int | None = 0,
        talk: Iterable[tuple[str, str]] = (),
        before: Iterable[str] = (),
    ) -> str:
        """Run a shell script; returns all that it wrote.

        Args:
            status: its exit status, None for any. talk: what is waited for, then typed. before: words of a program that
                runs it (``unshare -n``).
        """
        command = [*before, "timeout", str(LIMIT), "bash", "-euo", "pipefail", "-c", script]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        text, read = "", 0
        try:
            for awaited, answer in talk:
                while (at := text.find(awaited, read)) < 0:
                    data = os.read(process.stdout.fileno(), 65536)
                    assert data, f"{awaited!r} did not come:\n{text}"
                    text += data.decode(errors="replace")
                read = at + len(awaited)
                assert process.stdin is not None
                process.stdin.write(answer.encode())
                process.stdin.flush()
            text += process.stdout.read().decode(errors="replace")
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.stdout.close()
            ended = process.wait()
        assert status in (None, ended), f"status {ended} of\n{script}\n{text}"
        return text

    def console(self, session: str, *, status: int | None = 0) -> None:
        """Run each command after ``$``, and compare its output where the page shows one: columns may be wider."""
        commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.MULTILINE)
        assert commands, session
        for command, output in commands:
            said = self.run(command, status=status)
            if output:
                shown = [[line.split() for line in text.splitlines()] for text in (said, output)]
                assert shown[0] == shown[1], f"{command}\n{said}"

    def write(self, name: str, text: str | bytes) -> None:
        """Write a file that the page takes for given."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    def copy(self, file: Path) -> None:
        """Have a copy of *file* here."""
        if not (self.folder / file.name).exists():
            shutil.copy(file, self.folder / file.name)

    @contextmanager
    def background(self, *commands: str) -> Iterator[None]:
        """Run machines beside while the block lasts; each has started when this begins."""
        running = []
        try:
            for command in commands:
                words = ["timeout", str(LIMIT), "bash", "-c", f"exec {command}"]
                one = subprocess.Popen(
                    words,
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                running.append(one)
                assert one.stdout is not None
                assert one.stdout.readline() == "up\n", command
            yield
        finally:
            for one in running:
                one.terminate()
                one.communicate()
