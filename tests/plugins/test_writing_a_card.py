"""docs/writing-a-card.md: its first card is what the page claims, and runs as printed; its other code works."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cardcage.errors import ConfigError, NotOffered
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_testing import TestSlot
from cardcage_virtio.testing import Bench
from documents import ROOT, Reader, fenced

FILE = ROOT / "docs" / "writing-a-card.md"
PAGE = FILE.read_text()


def blocks(language: str) -> list[str]:
    """The page's blocks in *language*."""
    return [text for one, text in fenced(FILE) if one == language]


def test_the_first_card_is_small() -> None:
    """It has at most twelve lines, blank ones included, and needs at most five concepts."""
    card = blocks("python")[0]
    assert PAGE.index(card) < 200
    assert len(card.splitlines()) <= 12
    concepts = set()
    for node in ast.walk(ast.parse(card)):
        if isinstance(node, ast.ImportFrom):
            concepts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            concepts.add("a class of its own")
        elif isinstance(node, ast.FunctionDef) and node.name not in ("read", "write"):  # these make it a device
            concepts.add(node.name)
        elif isinstance(node, ast.Attribute):
            concepts.add(node.attr)
    assert concepts == {"a class of its own", "Pio", "hookimpl", "cardcage_register", "device"}
    told = re.findall(r"^[1-9]\. ", PAGE, re.MULTILINE)
    assert len(told) == len(concepts) == 5


@pytest.mark.once
def test_the_first_card_runs_as_printed(tmp_path: Path) -> None:
    """The page's card, machine, guest and three commands give the output that the page shows."""
    site = tmp_path / "site"
    reader = Reader(tmp_path / "desk", tmp_path / "home", [site])
    pip = f'exec {sys.executable} -m pip "$@" --no-index --no-deps --no-build-isolation --target {site}'
    program = tmp_path / "bin" / "pip"
    program.write_text(f"#!/bin/sh\n{pip} --disable-pip-version-check 2>/dev/null\n")
    program.chmod(0o755)
    assert "cardcage boot --device lamp" in reader.run("cardcage new card lamp")
    reader.write("lamp/src/lamp/__init__.py", blocks("python")[0])
    reader.write("lamp.toml", blocks("toml")[0])
    (guest,) = re.findall(r"`(printf .* > guest\.bin)`", PAGE)
    assert reader.run(guest) == ""
    (session,) = blocks("console")
    assert len(re.findall(r"^\$ ", session, re.MULTILINE)) == 3
    reader.console(session, status=None)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What all blocks define, as one module that reads like the page."""
    space: dict[str, Any] = {"__name__": "page"}
    for block in blocks("python"):
        exec(compile(block, "writing-a-card.md", "exec", dont_inherit=True), space)
    return space


def test_the_pages_own_tests_pass(page: dict[str, Any]) -> None:
    """The tests that the page shows pass."""
    page["test_the_contract"]()
    page["test_a_tick"]()


def test_an_option_is_refused_as_the_page_says(page: dict[str, Any], tmp_path: Path) -> None:
    """A period that is too short is named by its whole key."""
    card = ModuleType("clocks")

    def register(registry: Any) -> None:
        regions = (page["Pio"](1, base=0x2A1),)
        registry.device("clock", page["Clock"], options=page["ClockOptions"], regions=regions)

    card.cardcage_register = page["hookimpl"](register)  # type: ignore[attr-defined]  # a module made here
    file = tmp_path / "vm.toml"
    file.write_text('[machine]\nplatform = "none"\n[[device]]\ntype = "clock"\nirq = 5\nperiod = "1us"\n')
    with (
        Host([card]) as host,
        pytest.raises(ConfigError, match=r"vm\.toml: device\[0\].period: expected 1 ms or more"),
    ):
        Machine.from_toml(file, host=host)


def test_guest_memory_that_is_none_is_logged(page: dict[str, Any]) -> None:
    """The page's fetch returns what is RAM, and logs what is not or is too long."""
    slot = TestSlot()
    assert page["fetch"](slot, 0, 4) == bytes(4)
    assert page["fetch"](slot, 1 << 40, 4) is None
    assert page["fetch"](slot, 0, 1 << 40) is None
    assert [event for _, event, _ in slot.log.entries] == ["descriptor outside RAM", "descriptor too long"]
    slot.close()


def test_the_pages_virtio_device_answers(page: dict[str, Any]) -> None:
    """A driver gets zeros."""
    bench = Bench(page["Zeros"]())
    assert bench.call([], [8]) == bytes(8)
    bench.close()


def test_the_pages_own_kind_of_offer_works(page: dict[str, Any]) -> None:
    """The policy key is read, its witness hears of the machine's life, and a misspelt one is refused."""
    made: list[Any] = []

    diary: Any = page["Diary"]

    class Watched(diary):  # type: ignore[misc]  # its type is not known here
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    card = ModuleType("witness")
    card.cardcage_built = page["cardcage_built"]  # type: ignore[attr-defined]  # a module made here

    def register(registry: Any) -> None:
        registry.policy_key("witness")
        registry.add(page["WitnessOffer"]("diary", Watched))

    card.cardcage_register = page["hookimpl"](register)  # type: ignore[attr-defined]  # as above
    keys: dict[str, Any] = {"machine": {"platform": "none", "name": "m"}, "memory": "1M", "accel": "tcg"}
    with Host([card]) as host:
        Machine(**keys, fragments=[{"policy": {"witness": "diary"}}], host=host).close()
        assert [one.pages for one in made] == [["m lives", "and is gone"]]
        with pytest.raises(
            NotOffered, match=r'policy.witnes: no card offers policy key "witnes"\. Did you mean "witness"'
        ):
            Machine(**keys, fragments=[{"policy": {"witnes": "diary"}}], host=host)
