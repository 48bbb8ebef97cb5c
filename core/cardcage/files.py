"""Files that a person names: read whole and bounded, whatever is behind the path."""

from __future__ import annotations

import os
import stat

from cardcage.errors import ConfigError
from cardcage.units import say_size

__all__ = ["read_file"]


def read_file(path: str | os.PathLike[str], most: int, kind: str = "file") -> bytes:
    """The bytes of a file, or of a pipe until its end.

    Args:
        most: bytes, at least 1: one that has more is refused, and nothing beyond is read.
        kind: what it is expected to be, for the error.

    Raises :exc:`~cardcage.errors.ConfigError` that names the file: for one that cannot be read, a character device
    (``/dev/zero`` has no end; ``/dev/null`` is an empty file), or more than *most* bytes.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as stream:
            about = os.fstat(stream.fileno())
            if stat.S_ISCHR(about.st_mode) and stream.read(1):  # /dev/null is a way to say that there is nothing
                raise ConfigError(f"a character device: expected a {kind}", file=name)
            data = b"" if about.st_size > most else stream.read(about.st_size + 1)  # room for more would be made first
            if len(data) > about.st_size:  # a pipe, or it grows
                data += stream.read(most + 1 - len(data))
    except OSError as error:
        raise ConfigError(f"{kind} cannot be read: {error.strerror or error}", file=name) from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"{kind} cannot be read: {error}", file=repr(name)) from error
    if max(about.st_size, len(data)) > most:
        raise ConfigError(f"larger than {say_size(most)}: expected a {kind}", file=name)
    return data
