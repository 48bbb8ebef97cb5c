"""The distribution: shelves, entry points, the wheel, `__all__`, reference pages, CI."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cardcage.errors import MissingExtra
from cardcage_tcg.native import build

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
NO_CARDS = {"cardcage", "cardcage_cli", "cardcage_testing", "cardcage_conformance", "cardcage_pytest", "cardcage_ray"}
SHELVES = ("core", "accel", "devices", "plugins")


def packages() -> list[Path]:
    """Every package on a shelf."""
    return sorted(init.parent for shelf in SHELVES for init in (ROOT / shelf).glob("*/__init__.py"))


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_listing_is_exact() -> None:
    """Every package on a shelf is built into the wheel, typed, and announced where it is a card."""
    names = [str(one.relative_to(ROOT)) for one in packages()]
    assert sorted(project()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == names
    assert all((one / "py.typed").exists() for one in packages())
    announced = sorted(project()["project"]["entry-points"]["cardcage"].values())
    assert announced == sorted({one.name for one in packages()} - NO_CARDS)


def test_mypy_and_tox_know_every_package() -> None:
    """The type check covers every package on a shelf."""
    text = (ROOT / "tox.ini").read_text()
    assert all(str(one.relative_to(ROOT)) in text for one in packages())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is committed, without what lies about."""
    target = tmp_path_factory.mktemp("export")
    command = ["git", "-c", "safe.directory=*", "archive", "HEAD"]  # a checkout may belong to another account
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", target], input=archive, check=True)  # tarfile's filters are not in 3.11.2
    return target


@pytest.fixture(scope="module")
def compiler() -> None:
    """Whatever compiles the translator's library."""
    if not build.system_compiler() and not build.zig():
        pytest.skip("no compiler is installed")


