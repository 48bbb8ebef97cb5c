"""sVirt: pairs of categories without collision, labels on files, and putting them back, also after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from cardcage.errors import Denied, HostError
from cardcage.security import Act
from cardcage_selinux.card import Selinux, SelinuxOptions
from cardcage_selinux.errors import ContextError
from cardcage_selinux.svirt import leases
from cardcage_selinux.svirt.labels import ATTRIBUTE, real_label
from cardcage_selinux.svirt.leases import alive, draw, lease

IMAGE, LOG, CONTENT = (f"system_u:object_r:{name}" for name in ("svirt_image_t", "svirt_log_t", "virt_content_t"))


def can_label(folder: Path) -> bool:
    """Whether files here take the attribute."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, ATTRIBUTE, b"system_u:object_r:file_t:s0\0")
    except OSError:
        return False
    return True


@pytest.fixture(params=["attribute", "record"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are labelled by their attribute, or only in records."""
    if request.param == "attribute" and not can_label(tmp_path):
        pytest.skip("security.selinux cannot be set here: needs root, and a file system with security attributes")
    if request.param == "record":

        def refuse(*_: Any) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "setxattr", refuse)
    return tmp_path


class Machine:
    """What the card is asked by a machine with a disk."""

    def __init__(self, card: Selinux, label: str | None = None) -> None:
        self.card = card
        self.label = label or card.label(Act("operator", "host", "machine", ("create",)), "vm")
        self.disk = self.label.replace("svirt_t", "disk_t")
        self.range = self.label.split(":", 3)[3]

    def image(self, path: Path, *permissions: str, **facts: Any) -> str:
        """Label and check, as the core does."""
        asked = permissions or ("open", "read", "write")
        act = Act(self.disk, self.label, "image", asked, {"machine": "vm", **facts})
        found = self.card.label(act, str(path))
        self.card.check(evolve(act, target=found))
        return found


def card(folder: Path, **options: Any) -> Selinux:
    return Selinux(SelinuxOptions(audit="none", state=str(folder / "state"), **options))


def test_a_disk_gets_the_machines_categories_and_its_own_label_back(folder: Path) -> None:
    """While the machine lives the image has its pair; after it the label from before, or none."""
    disk, other = folder / "disk", folder / "other"
    disk.touch()
    other.touch()
    real = can_label(folder)
    if real:
        os.setxattr(other, ATTRIBUTE, b"system_u:object_r:svirt_image_t:s0\0")
    made = card(folder)
    machine = Machine(made)
    assert machine.image(disk) == machine.image(other) == f"{IMAGE}:{machine.range}"
    assert real_label(str(disk)) == (f"{IMAGE}:{machine.range}" if real else None)
    made.release(machine.label, "machine")
    assert real_label(str(disk)) is None
    assert real_label(str(other)) == (f"{IMAGE}:s0" if real else None)
    assert [one.name for one in (folder / "state").iterdir()] == ["lock"]
    made.close()


def test_images_that_are_read_or_shared(folder: Path) -> None:
    """Machines share what they only read (virt_content_t:s0) and what is marked shared (svirt_image_t:s0)."""
    base, both = folder / "base", folder / "both"
    base.touch()
    both.touch()
    made = card(folder)
    one, two = Machine(made), Machine(made)
    for machine in (one, two):
        assert machine.image(base, "open", "read", readonly=True) == f"{CONTENT}:s0"
        assert machine.image(both, shared=True) == f"{IMAGE}:s0"
    with pytest.raises(Denied):  # it is being read by others
        one.image(base)
    made.release(one.label, "machine")
    assert two.image(base, "open", "read", readonly=True) == f"{CONTENT}:s0"
    made.release(two.label, "machine")
    assert real_label(str(base)) is None
    made.close()


def test_another_machines_image_is_denied(folder: Path) -> None:
    """An image that a live machine has keeps its label, also towards other processes; then it is free."""
    disk = folder / "disk"
    disk.touch()
    first, second = card(folder), card(folder)
    one, two = Machine(first), Machine(second)
    label = one.image(disk)
    for permissions in (("open", "read", "write"), ("open", "read")):
        with pytest.raises(Denied):
            two.image(disk, *permissions, readonly="write" not in permissions)
    assert one.image(disk) == label
    first.release(one.label, "machine")
    assert two.image(disk) == f"{IMAGE}:{two.range}"
    second.close()
    assert real_label(str(disk)) is None
    first.close()


def test_a_static_label_is_kept(folder: Path) -> None:
    """A machine with a label of its own draws no pair, and its image has that label's range."""
    disk = folder / "disk"
    disk.touch()
    made = card(folder)
    machine = Machine(made, "system_u:system_r:svirt_t:s0:c5,c9")
    assert machine.image(disk) == f"{IMAGE}:s0:c5,c9"
    made.close()
    assert real_label(str(disk)) is None


CRASH = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_security_svirt import Machine, card
made = card(Path({folder!r}))
machine = Machine(made)
machine.image(Path({folder!r}) / "disk")
print(machine.range, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_labels_come_back_after_a_crash(tmp_path: Path) -> None:
    """A process that is killed leaves a record; the next one puts the label back, and may have pair and image."""
    (tmp_path / "disk").touch()
    code = CRASH.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pair = done.stdout.strip().removeprefix("s0:")
    assert not alive(tmp_path / "state", pair)
    if can_label(tmp_path):
        assert real_label(str(tmp_path / "disk")) == f"{IMAGE}:s0:{pair}"
    made = card(tmp_path)
    assert real_label(str(tmp_path / "disk")) is None
    assert Machine(made).image(tmp_path / "disk").startswith(IMAGE)
    made.close()


def test_a_label_that_somebody_changed_is_left_alone(tmp_path: Path) -> None:
    """What was labelled anew meanwhile, or is another file now, is not touched at the end."""
    if not can_label(tmp_path):
        pytest.skip("security.selinux cannot be set here: needs root, and a file system with security attributes")
    changed, replaced = tmp_path / "changed", tmp_path / "replaced"
    changed.touch()
    replaced.touch()
    made = card(tmp_path)
    machine = Machine(made)
    machine.image(changed)
    machine.image(replaced)
    os.setxattr(changed, ATTRIBUTE, b"system_u:object_r:file_t:s0\0")
    (tmp_path / "new").write_text("x")
    (tmp_path / "new").rename(replaced)
    made.close()
    assert real_label(str(changed)) == "system_u:object_r:file_t:s0"
    assert real_label(str(replaced)) is None


def test_a_denial_labels_nothing(tmp_path: Path) -> None:
    """A device that may not have an image does not change its label by asking."""
    (tmp_path / "disk").touch()
    made = card(tmp_path)
    machine = Machine(made)
    for type_ in ("nic_t", "stranger_t", "aid_t"):
        machine.disk = machine.label.replace("svirt_t", type_)
        with pytest.raises(Denied):
            machine.image(tmp_path / "disk")
    assert real_label(str(tmp_path / "disk")) is None
    assert not list((tmp_path / "state").glob("*.json"))
    made.close()


def test_damaged_records_are_no_obstacle(tmp_path: Path) -> None:
    """A record that is no record is left alone, and labelling goes on."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "1-2.json").write_text("{")
    (tmp_path / "state" / "3-4.json").write_text('{"a": 1}')
    (tmp_path / "disk").touch()
    made = card(tmp_path)
    assert Machine(made).image(tmp_path / "disk").startswith(IMAGE)
    made.close()


def test_pairs_do_not_collide(tmp_path: Path) -> None:
    """Of six pairs of four categories each is drawn once, by several folders too, and then there is none."""
    for one in ("a", "b"):
        (tmp_path / one).mkdir()
    held = [draw(tmp_path / one, 4) for one in ("a", "b", "a", "b", "a", "b")]
    assert len({one.name for one in held}) == 6
    with pytest.raises(HostError, match="each is another machine's"):
        draw(tmp_path / "a", 4)
    held.pop().close()
    draw(tmp_path / "a", 4).close()
    for one in held:
        one.close()
        one.close()


DRAW = """
import sys
from pathlib import Path
from cardcage_selinux.svirt.leases import draw
held = [draw(Path(sys.argv[1]), 32) for _ in range(40)]
print(*(one.name for one in held), flush=True)
sys.stdin.read()
"""


def test_processes_draw_different_pairs(tmp_path: Path) -> None:
    """Four processes that draw 40 of 496 pairs each at the same time have 160, and a killed one's are free."""
    words = [sys.executable, "-c", DRAW, str(tmp_path)]
    running = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        drawn = [process.stdout.readline().split() for process in running if process.stdout]
        names = [name for some in drawn for name in some]
        assert len(names) == len(set(names)) == 160
        assert all(alive(tmp_path, name) for name in names)
        running[0].kill()
        running[0].wait()
        assert not any(alive(tmp_path, name) for name in drawn[0])
        assert all(alive(tmp_path, name) for name in drawn[1])
        again = lease(tmp_path, drawn[0][0])
        assert again is not None
        assert lease(tmp_path, drawn[0][0]) is None
        again.close()
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_categories_are_those_of_the_default_policy() -> None:
    """Any pair that is drawn is valid in the default policy."""
    last = leases.CATEGORIES - 1
    made = Selinux(SelinuxOptions(audit="none", labels="none"))
    assert made.context(f"system_u:system_r:svirt_t:s0:c0,c{last}")
    with pytest.raises(ContextError, match="no category"):
        made.context(f"system_u:system_r:svirt_t:s0:c0,c{last + 1}")
