"""Files and text without end or measure: bounded time and memory, one line, status 2."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from cardcage._config.toml import DEEPEST, parse_toml
from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.files import read_file
from strangers import MACHINE, MAIN, Shop

SECONDS, MEMORY = 20, 1800 << 20
"""Processor time and address space of a command: 1 GiB is a machine's own; the bombs took minutes and gigabytes."""

BOMBS = {
    "arrays": ("[policy]\nx = " + "[" * 100_000 + "]" * 100_000, "not TOML: nested deeper than 64"),
    "open arrays": ("x = " + "[" * 100_000, "not TOML: nested deeper than 64"),
    "tables": ("[policy]\nx = " + "{a=" * 50_000, "not TOML: nested deeper than 64"),
    "a hundred deep": ("[policy]\nx = " + "[" * 100 + "]" * 100, "not TOML: nested deeper than 64"),
    "digits": ("[machine]\ncpus = " + "9" * 5000, "not TOML: a number of more than 128 bits"),
    "hexadecimal digits": ("[machine]\ncpus = 0x" + "f" * 5000, "not TOML: a number of 20000 bits"),
    "key": ("[policy]\n" + ".".join(["a"] * 20_000) + " = 1", "not TOML: a key of more than 64 parts"),
    "quoted key": ("[policy]\n" + ".".join(["'a'"] * 20_000) + " = 1", "not TOML: a key of more than 64 parts"),
    "spaced key": ("[policy]\n" + " . ".join(['"a"'] * 20_000) + " = 1", "not TOML: a key of more than 64 parts"),
    "key inside": ("policy = {" + ".".join(["a"] * 20_000) + " = 1}", "not TOML: a key of more than 64 parts"),
    "header": ("[" + ".".join(["policy"] * 20_000) + "]", "not TOML: a key of more than 64 parts"),
    "text without end": ('a = """\\\'' * 100_000, "not TOML: "),
    "long value": (f"[machine]\nmemory = '{'9' * 100_000}'", "machine.memory: expected a size"),
    "length": ("#" + "x" * (2 << 20), "larger than 1 MiB: expected a configuration"),
    "zeros": ("\0" * 100_000, "not TOML: "),
}


class Bench(Shop):
    """Commands under limits."""

    def bounded(self, *words: str, files: int = -1) -> tuple[int, list[str]]:
        """Run ``cardcage`` in bounded time and memory, with files of at most *files* bytes: status, standard error."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_FSIZE, (files, files))
            if files < 0:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words],
            cwd=self.folder,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            preexec_fn=limit,
        )
        return done.returncode, done.stderr.splitlines()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A machine's folder."""
    made = Bench(tmp_path)
    made.machine()
    return made


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_a_configuration_is_refused(bench: Bench, name: str) -> None:
    """A file made to take all time or memory is refused in one line that names it."""
    text, said = BOMBS[name]
    (bench.folder / "bomb.toml").write_text(text)
    status, lines = bench.bounded("run", "bomb.toml")
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"outcome: bad configuration: bomb.toml: {said}")
    assert len(lines[0]) < 2200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "policy.x=" + "[" * 50_000 + "]" * 50_000], "--set: policy: nested deeper than 64"),
        (["--set", "machine.cpus=" + "9" * 5000], "--set: machine: a number of more than 128 bits"),
        (["--set", "policy." + ".".join(["a"] * 20_000) + "=1"], "policy.a: no card offers policy key"),
        (["--set", "policy.x={" + ".".join(["a"] * 20_000) + "=1}"], "--set: policy: a key of more than 64 parts"),
        (["--cpus", "9" * 5000], '--cpus: machine.cpus: expected a whole number, got "999'),
        (["--memory", "9" * 5000], "--memory: machine.memory: expected a size"),
        (["--timeout", "9" * 5000], "--timeout: expected a time"),
        (["--device", "isa-serial,char." + ".".join(["a"] * 20_000) + "=1"], "--device isa-serial,char.a.a"),
        (["--device", "isa-serial,irq=" + "9" * 5000], "--device isa-serial,irq=999"),
    ],
)
@pytest.mark.once
def test_a_bomb_of_an_argument_is_refused(bench: Bench, words: list[str], said: str) -> None:
    """An argument is held to the same bounds as a file."""
    status, lines = bench.bounded("run", "vm.toml", *words)
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"outcome: bad configuration: {said}")
    assert len(lines[0]) < 2200


