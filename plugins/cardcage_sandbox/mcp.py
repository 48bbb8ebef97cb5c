"""``cardcage mcp``: a server of the Model Context Protocol, whose tools work in a sandbox of its own."""

from __future__ import annotations

import threading
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, MissingExtra, UsageError

from cardcage_sandbox.client import Sandbox
from cardcage_sandbox.command import add_template, create

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable

    from cardcage.host import Host

__all__ = ["configure", "run"]

SHOWN = 30_000
"""Characters of one output, or file, that are told; what is between their beginning and end is left out."""
LIMIT = 16 << 20
"""Bytes of an output, after which a command is killed."""
INSTRUCTIONS = "A Linux guest of your own, without a network. Files and processes stay until the server ends."


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    add_template(parser)
    parser.add_argument("--in", dest="id", metavar="ID", help="a sandbox that is there, and stays")


def run(host: Host, arguments: Namespace) -> int:
    """Serve on standard input and output until they end. Raises MissingExtra."""
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
    except ImportError as error:
        raise MissingExtra(f"cardcage mcp needs {error.name}: pip install 'cardcage[mcp]'") from error
    box = Box(arguments)
    server = MCPServer("cardcage", instructions=INSTRUCTIONS)

    def told(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except TimeoutExpired as error:
            raise ToolError(f"the command took more than {error.timeout:g} s, and was killed") from error
        except (CardcageError, OSError, ValueError) as error:
            raise ToolError(str(error)) from error

    def run_command(command: str, timeout: float = 60, stdin: str = "") -> dict[str, Any]:
        """Run a shell command in the sandbox. Returns exit_code, stdout and stderr.

        Args:
            command: for /bin/sh -c.
            timeout: seconds, 0.1 to 3600, after which it is killed.
            stdin: text for its standard input.
        """
        return dict(told(lambda: box.run(command, timeout, stdin)))

    def read_file(path: str) -> str:
        """Read a text file of the sandbox."""
        return str(told(lambda: shown(box.sandbox().files.read(path).decode(errors="replace"))))

    def write_file(path: str, text: str) -> str:
        """Write a text file of the sandbox, with the directories above it. Returns its absolute path."""
        return str(told(lambda: box.sandbox().files.write(path, text).path))

    def list_files(path: str = ".") -> list[dict[str, Any]]:
        """List a directory of the sandbox: name, type, size and permissions of each entry."""

        def rows() -> list[dict[str, Any]]:
            keys = ("name", "type", "size", "permissions")
            return [{key: getattr(one, key) for key in keys} for one in box.sandbox().files.list(path)]

        return list(told(rows))

    for tool in (run_command, read_file, write_file, list_files):
        server.tool()(tool)
    try:
        server.run("stdio")
    finally:
        box.close()
    return 0


class Box:
    """The server's sandbox, made when it is first needed."""

    def __init__(self, arguments: Namespace) -> None:
        self._arguments = arguments
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None

    def sandbox(self) -> Sandbox:
        """The sandbox; another one where its time was over. Raises what making one raises."""
        with self._lock:
            if self._arguments.id:
                self._sandbox = self._sandbox or Sandbox.connect(self._arguments.id)
            elif self._sandbox is None or not self._sandbox.is_running:
                self._sandbox = create(self._arguments, "24h")
            return self._sandbox

    def run(self, command: str, timeout: float, stdin: str) -> dict[str, Any]:
        """Run a command; its outputs, as far as they are told."""
        if not 0.1 <= timeout <= 3600:
            raise UsageError(f"timeout: {timeout:g} s: expected 0.1 to 3600")
        acts = self.sandbox().commands
        with acts.run(command, background=True, stdin=bool(stdin), timeout=timeout, limit=LIMIT) as started:
            if stdin:
                started.send_stdin(stdin, close=True)
            done = started.wait()
        return {"exit_code": done.exit_code, "stdout": shown(done.stdout), "stderr": shown(done.stderr)}

    def close(self) -> None:
        """End the sandbox, where it is the server's own."""
        if self._sandbox is not None and not self._arguments.id:
            self._sandbox.kill()


def shown(text: str) -> str:
    """*text* as far as it is told."""
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters are left out]\n{text[-half:]}"
