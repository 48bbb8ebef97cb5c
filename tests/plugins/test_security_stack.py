"""Security cards from their own wheels: the example, several that stack, and ones with mistakes, which fail closed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from installed import cardcage, install

EXAMPLE = Path(__file__).parents[2] / "examples" / "capability-card"

VM = """
[machine]
platform = "none"
memory = "2M"
[boot]
protocol = "raw"
image = "guest.bin"
address = 0x1000
[[device]]
type = "debugcon"
id = "log"
port = 0xe9
char = "file:out.txt"
[[device]]
type = "isa-debug-exit"
iobase = 0xf4
"""
GUEST = "bae900b06feeb06beebaf400b001ee"
"""mov dx,0xe9; 'o' and 'k' to dx; mov dx,0xf4; mov al,1; out dx,al"""

CARD = """
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl

class Made:
    def __init__(self): {init}
    def check(self, act): {check}

@hookimpl
def cardcage_register(registry):
    registry.security("watch", Made)
"""

PYPROJECT = EXAMPLE.joinpath("pyproject.toml").read_text().replace("capability-card", "watch-card")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, as pip would install it."""
    return install(EXAMPLE, tmp_path_factory.mktemp("site"))


def watch_card(folder: Path, text: str) -> Path:
    """A security card `watch` with this source, installed."""
    project = folder / "project"
    (project / "src" / "capability_card").mkdir(parents=True)
    names = PYPROJECT.replace("capabilities = ", "watch = ").replace("capability_card", "watch_card")
    (project / "src" / "capability_card").rename(project / "src" / "watch_card")
    (project / "pyproject.toml").write_text(names)
    (project / "src" / "watch_card" / "__init__.py").write_text(text)
    return install(project, folder / "watch")


def run(folder: Path, security: str, *sites: Path) -> subprocess.CompletedProcess[str]:
    """`cardcage run` a guest that writes "ok" to a file and exits with status 3, under *security*."""
    (folder / "guest.bin").write_bytes(bytes.fromhex(GUEST))
    (folder / "vm.toml").write_text(f"security = {security}\n{VM}")
    return cardcage("run", "vm.toml", "--timeout", "60", "--accel", "tcg", sites=sites, folder=folder)


ALL = '["device.*", "bus.*", "interrupt.*", "backend.open char:file", "image.*"]'


def test_the_example_is_small_and_works(wheel: Path, tmp_path: Path) -> None:
    """Within its capabilities a device serves the guest; without one it is refused, with the capability it lacks."""
    assert len((EXAMPLE / "src/capability_card/__init__.py").read_text().splitlines()) <= 40
    done = run(tmp_path, f'[{{ type = "capabilities", devices = {{ log = {ALL} }} }}]', wheel)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "out.txt").read_bytes() == b"ok"
    (tmp_path / "out.txt").unlink()
    fewer = ALL.replace(', "image.*"', ', "image.create /var/log/*"')
    done = run(tmp_path, f'[{{ type = "capabilities", devices = {{ log = {fewer} }} }}]', wheel)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"outcome: denied: log has no capability for image.create {tmp_path}/out.txt"
    assert not (tmp_path / "out.txt").exists()
    done = run(tmp_path, '[{ type = "capabilities", device = {} }]', wheel)
    assert 'vm.toml: security.checkers[0].device: no such key. Did you mean "devices"?' in done.stderr


def test_security_cards_stack(wheel: Path, tmp_path: Path) -> None:
    """Two cards allow what both allow; the second is itself loaded under the first."""
    capable = f'{{ type = "capabilities", devices = {{ log = {ALL} }} }}'
    state = f'{{ type = "selinux", state = "{tmp_path}/state" }}'
    done = run(tmp_path, f"[{state}, {capable}]", wheel)
    assert done.returncode == 3, done.stderr
    assert "avc:" not in done.stderr
    (tmp_path / "out.txt").unlink()
    for few in (capable.replace('"bus.*", ', ""), capable.replace('"backend.open char:file", ', "")):
        done = run(tmp_path, f"[{state}, {few}]", wheel)
        assert done.returncode == 2
        assert "log has no capability for b" in done.stderr
    strict = state.replace(" }", ", booleans = { machine_execmem = false } }")
    done = run(tmp_path, f"[{capable}, {strict}]", wheel)
    assert done.returncode == 2
    assert "denied  { execmem }" in done.stderr
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('no luck')", 'security card "watch" (watch-card 1.0) is broken: OSError: no luck'),
        (CARD.format(init="1/0", check="pass"), 'security "watch" (card watch, watch-card 1.0): ZeroDivisionError'),
        (CARD.format(init="pass", check="{}['x']"), "security card watch (watch-card 1.0): KeyError: 'x' (in check, "),
        (CARD.format(init="pass", check="raise Denied('never')"), "outcome: denied: never"),
        (
            CARD.format(init="pass", check="pass").replace("check", "chekc"),
            'security "watch" (card watch, watch-card 1.0): has no method \'check\'; did you mean it by "chekc"?',
        ),
        (CARD.format(init="pass", check="pass").replace("self, act", "self"), "does not take 1 positional argument"),
        (CARD.format(init="pass", check="pass").replace('"watch"', '"other"'), 'no card offers security "watch"'),
    ],
)
def test_a_security_card_with_a_mistake_fails_closed(text: str, said: str, tmp_path: Path) -> None:
    """Whatever is wrong with it, nothing runs, nothing is made, and one line names the card."""
    done = run(tmp_path, '["watch"]', watch_card(tmp_path, text))
    assert done.returncode in (2, 70)
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.txt").exists()