@pytest.mark.parametrize("file", ["/dev/zero", "/dev/urandom"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "{}"], "a configuration"),
        (["run", "--accel", "tcg", "--kernel", "{}"], "a kernel"),
        (["boot", "--accel", "tcg", "--kernel", "{}"], "a kernel"),
        (["boot", "--accel", "tcg", "--firmware", "{}"], "a firmware ROM"),
        (["run", "vm.toml", "--set", "boot.image={}"], "a raw image"),
        (["run", "vm.toml", "--device", "fw_cfg,paths.opt/x={}"], "a file"),
        (["policy", "check", "{}"], "a policy"),
        (["policy", "allow-from-log", "{}"], "a log"),
    ],
)
@pytest.mark.once
def test_a_device_without_end_is_no_file(bench: Bench, words: list[str], expected: str, file: str) -> None:
    """Where a whole file is read, a character device is refused by name, with what was expected."""
    status, lines = bench.bounded(*[word.format(file) for word in words])
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith("outcome: bad configuration: ")
    assert f"{file}: a character device: expected {expected}" in lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "vm.toml", "--set", "machine.platform=pc", "--drive", "/dev/zero"],
        ["image", "info", "/dev/zero"],
        ["image", "convert", "/dev/zero", "out.qcow2"],
    ],
)
@pytest.mark.once
def test_a_device_without_end_is_no_image(bench: Bench, words: list[str]) -> None:
    """A disk image is a regular file or a block device."""
    status, lines = bench.bounded(*words)
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].endswith("/dev/zero: neither a regular file nor a block device")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "vm.toml"], "tcg: cannot make 256 MiB of executable memory: File too large (a limit of file sizes"),
        (["image", "create", "out.qcow2", "10M"], "out.qcow2: cannot be written: File too large"),
    ],
)
@pytest.mark.once
def test_a_limit_of_file_sizes_is_one_line(bench: Bench, words: list[str], said: str) -> None:
    """Under ``ulimit -f 10`` what cannot be done is told in one line, and blamed on no card."""
    status, lines = bench.bounded(*words, files=10 << 10)
    assert status in (2, 70)
    assert len(lines) == 1
    assert said in lines[0]
    assert "card failure" not in lines[0]


def test_a_file_is_read_to_its_bound(tmp_path: Path) -> None:
    """A file of the most bytes is read, one more is refused; so is a pipe; /dev/null is empty."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_file(path, 100) == b"x" * 100
    assert read_file("/dev/null", 100) == b""
    with pytest.raises(ConfigError, match=f"{path}: larger than 99 bytes: expected a thing"):
        read_file(path, 99, "thing")
    assert read_file("/proc/self/status", 1 << 20).startswith(b"Name:"), "a file that has no size"
    reader, writer = os.pipe()
    os.write(writer, b"x" * 1000)
    with pytest.raises(ConfigError, match="larger than 99 bytes"):
        read_file(f"/dev/fd/{reader}", 99)
    os.close(reader)
    os.close(writer)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file("\0", 99)


def test_dots_in_text_are_no_key() -> None:
    """Text and comments may have any number of dots, escapes and quotes; a key of the most parts is one."""
    dots = ".".join(["a"] * 1000)
    text = "\n".join(
        (
            f'a = "{dots}"',
            f"b = '{dots}'",
            f'c = """\n{dots}\n"\\"""{dots}"""',
            f"d = '''\n{dots}''{dots}'''",
            f'# {dots} """ \'',
            f'e = ["\\"{dots}", 1.5]',
        )
    )
    assert set(parse_toml(text)) == set("abcde")
    parse_toml(".".join(["a"] * DEEPEST) + " = 1")
    with pytest.raises(ValueError, match="parts"):
        parse_toml(f"{text}\nx.{'.'.join(['a'] * DEEPEST)} = 1")


def test_python_is_held_to_the_same_bounds() -> None:
    """A fragment that is in itself, or nested deeper than a file may be, is refused."""
    loop: dict[str, object] = {}
    loop["a"] = [loop, loop]
    with pytest.raises(ConfigError, match="nested deeper than 64"):
        Draft.of({"policy": loop})


def test_a_machine_at_the_bounds_runs(bench: Bench) -> None:
    """A configuration of nearly the most bytes is read and run."""
    (bench.folder / "vm.toml").write_text(MACHINE + "# x\n" * (250_000))
    assert bench.run("run", "vm.toml").status == 1
