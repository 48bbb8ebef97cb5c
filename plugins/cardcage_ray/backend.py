"""The backend of ``ray.experimental.sandbox`` (Ray 2.60, an alpha interface): its six methods, for our sandboxes."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, MissingExtra
from cardcage_sandbox import Sandbox, Template
from cardcage_sandbox.template import load_template

try:
    from ray.experimental.sandbox import runtime
    from ray.experimental.sandbox.backend.base import BaseSandboxBackend, ExecResult, SandboxStatus
    from ray.experimental.sandbox.config import parse_memory_bytes
    from ray.experimental.sandbox.exceptions import (
        SandboxCreationError,
        SandboxError,
        SandboxExecError,
        SandboxNotFoundError,
        SandboxTimeoutError,
    )
except ImportError as error:
    raise MissingExtra(f"cardcage_ray needs {error.name}: pip install 'cardcage[ray]'") from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CardcageBackend", "use"]

DAY = 86400
"""Seconds that a sandbox lives which is given no time."""


class CardcageBackend:
    """Guests of cardcage for Ray's sandboxes. It is a ``BaseSandboxBackend`` by registration.

    ``image`` is ``"base"``, a template's file (``.toml``), or a tar archive or OCI image layout that is the root; Ray's
    pulling of images is not used. A sandbox has a kernel and files of its own, so that ``rootless`` and ``readonly``
    are no matter. ``network`` is ``"none"``: what may be reached is *egress*, or stands in the template.

    Args:
        egress: names and addresses that all sandboxes may reach, in place of their templates'.
    """

    def __init__(self, image_manager: Any = None, *, egress: Iterable[str] | None = None) -> None:
        self.image_manager = image_manager
        self._egress = egress
        self._sandbox_metadata: dict[str, dict[str, Any]] = {}  # by this name Ray's actor looks for a configuration

    def create_sandbox(self, config: Any) -> str:
        """See Ray. Raises its SandboxCreationError."""
        for name, value in (("network", config.network != "none"), ("capabilities", config.capabilities is not None)):
            if value:
                raise SandboxCreationError(
                    f"{name}: expected {'none' if name == 'network' else 'None'}: a guest has its own kernel, "
                    "and reaches what its template's egress names"
                )
        try:
            memory = parse_memory_bytes(config.memory)
            made = Sandbox.create(
                template_of(config.image),
                timeout=config.ttl_seconds if config.ttl_seconds and config.ttl_seconds > 0 else DAY,
                envs=config.env,
                memory=memory or None,
                cpus=math.ceil(config.cpu) if config.cpu else None,
                egress=self._egress,
            )
            if config.workdir:
                _make_workdir(made, config.workdir)
        except (CardcageError, OSError, ValueError, TypeError, TimeoutExpired) as error:
            raise SandboxCreationError(str(error)) from error
        self._sandbox_metadata[made.id] = {"config": config, "sandbox": made}
        return made.id

    def delete_sandbox(self, sandbox_id: str) -> None:
        """See Ray."""
        if (found := self._sandbox_metadata.pop(sandbox_id, None)) is not None:
            found["sandbox"].kill()

    def exec_command(
        self,
        sandbox_id: str,
        command: str | list[str],
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        shell: str | None = None,
        user: str | None = None,
    ) -> Any:
        """See Ray; *user* is a name or a number, without a group. Raises its SandboxTimeoutError, SandboxExecError."""
        sandbox, config = self._found(sandbox_id)
        words = [shell or config.shell, "-c", command] if isinstance(command, str) else command
        begun = time.monotonic()
        try:
            done = sandbox.commands.run(words, cwd=cwd or config.workdir, envs=env, user=user, timeout=timeout)
        except TimeoutExpired as error:
            raise SandboxTimeoutError(f"the command took more than {timeout} s") from error
        except (CardcageError, OSError) as error:
            raise SandboxExecError(str(error)) from error
        status = done.exit_code if done.exit_code >= 0 else 128 - done.exit_code
        return ExecResult(status, done.stdout, done.stderr, time.monotonic() - begun)

    def write_file(self, sandbox_id: str, path: str, content: str | bytes, append: bool = False) -> None:
        """See Ray. Raises its SandboxError."""
        sandbox, config = self._found(sandbox_id)
        data = content.encode() if isinstance(content, str) else content
        where = str(Path(config.workdir or "", path))
        try:
            if append:
                with suppress(FileNotFoundError):
                    data = sandbox.files.read(where) + data
            sandbox.files.write(where, data)
        except (CardcageError, OSError) as error:
            raise SandboxError(str(error)) from error

    def read_file(self, sandbox_id: str, path: str) -> bytes:
        """See Ray. Raises its SandboxError."""
        sandbox, config = self._found(sandbox_id)
        try:
            return sandbox.files.read(str(Path(config.workdir or "", path)))
        except (CardcageError, OSError) as error:
            raise SandboxError(str(error)) from error

    def get_status(self, sandbox_id: str) -> Any:
        """See Ray."""
        found = self._sandbox_metadata.get(sandbox_id)
        return SandboxStatus.RUNNING if found and found["sandbox"].is_running else SandboxStatus.TERMINATED

    def _found(self, sandbox_id: str) -> tuple[Sandbox, Any]:
        if (found := self._sandbox_metadata.get(sandbox_id)) is None:
            raise SandboxNotFoundError(f"no sandbox {sandbox_id} was found")
        return found["sandbox"], found["config"]


def _make_workdir(sandbox: Sandbox, path: str) -> None:
    """Make a sandbox's directory, its user's; one that has none is nobody's, and ends."""
    try:
        sandbox.files.make_dir(path, user="root")
        sandbox.commands.run(["chown", sandbox.made.user, path], user="root", check=True)
    except BaseException:
        sandbox.kill()
        raise


BaseSandboxBackend.register(CardcageBackend)


class NoImages:
    """A manager of images in place of Ray's: here the backend finds them itself."""

    def pull_image(self, image: str, timeout_seconds: float = 0) -> str:
        """Nothing to do."""
        return image


def template_of(image: str) -> Template:
    """The template that an image's name means. Raises ConfigError, UsageError."""
    path = Path(image)
    if image == "base" or path.suffix == ".toml" or not path.exists():
        return load_template(image)
    return Template(name="image", root=str(path.resolve()))


def use() -> None:
    """Make cardcage the backend of ``ray.experimental.sandbox`` in this process.

    In the workers of a cluster Ray itself calls it: ``ray.init(runtime_env={"worker_process_setup_hook":
    "cardcage_ray.use"})``. Ray 2.60 has no door for a backend; two names of its runtime are put in place of its own.
    """
    runtime.GVisorSandboxBackend, runtime.ImageManager = CardcageBackend, NoImages
