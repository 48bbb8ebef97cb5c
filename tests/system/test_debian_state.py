"""A running Debian kernel is saved, and goes on in other machines."""

from __future__ import annotations

import pytest
from cardcage import Machine
from cardcage.errors import HostError
from cardcage.outcome import PoweredOff
from cardcage_boot.cache import cache_root
from cardcage_boot.command import COMMAND_LINE
from cardcage_boot.fetch import Shelf
from cardcage_snapshot.state import capture, dumps, loads, restore

PIECE = 1 << 20


def test_a_running_linux_goes_on_elsewhere() -> None:
    """A shell with a variable set, on two processors: its state as JSON and its RAM continue elsewhere, twice."""
    shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    try:
        kernel = shelf.kernel()
    except HostError as error:
        pytest.skip(str(error))
    initrd = shelf.initramfs(kernel)

    def machine() -> Machine:
        append = f"{COMMAND_LINE} quiet"
        return Machine(kernel=kernel.path, initrd=initrd, append=append, memory="192M", cpus=2, accel="tcg")

    with machine() as first:
        first.start()
        first.console.expect("~ # ", timeout=120)
        first.console.send("kept=41; echo it is set\r")
        first.console.expect("it is set\r\n", timeout=60)
        first.pause()
        text = dumps(capture(first))
        ram = {slot.address: first.memory.read(slot.address, slot.size) for slot in first.memory.slots}
    for _ in range(2):
        with machine() as second:
            for address, data in ram.items():
                for at in range(0, len(data), PIECE):
                    if any(piece := data[at : at + PIECE]):  # what is zero there is zero here
                        second.memory.write(address + at, piece)
            restore(second, loads(text))
            second.start(boot=False)
            second.console.send("nproc; echo got $((kept + 1)); poweroff -f\r")
            assert "2\r\ngot 42" in second.console.expect("got 42", timeout=60)
            assert second.wait(60) == PoweredOff()
