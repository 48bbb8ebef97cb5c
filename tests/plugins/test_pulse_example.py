"""The example pulse, installed from its wheel: a stranger's conversation with a machine in another process."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed import cardcage, install

ROOT = Path(__file__).parents[2]
MACHINE = '[machine]\naccel = "tcg"\nmemory = "4M"\nname = "lab"\n[boot]\nprotocol = "raw"\nimage = "guest.bin"\n'


def test_a_strangers_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beats come one by one, with its options; its mistake is named with its card, and ends nothing."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    site = install(ROOT / "examples" / "pulse-card", tmp_path / "site")
    (tmp_path / "guest.bin").write_bytes(bytes.fromhex("ebfe"))
    (tmp_path / "vm.toml").write_text(MACHINE)
    assert cardcage("run", "-d", "vm.toml", sites=(site,), folder=tmp_path).stdout == "lab\n"
    try:
        done = cardcage("pulse", "lab", "--every", "1ms", "--count", "3", sites=(site,))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [*(f"lab running {at}" for at in (1, 2, 3)), "3 beats at 1000 Hz"]
        wrong = cardcage("pulse", "lab", "--every", "0", sites=(site,))
        assert wrong.returncode == 70
        assert 'session "pulse" (card pulse-card, pulse-card 1.0): ZeroDivisionError' in wrong.stderr.splitlines()[-1]
        assert cardcage("ps", "-q").stdout == "lab\n"
    finally:
        cardcage("kill", "lab")
