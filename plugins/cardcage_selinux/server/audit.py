"""Audit lines in the kernel's grammar, readable by ``ausearch`` and ``audit2allow``.

Source: ``security/selinux/avc.c`` (``avc_audit_pre_callback``), and ``kernel/audit.c`` (``audit_log_untrustedstring``):
text with a space, a quote or a byte outside of 0x21-0x7e is written in hexadecimal, without quotes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cardcage.security import Act

__all__ = ["avc_line", "value_text"]

PLAIN = re.compile(r"[!#-~]*\Z")
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")
OURS = {"type", "msg", "scontext", "tcontext", "tclass", "permissive"}


def value_text(value: object) -> str:
    """A value of an audit field: numbers as they are, text quoted or, where that is not safe, in hexadecimal."""
    if isinstance(value, bool) or not isinstance(value, int):
        text = str(value)
        return f'"{text}"' if PLAIN.match(text) else text.encode("utf-8", "surrogateescape").hex().upper()
    return str(value)


def avc_line(act: Act, *, denied: bool, permissive: bool, time: float, serial: int) -> str:
    """One record, ``type=AVC msg=audit(...): avc:  denied  { read } for  pid=1 ... permissive=0``.

    Args:
        act: between two contexts. Its facts are what else is known (``pid``, ``comm``, ``path``, ``dev`` ...); keys
            that are no field names, or that the record has itself, are left out.
        time: seconds since 1970; serial: the record's number.
    """
    fields = {key: value for key, value in act.facts.items() if KEY.match(key) and key not in OURS}
    data = " ".join(f"{key}={value_text(value)}" for key, value in fields.items())
    milliseconds = round(time * 1000)
    stamp = f"{milliseconds // 1000}.{milliseconds % 1000:03}:{serial}"
    result = "denied" if denied else "granted"
    labels = f"scontext={act.source} tcontext={act.target} tclass={act.tclass}"
    tail = f" permissive={int(permissive)}" if denied else ""
    words = " ".join(act.permissions)
    return f"type=AVC msg=audit({stamp}): avc:  {result}  {{ {words} }} for  {data}{' ' * bool(data)}{labels}{tail}"
