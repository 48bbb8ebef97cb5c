"""Memory back ends: the contract, real huge pages, files, preallocation, NUMA, and memory that is taken away."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage import ram
from cardcage.config import Config, Draft
from cardcage.errors import ConfigError, HostError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import Anonymous, Memfd, Placement, RamBlock, numa_nodes
from cardcage.registry import Registry
from cardcage_memory import checks
from cardcage_memory.file import File, FileOptions
from cardcage_memory.hugetlb import Hugetlb, HugetlbOptions, pool
from cardcage_memory.parse import parse_memory_flag
from cardcage_testing import check_memory_backend

pytestmark = pytest.mark.xdist_group("host")

MIB = 1 << 20


@pytest.fixture
def huge() -> Iterator[int]:
    """Four more pages of 2 MiB in the host's pool, put back afterwards."""
    knob = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = pool(2 * MIB, "nr_hugepages")
    if before is None or not os.access(knob, os.W_OK):
        pytest.skip("needs root and a kernel with hugetlb, to make a pool of huge pages")
    knob.write_text(str(before + 4))
    try:
        if (pool(2 * MIB, "free_hugepages") or 0) < 4:
            pytest.skip("the host has no four free stretches of 2 MiB left")
        yield 4
    finally:
        knob.write_text(str(before))


def resident(block: RamBlock) -> int:
    """Bytes of the block's mapping that are in memory, from smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            low, high = (int(one, 16) for one in line.split()[0].split("-"))
            inside = low <= block.host_address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the block is not mapped")


def machine(host: Host | None = None, **memory: Any) -> Machine:
    table = {"machine": {"memory": "8M", "platform": "none", "accel": ["tcg"]}, "memory": memory}
    return Machine(fragments=[table], host=host)


# the contract


@pytest.mark.parametrize(
    "make",
    [
        Anonymous,
        Memfd,
        lambda: File(FileOptions(Path("/dev/shm"))),
        lambda: File(FileOptions(Path("/var/tmp"))),
    ],
    ids=["anonymous", "memfd", "tmpfs", "disk"],
)
def test_back_ends_keep_the_contract(make: Callable[[], ram.MemoryBackend]) -> None:
    """Each back end that every host has passes the public contract."""
    check_memory_backend(make)


@pytest.mark.parametrize("shared", [True, False])
def test_huge_pages_keep_the_contract(huge: int, shared: bool) -> None:
    """Pages of 2 MiB pass the public contract on a real pool, shared and private."""
    check_memory_backend(lambda: Hugetlb(HugetlbOptions(shared=shared)), 4 * MIB)


def test_a_template_keeps_the_contract(tmp_path: Path) -> None:
    """A private file passes the contract, and the file itself never changes."""
    path = tmp_path / "template"
    path.write_bytes(b"T" * MIB)
    check_memory_backend(lambda: File(FileOptions(path, shared=False)), MIB, zeros=False)
    assert path.read_bytes() == b"T" * MIB


def test_the_check_finds_a_back_end_that_lies() -> None:
    """check_memory_backend names what a broken back end breaks."""

    class Short:
        takes_ram = True

        def allocate(self, size: int, name: str, /) -> ram.Backing:
            return ram.Backing(mmap.mmap(-1, size), discard=None, page=3)

    with pytest.raises(AssertionError, match="power of two"):
        check_memory_backend(Short)


# configuration


def test_a_machine_uses_what_memory_names(tmp_path: Path) -> None:
    """[memory] chooses the back end and its options; the guest's bytes are in the file."""
    path = tmp_path / "ram"
    with machine(type="file", path=str(path)) as vm:
        vm.memory.write(0x1000, b"guest")
        assert path.stat().st_size == 8 * MIB
        with pytest.raises(ConfigError, match="another machine uses it"):
            machine(type="file", path=str(path))
    assert path.read_bytes()[0x1000:0x1005] == b"guest"
    with machine(type="memfd") as vm:
        assert vm.memory.ranges[0].block.fd >= 0


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ({"type": "memfdd"}, 'memory.type: no card offers memory "memfdd". Did you mean "memfd"?'),
        ({"type": "memfd", "page": "2M"}, "memory.page: no such key"),
        ({"preallocate": "yes"}, 'memory.preallocate: expected true or false, got "yes"'),
        ({"huge_pages": "sometimes"}, 'memory.huge_pages: expected one of "default", "always", "never"'),
        ({"nodes": [63]}, "memory.nodes[0]: the host has no NUMA node 63"),
        ({"type": "hugetlb", "page": "3M"}, "memory.page: the host has no pages of 3 MiB"),
        ({"type": "file"}, "memory.path: missing: expected a path"),
        ({"type": "file", "path": "/proc/version"}, "memory.path: /proc/version: "),
        ({"type": "file", "path": "/no/such/place/ram"}, "memory.path: /no/such/place/ram: No such file"),
        ({"type": "file", "path": "/etc/hostname", "shared": False}, "memory.path: /etc/hostname: it has "),
    ],
)
def test_bad_input_names_the_key(memory: dict[str, Any], says: str) -> None:
    """Each mistake in [memory] is one line that names the key; nothing is left."""
    with pytest.raises((ConfigError, HostError)) as caught:
        machine(**memory)
    assert str(caught.value).startswith(says), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    """A mistake in a TOML file's [memory] is blamed on that file and key."""
    file = tmp_path / "vm.toml"
    file.write_text('[machine]\nmemory = "8M"\nplatform = "none"\n[memory]\ntype = "hugetlb"\npage = "5M"\n')
    with pytest.raises(ConfigError, match=rf"{file}: memory\.page: the host has no pages of 5 MiB"):
        Machine.from_toml(file)
    file.write_text('[memory]\nnodes = ["a"]\n')
    with pytest.raises(ConfigError, match=rf"{file}: memory\.nodes\[0\]: expected a whole number"):
        Machine.from_toml(file)


