"""Guests that attack the translator: they end as a guest ends, and the VMM lives. The programs are in ``boundary/``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "boundary"
CARDCAGE = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]
CRASHED, TIMED_OUT = 12, 124
CONFIG = """
[machine]
accel = ["tcg"]
memory = "{memory}"
cpus = {cpus}
console = "stdio"
[boot]
protocol = "raw"
image = "{image}"
address = 0x100040
entry = 0x100040
mode = 64
"""


def run(
    program: str, tmp_path: Path, *, memory: str = "16M", cpus: int = 1, seconds: int = 100
) -> tuple[int, str, str]:
    """(status, what it wrote to the serial line, the messages) of ``boundary/PROGRAM.asm``."""
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not installed")
    image, config = tmp_path / "image", tmp_path / "vm.toml"
    subprocess.run(["nasm", "-f", "bin", "-i", f"{HERE}/", "-o", image, HERE / f"{program}.asm"], check=True)
    config.write_text(CONFIG.format(memory=memory, cpus=cpus, image=image))
    ended = subprocess.run(
        [*CARDCAGE, "run", "--timeout", f"{seconds}s", str(config)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + 60, check=False,
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("program", "says", "vector"),
    [
        ("jump_nowhere", "", 13),
        ("load_nowhere", "", 13),
        ("string_nowhere", "", 13),
        ("cross_nowhere", "M", 13),
        ("compat_wrap", "", 13),
        ("compat_wrap_read", "", 13),
        ("compat_wrap_string", "", 13),
        ("ram_end", "", 6),
    ],
)
def test_faults(program: str, says: str, vector: int, tmp_path: Path) -> None:
    """An address that nothing maps, and an operand past the end of what there is, raise the guest's own exception."""
    status, said, messages = run(program, tmp_path)
    assert (status, said) == (CRASHED, says), messages
    assert f"first vector {vector})" in messages


@pytest.mark.parametrize("program", ["call_nowhere", "rom_tables"])
def test_goes_on(program: str, tmp_path: Path) -> None:
    """No index of the jump cache lets an address that nothing maps through; page walks write no ROM."""
    status, said, messages = run(program, tmp_path)
    assert (status, said) == (CRASHED, "D"), messages


def test_code_across_four_gib(tmp_path: Path) -> None:
    """Compatibility-mode code across 4 GiB goes on at 0."""
    status, said, messages = run("compat_wrap_code", tmp_path)
    assert (status, said) == (CRASHED, "K"), messages


def test_aliases(tmp_path: Path) -> None:
    """However many aliases of a page of code there are, a store into it takes bounded time."""
    status, said, messages = run("alias_chain", tmp_path, memory="64M")
    assert (status, said) == (CRASHED, "D"), messages


@pytest.mark.once
def test_jump_into_forgotten_code(tmp_path: Path) -> None:
    """When all code has been forgotten nothing leads to where it was."""
    status, said, messages = run("jump_stale", tmp_path, memory="512M")
    assert (status, said) == (CRASHED, "D"), messages


@pytest.mark.once
def test_going_on_in_forgotten_code(tmp_path: Path) -> None:
    """A processor that left for a device while another has all code forgotten and made anew does not go on in that."""
    for seconds in (12, 100):  # on a busy host the first may not be enough to have all code forgotten
        status, said, messages = run("resume_stale", tmp_path, cpus=2, seconds=seconds)
        assert status == TIMED_OUT, messages
        assert "X" not in said
        if "." in said:
            return
    pytest.fail("its code was never forgotten")
