"""The guest agent's executable: static, small, of these sources, by whichever compiler there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cardcage.errors import CardError
from cardcage_agent import program as programs
from cardcage_agent.native import build
from cardcage_boot.fetch import is_static_busybox as is_static
from cardcage_tcg.native import build as translator
from documents import ROOT, blocks

COMPILERS = [cc for cc in ("gcc", "clang", translator.zig()) if cc and translator.can(cc)]


def test_the_installed_program_is_of_these_sources(tmp_path: Path) -> None:
    """It is a static executable for x86-64 of less than 64 KiB, which needs nothing of its guest."""
    data = programs.program()
    (tmp_path / "agent").write_bytes(data)
    assert is_static(tmp_path / "agent")
    assert len(data) < 65536


@pytest.mark.parametrize("cc", COMPILERS)
def test_each_compiler_builds_it(cc: str, tmp_path: Path) -> None:
    """Without a warning, and the same twice."""
    for name in ("one", "two"):
        build.build(tmp_path / name, f"{cc} -Werror")
    assert is_static(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_compiler_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """BuildError names it and its status, or why it cannot be run."""
    (tmp_path / "agent").write_bytes(b"before")
    with pytest.raises(build.BuildError, match="C compiler false: ended with status 1"):
        build.build(tmp_path / "agent", "false")
    with pytest.raises(build.BuildError, match="C compiler /none: No such file"):
        build.build(tmp_path / "agent", "/none")
    assert (tmp_path / "agent").read_bytes() == b"before"


def test_a_program_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CardError says how it is built again; so does one for a program that is missing."""
    monkeypatch.setattr(programs, "digest", lambda: "0" * 64)
    with pytest.raises(CardError, match=r"was built from other sources; to build it: python -m cardcage_agent\.native"):
        programs.program()
    monkeypatch.setattr(programs, "__file__", str(tmp_path / "program.py"))
    with pytest.raises(CardError, match="No such file"):
        programs.program()


@pytest.mark.once
def test_the_agents_verbs_have_types(tmp_path: Path) -> None:
    """mypy --strict takes each program of docs/python.md; it knows what the verbs give, and a misspelt one."""
    for one in blocks(ROOT / "docs" / "python.md"):
        before = "" if "import Machine" in one.text else "from cardcage_agent import Machine\nvm = Machine.debian()\n"
        (tmp_path / f"block{one.number}.py").write_text(before + one.text)
    (tmp_path / "program.py").write_text(
        "from cardcage_agent import Machine\n\n"
        'with Machine.debian(memory="512M") as vm:\n'
        "    vm.start()\n"
        '    raw: bytes = vm.run("uname -a").stdout\n'
        '    text: str = vm.run(["uname"], text=True, check=True).stdout\n'
        '    data: bytes = vm.run(["cat"], input=b"x", timeout=10).stdout\n'
        '    vm.files.write("/tmp/x", text)\n'
        '    names = [one.name for one in vm.files.list("/tmp")]\n'
        '    vm.console.send("exit\\n")\n'
        "    vm.rum()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *sorted(one.name for one in tmp_path.glob("*.py"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[0].startswith('program.py:11: error: "Machine" has no attribute "rum"'), done.stdout
    count = len(list(tmp_path.glob("*.py")))
    assert done.stdout.endswith(f"Found 1 error in 1 file (checked {count} source files)\n"), done.stdout
