"""Card ``sandbox``: guests to run strange programs in, ready in a moment, each a fork of a machine that has booted.

::

    from cardcage_sandbox import Sandbox

    with Sandbox.create() as sandbox:
        print(sandbox.commands.run("uname -a").stdout)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage.registry import Offer
from cardcage.security import Needs
from cardcage_fleet import ControlOffer, SessionOffer

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry

    from cardcage_sandbox.client import Sandbox, SandboxInfo
    from cardcage_sandbox.commands import Command, CommandFailed, CommandResult
    from cardcage_sandbox.template import Template, stop_templates

__all__ = [
    "Command",
    "CommandFailed",
    "CommandResult",
    "Sandbox",
    "SandboxInfo",
    "Template",
    "TemplateOffer",
    "stop_templates",
]

POOL = "sandbox:pool"
"""The name under which a host shares the pool of a template's process."""
TABLE = "sandbox:processes"
"""And the one for commands that run in a sandbox."""


class TemplateOffer(Offer):
    """The keys of a template's file."""

    kind: ClassVar[str] = "sandbox-template"


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command ``sandbox``, what a template's process takes, and what a sandbox's does."""
    registry.command(
        "sandbox",
        "cardcage_sandbox.command:run",
        configure="cardcage_sandbox.command:configure",
        help="make, list and end sandboxes, and serve them to the e2b SDK",
    )
    registry.command(
        "mcp",
        "cardcage_sandbox.mcp:run",
        configure="cardcage_sandbox.mcp:configure",
        help="serve a sandbox to a model, by the Model Context Protocol",
    )
    registry.add(
        ControlOffer("sandbox-pool", "cardcage_sandbox.pool:answer", help="make and end a template's sandboxes")
    )
    registry.add(SessionOffer("sandbox", "cardcage_sandbox.guest:serve", help="a sandbox's commands and files"))
    registry.add(TemplateOffer("template", None, options="cardcage_sandbox.template:Template"))


@hookimpl
def cardcage_needs(machine: Machine) -> Needs | None:
    """A template's process removes its file at the end."""
    file = machine.host.share(POOL, dict).get("file")
    return Needs(remove=(str(file.parent),)) if file is not None else None


@hookimpl
def cardcage_forked(machine: Machine) -> None:
    """This is a copy: the pool, and the commands that ran, are its parent's."""
    share = machine.host.share
    if (pool := share(POOL, dict).pop("pool", None)) is not None:
        pool.abandon()
    share(TABLE, dict).clear()


__getattr__ = lazy_names(
    "cardcage_sandbox",
    client="Sandbox SandboxInfo",
    commands="Command CommandFailed CommandResult",
    template="Template stop_templates",
)
