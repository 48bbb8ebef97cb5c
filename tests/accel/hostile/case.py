"""One case: what a hostile guest is made from. A case is its JSON; its seed and fields make the same guest again."""

from __future__ import annotations

import json
import random

from attrs import asdict, define, evolve, field

from hostile.grammar import KINDS
from hostile.oracles import ROLES

__all__ = ["ACTS", "MODES", "Case", "random_case"]

MODES = ("real", "vm86", "code16", "flat32", "paged32", "pae32", "user32", "compat", "compat_user", "long", "long_user")
ACTS = ("flip", "dma", "kick", "msi", "nmi", "reset", "extint")


@define
class Case:
    """A case.

    Attributes:
        seed: of all that is chosen by chance.
        theme: ``roam`` for random code on every vCPU, ``tags`` for code about addresses that are not canonical, or a
            role of :mod:`hostile.oracles`.
        cpus: 1 to 4. ram: bytes from address 0. seconds: how long the vCPUs run.
        kinds: pieces that snippets are made of; ``oracle`` for code that must fault. modes: where vCPUs start.
        acts: what the machine does beside. irqchip, code_cache, block_size: as the accelerator's.
        avx: whether AVX and XSAVE are on, where the host has them.
    """

    seed: int
    theme: str = "roam"
    cpus: int = 1
    ram: int = 4 << 20
    seconds: float = 0.5
    kinds: list[str] = field(factory=lambda: [*KINDS, "oracle"])
    modes: list[str] = field(factory=lambda: list(MODES))
    acts: list[str] = field(factory=lambda: list(ACTS))
    irqchip: str = "split"
    code_cache: int = 8
    block_size: int = 64
    avx: bool = False

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))

    def smaller(self) -> list[Case]:
        """Cases with less in them, the greatest steps first."""
        found = []
        for name in ("acts", "kinds", "modes"):
            now = getattr(self, name)
            if len(now) > 1:
                half = len(now) // 2
                found += [evolve(self, **{name: now[:half]}), evolve(self, **{name: now[half:]})]
                found += (
                    [evolve(self, **{name: [one for one in now if one != gone]}) for gone in now]
                    if len(now) <= 8
                    else []
                )
            elif name == "acts" and now:
                found.append(evolve(self, acts=[]))
        if self.cpus > 1:
            found.insert(0, evolve(self, cpus=self.cpus - 1))
        return found


def random_case(seed: int, cpus: int, seconds: float) -> Case:
    """A case out of a seed: some of the pieces and acts, not all, so that each gets its turn to be frequent."""
    r = random.Random(seed)
    theme = r.choice(("roam", "roam", "tags", r.choice(list(ROLES))))
    kinds = [*KINDS, "oracle"]
    acts, modes = list(ACTS), list(MODES)
    if theme == "roam":
        kinds = r.sample(kinds, r.choice((2, 4, 8, len(kinds))))
        modes = r.sample(modes, r.choice((1, 3, len(modes))))
    if theme == "tags":
        kinds, modes = ["oracle", *r.sample(kinds, r.choice((0, 1)))], ["long", "long_user"]
    acts = r.sample(acts, r.choice((0, 1, 3, len(acts))))
    count = r.randrange(1, cpus + 1)
    if theme == "storm":  # alone, and without what empties the code buffer: it takes its time
        seconds, count, acts = max(seconds, 16.0), 1, [one for one in acts if one != "flip"]
    return Case(
        seed, theme, count, r.choice((3 << 20, 4 << 20, (4 << 20) + 0x1000, 12 << 20)),
        seconds, kinds, modes, acts, r.choice(("split", "split", "none")),
        256 if theme == "storm" else r.choice((8, 8, 8, 16)), r.choice((64, 64, 64, 8, 2, 1)),
        theme == "roam" and r.random() < 0.3,
    )  # fmt: skip
