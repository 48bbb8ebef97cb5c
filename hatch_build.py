"""Build hook: the wheel is for Linux on x86-64, whatever Python 3 (docs/architecture.md says why)."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PlatformTag(BuildHookInterface):  # type: ignore[type-arg]  # hatchling names no argument
    """Tags the wheel for the platform of the translator's prebuilt library."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before the wheel is put together."""
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
