"""``cardcage policy reload|set-boolean|set-enforcing|show``: the policy of machines that run in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import Denied, UsageError
from cardcage_cli import main
from cardcage_fleet.control import command, find
from cardcage_selinux.card import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = [sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())"]
CONFIG = """
{security}
[machine]
name = "{name}"
platform = "none"
memory = "2M"
accel = "tcg"
[boot]
protocol = "raw"
image = "guest.bin"
"""
SECURITY = """
[security]
checkers = [{ type = "selinux", policy = ["policy.cil", "site.cil"], audit = "audit.log", state = "state" }]
"""


class Lab:
    """A folder in which ``cardcage run`` runs machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "guest.bin").write_bytes(bytes.fromhex("fbf4ebfc"))  # sti; hlt; again
        (folder / "policy.cil").write_text(DEFAULT.read_text())
        (folder / "site.cil").write_text("(boolean first false)")
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, name: str, security: str = SECURITY) -> Any:
        """A machine that runs; what find() says of it."""
        (self.folder / f"{name}.toml").write_text(CONFIG.replace("{security}", security).replace("{name}", name))
        command = [*PROGRAM, "run", f"{name}.toml"]
        process = subprocess.Popen(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.processes.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if b"accelerator" in line:
                break
        while True:  # the roster says when it runs
            assert process.poll() is None
            try:
                if (entry := find(name)).state == "running":
                    return entry
            except UsageError:
                continue

    def denials(self) -> str:
        return (self.folder / "audit.log").read_text()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CARDCAGE_SECURITY", raising=False)
    lab = Lab(tmp_path)
    yield lab
    for process in lab.processes:
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.terminate()
        process.communicate()


def said(capsys: Any, *words: str) -> tuple[int, str]:
    """Status and both outputs."""
    status = main(["policy", *words])
    out = capsys.readouterr()
    return status, out.out + out.err


def test_the_policy_of_a_running_machine(lab: Lab, capsys: Any) -> None:
    """Booleans, mode and files change in another process's machine; what is wrong is one line and changes nothing."""
    entry = lab.run("one")
    status, text = said(capsys, "show", "one")
    assert (status, text.splitlines()[0]) == (0, "enforcing")
    assert {"first=false", "machine_execmem=true"} <= set(text.splitlines())
    assert said(capsys, "set-boolean", "one", "first=on", "nic_dump=true") == (0, "")
    assert {"first=true", "nic_dump=true"} <= set(said(capsys, "show", str(entry.pid))[1].splitlines())
    status, text = said(capsys, "set-boolean", "one", "nic_dump=false", "frist=on")
    assert (status, 'no boolean is called "frist". Did you mean "first"' in text) == (2, True)
    assert "nic_dump=true" in said(capsys, "show", "one")[1]
    assert said(capsys, "set-enforcing", "one", "off") == (0, "")
    assert said(capsys, "show", "one")[1].startswith("permissive")
    assert said(capsys, "set-enforcing", "one", "on") == (0, "")
    (lab.folder / "site.cil").write_text("(oops)")
    status, text = said(capsys, "reload", "one")
    assert (status, "site.cil:1:1: " in text, len(text.splitlines())) == (2, True, 1)
    assert "first=true" in said(capsys, "show", "one")[1]
    (lab.folder / "site.cil").write_text("(boolean second true)")
    assert said(capsys, "reload", "one") == (0, "")
    assert "second=true" in said(capsys, "show", "one")[1]
    assert "first" not in said(capsys, "show", "one")[1]


@pytest.mark.once
def test_all_machines_are_reloaded(lab: Lab, capsys: Any) -> None:
    """Without a name, reload reaches each machine with a policy; one that has none is no error, unless it is named."""
    assert said(capsys, "reload") == (2, "outcome: wrong use: no running machine has a policy of the card selinux\n")
    one, two = lab.run("one"), lab.run("two")
    lab.run("three", security="")
    (lab.folder / "site.cil").write_text("(boolean second true)")
    status, text = said(capsys, "reload")
    assert (status, sorted(text.splitlines())) == (
        0,
        [f"one (pid {one.pid}): reloaded", f"two (pid {two.pid}): reloaded"],
    )
    status, text = said(capsys, "reload", "two", "three")
    assert (status, "three (pid " in text, "does not use the security card selinux" in text) == (1, True, True)
    status, text = said(capsys, "show", "three")
    assert (status, 'machine "three" does not use the security card selinux' in text) == (2, True)
    assert said(capsys, "show", "four")[0] == 2


@pytest.mark.parametrize(
    ("rule", "less", "denied"),
    [
        ("(policy (load setbool setenforce))", "(policy (load))", "setbool"),
        ("(allow operator_t svirt_t (management (reach)))", "", "reach"),
        ("(allow operator_t command_t (management (command)))", "(typeattribute unused)", "command"),
    ],
)
@pytest.mark.once
def test_a_policy_decides_who_changes_it(lab: Lab, rule: str, less: str, denied: str) -> None:
    """Each of the three questions is asked: may the machine be reached, the command given, the policy changed."""
    text = DEFAULT.read_text()
    assert rule in text
    (lab.folder / "policy.cil").write_text(text.replace(rule, less))
    if denied == "command":  # cardcage run is a command too
        more = (
            '(typetransition operator_t host_t management "run" tap_t) (allow operator_t tap_t (management (command)))'
        )
        (lab.folder / "site.cil").write_text(f"(boolean first false) {more}")
    entry = lab.run("one")
    with pytest.raises(Denied, match=f"may not {denied}"):
        command(entry, "policy-set", {"booleans": {"first": True}})
    assert f"{{ {denied} }}" in lab.denials()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("policy-reload", {"x": 1}),
        ("policy-set", {"booleans": []}),
        ("policy-set", {"booleans": {"first": 1}}),
        ("policy-set", {"enforcing": "no"}),
        ("policy-set", {"enforcing": True, "booleans": {"first": True}}),
        ("policy-show", {"": None}),
    ],
)
@pytest.mark.once
def test_arguments_are_checked(lab: Lab, name: str, arguments: dict[str, Any]) -> None:
    """What a command does not take is refused before anything is done."""
    entry = lab.run("one")
    with pytest.raises(UsageError):
        command(entry, name, arguments)
    assert command(entry, "policy-show", {})["changes"] == 0


def test_nothing_runs(lab: Lab, capsys: Any) -> None:
    """Machines that are not there, and values that are none, are one line and status 2."""
    for words in (["reload", "one"], ["set-boolean", "one", "a=on"], ["show", "one"], ["set-enforcing", "one", "on"]):
        status, text = said(capsys, *words)
        assert (status, 'no machine "one" of this user runs' in text) == (2, True)
    assert os.listdir(lab.folder / "cardcage") == []
