"""A stranger's disk, from a wheel of its own: it keeps the contract, and moves with its machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage.abilities import has
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage_migrate import Movable
from cardcage_testing import check_block_backend
from installed import install
from migrate_kit import Coming, over
from snapshot_kit import count, counting, counts_on

pytestmark = pytest.mark.once
EXAMPLE = Path(__file__).parents[2] / "examples" / "stripe-card"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the back end."""
    site = install(EXAMPLE, tmp_path_factory.mktemp("stripe") / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        import stripe_card.striped

        assert str(site) in str(stripe_card.striped.__file__)
        yield stripe_card.striped
    for name in ("stripe_card", "stripe_card.striped"):
        sys.modules.pop(name, None)


@pytest.fixture
def host(card: Any) -> Iterator[Host]:
    """A host with the installed cards, and this one, which its wheel announces."""
    with Host() as made:
        assert "stripe" in [one.name for one in made.cards]
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three files of 8 stripes."""
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(8 * 4096))
    return [str(tmp_path / name) for name in "abc"]


def test_it_keeps_the_contract(card: Any, files: list[str]) -> None:
    """What is written is read again, wherever stripes end; the stripes lie in turn in the files."""

    def make() -> Any:
        return card.Striped(card.StripedOptions(files, 4096))

    check_block_backend(make)
    disk = make()
    assert has(disk, Movable)
    disk.writev(4096 - 512, [memoryview(bytearray(b"x" * 4096)), memoryview(bytearray(b"y" * 8192))])
    disk.flush()
    disk.close()
    data = [Path(one).read_bytes() for one in files]
    assert data[0][4096 - 512 : 4096] == b"x" * 512
    assert data[1][:4096] == b"x" * 3584 + b"y" * 512
    assert data[2][:4096] == b"y" * 4096


@pytest.mark.parametrize(
    ("names", "stripe", "match"),
    [
        ("a", 4096, "files"),
        ("ab", 5000, "power of two"),
        ("abd", 4096, "cannot be opened: No such file"),
        ("ab", 1 << 20, "not of whole stripes"),
    ],
)
def test_mistakes_are_named(
    card: Any, host: Host, files: list[str], tmp_path: Path, names: str, stripe: int, match: str
) -> None:
    """Options and files that do not fit are errors of the configuration; a file that another has is the host's."""
    drive = {"type": "striped", "files": [str(tmp_path / one) for one in names], "stripe": stripe}
    with pytest.raises(ConfigError, match=match):
        counting(tmp_path, host, platform="pc", memory="8M", devices=[{"type": "virtio-blk", "drive": drive}])
    disk = card.Striped(card.StripedOptions(files, 4096))
    with pytest.raises(HostError, match=r"a: another process has it"):
        card.Striped(card.StripedOptions(files, 4096))
    disk.close()


def test_it_moves_with_its_machine(card: Any, host: Host, files: list[str], tmp_path: Path) -> None:
    """A machine with the disk is migrated, there and back again: one side has the files, never both."""
    drive = {"type": "striped", "files": files, "stripe": 4096}
    devices = [{"type": "virtio-blk", "id": "d", "drive": drive}]
    with counting(tmp_path, host, platform="pc", memory="8M", devices=devices) as vm:
        vm.start()
        counts_on(vm, 100)
        with Coming(host) as there:
            over(vm, there.link)
            moved = there.done().machine
            counts_on(moved, count(moved))
            with pytest.raises(HostError, match="another process has it"):
                card.Striped(card.StripedOptions(files, 4096))
            with Coming(host) as again:
                over(moved, again.link)
                back = again.done().machine
                counts_on(back, count(back))
    card.Striped(card.StripedOptions(files, 4096)).close()
