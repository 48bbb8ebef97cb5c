"""Certificates for migrations in QEMU's words: ``tls-creds-x509`` objects of a machine, by their ids.

Whoever makes such an object notes it here; the parameter ``tls-creds`` names one. The files are read when it is made,
before a jail shuts them out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from attrs import frozen

from cardcage_migrate.reach import tls_context

if TYPE_CHECKING:
    from ssl import SSLContext

    from cardcage.machine import Machine

__all__ = ["Credentials", "Endpoint", "credentials", "read_credentials"]

Endpoint = Literal["client", "server"]


@frozen
class Credentials:
    """Certificates, shown and wanted.

    Attributes:
        endpoint: ``client`` for a source, ``server`` for a destination. context: they, in OpenSSL's hands. folder: of
            their files.
    """

    endpoint: Endpoint
    context: SSLContext
    folder: str


def read_credentials(folder: str, endpoint: Endpoint) -> Credentials:
    """The certificates in *folder*: ``ca-cert.pem``, and ``client-cert.pem``, ``client-key.pem`` or the server's.

    Raises ConfigError that names the file.
    """
    return Credentials(endpoint, tls_context(folder, server=endpoint == "server"), folder)


def credentials(machine: Machine) -> dict[str, Credentials]:
    """Those of *machine*, by the ids of their objects."""
    known: WeakKeyDictionary[Machine, dict[str, Credentials]] = machine.host.share(
        "migrate:credentials", WeakKeyDictionary
    )
    return known.setdefault(machine, {})
