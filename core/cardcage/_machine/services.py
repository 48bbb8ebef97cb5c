"""What devices provide to other cards by name."""

from __future__ import annotations

from typing import Any

from cardcage.errors import ConfigError


class Services(dict[str, Any]):
    """Name to service; a machine has each once."""

    def provide(self, name: str, service: Any) -> None:
        """Let other cards find *service* as *name*. Raises ConfigError when there is one."""
        if name in self:
            raise ConfigError(f"the machine has a {name} already")
        self[name] = service
