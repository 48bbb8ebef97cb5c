"""Linux guests by `cardcage boot`, for tests of what they see."""

from __future__ import annotations

import subprocess

from installed import PROGRAM

BOOT = [*PROGRAM, "boot", "--accel", "tcg", "--timeout", "200"]


def boot(*arguments: str, script: str) -> list[str]:
    """Run *script* in a guest; its lines."""
    done = subprocess.run([*BOOT, *arguments, "--exec", script], capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout.decode().splitlines()
