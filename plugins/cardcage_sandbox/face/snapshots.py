"""Snapshots of sandboxes as e2b's SDK has them: each is, by its name, a template of its own.

They lie below ``$XDG_STATE_HOME/cardcage/sandboxes``, by their template and the sandbox that was kept.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from cardcage.host import Host
from cardcage_snapshot.creating import remove
from cardcage_snapshot.manifest import MANIFEST
from cardcage_snapshot.places import state_directory

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage_sandbox.client import Sandbox
    from cardcage_sandbox.template import Template

__all__ = ["MOST", "NAME", "Snapshots"]

MOST = 64
"""Snapshots at once: each takes up to the memory of its sandbox."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Snapshots:
    """Those that were made by this face, or one before it."""

    def list(self, sandbox: str = "", name: str = "") -> list[Path]:
        """All, or those of a sandbox, or of a name; the oldest first."""
        found = (state_directory() / "sandboxes").glob(f"*/{sandbox or '*'}/{name or '*'}/{MANIFEST}")
        return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]

    def keep(self, sandbox: Sandbox, template: Template, name: str) -> str:
        """Keep a sandbox; the snapshot's name, a new one where none is given. Raises what that raises."""
        name = name or secrets.token_hex(10)
        sandbox.snapshot(state_directory() / "sandboxes" / template.name / sandbox.id / name, replace=True)
        return name

    def template(self, name: str, templates: dict[str, Template]) -> Template | None:
        """The template that goes on from a snapshot; None where there is none of that name."""
        for path in self.list(name=name) if NAME.fullmatch(name) else []:
            if (of := templates.get(path.parent.parent.name)) is not None:
                return of.with_limits(snapshot=str(path))
        return None

    def remove(self, name: str) -> bool:
        """Remove one; False where there is none of that name. Raises what that raises."""
        found = self.list(name=name) if NAME.fullmatch(name) else []
        for path in found:
            with Host() as host:
                remove(host, path)
        return bool(found)
