"""Names of machines: one of an account each, so that commands and MAC addresses mean one machine."""

from __future__ import annotations

import subprocess
import sys

import cardcage_fleet
import pytest
from cardcage.errors import StateError
from cardcage.host import Host
from cardcage.machine import Machine, rename
from cardcage_cli import draft_of
from cardcage_cli.program import make_parser
from cardcage_fleet.roster import Roster
from scripted import Scripted

pytestmark = pytest.mark.usefixtures("runtime")

OTHER = """
import sys
from cardcage.machine import Machine
with Machine(accel="tcg", memory="2M", machine={"platform": "none", "name": "lab"}) as vm:
    print(vm.name, flush=True)
    sys.stdin.read()
"""


def machine(name: str = "lab", host: Host | None = None, **keys: object) -> Machine:
    table = {"machine": {"name": name, "memory": "2M", "platform": "none", "accel": ["scripted"], **keys}}
    return Machine(host=host or Host([Scripted(), cardcage_fleet], installed=False), fragments=[table])


def test_a_number_is_added_to_a_name_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """The second machine of a name gets the first free number, which is said; a name that came free is taken again."""
    with machine() as first, machine() as second, machine() as third:
        assert (first.name, second.name, third.name) == ("lab", "lab-2", "lab-3")
        assert (second.config.machine.name, second.label, repr(second)) == ("lab-2", "lab-2", "<Machine 'lab-2' built>")
        assert sorted((one.name, one.label) for one in Roster().read()[0]) == [
            (name, name) for name in ("lab", "lab-2", "lab-3")
        ]
        said = capsys.readouterr().err
        assert said.count("another machine of this account has the name: a number is added") == 2
        assert "machine=lab-3" in said
        assert "name=lab" in said
        second.close()
        with machine() as fourth:
            assert fourth.name == "lab-2"
    with machine() as again:
        assert again.name == "lab"


def test_a_machine_without_a_name_is_told_apart_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """Of machines that nobody named each has a name of its own, and there is nothing to say."""
    fragment = {"machine": {"memory": "2M", "platform": "none", "accel": ["scripted"]}}
    with Host([Scripted(), cardcage_fleet], installed=False) as host:
        made = [Machine(host=host, fragments=[fragment]) for _ in range(3)]
        assert [one.name for one in made] == ["machine", "machine-2", "machine-3"]
    assert capsys.readouterr().err == ""


def test_names_are_told_apart_between_processes() -> None:
    """A machine of another process of the account keeps its name from ours."""
    words = [sys.executable, "-c", OTHER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "lab\n"
        with machine() as ours:
            assert ours.name == "lab-2"
        other.communicate("")


def test_network_cards_of_two_machines_have_different_addresses() -> None:
    """Two machines of one configuration, on one network, have different MAC addresses, without a key for it."""
    with Host() as host:
        made = [
            Machine(host=host, accel="tcg", memory="4M", devices=[{"type": "virtio-net", "net": "switch"}])
            for _ in range(3)
        ]
        assert len({one.devices["virtio-net"].device.virtio.device.mac for one in made}) == 3
        assert [one.devices["virtio-net"].slot.machine for one in made] == ["machine", "machine-2", "machine-3"]


def test_a_label_that_was_given_is_kept() -> None:
    """A machine that is renamed keeps the label that its configuration gives it."""
    with machine(), machine(label="mine") as second:
        assert (second.name, second.label) == ("lab-2", "mine")


def test_a_machine_that_is_built_keeps_its_name() -> None:
    """What a machine has made in its name would not follow: renaming it then is refused."""
    with machine() as vm, pytest.raises(StateError, match="lab: a machine is renamed while it is admitted"):
        rename(vm, "other")


def test_a_machine_is_named_from_python() -> None:
    """``Machine(name=...)`` names the machine."""
    with Machine(name="lab", accel="tcg", memory="2M", machine={"platform": "none"}) as vm:
        assert vm.name == "lab"


@pytest.mark.parametrize("words", [["run", "vm.toml"], ["boot"]], ids=lambda words: words[0])
def test_each_command_that_makes_a_machine_takes_a_name(words: list[str]) -> None:
    """``--name`` names the machine, whatever the command."""
    with Host() as host:
        arguments = make_parser(host).parse_args([*words, "--name", "lab"])
        config = draft_of(arguments).config()
    assert (config.machine.name, config.origins["machine.name"]) == ("lab", "--name")
