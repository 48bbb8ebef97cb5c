"""Security cards: how a configuration and the command line name them, and that they come before all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import CardError, ConfigError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.registry import Registry
from cardcage.security import Act
from guarded import Cards, Guard
from scripted import Scripted


def test_a_broken_security_card_stops_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A security card that cannot be loaded or made is an error of Host, never a card that is left out."""
    from cardcage._host import cards as hosts
    from cardcage._host.discovery import Announcement
    from cardcage.config import Draft

    def announce(guard: Any) -> None:
        def load(one: Announcement) -> Any:
            if guard is None:
                raise ImportError("broken")
            return Cards(guard if one.name == "guard" else None)

        monkeypatch.setattr(Announcement, "load", load)
        monkeypatch.setattr(hosts, "announced", lambda group: [Announcement("guard", "g", "stranger", "1", "")])

    wanted = Draft.of({"policy": {"security": ["guard"]}}).config().security
    announce(None)
    with pytest.raises(CardError, match=r'card "guard" \(stranger 1\) is broken'):
        Host(security=wanted)
    announce(guard := Guard())
    with Host(security=wanted) as host:
        assert host.mediator.checkers == (guard,)
    assert guard.closed == 1
    with pytest.raises(ConfigError, match='no card offers security "other"'):
        Host(security=Draft.of({"security": "other"}).config().security)


def test_security_cards_load_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named security card is found by its entry point, and asked about each card that follows."""
    from cardcage._host import cards as hosts
    from cardcage._host.discovery import Announcement
    from cardcage.config import Draft

    guard, loaded = Guard(), []

    class Other:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None: ...

    def load(one: Announcement) -> Any:
        loaded.append(one.name)
        return Cards(guard) if one.name == "guard" else Other()

    names = ("abc", "guard", "xyz")
    monkeypatch.setattr(Announcement, "load", load)
    monkeypatch.setattr(hosts, "announced", lambda group: [Announcement(name, "g", "far", "1", "") for name in names])
    config = Draft.of({"security": {"checkers": ["guard"]}}).config()
    with Host(security=config.security):
        assert loaded == ["guard", "abc", "xyz"]
        assert guard.asked == [Act("host", "far", "card", ("load",))] * 2


def test_the_configuration_names_checkers() -> None:
    """`security = "default"`, `[security] checkers` and `[policy] security` are one list; other keys are refused."""
    from cardcage.config import Draft

    for table in (
        {"security": "default"},
        {"policy": {"security": "default"}},
        {"security": {"checkers": ["default"]}},
    ):
        config = Draft.of(table).config()
        assert [one.name for one in config.security] == ["default"]
        assert config.policy == {}
    both = Draft.of({"security": {"checkers": ["a"]}, "policy": {"security": [{"type": "b", "k": 1}], "memory": "c"}})
    assert [(one.name, one.options) for one in both.config().security] == [("a", {}), ("b", {"k": 1})]
    assert both.config().policy == {"memory": "c"}
    with pytest.raises(ConfigError, match=r"security.chekers: no such key. Did you mean"):
        Draft.of({"security": {"chekers": []}}).config()


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Guard:
    """A security card that is installed, as `guard`."""
    from cardcage._host import cards as hosts
    from cardcage._host.discovery import Announcement

    guard = Guard()
    monkeypatch.setattr(Announcement, "load", lambda one: Cards(guard))
    monkeypatch.setattr(hosts, "announced", lambda group: [Announcement("guard", "g", "stranger", "1", "")])
    return guard


RUN = '[machine]\nplatform = "none"\nmemory = "1M"\naccel = "scripted"\nname = "vm"\n'


@pytest.mark.parametrize("named", ["file", "option", "set", "environment"])
def test_the_command_line_loads_security_first(
    named: str, announced: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever the security card is named, it is asked about each other card, the command, and the machine."""
    from cardcage_cli import main

    (tmp_path / "vm.toml").write_text(RUN + ('[policy]\nsecurity = "guard"\n' if named == "file" else ""))
    more = {"option": ["--security", "guard"], "set": ["--set", 'security.checkers=["guard"]']}.get(named, [])
    if named == "environment":
        monkeypatch.setenv("CARDCAGE_SECURITY", "guard")
    announced.refused = {("machine", "create")}
    assert main(["run", str(tmp_path / "vm.toml"), *more], cards=[Scripted()]) == 2
    assert "outcome: denied: operator may not create machine" in capfd.readouterr().err
    assert announced.asked == [
        Act("host", "given to Host", "card", ("load",)),
        Act("operator", "run", "management", ("command",)),
        Act("operator", "operator:vm", "machine", ("create",)),
    ]
    announced.refused = {("management", "command")}
    assert main(["run", str(tmp_path / "vm.toml"), *more], cards=[Scripted()]) == 2
    assert "may not command management" in capfd.readouterr().err


def test_security_that_comes_too_late_is_refused(
    announced: Guard, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A security card that only the whole configuration names, after the other cards were loaded, is an error."""
    from cardcage_cli import main

    (tmp_path / "vm.conf").write_text(RUN + 'policy.security = "guard"\n'.replace("policy.", "[policy]\n"))
    assert main(["run", str(tmp_path / "vm.conf")], cards=[Scripted()]) == 2
    assert "policy.security: a security card is loaded before all others" in capfd.readouterr().err
