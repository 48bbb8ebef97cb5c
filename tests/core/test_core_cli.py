"""The command line: exit statuses, the outcome line, flags, listings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from cardcage.device import Pio, Slot
from cardcage.errors import ConfigError
from cardcage.registry import Registry
from cardcage.vcpu import Exit
from cardcage_cli import main
from scripted import Script, Scripted, ScriptedVCpu

pytestmark = pytest.mark.usefixtures("runtime")  # the name of a machine is in what is told

Steps = Generator[tuple[Any, ...], Any, None]


class Panel:
    """Ends the machine as it is told, at port 0x80; a serial port on the console at 0x85."""

    late = 0

    def plug(self, slot: Slot, /) -> None:
        self.power = slot.power
        self.char = slot.host.open("char", "console")
        self.char.start(lambda data: None)

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        match offset:
            case 0:
                self.power.off()
            case 2:
                self.power.panic("oops")
            case 3:
                self.power.exit(value)
            case 4:
                raise ZeroDivisionError("a card's bug")
            case 5:
                self.char.write(bytes([value]))
            case 6:
                os.kill(os.getpid(), value)
            case 7:
                self.late = value
                os.kill(os.getpid(), value)

    def unplug(self) -> None:
        if self.late:
            os.kill(os.getpid(), self.late)
            os.kill(os.getpid(), self.late)
            print("put back", file=sys.stderr)


def guest(*steps: tuple[Any, ...]) -> Script:
    """A guest that makes these steps."""

    def script(_: ScriptedVCpu) -> Steps:
        yield from steps

    return script


def parse_panel(text: str) -> dict[str, Any]:
    """The flag ``--panel``: port numbers of panels."""
    if text == "bad":
        raise ConfigError("expected a port", key="device")
    return {"device": [{"type": "panel", "port": int(text, 0)}]}


def run(host: Any, arguments: Any) -> int:
    """The command ``hello``."""
    print("hello", arguments.who)
    return 3


def configure(parser: Any) -> None:
    """Its arguments."""
    parser.add_argument("--who", default="nobody")


def card(script: Script) -> Scripted:
    """A card with all of that."""

    def extra(registry: Registry) -> None:
        registry.device("panel", Panel, regions=(Pio(8, 0x80),))
        registry.flag("--panel", parse_panel, help="a panel at this port", metavar="PORT")
        registry.command("hello", run, configure=configure, help="say hello")

    return Scripted((script,), extra=extra)


MACHINE = '[machine]\naccel = "scripted"\nmemory = "1M"\nplatform = "none"\n'
PANEL = '[[device]]\ntype = "panel"\n'


@pytest.fixture
def vm(tmp_path: Path) -> Path:
    """A machine's file."""
    file = tmp_path / "vm.toml"
    file.write_text(MACHINE + PANEL)
    return file


