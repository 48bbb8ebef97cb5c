"""The kinds of card that ``cardcage new card`` writes."""

from __future__ import annotations

from attrs import frozen

__all__ = ["KINDS", "Kind"]


@frozen
class Kind:
    """A kind of card.

    Attributes:
        about: the noun for it. description: one sentence about the card that is written.
        offers: kind and name of its offer, in which ``$name`` stands for the card's name.
        use: the command line that uses it.
    """

    about: str
    description: str
    offers: tuple[str, str]
    use: str


KINDS = {
    "device": Kind(
        "a device",
        "A device with one port, which counts what the guest writes to it",
        ("device", "$name"),
        "cardcage boot --device $name",
    ),
    "virtio": Kind(
        "a virtio device",
        "A virtio entropy source that repeats a text",
        ("device", "$name"),
        "cardcage boot --device $name --exec 'head -c 8 /dev/hwrng'",
    ),
    "pci": Kind(
        "a PCI function",
        "A PCI function with one memory BAR, which interrupts the guest by MSI-X",
        ("device", "$name"),
        "cardcage boot --device $name --exec 'cat /proc/bus/pci/devices'",
    ),
    "char": Kind(
        "a char back end",
        "A char back end that writes the guest's lines to the machine's log",
        ("backend", "char:$name"),
        "cardcage boot --log-level info --set machine.console=$name --exec uname",
    ),
    "policy": Kind(
        "a memory policy",
        "A memory policy that reclaims what a machine has in the host's memory above a limit",
        ("policy", "$name"),
        "cardcage boot --set policy.memory=$name",
    ),
    "checker": Kind(
        "a security card",
        "A security card that denies the acts on a list",
        ("security", "$name"),
        "cardcage --security $name cards",
    ),
    "command": Kind(
        "a command",
        "A command that counts what the installed cards offer",
        ("command", "$name"),
        "cardcage $name",
    ),
}
"""By the word for ``--kind``."""