def test_the_flag_is_a_memory_table() -> None:
    """--memory-backend makes a [memory] table; words that are neither on nor off are refused."""
    assert parse_memory_flag("memfd", Host()) == {"memory": {"type": "memfd"}}
    assert parse_memory_flag("hugetlb,page=1G,preallocate=on,nodes=0:1", Host()) == {
        "memory": {"type": "hugetlb", "page": "1G", "preallocate": True, "nodes": [0, 1]}
    }
    for text, says in (
        ("memfd,preallocate=maybe", "on or off"),
        ("memfd,nodes=0-1", "numbers"),
        ("memfd,x", "key=value"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_memory_flag(text, Host())


def test_a_strangers_back_end_gets_what_all_have() -> None:
    """A back end that a card registers is placed and preallocated by the core, and the machine runs on it."""
    made: list[int] = []

    class Locked:
        takes_ram = True

        def allocate(self, size: int, name: str, /) -> ram.Backing:
            made.append(size)
            return ram.Backing(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    class Card:
        @staticmethod
        def cardcage_register(registry: Registry) -> None:
            registry.memory("pinned", Locked)

    from cardcage.hookspecs import hookimpl

    Card.cardcage_register = staticmethod(hookimpl(Card.cardcage_register))  # type: ignore[method-assign]  # a hook that needs no object
    with Host([Card()]) as host, machine(host, type="pinned", preallocate=True) as vm:
        assert made == [8 * MIB]
        assert resident(vm.memory.ranges[0].block) == 8 * MIB


# what is taken, and when


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), File(FileOptions(Path("/dev/shm")))])
def test_preallocated_or_lazy(backend: ram.MemoryBackend) -> None:
    """Without preallocation nothing is resident until it is touched; with it, all is."""
    lazy = RamBlock(4 * MIB, backend=backend)
    assert resident(lazy) == 0
    lazy.view[: 1 * MIB] = b"x" * MIB
    assert MIB <= resident(lazy) <= 3 * MIB
    assert lazy.discard(0, MIB)
    assert resident(lazy) < MIB
    lazy.close()
    eager = RamBlock(4 * MIB, backend=backend, placement=Placement(preallocate=True))
    assert resident(eager) == 4 * MIB
    eager.close()


def test_preallocation_without_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not know MADV_POPULATE_WRITE has each page touched instead."""
    monkeypatch.setattr(ram, "MADV_POPULATE_WRITE", 9999)
    block = RamBlock(4 * MIB, placement=Placement(preallocate=True))
    assert resident(block) == 4 * MIB
    block.close()


def test_more_than_there_is_is_refused() -> None:
    """Preallocating more than the host has left is refused with numbers before a page is taken."""
    with pytest.raises(ConfigError, match=r"cannot be allocated at once: the host has .* left"):
        RamBlock(1 << 45, placement=Placement(preallocate=True))


def test_a_full_tmpfs_is_an_error(tmp_path: Path) -> None:
    """A tmpfs with less room than RAM refuses at once; one that fills later stops the machine, not the process."""
    if os.geteuid():
        pytest.skip("needs root, to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", tmp_path], check=True)
    try:
        with pytest.raises(ConfigError, match="16 MiB are needed, its file system has 12 MiB left"):
            RamBlock(16 * MIB, backend=File(FileOptions(tmp_path / "a")))
        assert not (tmp_path / "a").exists()
        with machine(type="file", path=str(tmp_path / "ram")) as vm:
            (tmp_path / "hog").write_bytes(bytes(11 * MIB))
            vm.memory.write(0, b"x" * (512 << 10))
            vm.memory.write(2 * MIB, b"x" * MIB)
            assert vm._life.await_end(60)
            with pytest.raises(HostError, match=r"no memory at .* file system or pool is full"):
                vm.wait()
        (tmp_path / "hog").unlink()
        (tmp_path / "ram").unlink()
        first = RamBlock(8 * MIB, backend=File(FileOptions(tmp_path)))
        second = RamBlock(8 * MIB, backend=File(FileOptions(tmp_path)))
        first.view[: 8 * MIB] = b"x" * 8 * MIB  # what the second was promised is gone now
        with pytest.raises(ConfigError, match="cannot all be allocated"):
            second.populate()
        first.close()
        second.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_that_is_cut_short_stops_only_its_machine(tmp_path: Path) -> None:
    """Another process truncates a machine's file: that machine ends with an error, another one and the process live."""
    path = tmp_path / "ram"
    with machine(type="memfd") as other, machine(type="file", path=str(path)) as vm:
        vm.memory.write(MIB, b"here")
        subprocess.run(["truncate", "--size=4096", path], check=True)
        assert vm.memory.read(MIB, 4) == b"\0\0\0\0"
        assert vm._life.await_end(60)
        with pytest.raises(HostError, match="no memory at 1 MiB: its file was cut short"):
            vm.wait()
        other.memory.write(0, b"still")
        assert other.memory.read(0, 5) == b"still"
        assert other.state == "built"


