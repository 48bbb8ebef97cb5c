"""Settings of a guest's kernel."""

from __future__ import annotations

import pytest
from cardcage_pytest import Guest
from guest_tests import get, held, put


@pytest.mark.cardcage(append="sysctl.vm.swappiness=7")
def test_the_command_line_sets_them(guest: Guest) -> None:
    assert get(guest, "vm.swappiness") == "7"
    put(guest, "vm.swappiness", "8")
    assert guest.run("cat /proc/sys/vm/swappiness", text=True, check=True).stdout == "8\n"


def test_they_are_put_back(module_guest: Guest) -> None:
    before = get(module_guest, "kernel.panic")
    with held(module_guest, "kernel.panic", "5"):
        assert get(module_guest, "kernel.panic") == "5"
    assert get(module_guest, "kernel.panic") == before


@pytest.mark.parametrize("name", ["vm.nonesuch", "nonesuch.vm"])
def test_an_unknown_one_is_the_kernels_own_error(module_guest: Guest, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        get(module_guest, name)


def test_a_wrong_value_is_refused(module_guest: Guest) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        put(module_guest, "vm.swappiness", "much")
    with pytest.raises(ValueError, match="expected a name"):
        get(module_guest, "vm/../swappiness")
