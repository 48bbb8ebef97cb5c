"""Build hook: compiles the translator's library; the wheel is for Linux on x86-64, whatever Python 3."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "accel/cardcage_tcg"
COMPILER = "zig"  # the extra in pyproject.toml that names PyPI's compiler


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]  # hatchling names no argument
    """Builds ``_native.so`` and ``layout.py`` and tags the wheel for their platform.

    The library needs Linux's system calls and x86-64, no Python and no C library, so ``linux_x86_64`` is all there is
    to say; a manylinux tag would speak of a C library.
    """

    def dependencies(self) -> list[str]:
        """A compiler from PyPI, where this system has none."""
        builder = self._builder()
        try:
            return [] if builder.system_compiler() else list(self.metadata.core.optional_dependencies[COMPILER])
        except builder.BuildError as error:
            raise SystemExit(f"cardcage: {error}") from None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before the wheel is put together; an editable one leaves its packages where they are."""
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
        builder = self._builder()
        try:
            if version == "editable":
                builder.build_in_place()
                return
            self._scratch = tempfile.TemporaryDirectory()  # until the hook is done with
            library, layout = Path(self._scratch.name, "_native.so"), Path(self._scratch.name, "layout.py")
            builder.build(library, layout)
        except builder.BuildError as error:
            raise SystemExit(f"cardcage: {error}") from None
        package = Path(PACKAGE).name
        build_data["force_include"] |= {str(one): f"{package}/{one.name}" for one in (library, layout)}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling when the wheel is there."""
        if version != "editable":
            self._scratch.cleanup()

    def _builder(self) -> Any:
        """``native/build.py`` by its path: the package itself needs what is not installed yet."""
        module = ModuleType("cardcage_native_build")
        module.__file__ = str(Path(self.root, PACKAGE, "native", "build.py"))
        # not by import, which would leave bytecode in the tree
        exec(compile(Path(module.__file__).read_bytes(), module.__file__, "exec"), vars(module))
        return module