def test_a_memfd_cannot_be_cut_short() -> None:
    """A peer that holds the memfd can neither shrink nor grow it, nor undo that."""
    block = RamBlock(MIB, backend=Memfd())
    for act in (lambda: os.ftruncate(block.fd, 0), lambda: os.ftruncate(block.fd, 2 * MIB)):
        with pytest.raises(PermissionError):
            act()
    assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    block.close()


def test_other_faults_end_the_process_as_before() -> None:
    """A SIGBUS outside guest memory goes to who handled it before, and ends the process, also beside the translator."""
    program = (
        "import mmap, os, sys, faulthandler\n"
        "if sys.argv[1] == 'yes': faulthandler.enable()\n"
        "from cardcage.ram import Memfd, RamBlock\n"
        "if sys.argv[1] == 'tcg':\n"
        "    from cardcage import Machine\n"
        "    from cardcage_tcg.library import load\n"
        "    vm = Machine(accel='tcg', memory='2M', machine={'platform': 'none'})\n"
        "block = RamBlock(4096, backend=Memfd())\n"
        "if sys.argv[1] == 'tcg': assert load().signals() == 1\n"
        "fd = os.memfd_create('x'); os.ftruncate(fd, 4096); m = mmap.mmap(fd, 4096); os.ftruncate(fd, 0)\n"
        "m[0] = 1\n"
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for loud in ("no", "yes", "tcg"):
        done = subprocess.run([sys.executable, "-c", program, loud], capture_output=True, text=True, timeout=100)
        assert done.returncode == -7
        assert ("Bus error" in done.stderr) == (loud == "yes")


def test_numa_binding_takes_the_nodes_that_there_are() -> None:
    """Memory is bound to a node that is online (mbind accepts it), seen in numa_maps."""
    if not numa_nodes():
        pytest.skip("the kernel has no NUMA")
    for numa in ("bind", "preferred", "interleave"):
        block = RamBlock(MIB, placement=Placement(nodes=[numa_nodes()[0]], numa=numa))  # type: ignore[arg-type]  # str for Literal
        maps = Path("/proc/self/numa_maps")
        if maps.exists():
            row = next(one for one in maps.read_text().splitlines() if one.startswith(f"{block.host_address:x} "))
            assert numa.removesuffix("red") in row
        block.close()


def test_huge_page_advice_is_given() -> None:
    """huge_pages = "always" sets the kernel's advice on the mapping ("hg"), "never" its opposite ("nh")."""
    for word, flag in (("always", "hg"), ("never", "nh")):
        block = RamBlock(4 * MIB, placement=Placement(huge_pages=word))  # type: ignore[arg-type]  # str for Literal
        text = Path("/proc/self/smaps").read_text()
        flags = text[text.index(f"{block.host_address:x}-") :].partition("VmFlags:")[2].splitlines()[0]
        assert flag in flags.split()
        block.close()


def test_an_empty_pool_names_the_command(huge: int) -> None:
    """More huge pages than are free is refused with the command that makes them."""
    with pytest.raises(ConfigError, match=r"echo \d+ \| sudo tee .*hugepages-2048kB/nr_hugepages"):
        RamBlock(1 << 40, backend=Hugetlb(HugetlbOptions()))
    block = RamBlock(4 * MIB, backend=Hugetlb(HugetlbOptions()), placement=Placement(preallocate=True))
    assert not block.discard(0, 4096)
    assert block.discard(0, 2 * MIB)
    block.close()
    with pytest.raises(ConfigError, match="multiple of 2 MiB"):
        RamBlock(3 * MIB, backend=Hugetlb(HugetlbOptions()))


def test_doctor_tells_of_each() -> None:
    """Each check gives a finding with a command where it does not work."""
    for name in checks.__all__:
        works, found, enable = getattr(checks, name)()
        assert found
        assert works or enable


def test_memory_above_the_hole_is_the_same_block() -> None:
    """RAM above 4 GiB is the rest of the one block, so that a file or memfd holds all of it."""
    config: Config = Draft.of({"machine": {"memory": "4G", "platform": "pc", "accel": ["tcg"]}}).config()
    with Machine.from_config(config) as vm:
        assert len({id(one.block) for one in vm.memory.ranges}) == 1
        vm.memory.write(4 << 30, b"high")
        assert bytes(vm.memory.ranges[0].block.view[3 << 30 : (3 << 30) + 4]) == b"high"
