"""The hooks and fixtures that pytest finds. Nothing else is imported before a test asks for a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cardcage_pytest.lab import Guest, Lab, MachineFactory

__all__ = ["class_guest", "guest", "machine_factory", "module_guest", "session_guest"]

LAB: pytest.StashKey[Lab] = pytest.StashKey()
FIXTURES = frozenset({"guest", "class_guest", "module_guest", "session_guest", "machine_factory"})
MARKER = (
    "cardcage(memory, cpus, accel, kernel, append, devices, machine, fragments, maker, boot_timeout, setup_timeout, "
    "call_timeout, ...): the guests of this test; keys are those of Machine.debian()"
)
KEYS = {
    "memory": ("SIZE", 'memory of a guest, such as "1G"'),
    "cpus": ("N", "processors of a guest"),
    "accel": ("NAME", "accelerator of a guest, such as tcg or kvm"),
    "kernel": ("FILE", "kernel of a guest; by default the distribution's"),
    "append": ("TEXT", "text behind the kernel's command line of a guest"),
}
"""Defaults for guests whose marker says nothing else: an option of the command line, and a key of the ini-file."""
LIMITS = {
    "boot_timeout": ("120", "seconds in which a guest has to be up"),
    "setup_timeout": ("", "seconds in which a test's fixtures have to be done, beside booting; by default no limit"),
    "call_timeout": ("", "seconds that a test with a guest may take; by default no limit"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line and of the ini-file."""
    group = parser.getgroup("cardcage", "guests of cardcage")
    for name, (metavar, text) in KEYS.items():
        group.addoption(f"--cardcage-{name}", metavar=metavar, help=text)
        parser.addini(f"cardcage_{name}", text)
    for name, (default, text) in LIMITS.items():
        parser.addini(f"cardcage_{name}", text, default=default)
    parser.addini("cardcage_booted", "guests that are kept booted to be reverted to", default="2")
    group.addoption(
        "--cardcage-keep",
        action="store_true",
        help="stop at the first failure of a test with guests, and keep them running, their consoles on sockets",
    )
    group.addoption(
        "--cardcage-card",
        metavar="DISTRIBUTION",
        action="append",
        default=[],
        help="run the contracts for all that this distribution's cards offer; alone where no tests are named",
    )
    parser.addini(
        "cardcage_options",
        'options of an offer that --cardcage-card checks, a line each: "NAME: key=value,..."',
        type="linelist",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker; and without named tests, the contracts of a card are the whole suite."""
    config.addinivalue_line("markers", MARKER)
    booted = config.getini("cardcage_booted")
    if not (booted.isascii() and booted.isdigit() and int(booted)):
        raise pytest.UsageError(f"cardcage_booted: expected a number of guests, from 1, got {booted!r}")
    if config.option.cardcage_card and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []
    if config.option.cardcage_keep and (hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None)):
        raise pytest.UsageError("--cardcage-keep waits at this terminal: omit -n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the contracts."""
    if config.option.cardcage_card:
        from cardcage_pytest.cards import collected

        for name in config.option.cardcage_card:
            items += collected(session, name)


def lab_of(config: pytest.Config) -> Lab:
    """The guests of this run."""
    if LAB not in config.stash:
        from cardcage_pytest.lab import Lab

        config.stash[LAB] = Lab(config)
    return config.stash[LAB]


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> Guest:
    """A guest that has just booted: a machine with all verbs of its agent.

    Between tests it is brought back to that point where it has ``checkpoint`` and ``revert``; else each test boots one.
    """
    return lab_of(request.config).guest(request)


@pytest.fixture(scope="class")
def class_guest(request: pytest.FixtureRequest) -> Guest:
    """A guest that the tests of a class share, as they leave it to one another."""
    return lab_of(request.config).guest(request)


@pytest.fixture(scope="module")
def module_guest(request: pytest.FixtureRequest) -> Guest:
    """A guest that the tests of a module share, as they leave it to one another."""
    return lab_of(request.config).guest(request)


@pytest.fixture(scope="session")
def session_guest(request: pytest.FixtureRequest) -> Guest:
    """A guest that all tests of a process share, as they leave it to one another."""
    return lab_of(request.config).guest(request)


@pytest.fixture
def machine_factory(request: pytest.FixtureRequest) -> MachineFactory:
    """Makes machines that are closed after the test.

    ``machine_factory(memory="1G")`` gives one that was not started, ``machine_factory.boot(...)`` one that is up. Keys
    are those of the marker, which holds for what is not given. A card's exception that no ``wait()`` raised fails the
    test.
    """
    from cardcage_pytest.lab import MachineFactory

    return MachineFactory(lab_of(request.config), request)


def _phase(item: pytest.Item, phase: str) -> Iterator[None]:
    """Hold a phase of a test with guests to its limit."""
    if FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
        yield
    else:
        yield from lab_of(item.config).limited(item, phase)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """The limit ``setup_timeout``."""
    yield from _phase(item, "setup")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The limit ``call_timeout``."""
    yield from _phase(item, "call")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add consoles and commands to the report of a failure."""
    outcome: Any = yield
    if LAB in item.config.stash and outcome.excinfo is None:
        item.config.stash[LAB].report(item, outcome.get_result())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what is kept booted; with ``--cardcage-keep``, wait first."""
    if LAB in config.stash:
        config.stash[LAB].close()