@pytest.mark.parametrize(
    ("step", "status", "outcome"),
    [
        (("out", 0x80, 1, 0), 0, "outcome: the guest powered off"),
        (("out", 0x82, 1, 0), 10, "outcome: the guest panicked: oops"),
        (("out", 0x83, 1, 0), 1, "outcome: debug exit with code 0"),
        (("out", 0x83, 1, 16), 33, "outcome: debug exit with code 16"),
        (("out", 0x83, 1, 255), 255, "outcome: debug exit with code 255"),
        (("exit", Exit.SHUTDOWN, "rip=0x7c00"), 12, "rip=0x7c00\noutcome: the guest crashed: triple fault on cpu 0"),
        (("exit", Exit.FAILED, "cannot go on"), 70, "outcome: host or accelerator failure: cannot go on"),
        (("wait",), 124, "outcome: timed out after 0.05 s"),
        (("out", 0x86, 1, signal.SIGINT), 130, "outcome: interrupted"),
        (("out", 0x86, 1, signal.SIGTERM), 143, "outcome: ended by: SIGTERM"),
        (("out", 0x87, 1, signal.SIGTERM), 143, "put back\noutcome: ended by: SIGTERM"),
        (("out", 0x87, 1, signal.SIGHUP), 129, "put back\noutcome: ended by: SIGHUP"),
        (("out", 0x87, 1, signal.SIGINT), 130, "put back\noutcome: interrupted"),
    ],
)
def test_each_outcome_has_its_status_and_line(
    vm: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest, step: Any, status: int, outcome: str
) -> None:
    """``cardcage run`` exits with the documented status and one line on stderr; a second signal changes nothing."""
    timeout = ["--timeout", "50ms"] if step == ("wait",) else ["--timeout", "60"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert main(["run", str(vm), *timeout], cards=[card(guest(step))]) == status
    said = capfd.readouterr().err
    assert said == f"accelerator: scripted: scripted by the test\n{outcome}\n"


def test_a_cards_exception_is_one_line_with_its_place(vm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A card's bug exits with 70 and names the place; ``--traceback`` shows all of it."""
    guests = guest(("out", 0x84, 1, 0))
    assert main(["run", str(vm)], cards=[card(guests)]) == 70
    said = capfd.readouterr().err
    assert "outcome: card failure: card scripted (given to Host): ZeroDivisionError: a card's bug (in write, " in said
    assert "Traceback" not in said
    assert main(["run", str(vm), "--traceback"], cards=[card(guests)]) == 70
    assert "Traceback" in capfd.readouterr().err


def test_the_console_goes_to_standard_output(vm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The guest's console is on stdout, and the diagnosis on stderr."""
    text = b"hello from the guest\n"
    steps = [("out", 0x85, 1, byte) for byte in text]
    assert main(["run", str(vm)], cards=[card(guest(*steps, ("out", 0x80, 1, 0)))]) == 0
    assert capfd.readouterr().out == text.decode()


@pytest.mark.parametrize(
    ("words", "text", "error"),
    [
        (["run", "{vm}", "--set", "machine.cpus=x"], "", '--set: machine.cpus: expected a whole number, got "x"'),
        (["run", "{vm}", "--cpus", "two"], "", '--cpus: machine.cpus: expected a whole number, got "two"'),
        (["run", "{vm}", "--cpus", "0"], "", "--cpus: machine.cpus: must be >= 1: 0"),
        (["run", "{vm}", "--memory", "1P"], "", '--memory: machine.memory: expected a size such as "512M"'),
        (["run", "{vm}", "--memory", "900T"], "", "--memory: machine.memory: 921600.0 GiB of memory is more than"),
        (["run", "{vm}", "--accel", "kmv"], "", '--accel: machine.accel[0]: no card offers accelerator "kmv". Did you'),
        (["run", "{vm}", "--timeout", "soon"], "", '--timeout: expected a time such as "250ms"'),
        (["run", "{vm}", "--panel", "bad"], "", "--panel bad: device: expected a port"),
        (["run", "{vm}", "--panel", "x"], "", "--panel x: invalid literal for int()"),
        (
            ["run", "{vm}"],
            '[[device]]\ntype = "panle"',
            'device[1].type: no card offers device "panle". Did you mean "panel"',
        ),
        (["run", "{vm}"], '[[device]]\ntype = "panel"\nprot = 3', "device[1].prot: no such key."),
        (["run", "{vm}"], "[boot]\nkernel = 'gone'\n", "gone: kernel cannot be read: No such file or directory"),
        (["run", "{vm}", "--panel", "0x84"], "", "device[0]: panel1: pio 0x84-0x8b overlaps panel at 0x80-0x87"),
        (["run", "nothing.toml"], "", "nothing.toml: configuration cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_clear_line(
    vm: Path, capfd: pytest.CaptureFixture[str], words: list[str], text: str, error: str
) -> None:
    """Bad input exits with 2 and one line that says where and what was expected."""
    vm.write_text(MACHINE + PANEL + text)
    assert main([word.format(vm=vm) for word in words], cards=[card(guest())]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("outcome: bad configuration: ")
    assert error in lines[0]


@pytest.mark.parametrize("words", [[], ["rnu"], ["run"], ["run", "x", "--cpu", "3"], ["cards", "x"]])
def test_wrong_arguments_exit_with_2(capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """A command line that cannot be parsed exits with 2, and its last line is the outcome."""
    assert main(words) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("outcome: bad configuration")


def test_a_kernel_needs_no_file(capfd: pytest.CaptureFixture[str]) -> None:
    """``run --kernel`` takes the place of a file, and what is wrong with it is said of it."""
    assert main(["run", "--accel", "tcg", "--kernel", "/nothing/here", "--initrd", "a", "--append", "x"]) == 2
    assert capfd.readouterr().err == (
        "outcome: bad configuration: /nothing/here: kernel cannot be read: No such file or directory\n"
    )


def test_registered_flags_and_commands(vm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A card's flag adds its fragment, its command gets host and arguments and returns the status."""
    vm.write_text(MACHINE)
    assert main(["run", str(vm), "--panel", "0x80"], cards=[card(guest(("out", 0x83, 1, 4)))]) == 9
    assert main(["hello", "--who", "you"], cards=[card(guest())]) == 3
    assert capfd.readouterr().out == "hello you\n"
    assert main(["hello", "--help"], cards=[card(guest())]) == 0
    assert "--who" in capfd.readouterr().out


def test_cards_are_listed_with_their_state(capfd: pytest.CaptureFixture[str]) -> None:
    """``cardcage cards`` shows each card, its distribution and what it offers, or why it is broken; -v shows more."""

    class Broken:
        __name__ = "broken"

        from cardcage.hookspecs import hookimpl

        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            raise RuntimeError("boom")

    assert main(["cards"], cards=[card(guest()), Broken()]) == 0
    said = capfd.readouterr().out
    assert "broken: RuntimeError: boom" in said
    assert (
        "accelerator scripted (usable, native: scripted by the test); device panel; flag --panel; command hello" in said
    )
    assert main(["cards", "-v"], cards=[card(guest())]) == 0
    assert "on system; pio 8 at 0x80; can: plug" in capfd.readouterr().out


def test_doctor_names_what_would_enable_the_rest(capfd: pytest.CaptureFixture[str]) -> None:
    """``cardcage doctor`` checks platform, accelerators and features, each in a line."""
    assert main(["doctor"], cards=[card(guest())]) == 0
    said = capfd.readouterr().out
    for name in ("platform", "accelerator scripted", "kvm device", "KSM", "transparent huge pages", "tap"):
        assert name in said


def test_a_broken_pipe_is_no_error() -> None:
    """``cardcage cards | true`` ends quietly."""
    done = subprocess.run(
        f"{sys.executable} -c 'from cardcage_cli import main; raise SystemExit(main())' cards -v | true",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_closed_streams_are_no_error() -> None:
    """Started with standard input, output and error closed, a command works and its status is right."""
    command = f"{sys.executable} -c 'from cardcage_cli import main; raise SystemExit(main())' cards <&- >&- 2>&-"
    assert subprocess.run(command, shell=True).returncode == 0


def test_a_missing_extra_is_listed(capfd: pytest.CaptureFixture[str]) -> None:
    """What needs an extra that is not installed says in the list how to get it."""

    def extra(registry: Registry) -> None:
        registry.device("fancy", "no_such_module:X", needs="fancy")

    assert main(["cards"], cards=[Scripted(extra=extra)]) == 0
    assert "device fancy (needs: pip install 'cardcage[fancy]' (No module named" in capfd.readouterr().out


def test_only_the_commands_own_parser_is_made() -> None:
    """Of the commands' parsers, that of the command that is parsed is made; a usage line and ``--help`` need none."""
    from cardcage.host import Host
    from cardcage_cli.later import LaterParser
    from cardcage_cli.program import make_parser

    parser = make_parser(Host(installed=False))
    (commands,) = (one.choices for one in parser._actions if isinstance(one.choices, dict))
    assert all(isinstance(one, LaterParser) for one in commands.values())
    parser.format_help()
    assert [name for name, one in commands.items() if "_later" not in vars(one)] == []
    assert parser.parse_args(["cards", "-v"]).verbose
    assert [name for name, one in commands.items() if "_later" not in vars(one)] == ["cards"]
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = commands["cards"].nothing_such


COLLECTED = """
import gc, sys
from cardcage.hookspecs import hookimpl
from cardcage_cli import main

found = gc.get_freeze_count()  # 3.12 freezes some itself

class Card:
    @hookimpl
    def cardcage_register(self, registry):
        registry.command("look", lambda host, arguments: print(gc.isenabled()) or 0)

    @hookimpl
    def cardcage_admit(self, machine):
        print(gc.isenabled())

    @hookimpl
    def cardcage_starting(self, machine):
        print(gc.isenabled(), gc.get_freeze_count() > found)

words = {words}
sys.argv[1:] = words
raise SystemExit(main({given}cards=[Card()]))
"""


@pytest.mark.parametrize(
    ("given", "command", "found"),
    [
        ("", ["look"], "True"),
        ("", ["run"], "False\nTrue True"),
        ("words, ", ["look"], "True"),
        ("words, ", ["run"], "True\nTrue False"),
    ],
)
def test_only_a_process_of_ours_builds_without_the_collector(
    tmp_path: Path, given: str, command: list[str], found: str
) -> None:
    """The collector is off while the program's own process builds a machine; a program that calls main() keeps it."""
    file = tmp_path / "vm.toml"
    file.write_text(
        '[machine]\naccel = "tcg"\nmemory = "1M"\nplatform = "none"\n'
        '[boot]\nprotocol = "raw"\nimage = "guest"\n[[device]]\ntype = "isa-debug-exit"\niobase = 0xf4\n'
    )
    (tmp_path / "guest").write_bytes(bytes.fromhex("b000e6f4f4"))
    words = [*command, *([str(file)] if command == ["run"] else [])]
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED.format(words=words, given=given)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == found, done.stderr


def test_help_loads_nothing_heavy() -> None:
    """``cardcage --help`` imports neither asyncio, cattrs, rich, structlog nor any card's own modules."""
    code = (
        "import sys, io, contextlib\nfrom cardcage_cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "heavy = {'asyncio', 'cattrs', 'rich', 'structlog', 'iced_x86', 'shutil', 'difflib'}\n"
        "heavy &= set(sys.modules)\n"
        "print(sorted(heavy), [m for m in sys.modules if m.startswith('cardcage_') and '.' in m and 'cli' not in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


@pytest.mark.parametrize("told", ["", "60", "0", "x", "-3", "132"])
def test_help_is_as_wide_as_the_terminal(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of help is what shutil finds, by ``COLUMNS`` or the terminal."""
    from shutil import get_terminal_size

    from cardcage_cli.later import columns

    monkeypatch.setenv("COLUMNS", told)
    assert columns() == get_terminal_size().columns
