"""The way out of sandboxes: what is open is reached, and nothing else, whatever their guests try."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cardcage.errors import ConfigError, UsageError
from cardcage_agent.native.build import FLAGS, compiler
from cardcage_sandbox import Sandbox, Template, stop_templates
from cardcage_sandbox.template import load_template
from egress_attempts import EGRESS, Attempt, attempts

sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from egress_lab import ALLOWED, PRIVATE, SECRET, World, hello, named, record

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.once,
    pytest.mark.xdist_group("host"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed"),
]
LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
AT_ONCE = 12
FETCH = "wget -q -O- http://good.test/"


@pytest.fixture(scope="module")
def world(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with closing(World(tmp_path_factory.mktemp("world"))) as made:
        made.turning["turns.test"] = [[ALLOWED]]
        made.answers["turns.test"] = [PRIVATE]
        yield made


@pytest.fixture(scope="module")
def sandbox(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox with a way out, in the host of *world*."""
    run = tmp_path_factory.mktemp("run")
    run.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(run))
        try:
            template = Template(name="out", memory="128M", egress=EGRESS)  # type: ignore[arg-type]  # attrs converts
            yield world.run(lambda: Sandbox.create(template, timeout=900))
        finally:
            stop_templates()


def script(chosen: list[Attempt], sandbox: Sandbox) -> str:
    """The commands that make the attempts, some at once; what they say is put into files."""
    lines = []
    for number, one in enumerate(chosen):
        act = one.shell
        if one.say:
            for part, data in enumerate(one.say):
                sandbox.files.write(f"/tmp/say/{number}.{part}", data)
            said = "; usleep 300000; ".join(f"cat /tmp/say/{number}.{part}" for part in range(len(one.say)))
            act = f"({said}) | nc {one.to}"
        if act:
            lines.append(f"timeout 8 sh -c {shlex.quote(act)} >/dev/null 2>&1 &")
            if len(lines) % AT_ONCE == 0:
                lines.append("wait")
    return "\n".join([*lines, "wait"])


def sender(folder: Path) -> bytes:
    """The program that sends frames."""
    source = Path(__file__).with_name("send_frames.c")
    subprocess.run([*shlex.split(compiler()), *FLAGS, "-o", folder / "send", source], check=True)
    return (folder / "send").read_bytes()


def test_a_way_out(sandbox: Sandbox, world: World) -> None:
    """A sandbox reaches what is open, by HTTP, TLS and plain TCP; so does its copy. A name is looked up each time."""
    run = sandbox.commands.run
    assert run(FETCH, check=True).stdout == "hello\n"
    assert run("wget -q -O- http://turns.test/", check=True).stdout == "hello\n"
    assert run("wget -q -O- http://turns.test/").exit_code != 0  # it has a private address now
    assert run("wget -q -O- http://both.test/", check=True).stdout == "hello\n"
    said = record(hello(named(b"good.test")))
    sandbox.files.write("hello", said)
    assert "hello" in run("nc good.test 443 <hello", check=True).stdout
    sandbox.files.write("blob", b"0123456789abcdef" * 16384)
    assert run("(cat blob; sleep 1) | nc raw.test 9000 | head -c 262144 | cmp - blob", check=True).exit_code == 0
    assert (ALLOWED, 443, said) in world.calls
    (copy,) = sandbox.fork()
    with copy:
        assert copy.commands.run(FETCH, check=True).stdout == "hello\n"
    assert run(FETCH, check=True).stdout == "hello\n"


def test_no_other_way_out(sandbox: Sandbox, world: World, tmp_path: Path) -> None:
    """Of all attempts to say something to anybody else none succeeds, and the way out is still there."""
    sandbox.commands.run(FETCH, check=True)
    chosen = attempts()
    assert len(chosen) >= 200
    frames = b"".join(len(data).to_bytes(2, "big") + data for one in chosen for data in one.frames)
    quick = [one for one in chosen if not one.frames]
    if not LONG:
        quick = [one for one in quick if one.say][::5] + [one for one in quick if one.shell][::6]
    sandbox.files.write("/tmp/send", sender(tmp_path))
    sandbox.files.write("/tmp/frames", frames)
    text = script(quick, sandbox)
    run = sandbox.commands.run
    run("chmod 755 /tmp/send; /tmp/send </tmp/frames", user="root", check=True, timeout=60)
    run(text, user="root", timeout=600)
    assert run(FETCH, check=True).stdout == "hello\n"
    assert not [one for one in world.packets if SECRET in one]
    assert not [one for one in world.calls if SECRET in one[2] or one[0] != ALLOWED]
    assert not [one for one in world.questions if SECRET in one.lower()]
    assert world.targets() <= {(ALLOWED, 6, 80), (ALLOWED, 6, 443), (ALLOWED, 6, 9000)}


def test_templates_with_a_wrong_way_out(tmp_path: Path) -> None:
    """A wrong entry is refused in one line, in a template's file, from Python and on the command line."""
    path = tmp_path / "wrong.toml"
    path.write_text('egress = ["pypi.org", "pypi org"]\n')
    with pytest.raises(ConfigError, match='egress: "pypi org": expected a name'):
        load_template(path)
    with pytest.raises(UsageError, match='egress: "fe80::1": IPv6 is not let out'):
        Sandbox.create(egress=["fe80::1"])
    assert Template(egress=("b.org", "a.org")).key == Template(egress=["A.org", "b.org", "b.org"]).key  # type: ignore[arg-type]  # attrs converts
