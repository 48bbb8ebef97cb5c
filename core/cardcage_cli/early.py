"""Which security cards a command line names, found before any card is loaded: nobody knows the cards' flags yet."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.config import Spec

__all__ = ["VARIABLE", "early_security"]

VARIABLE = "CARDCAGE_SECURITY"
"""Environment variable that stands for ``--security`` where that is not given."""


def early_security(words: Sequence[str]) -> tuple[Spec, ...]:
    """Return the values in the ``.toml`` files of ``run``, ``--security`` and ``--set``, merged as for the machine.

    What is wrong with them is left for the whole configuration to say; :func:`~cardcage_cli.draft_of` refuses one that
    names more than was found here.
    """
    files = [word for word in words if word.endswith(".toml")] if "run" in words else []
    named, assignments = list(values(words, "--security")), list(values(words, "--set"))
    if not (files or named or assignments):
        return ()
    from cardcage.config import Draft

    draft = Draft()
    with suppress(ConfigError):
        for path in files:
            draft.add_file(path)
        for text in named[-1:]:
            draft.add({"policy": {"security": text}}, origin="--security")
        for text in assignments:
            if text.startswith(("security.", "policy.")):
                draft.set(text)
        return draft.security()
    return ()


def values(words: Sequence[str], option: str) -> Iterator[str]:
    """Return the value after each *option*."""
    for at, word in enumerate(words):
        if word == option and at + 1 < len(words):
            yield words[at + 1]
        elif word.startswith(f"{option}="):
            yield word.partition("=")[2]
