"""A guest that lets go of devices."""

from __future__ import annotations

LETS_GO = b"\x66\xb9\0\0\x10\0\x67\xe2\xfd\xba\x04\xae\x66\xed\x66\x85\xc0\x74\xed\xba\x08\xae\x66\xef\xeb\xe6"
"""Counts to a million, reads *down* of the hot-plug registers, and writes what there is in it to *eject*."""
