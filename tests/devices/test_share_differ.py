"""Both servers of shared directories against the host's own file system: the same calls have the same ends."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from share_calls import Direct, furnish, outcome, tree
from share_kernel import Kernel
from share_strategies import WIRE_ACTS, WIRE_FS_ACTS, WIRE_OWNS
from share_wire import WIRES

MEMORY = Path("/dev/shm")
OWNS = WIRE_OWNS if os.geteuid() == 0 else st.nothing()
SCRIPTS = {"fs": st.one_of(WIRE_ACTS, WIRE_FS_ACTS, OWNS), "9p": st.one_of(WIRE_ACTS, OWNS)}


def ended(kernel: Kernel, act: str, *values: Any) -> Any:
    try:
        return outcome(kernel, act, *values)
    except kernel.wire.error as error:
        return str(error)


def guests_view(files: dict[str, Any]) -> dict[str, Any]:
    """*files* with attributes by the names that the guest gave them."""
    for *_, values in files.values():
        values[:] = sorted([key.removeprefix("user.virtiofs."), value] for key, value in values)
    return files


@pytest.mark.parametrize("kind", ["fs", "9p"])
@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.once
def test_calls_end_as_on_the_host(kind: str, where: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is called, in whatever order, results, errors, files and their attributes are those of the host, on a
    disk and on a tmpfs.
    """
    if where == "memory" and not os.access(MEMORY, os.W_OK):
        pytest.skip("needs /dev/shm")

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(script=st.lists(SCRIPTS[kind], max_size=40))
    def same(script: list[tuple[Any, ...]]) -> None:
        base = tmp_path_factory.mktemp("differ") if where == "disk" else Path(mkdtemp(dir=MEMORY))
        host, guest = base / "host", base / "guest"
        before = os.umask(0)
        for one in (host, guest):
            furnish(str(one))
        wire = WIRES[kind](guest, user=os.getuid(), group=os.getgid())
        direct, kernel = Direct(str(host)), Kernel(wire)
        try:
            for act in script:
                here = outcome(direct, *act)
                os.umask(0o077)
                there = ended(kernel, *act)
                os.umask(0)
                assert there == here, act
            kernel.drop_all()
            assert guests_view(tree(str(guest))) == tree(str(host))
        finally:
            os.umask(before)
            direct.drop_all()
            wire.close()
            rmtree(base, ignore_errors=True)

    same()
