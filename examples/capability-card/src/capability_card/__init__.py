"""A security card: each device may do what its list of capabilities says."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from attrs import field, frozen
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry


@frozen
class Options:
    """``devices``: patterns of acts ("image.read /srv/*") by device id; ``others``: for all that is not listed."""

    devices: dict[str, list[str]] = field(factory=dict)
    others: list[str] = field(factory=lambda: ["*"])


class Capabilities:
    """See docs/security.md for what is asked."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(
        self, source: str, target: str, tclass: str, permissions: tuple[str, ...], facts: Mapping[str, object], /
    ) -> None:
        patterns = self.options.devices.get(str(facts.get("device")), self.options.others)
        for permission in permissions:
            act = f"{tclass}.{permission} {facts.get('name', '')}".strip()
            if not any(fnmatchcase(act, pattern) for pattern in patterns):
                raise Denied(f"{facts.get('device', source)} has no capability for {act}")


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.security("capabilities", Capabilities, options=Options, help="a list of what each device may do")
