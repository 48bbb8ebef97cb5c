"""The access-vector cache and its audit lines."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from cardcage.errors import Denied, UsageError
from cardcage.security import Act
from cardcage_selinux.server.audit import avc_line
from cardcage_selinux.server.avc import Avc
from cardcage_selinux.server.policy import load
from selinux_sepol import HAVE, MISSING, secilc

POLICY = """
(class file (read write open lock)) (user u) (role r) (type a) (type b) (type p)
(userrole u r) (roletype r a) (roletype r b) (roletype r p) (typepermissive p)
(allow a b (file (read lock))) (auditallow a b (file (lock))) (dontaudit a b (file (open)))
(boolean more false) (booleanif more (true (allow a b (file (write)))))
"""
FOR_SECILC = """
(classorder (file)) (sid k) (sidorder (k)) (sidcontext k (u r a ((s) (s)))) (sensitivity s) (sensitivityorder (s))
(category x) (categoryorder (x)) (userlevel u (s)) (userrange u ((s) (s)))
"""
A, B, P = "u:r:a", "u:r:b", "u:r:p"


class Asked:
    """A cache with the lines that it wrote."""

    def __init__(self, text: str = POLICY, **options: object) -> None:
        self.lines: list[str] = []
        self.avc = Avc(load(text), audit=self.lines.append, **options)  # type: ignore[arg-type]  # options of any type

    def denied(self, source: str, target: str, tclass: str, permissions: str, **facts: object) -> bool:
        """Whether it refuses *permissions*, words with spaces between them."""
        try:
            self.avc.check(Act(source, target, tclass, tuple(permissions.split()), facts))
        except Denied:
            return True
        return False


def test_grants_and_denials() -> None:
    """What is allowed passes without a line; a denial is logged once for each permission of an entry."""
    asked = Asked()
    assert not asked.denied(A, B, "file", "read")
    assert asked.lines == []
    assert asked.denied(A, B, "file", "read write", pid=7, comm="vm one", path="/a b")
    assert asked.denied(A, B, "file", "read write")
    (line,) = asked.lines
    assert re.fullmatch(
        r"type=AVC msg=audit\(\d+\.\d{3}:1\): avc:  denied  \{ write \} for  pid=7 comm=766D206F6E65 "
        r"path=2F612062 scontext=u:r:a tcontext=u:r:b tclass=file permissive=0",
        line,
    )


def test_message_says_who_may_not_what() -> None:
    """The error names both contexts, the class and what was refused."""
    with pytest.raises(Denied, match=r"^u:r:a may not write file u:r:b$"):
        Asked().avc.check(Act(A, B, "file", ("read", "write")))


def test_dontaudit_is_silent() -> None:
    """A dontaudit rule keeps a denial out of the log."""
    asked = Asked()
    assert asked.denied(A, B, "file", "open")
    assert asked.lines == []


def test_auditallow_is_logged_each_time() -> None:
    """What an auditallow rule names is logged whenever it is granted."""
    asked = Asked()
    for _ in range(2):
        assert not asked.denied(A, B, "file", "lock")
    assert [line.split("avc:  ")[1].split(" for ")[0] for line in asked.lines] == ["granted  { lock }"] * 2
    assert "permissive" not in asked.lines[0]


@pytest.mark.parametrize(("options", "source"), [({"enforcing": False}, A), ({}, P)])
def test_permissive(options: dict[str, object], source: str) -> None:
    """Under a permissive mode or type a denial is logged once, with permissive=1, and passes."""
    asked = Asked(**options)
    for _ in range(2):
        assert not asked.denied(source, B, "file", "write")
    (line,) = asked.lines
    assert line.endswith("permissive=1")


def test_booleans_reload_and_mode_take_effect() -> None:
    """A change of booleans, policy or mode changes answers at once, counts, and calls back."""
    asked, heard = Asked(), []
    avc = asked.avc
    avc.on_change(lambda: heard.append(avc.sequence))
    assert asked.denied(A, B, "file", "write")
    avc.set_booleans({"more": True})
    assert not asked.denied(A, B, "file", "write")
    avc.reload(load(POLICY.replace("(allow a b (file (read lock)))", "")))
    assert asked.denied(A, B, "file", "read")
    avc.enforcing = False
    assert not asked.denied(A, B, "file", "read")
    avc.enforcing = False
    assert heard == [1, 2, 3]
    with pytest.raises(UsageError):
        avc.set_booleans({"nothing": True})
    assert avc.sequence == 3


def test_invalid_contexts_are_denied() -> None:
    """A context that is not valid is denied in every mode, with the reason, and logged once."""
    asked = Asked(enforcing=False)
    for _ in range(2):
        with pytest.raises(Denied, match='no type is called "x"'):
            asked.avc.check(Act("u:r:x", B, "file", ("read",)))
    assert len(asked.lines) == 1


@pytest.mark.parametrize(("word", "denied"), [("allow", False), ("deny", True)])
def test_unknown_permissions(word: str, denied: bool) -> None:
    """Classes and permissions that the policy lacks follow handleunknown."""
    asked = Asked(POLICY + f"(handleunknown {word})")
    assert asked.denied(A, B, "file", "lick") is denied
    assert asked.denied(A, B, "tap", "open read") is denied
    assert len(asked.lines) == (2 if denied else 0)
    assert asked.denied(A, B, "file", "lick") is denied
    assert len(asked.lines) == (2 if denied else 0)


def test_cache_is_bounded() -> None:
    """However many contexts are asked about, what is kept does not grow."""
    asked = Asked(entries=8)
    for number in range(100):
        assert asked.denied(f"u:r:x{number}", B, "file", "read")
        asked.denied(A, B, f"class{number}", "read")
    state = asked.avc._state
    assert len(state.entries) <= 8
    assert len(state.granted) <= 32


def test_revocation_reaches_every_thread() -> None:
    """Once a change has returned, no thread is granted what it took away, however many ask meanwhile."""
    asked = Asked()
    avc, stop, wrong = asked.avc, threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            before = avc.sequence
            granted = not asked.denied(A, B, "file", "write")
            if before == avc.sequence and granted is not avc.policy.booleans["more"] and before == avc.sequence:
                wrong.append(before)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):
        avc.set_booleans({"more": number % 2 == 0})
        assert asked.denied(A, B, "file", "write") is (number % 2 == 1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lines_cannot_be_forged() -> None:
    """Values that would end a field or a line are written in hexadecimal; keys that are no names are left out."""
    facts = {"comm": 'x" s=1\n', "tclass": "forged", "a b": 1, "name": "ok"}
    act = Act(A, B, "file", ("read",), facts)
    line = avc_line(act, denied=True, permissive=False, time=1363289005.532, serial=184)
    head = "type=AVC msg=audit(1363289005.532:184): avc:  denied  { read } for  comm=782220733D310A"
    assert line == f'{head} name="ok" scontext=u:r:a tcontext=u:r:b tclass=file permissive=0'


@pytest.mark.skipif(shutil.which("ausearch") is None, reason="ausearch is missing: apt-get install auditd")
def test_ausearch_reads_the_lines(tmp_path: Path) -> None:
    """Audit's own tool finds the records and interprets their fields."""
    asked = Asked()
    asked.denied(A, B, "file", "write", comm="a vm", path="/img x")
    asked.denied(A, B, "file", "lock")
    log = f"{tmp_path}/audit.log"
    with open(log, "w") as file:
        file.writelines(f"{line}\n" for line in asked.lines)
    found = subprocess.run(
        ["ausearch", "-i", "-if", log, "-m", "AVC"], capture_output=True, text=True, check=True
    ).stdout
    assert "denied  { write }" in found
    assert "comm=a vm" in found
    assert "granted  { lock }" in found


@pytest.mark.skipif(
    shutil.which("audit2allow") is None or not HAVE, reason=f"policycoreutils-python-utils, or {MISSING}"
)
def test_audit2allow_reads_the_lines(tmp_path: Path) -> None:
    """SELinux's own tool makes from the records the rules that would grant what was denied."""
    asked = Asked()
    asked.denied(A, B, "file", "write read")
    asked.denied(B, A, "file", "lock")
    status, binary, said = secilc(POLICY + FOR_SECILC, tmp_path)
    assert status == 0, said
    command = ["audit2allow", "-p", str(binary)]
    lines = "".join(f"{line}\n" for line in asked.lines)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert "allow a b:file write;" in done.stdout
    assert "allow b a:file lock;" in done.stdout
