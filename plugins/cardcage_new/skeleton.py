"""The files of a new card, from the templates beside this module."""

from __future__ import annotations

import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from cardcage.errors import ConfigError

from cardcage_new.kinds import KINDS

__all__ = ["contents", "write"]


def contents(kind: str, name: str) -> dict[str, str]:
    """The text of each file of a card, by its path inside the distribution.

    Args:
        kind: a key of :data:`~cardcage_new.kinds.KINDS`.
        name: of the card.
    """
    package = name.replace("-", "_")
    words = {
        "name": name,
        "package": package,
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "description": KINDS[kind].description,
        "use": Template(KINDS[kind].use).substitute(name=name),
    }
    templates = files("cardcage_new") / "templates"

    def filled(template: str) -> str:
        return Template((templates / template).read_text("utf-8")).substitute(words)

    return {
        "pyproject.toml": filled("pyproject.toml.in"),
        "README.md": filled("README.md.in"),
        f"src/{package}/__init__.py": filled(f"{kind}.py.in"),
        f"src/{package}/py.typed": "",
        f"tests/test_{package}.py": filled(f"{kind}_test.py.in"),
    }


def write(folder: Path, kind: str, name: str) -> list[str]:
    """Write a card into *folder*, which must not exist, and return the paths inside it.

    All of it appears at once, or nothing does. Raises ConfigError.
    """
    texts = contents(kind, name)
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            whole = made / name  # a folder with the usual permissions, which a temporary one has not
            for path, text in texts.items():
                (whole / path).parent.mkdir(parents=True, exist_ok=True)
                (whole / path).write_text(text, "utf-8")
            whole.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=str(folder)) from error
    return list(texts)
