"""Where two processors that keep to the manuals may differ, though only in how an access that fails is refused."""

from __future__ import annotations

from tcg_host import State

__all__ = ["explained"]

ORDERS = {("#GP", "#PF"), ("#GP", "#AC"), ("#AC", "#GP"), ("#AC", "#PF")}


def _kind(state: State) -> str:
    """The fault that a run ended with; #AC stands for #SS, too, which Linux reports alike."""
    return {"SIGBUS": "#AC", "SIGSEGV": "#GP" if state.address is None else "#PF"}.get(
        state.ended, state.ended or "its end"
    )


def _at_the_border(address: int) -> bool:
    """An operand there ends where no address is canonical."""
    return (1 << 47) - 64 < address < 1 << 47


def explained(bits: int, want: State, got: State) -> str:
    """What explains that *got* is not the real processor's *want*; empty when nothing does.

    - Of several faults of one access (not canonical, misaligned, no page) each processor takes its own first (Intel SDM
      vol. 3, table 6-2); an operand round the end of 4 GiB may break its limit, or wrap (vol. 3, 5.3).
    - An operand of more than 8 bytes may be several accesses: which byte of a page is reported, and whether those
      before it are written, is not said (vol. 3, 9.1.1).
    """
    mask, count = (0xFFFFFFFFFFFFFFFF, 16) if bits == 64 else (0xFFFFFFFF, 8)
    if want.rip != got.rip or want.xstate != got.xstate or not (want.ended and got.ended):
        return ""
    if any((a ^ b) & mask for a, b in zip(want.general[:count], got.general[:count], strict=True)):
        return ""
    pair, at = (_kind(want), _kind(got)), want.address
    if want.memory == got.memory:
        if pair in ORDERS or (pair == ("#PF", "#GP") and bits == 64 and at is not None and _at_the_border(at)):
            return f"{pair[0]} here, {pair[1]} there"
        if at is not None and bits != 64 and at >= 0xFFFFFF00 and pair[1] in ("#AC", "#GP"):
            return "round the end of 4 GiB"
        if at is not None and got.address is not None and at >> 12 == got.address >> 12:
            return "another byte of the page"
        return ""
    if pair[0] != pair[1] or (at is not None and got.address is not None and at >> 12 != got.address >> 12):
        return ""
    changed = [i for i, (a, b) in enumerate(zip(want.memory, got.memory, strict=True)) if a != b]
    end = (changed[0] | 0xFFF) + 1
    return "written in part" if end - changed[0] <= 16 and changed[-1] < end else ""
