"""Memory back ends: anonymous, memfd, huge pages and file, ``--memory-backend``, and what the host can do of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the memory back ends, their flag and lines of ``cardcage doctor``."""
    registry.memory("anonymous", "cardcage.ram:Anonymous", help="private memory that KSM can merge (the default)")
    registry.memory("memfd", "cardcage.ram:Memfd", help="sealed memory that other processes can map (vhost-user)")
    registry.memory(
        "hugetlb",
        "cardcage_memory.hugetlb:Hugetlb",
        options="cardcage_memory.hugetlb:HugetlbOptions",
        help="huge pages of 2 MiB or 1 GiB from the host's pool",
    )
    registry.memory(
        "file",
        "cardcage_memory.file:File",
        options="cardcage_memory.file:FileOptions",
        help="a file on tmpfs or disk, or a DAX device",
    )
    registry.flag(
        "--memory-backend",
        "cardcage_memory.parse:parse_memory_flag",
        asks=True,
        help="source of guest RAM: memfd or hugetlb,page=1G or file,path=ram.img,preallocate=on, ...",
    )
    for name in (
        "preallocation",
        "memfd",
        "transparent huge pages",
        "huge pages of 2 MiB",
        "huge pages of 1 GiB",
        "NUMA",
    ):
        registry.doctor(f"memory: {name}", f"cardcage_memory.checks:check_{'_'.join(name.split()).lower()}")
