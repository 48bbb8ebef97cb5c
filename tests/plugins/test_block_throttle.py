"""Limits of drives: rates without a clock, and a back end that keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
from cardcage.machine import Machine
from cardcage_block.throttle import Bucket, Throttle, ThrottleOptions
from hypothesis import given
from hypothesis import strategies as st


@given(
    rate=st.floats(1, 1e6),
    burst=st.floats(0, 10),
    requests=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 100000)), min_size=1, max_size=50),
)
def test_no_time_sees_more_than_the_rate(rate: float, burst: float, requests: list[tuple[float, int]]) -> None:
    """Whoever asks when: before any moment no more was begun than rate and burst allow, and quiet is not saved up."""
    bucket, now, begun = Bucket(rate, burst), 1000.0, []
    for pause, units in requests:
        now += pause
        begun.append((now + bucket.take(units, now), units))
    for at, (moment, _) in enumerate(begun):
        before = [one for one in begun[:at] if one[0] <= moment]
        first = min((one[0] for one in before), default=moment)
        assert sum(units for _, units in before) <= (moment - first + burst) * rate * 1.000001 + begun[0][1]
    assert [one for one, _ in begun] == sorted(one for one, _ in begun)


class Disk:
    """A back end that counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        return lambda *given, **named: self.calls.append(name)


def test_requests_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes wait by the nearest limit, flushes never, and close ends the wait."""
    waited: list[float] = []
    monkeypatch.setattr("cardcage_block.throttle.time.monotonic", lambda: 1000.0)
    options = ThrottleOptions(drive="x", bps_read=1000, iops=2, burst=0)  # type: ignore[arg-type]  # numbers will do
    below = Disk()
    below.info = type("Info", (), {"write_zeroes": False})()  # type: ignore[attr-defined]
    one = Throttle(below, options)  # type: ignore[arg-type]
    monkeypatch.setattr(one._over, "wait", waited.append)
    view = memoryview(bytearray(2000))
    one.readv(0, [view])
    one.readv(0, [view])
    one.writev(0, [view])
    one.flush()
    one.discard(0, 512)
    assert waited == [2.0, 1.0, 1.5]
    assert below.calls == ["readv", "readv", "writev", "flush", "discard"]
    one.close()
    assert one._over.is_set()


def test_a_drive_has_limits(tmp_path: Path) -> None:
    """A machine's drive may be one with limits, whatever is below."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    drive = {"type": "throttle", "iops": 10, "drive": {"file": str(tmp_path / "disk.raw"), "format": "raw"}}
    with Machine(accel="tcg", memory="4M", devices=[{"type": "virtio-blk", "drive": drive}]) as vm:
        assert vm.devices["virtio-blk"].device.virtio.device.info.size == 1 << 20
