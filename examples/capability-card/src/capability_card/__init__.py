"""A security card: each device may do what its list of capabilities says."""

from fnmatch import fnmatchcase

from attrs import field, frozen
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage.security import Act


@frozen
class Options:
    """``devices``: patterns of acts ("image.read /srv/*") by device id; ``others``: for all that is not listed."""

    devices: dict[str, list[str]] = field(factory=dict)
    others: list[str] = field(factory=lambda: ["*"])


class Capabilities:
    """See docs/security.md for what is asked."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, act: Act, /) -> None:
        patterns = self.options.devices.get(str(act.facts.get("device")), self.options.others)
        for permission in act.permissions:
            wanted = f"{act.tclass}.{permission} {act.facts.get('name', '')}".strip()
            if not any(fnmatchcase(wanted, pattern) for pattern in patterns):
                raise Denied(f"{act.facts.get('device', act.source)} has no capability for {wanted}")


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.security("capabilities", Capabilities, options=Options, help="a list of what each device may do")
