"""Page tables made at random: aliases, self-maps, large pages, ends of RAM, reserved bits, devices, ROM."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

from attrs import define

from hostile.places import ALIASES, APIC, BIG, CODE, DATA, DEVICE, MAPS, ROM

if TYPE_CHECKING:
    from cardcage.memory import PhysicalMemory

__all__ = ["HIGH", "Maps", "write_maps"]

P, W, U, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
HIGH = 0xFFFF800000000000
ROOT_SIZE = 0x10000
RANDOM_WINDOW = 0x10000000
"""Linear: 512 pages that are mapped anywhere."""


@define
class Maps:
    """Roots by kind (values of CR3), and where the RAM ends."""

    long: list[int]
    pae: int
    narrow: int
    ram: int


def _anywhere(r: random.Random, ram: int) -> int:
    """A physical page: any RAM, tables, code, devices, ends."""
    return r.choice(
        (
            r.randrange(ram >> 12) << 12, CODE + (r.randrange(32) << 12), DATA + (r.randrange(16) << 12),
            MAPS + (r.randrange(48) << 12), ram - 0x1000, ram, DEVICE, APIC, ROM, ROM + 0xF000, 0xC0000, 0xFFFFF000,
            1 << 32, 1 << 39, 0xFFFFFFFFF000, 0,
        )
    )  # fmt: skip


def _bits(r: random.Random) -> int:
    bits = P | r.choice((W, W, W, 0)) | r.choice((U, U, 0)) | r.choice((0, 0, G)) | r.choice((0, 0, 0, NX))
    odd = r.random()
    if odd < 0.03:
        bits |= 1 << r.randrange(52)
    elif odd < 0.05:
        bits &= ~P
    return bits | r.choice((0, A, A | D))


def _quads(memory: PhysicalMemory, at: int, values: list[int]) -> None:
    memory.write(at, struct.pack(f"<{len(values)}Q", *values))


def _long_root(memory: PhysicalMemory, r: random.Random, root: int, ram: int, *, odd: bool) -> None:
    """PML4, and below it: identity for 4 GiB (the first 2 MiB by 4 KiB pages), aliases, a random window, a self-map."""
    pml4, pdpt, pd, pt, wild_pt, alias_pdpt, alias_pd, alias_pt = (root + 0x1000 * i for i in range(8))
    base = P | W | U
    fine = [i << 12 | base | r.choice((0, 0, G)) for i in range(512)]
    if odd:
        for _ in range(r.choice((0, 4, 60))):
            fine[r.randrange(CODE >> 12, 512)] = _anywhere(r, ram) | _bits(r)
    _quads(memory, pt, fine)
    directory = [i << 21 | base | PS | r.choice((0, 0, G)) for i in range(512)]
    directory[0], directory[RANDOM_WINDOW >> 21] = pt | base, wild_pt | base
    if odd:
        for _ in range(r.choice((0, 3))):
            directory[r.randrange(1, 512)] = (_anywhere(r, ram) & ~0x1FFFFF | PS if r.random() < 0.7 else pt) | _bits(r)
    _quads(memory, pd, directory)
    _quads(memory, wild_pt, [_anywhere(r, ram) | _bits(r) for _ in range(512)])
    giants = [pd | base] + [i << 30 | base | PS for i in range(1, 4)]
    giants += [_anywhere(r, ram) & ~0x3FFFFFFF | PS | _bits(r) for _ in range(4)] if odd else [pd | base] * 4
    _quads(memory, pdpt, giants)
    shown = (r.choice((CODE, DATA, BIG)) if odd else BIG) | base | r.choice((0, G))
    _quads(memory, alias_pt, [shown] * 512)
    _quads(memory, alias_pd, [alias_pt | base] * 512)
    _quads(memory, alias_pdpt, [alias_pd | base] * 8)
    top = [0] * 512
    top[0] = top[256] = top[511] = pdpt | base
    top[ALIASES >> 39] = alias_pdpt | base
    top[r.choice((2, 300))] = root | base  # a self-map
    if odd and r.random() < 0.2:
        top[r.randrange(3, 256)] = _anywhere(r, ram) | _bits(r)
    _quads(memory, pml4, top)


def write_maps(memory: PhysicalMemory, r: random.Random, ram: int) -> Maps:
    """Four roots for long mode (the first is sound, the last lies in ROM), one for PAE, one of two levels."""
    roots = [MAPS, MAPS + ROOT_SIZE, MAPS + 2 * ROOT_SIZE]
    for i, root in enumerate(roots):
        _long_root(memory, r, root, ram, odd=i > 0)
    _long_root(memory, r, ROM, ram, odd=False)
    base = P | W | U
    pae, narrow = MAPS + 3 * ROOT_SIZE, MAPS + 3 * ROOT_SIZE + 0x8000
    _quads(memory, pae, [(pae + 0x1000 * (i + 1)) | P for i in range(4)])
    for i in range(4):
        _quads(memory, pae + 0x1000 * (i + 1), [(i << 30) + (j << 21) | base | PS for j in range(512)])
    if r.random() < 0.7:
        fine = [i << 12 | base for i in range(512)]
        for _ in range(r.choice((0, 4, 60))):
            fine[r.randrange(CODE >> 12, 512)] = _anywhere(r, ram) | _bits(r)
        _quads(memory, pae + 0x6000, fine)
        _quads(memory, pae + 0x1000, [(pae + 0x6000) | base])
    small = [i << 22 | base | PS for i in range(1024)]
    small[0] = narrow + 0x1000 | base
    for _ in range(r.choice((0, 0, 4))):
        small[r.randrange(1, 1024)] = (_anywhere(r, ram) | _bits(r)) & 0xFFFFFFFF
    memory.write(narrow, struct.pack("<1024I", *small))
    fine = [i << 12 | base for i in range(1024)]
    for _ in range(r.choice((0, 4, 60))):
        fine[r.randrange(CODE >> 12, 1024)] = (_anywhere(r, ram) | _bits(r)) & 0xFFFFFFFF
    memory.write(narrow + 0x1000, struct.pack("<1024I", *fine))
    return Maps([*roots, ROM], pae, narrow, ram)
