"""Build hook: compiles two libraries and the guest agent; the wheel is for Linux on x86-64, any Python 3."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "accel/cardcage_tcg"
AGENT = "plugins/cardcage_agent"
VIRTIO = "devices/cardcage_virtio"
COMPILER = "zig"  # the extra in pyproject.toml that names PyPI's compiler


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]  # hatchling names no argument
    """Builds both ``_native.so``, ``layout.py`` and the guest agent, and tags the wheel for their platform.

    The libraries need Linux's system calls and x86-64, no Python and no C library, so ``linux_x86_64`` is all there is
    to say; a manylinux tag would speak of a C library.
    """

    def dependencies(self) -> list[str]:
        """A compiler from PyPI, where this system has none."""
        builder = self._builder(PACKAGE)
        try:
            return [] if builder.system_compiler() else list(self.metadata.core.optional_dependencies[COMPILER])
        except builder.BuildError as error:
            raise SystemExit(f"cardcage: {error}") from None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before the wheel is put together; an editable one leaves its packages where they are."""
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
        builder, agent, virtio = self._builder(PACKAGE), self._builder(AGENT), self._builder(VIRTIO)
        try:
            if version == "editable":
                cc = builder.build_in_place()
                agent.build_in_place(cc)
                virtio.build_in_place(cc)
                return
            self._scratch = tempfile.TemporaryDirectory()  # until the hook is done with
            library, layout = Path(self._scratch.name, "_native.so"), Path(self._scratch.name, "layout.py")
            program = Path(self._scratch.name, agent.PROGRAM)
            served = Path(self._scratch.name, f"virtio{virtio.LIBRARY}")
            cc = builder.build(library, layout)
            agent.build(program, cc)
            virtio.build(served, cc)
        except (builder.BuildError, agent.BuildError, virtio.BuildError) as error:
            raise SystemExit(f"cardcage: {error}") from None
        made = {library: PACKAGE, layout: PACKAGE, program: AGENT}
        build_data["force_include"] |= {str(one): f"{Path(of).name}/{one.name}" for one, of in made.items()}
        build_data["force_include"][str(served)] = f"{Path(VIRTIO).name}/{virtio.LIBRARY}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling when the wheel is there."""
        if version != "editable":
            self._scratch.cleanup()

    def _builder(self, package: str) -> Any:
        """``native/build.py`` by its path: the package itself needs what is not installed yet."""
        module = ModuleType(f"{Path(package).name}_build")
        module.__file__ = str(Path(self.root, package, "native", "build.py"))
        # not by import, which would leave bytecode in the tree
        exec(compile(Path(module.__file__).read_bytes(), module.__file__, "exec"), vars(module))
        return module
