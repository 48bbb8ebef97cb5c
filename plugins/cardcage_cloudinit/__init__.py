"""Card ``cloudinit``: a seed for cloud images, by which cloud-init in the guest sets up users, keys and the rest.

The seed is a small read-only disk with the label CIDATA, which cloud-init's data source NoCloud looks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back end ``block:cloud-init``, its flags, and read ``policy.cloud_init``."""
    registry.backend(
        "block",
        "cloud-init",
        "cardcage_cloudinit.seed:open_seed",
        options="cardcage_cloudinit.seed:SeedOptions",
        shorthand="cardcage_cloudinit.seed:parse_source",
        help="a seed for cloud-init (NoCloud), made of a directory or a user-data file and of SSH keys",
    )
    registry.policy_key("cloud_init", help="the seed of a cloud image: source, user_data, ssh_keys, programs")
    registry.flag(
        "--cloud-init",
        "cardcage_cloudinit.seed:parse_source_flag",
        metavar="DIR|FILE",
        help="give a cloud image its seed: a user-data file, or a directory with user-data, meta-data and the like",
    )
    registry.flag(
        "--ssh-key",
        "cardcage_cloudinit.seed:parse_key_flag",
        metavar="FILE",
        help="let the keys of a public key file (or authorized_keys) in to a cloud image's own user; may be repeated",
    )


@hookimpl
def cardcage_built(machine: Machine) -> None:
    """Add the seed's disk to a machine that has ``[policy] cloud_init``, and what the programs in it talk to."""
    if (table := machine.config.policy.get("cloud_init")) is not None:
        if not isinstance(table, dict):
            raise machine.config.place("policy.cloud_init").error("expected a table")
        if "cloud-init" in machine.devices:  # it goes on from a snapshot, or came from elsewhere, with all its devices
            return
        table = dict(table)
        programs = table.pop("programs", False)
        if not isinstance(programs, bool):
            raise machine.config.place("policy.cloud_init.programs").error("expected true or false")
        if programs:
            from cardcage_cloudinit.programs import add_programs

            table["vendor_data"] = add_programs(machine)
        machine.add("virtio-blk", id="cloud-init", readonly=True, drive={"type": "cloud-init", **table})