@pytest.fixture(scope="module")
def wheel(exported: Path, compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of what is committed."""
    from hatchling.builders.wheel import WheelBuilder

    target = tmp_path_factory.mktemp("wheel")
    (made,) = WheelBuilder(str(exported)).build(directory=str(target), versions=["standard"])
    return Path(made)


BUILT = {
    "accel": ["cardcage_tcg/_native.so", "cardcage_tcg/layout.py"],
    "devices": ["cardcage_virtio/_native.so"],
    "plugins": ["cardcage_agent/guest-agent"],
}
"""What is compiled, by shelf."""
PLACES = [f"{shelf}/{name}" for shelf, names in BUILT.items() for name in names]


def test_git_lists_nothing_compiled(exported: Path) -> None:
    """No committed file is a program, a library or an object file."""
    assert [one for one in exported.rglob("*") if one.is_file() and one.read_bytes()[:4] == b"\x7fELF"] == []
    assert not any((exported / one).exists() for one in PLACES)


def test_the_wheel_holds_what_git_lists(exported: Path, wheel: Path) -> None:
    """The wheel holds each committed file of the packages, what is compiled, and nothing else."""
    listed = sorted(
        str(file.relative_to(exported / shelf))
        for shelf in SHELVES
        for file in (exported / shelf).rglob("*")
        if file.is_file()
    )
    with zipfile.ZipFile(wheel) as archive:
        held = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
    assert held == sorted([*listed, *(name for names in BUILT.values() for name in names)])
    assert not any((exported / one).exists() for one in PLACES)


def test_an_editable_installation_is_built_in_place(exported: Path, compiler: None, tmp_path: Path) -> None:
    """Building for an editable installation leaves what is compiled where its package is imported from."""
    from hatchling.builders.wheel import WheelBuilder

    tree = tmp_path / "tree"
    shutil.copytree(exported, tree)
    (made,) = WheelBuilder(str(tree)).build(directory=str(tmp_path), versions=["editable"])
    assert all((tree / one).exists() for one in PLACES)
    with zipfile.ZipFile(made) as archive:
        assert [name for name in archive.namelist() if not name.endswith(".pth") and ".dist-info/" not in name] == []


def test_an_sdist_gives_the_same_wheel(exported: Path, wheel: Path, tmp_path: Path) -> None:
    """A source distribution holds nothing that was built, even where something was, and gives the very same wheel."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    tree = tmp_path / "tree"
    shutil.copytree(exported, tree)
    for one in PLACES:
        (tree / one).write_text("left over")
    (sdist,) = SdistBuilder(str(tree)).build(directory=str(tmp_path), versions=["standard"])
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-x", "-z", "-C", tmp_path / "unpacked", "-f", sdist], check=True)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not any((unpacked / one).exists() for one in PLACES)
    (again,) = WheelBuilder(str(unpacked)).build(directory=str(tmp_path / "again"), versions=["standard"])
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()
        assert all(first.read(name) == second.read(name) for name in first.namelist() if ".dist-info/" not in name)


def test_a_compiler_is_asked_for_only_where_there_is_none(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build needs PyPI's compiler where the system has none, and hatchling alone where it has one."""
    from hatchling.builders.wheel import WheelBuilder

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (needed,) = WheelBuilder(str(exported)).config.dependencies
    assert needed.startswith("ziglang")
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert WheelBuilder(str(exported)).config.dependencies == []


def test_the_wheel_is_for_its_platform(wheel: Path) -> None:
    """The wheel is tagged for Linux on x86-64 and any Python 3, for its native code is tied to none."""
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/WHEEL"))
        text = archive.read(name).decode()
    assert "Root-Is-Purelib: false" in text


def modules() -> list[str]:
    """Every module on a shelf."""
    found = []
    for package in packages():
        for file in package.rglob("*.py"):
            parts = file.relative_to(package.parent).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found)


def test_all_lists_exactly_what_is_offered() -> None:
    """Each `__all__` is sorted, without repetition, and names what exists."""
    problems = []
    for name in modules():
        if name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(name)
        except MissingExtra:
            continue
        offered = getattr(module, "__all__", None)
        if offered is None:
            continue
        # capitals sort first, as ruff has it (RUF022: constants, classes, then the rest)
        if sorted(set(offered)) != sorted(offered):
            problems.append(f"{name}: repetition")
        problems += [f"{name}.{one}" for one in offered if not is_there(module, one)]
    assert not problems


def is_there(module: ModuleType, name: str) -> bool:
    """True also for what needs an extra that is not installed here."""
    try:
        return hasattr(module, name)
    except MissingExtra:
        return True


def test_cardcage_offers_exactly_its_all() -> None:
    """`import cardcage` shows `__all__`, no more and no less, and each name comes from where the types say."""
    import cardcage

    tree = ast.parse(Path(str(cardcage.__file__)).read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cardcage.")
        for alias in node.names
    }
    assert sorted(typed) == sorted(cardcage.__all__)
    for name, module in typed.items():
        assert getattr(cardcage, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError):
        cardcage.nothing  # noqa: B018  the access is the test


def test_importing_cardcage_imports_nothing_else() -> None:
    """`import cardcage` alone costs nothing: not even attrs is imported."""
    code = "import sys, cardcage; print(sorted({'attr', 'pluggy', 'asyncio', 'cattrs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reference_pages_are_up_to_date() -> None:
    """docs/ says what the code says: hooks with signatures, protocols, keys, arguments."""
    done = subprocess.run([sys.executable, ROOT / "docs" / "reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documents_name_files_that_exist() -> None:
    """Each relative link of README, CONTRIBUTING and docs/ leads to a file, and README links every page of docs/."""
    import re

    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            if not (page.parent / link).exists():
                missing.append(f"{page.name}: {link}")
    assert not missing
    readme = (ROOT / "README.md").read_text()
    pages = [one.name for one in (ROOT / "docs").glob("*.md") if not one.name.endswith(".in.md")]
    assert [name for name in pages if f"(docs/{name})" not in readme] == []


def test_every_hook_is_tested() -> None:
    """Each hook's name occurs in a test of the core room."""
    from cardcage.hookspecs import Hooks

    text = "".join(file.read_text() for file in (ROOT / "tests" / "core").glob("test_core_*.py"))
    assert all(name in text for name in vars(Hooks) if name.startswith("cardcage_"))


def test_every_error_is_in_the_drawn_tree() -> None:
    """The tree in errors.py draws each class below its base."""
    from cardcage import errors

    above: dict[int, str] = {}
    bases = {}
    for line in str(errors.__doc__).splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ")
        name = words.split()[0] if words.split() else ""
        if name in errors.__all__:
            depth = words.index(name)
            above = {at: one for at, one in above.items() if at < depth}
            bases[name] = above[max(above)] if above else "Exception"
            above[depth] = name
    classes = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert bases == {one.__name__: one.__bases__[0].__name__ for one in classes}


def test_ci_runs_the_readmes_commands() -> None:
    """`.ci/run` is executable, and the README's two shell blocks are an installation with a boot, and tox."""
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    blocks = (ROOT / "README.md").read_text().split("```sh\n")[1:]
    assert len(blocks) == 2
    assert "cardcage boot --exec 'uname -a; cat /proc/cpuinfo'" in blocks[0]
    assert "tox" in blocks[1]
