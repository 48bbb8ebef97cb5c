"""``cardcage sandbox serve``: the HTTP face, on sockets of its own."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, HostError, MissingExtra
from cardcage.files import read_file

if TYPE_CHECKING:
    from argparse import Namespace

    from cardcage_sandbox.template import Template

__all__ = ["serve"]

KEY_MOST = 4096
KEY_LEAST = 16
"""Characters of a key."""
DEBUG_PORT = 49983
"""Where the SDK's debug mode finds its sandbox."""


def serve(arguments: Namespace, templates: dict[str, Template]) -> int:
    """Serve until Ctrl-C, or SIGTERM. Raises ConfigError, HostError, MissingExtra."""
    try:
        import uvicorn

        from cardcage_sandbox.face.app import Face, application
    except ImportError as error:
        raise MissingExtra(f"cardcage sandbox serve needs {error.name}: pip install 'cardcage[sandbox]'") from error
    key, told = _key(arguments.key_file)
    ports = [arguments.port, *([DEBUG_PORT] if arguments.debug else [])]
    sockets = [_listening(arguments.host, one) for one in ports]
    hosts = (
        frozenset({"localhost", "127.0.0.1", "[::1]", arguments.host}) if _is_loopback(arguments.host) else frozenset()
    )
    app = application(lambda: Face(key, templates, debug=arguments.debug), hosts)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=1024,
        h11_max_incomplete_event_size=1 << 16,
        timeout_graceful_shutdown=5,
    )
    url = f"http://{arguments.host}:{sockets[0].getsockname()[1]}"
    lines = [f"export E2B_API_URL={url} E2B_SANDBOX_URL={url}"]
    if told:
        lines.append(f"export E2B_API_KEY={key}")
    print("\n".join(lines), flush=True)
    with suppress(KeyboardInterrupt):  # it has ended, and says so again
        asyncio.run(uvicorn.Server(config).serve(sockets=sockets))
    return 0


def _key(path: str | None) -> tuple[str, bool]:
    """The key, and whether it was made now: out of a file, ``CARDCAGE_SANDBOX_KEY``, or new."""
    if path is not None:
        key, place = read_file(path, KEY_MOST, "key").decode(errors="replace").strip(), path
    elif key := os.environ.get("CARDCAGE_SANDBOX_KEY", "").strip():
        place = "CARDCAGE_SANDBOX_KEY"
    else:
        return f"e2b_{secrets.token_hex(20)}", True
    if len(key) < KEY_LEAST or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"expected a key of {KEY_LEAST} or more letters, digits and signs", file=place)
    return key, False


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    if not _is_loopback(host):
        print(f"cardcage: warning: {host} is no loopback address, and HTTP has no encryption", file=sys.stderr)
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, number)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except (OSError, OverflowError) as error:
        raise HostError(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return made
