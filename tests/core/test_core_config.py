"""Configuration: units, strict structuring, drafts and their errors."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from attrs import field, frozen
from attrs.validators import ge
from cardcage._config.structure import structure
from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.units import Duration, Size
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 65536),
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        ("2GiB", 2 << 30),
        ("1 T", 1 << 40),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    """A size is a number of bytes with a binary suffix."""
    assert Size(text) == size


@pytest.mark.parametrize(
    "wrong", ["", "M", "-1", "9" * 5000, "1" * 400 + "T", "1.5", "1Q", "0x10", "1 2", "1e3", "٣", True, 1.5, None, -4]
)
def test_other_sizes_are_refused(wrong: Any) -> None:
    """What is no size, below 0 or no whole number of bytes raises ValueError."""
    with pytest.raises(ValueError, match=r"size|bytes"):
        Size(wrong)


@given(st.integers(min_value=0, max_value=1 << 80))
def test_size_text_loses_nothing(number: int) -> None:
    """A size of any length keeps each of its digits, and its shortest form reads back as itself."""
    assert Size(str(number)) == number
    assert Size(str(Size(number)).replace(" bytes", "")) == number


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("2m", 120), ("1.5", 1.5), ("3us", 3e-6), ("1h", 3600)])
def test_durations_are_seconds(text: str, seconds: float) -> None:
    """A duration is a number of seconds, with a unit on request."""
    assert Duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("wrong", ["", "s", "-1s", "1 day", "nan", "inf", True, None, float("inf"), -1])
def test_other_durations_are_refused(wrong: Any) -> None:
    """What is no finite time of 0 or more raises ValueError."""
    with pytest.raises(ValueError, match="time"):
        Duration(wrong)


class Colour(Enum):
    RED = "red"


@frozen
class Inner:
    level: int = field(default=1, validator=ge(1))


@frozen
class Options:
    name: str
    count: int = 1
    rate: float = 0.5
    on: bool = False
    size: Size = Size("4k")  # noqa: RUF009  an immutable value
    mode: Literal["slow", "fast"] = "slow"
    colour: Colour = Colour.RED
    path: Path | None = None
    inner: Inner = field(factory=Inner)
    inners: list[Inner] = field(factory=list)
    drive: str | dict[str, Any] = ""
    pair: tuple[int, str] = (1, "a")
    table: dict[str, bool] = field(factory=dict)


def test_every_kind_of_value_is_structured() -> None:
    """All that TOML can say becomes the typed value that the class declares."""
    table = {
        "name": "x",
        "count": 2,
        "rate": 1,
        "on": True,
        "size": "1M",
        "mode": "fast",
        "colour": "red",
        "path": "/tmp/x",
        "inner": {"level": 3},
        "inners": [{"level": 4}],
        "drive": {"file": "x", "n": 1},
        "pair": [2, "b"],
        "table": {"avx": False},
    }
    made = structure(table, Options)
    assert (made.size, made.rate, made.path, made.inners, made.pair) == (
        1 << 20,
        1.0,
        Path("/tmp/x"),
        [Inner(4)],
        (2, "b"),
    )
    assert made.drive == {"file": "x", "n": 1}
    assert made.inner == Inner(3)


@pytest.mark.parametrize(
    ("table", "key", "problem"),
    [
        ({}, "name", "missing: expected text"),
        ({"name": 3}, "name", "expected text, got 3"),
        ({"name": "x", "on": "no"}, "on", 'expected true or false, got "no"'),
        ({"name": "x", "count": 1.9}, "count", "expected a whole number, got 1.9"),
        ({"name": "x", "count": True}, "count", "expected a whole number, got true"),
        ({"name": "x", "rate": "1"}, "rate", 'expected a number, got "1"'),
        ({"name": "x", "size": "12Q"}, "size", 'expected a size such as "512M" or a number of bytes, got "12Q"'),
        ({"name": "x", "mode": "fats"}, "mode", 'expected one of "slow", "fast", got "fats". Did you mean "fast"?'),
        ({"name": "x", "colour": "blue"}, "colour", 'expected one of "red", got "blue".'),
        ({"name": "x", "path": 1}, "path", "expected a path, got 1"),
        ({"name": "x", "inner": {"level": 0}}, "inner.level", "must be >= 1: 0"),
        ({"name": "x", "inner": {"levle": 1}}, "inner.levle", 'no such key. Did you mean "level"?'),
        ({"name": "x", "inner": 1}, "inner", "expected a table, got 1"),
        ({"name": "x", "inners": [{}, {"level": "a"}]}, "inners[1].level", 'expected a whole number, got "a"'),
        ({"name": "x", "inners": "ab"}, "inners", 'expected a list, got "ab"'),
        ({"name": "x", "drive": 5}, "drive", "expected text or a table, got 5"),
        ({"name": "x", "pair": [1]}, "pair", "expected a list of 2, got 1"),
        ({"name": "x", "table": {"avx": "no"}}, "table.avx", 'expected true or false, got "no"'),
        ({"name": "x", "cuont": 1}, "cuont", 'no such key. Did you mean "count"?'),
        ({"naem": "x"}, "naem", 'no such key. Did you mean "name"?'),
    ],
)
def test_what_does_not_fit_is_named(table: dict[str, Any], key: str, problem: str) -> None:
    """An error carries the file, the key path, what was expected and near matches, in one line."""
    with pytest.raises(ConfigError) as caught:
        structure(table, Options, file="vm.toml", key="device[0]")
    assert str(caught.value) == f"vm.toml: device[0].{key}: {problem}"


def test_fragments_merge_in_order(tmp_path: Path) -> None:
    """Tables merge, devices append, later values replace, and each value remembers where it came from."""
    file = tmp_path / "vm.toml"
    file.write_text(
        '[machine]\nmemory = "1G"\ncpus = 2\n[boot]\nkernel = "k"\n[[device]]\ntype = "a"\n[accel.kvm]\nx = 1\n'
    )
    draft = Draft()
    draft.add_file(file)
    draft.add({"device": [{"type": "b", "id": "disk", "speed": 3}], "machine": {"cpus": 4}}, origin="--flag")
    draft.set("machine.memory=2G")
    draft.set("device.disk.speed=7")
    draft.set("device[0].port=0x3f8")
    draft.set("accel.kvm.y=[1, 2]")
    config = draft.config()
    assert (config.machine.memory, config.machine.cpus) == (2 << 30, 4)
    assert [(one.type, one.port, one.options) for one in config.devices] == [
        ("a", 0x3F8, {}),
        ("b", None, {"speed": 7}),
    ]
    assert config.accel == {"kvm": {"x": 1, "y": [1, 2]}}
    assert config.place("machine.cpus").file == "--flag"
    assert config.place("machine.memory").file == "--set"
    assert config.place("boot.kernel").file == str(file)
    assert config.devices[0].place.file == str(file)


@pytest.mark.parametrize(
    ("fragment", "error"),
    [
        ({"machin": {}}, 'machin: no such table. Did you mean "machine"?'),
        ({"machine": 3}, "machine: expected a table, got 3"),
        ({"machine": {"cpus": 0}}, "machine.cpus: must be >= 1: 0"),
        ({"machine": {"cpus": 256}}, "machine.cpus: must be <= 255: 256"),
        ({"machine": {"memry": 1}}, 'machine.memry: no such key. Did you mean "memory"?'),
        ({"device": {"type": "x"}}, "device: expected a list of tables: write [[device]]"),
        ({"device": [{"id": "x"}]}, 'device[0]: missing key "type": expected the name of a device card'),
        ({"device": [{"type": "x", "irq": 24}]}, "device[0].irq: expected 0 to 23, got 24"),
        (
            {"device": [{"type": "x"}, {"type": "x", "port": "9"}]},
            'device[1].port: expected a whole number or a list, got "9"',
        ),
        ({"accel": {"kvm": 1}}, "accel.kvm: expected a table"),
    ],
)
def test_wrong_fragments_are_refused(fragment: dict[str, Any], error: str) -> None:
    """A configuration that does not fit the schema is refused with its key path."""
    with pytest.raises(ConfigError) as caught:
        Draft.of(fragment).config()
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("machine.cpus", "expected key=value"),
        ("=3", "expected key=value"),
        ("machine=3", "expected a key inside the table"),
        ("mahcine.cpus=3", 'no such table. Did you mean "machine"?'),
        ("device[7].port=3", 'no device "7" is configured.'),
        ("device.disk=3", "expected a key of a device"),
        ("machine.name.x=3", "name is a value, not a table"),
    ],
)
def test_wrong_assignments_are_refused(text: str, error: str) -> None:
    """``--set`` says what it expected."""
    draft = Draft.of({"machine": {"name": "n"}, "device": [{"type": "x", "id": "disk"}]})
    with pytest.raises(ConfigError) as caught:
        draft.set(text)
    assert str(caught.value).startswith("--set: ")
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"[machine\n", "not TOML: "),
        (b"\xff\xfe", "configuration cannot be read: not UTF-8 text"),
        (None, "configuration cannot be read: No such file or directory"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, error: str) -> None:
    """A file that is missing, no text or no TOML is named with the reason."""
    file = tmp_path / "vm.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Draft().add_file(file)
    assert str(caught.value).startswith(f"{file}: {error}")


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_nothing_but_config_errors(value: Any) -> None:
    """Whatever stands in a configuration, it is taken or refused with a ConfigError."""
    for fragment in (
        {"machine": value},
        {"machine": {"memory": value, "features": value}},
        {"device": value},
        {"device": [value]},
    ):
        try:
            Draft.of(fragment).config()
        except ConfigError:
            continue
