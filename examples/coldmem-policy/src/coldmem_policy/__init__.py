"""A card of one memory policy: cold memory goes out."""

from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_memory_policies import PolicyOffer


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.add(
        PolicyOffer(
            "coldmem",
            "coldmem_policy.policy:ColdMemory",
            options="coldmem_policy.policy:Options",
            shared=True,
            help="what guests have not touched for a while goes to swap, or to the file behind it",
        )
    )
