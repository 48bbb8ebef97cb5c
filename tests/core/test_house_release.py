"""What a release is made of: the changelog's fragments, and versions that stand in one place."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import cardcage
import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
FRAGMENTS = ROOT / "changelog.d"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def fragments() -> list[Path]:
    """Every fragment; there is none right after a release."""
    return sorted(one for one in FRAGMENTS.iterdir() if one.name != "README.md")


def test_fragments_have_a_type_and_say_something(project: dict[str, Any]) -> None:
    """Each fragment is named `+name.type.md`, its type is known, and it holds one paragraph of whole sentences."""
    types = {one["directory"] for one in project["tool"]["towncrier"]["type"]}
    names = re.compile(rf"\+[a-z0-9][a-z0-9-]*\.({'|'.join(sorted(types))})\.md")
    assert [one.name for one in fragments() if not names.fullmatch(one.name)] == []
    sentences = re.compile(r"[A-Z`-].*\.\n")
    assert [one.name for one in fragments() if not sentences.fullmatch(one.read_text())] == []


def test_the_fragments_readme_names_every_type(project: dict[str, Any]) -> None:
    """`changelog.d/README.md` lists the types of pyproject.toml, and no other."""
    listed = re.findall(r"^- `(\w+)`:", (FRAGMENTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(one["directory"] for one in project["tool"]["towncrier"]["type"])


def test_towncrier_renders_every_fragment(project: dict[str, Any]) -> None:
    """`towncrier build --draft` succeeds and shows each fragment as one item, below a heading."""
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "1.2.3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "## 1.2.3 (" in done.stdout
    items = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    assert sorted(items) == sorted(f"- {one.read_text().strip()}" for one in fragments())


def test_the_changelog_has_a_place_for_releases(project: dict[str, Any]) -> None:
    """`CHANGELOG.md` holds towncrier's marker exactly once: releases are put below it."""
    settings = project["tool"]["towncrier"]
    assert (ROOT / settings["filename"]).read_text().count(settings["start_string"]) == 1


def test_the_version_stands_in_one_place(project: dict[str, Any]) -> None:
    """pyproject.toml has no version: hatchling reads the `__version__` that `cardcage --version` prints."""
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    assert "version" not in project["project"]
    assert ProjectMetadata(str(ROOT), PluginManager()).version == cardcage.__version__


def test_the_compilers_version_stands_in_one_place(project: dict[str, Any]) -> None:
    """PyPI's compiler is named by the extra `zig` alone; the build hook and tox refer to the extra."""
    assert len(project["project"]["optional-dependencies"]["zig"]) == 1
    assert "ziglang" not in (ROOT / "hatch_build.py").read_text()
    assert "ziglang" not in (ROOT / "tox.ini").read_text()
    assert "extras = test, zig" in (ROOT / "tox.ini").read_text()
