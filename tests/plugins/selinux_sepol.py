"""libsepol by ctypes and secilc: what the security server is compared with."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import faulthandler
import os
import shutil
import subprocess
from pathlib import Path

HAVE = all(map(shutil.which, ("secilc", "checkpolicy"))) and ctypes.util.find_library("sepol") is not None
MISSING = "secilc, checkpolicy or libsepol2 is missing: apt-get install secilc checkpolicy libsepol2"


class Decision(ctypes.Structure):
    """``struct sepol_av_decision`` (sepol/policydb/flask_types.h)."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("allowed", "decided", "auditallow", "auditdeny", "seqno")]


def secilc(text: str, folder: Path, *options: str) -> tuple[int, Path, str]:
    """Compile CIL; (status, binary policy, what it said)."""
    source, binary = folder / "policy.cil", folder / "policy.bin"
    source.write_text(text)
    binary.unlink(missing_ok=True)
    done = subprocess.run(
        ["secilc", "-o", binary, "-f", "/dev/null", *options, source], capture_output=True, text=True, timeout=60
    )
    return done.returncode, binary, done.stdout + done.stderr


BOUNDED = """(class c (p)) (classorder (c)) (sid k) (sidorder (k)) (user u) (role r) (type a) (type b) (type d)
(userrole u r) (roletype r a) (roletype r b) (roletype r d) (typebounds a b) (typebounds b d)
(sidcontext k (u r a ((s) (s))))
(allow b a (c (p))) (allow d a (c (p))) (sensitivity s) (category x) (sensitivityorder (s)) (categoryorder (x))
(userlevel u (s)) (userrange u ((s) (s)))"""


def bounds_work(folder: Path) -> bool:
    """Whether this libsepol survives a type whose bound is bounded too: 3.4 does not. Asked in a child process."""
    status, binary, said = secilc(BOUNDED, folder, "-N")
    assert status == 0, said
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        code = 1
        try:
            decision = Sepol(binary).av("u:r:d", "u:r:a", "c")
            code = 0 if decision and decision.allowed == 0 else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Sepol:
    """One binary policy in libsepol. The library holds one policy a process: the last made counts."""

    def __init__(self, binary: Path) -> None:
        self.lib = ctypes.CDLL(ctypes.util.find_library("sepol"))
        self.libc = ctypes.CDLL(None)
        self.lib.sepol_debug(0)
        self.binary = self.loaded = binary
        self._sids: dict[str, int | None] = {}
        self._classes: dict[str, int] = {}
        self._load(binary)

    def _open(self, path: Path, mode: bytes) -> ctypes.c_void_p:
        self.libc.fopen.restype = ctypes.c_void_p
        file = self.libc.fopen(str(path).encode(), mode)
        assert file, path
        return ctypes.c_void_p(file)

    def _load(self, path: Path) -> None:
        file = self._open(path, b"rb")
        assert self.lib.sepol_set_policydb_from_file(file) == 0
        self.libc.fclose(file)
        self.loaded = path
        self._sids.clear()

    def set_booleans(self, values: dict[str, bool]) -> None:
        """Give booleans values, if any: read, changed, written and loaded again, by libsepol's own functions."""
        if not values:
            return
        lib = self.lib
        lib.sepol_handle_create.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(lib.sepol_handle_create())
        policy, file = ctypes.c_void_p(), ctypes.c_void_p()
        assert lib.sepol_policydb_create(ctypes.byref(policy)) == 0
        assert lib.sepol_policy_file_create(ctypes.byref(file)) == 0
        stream = self._open(self.binary, b"rb")
        lib.sepol_policy_file_set_fp(file, stream)
        lib.sepol_policy_file_set_handle(file, handle)
        assert lib.sepol_policydb_read(policy, file) == 0
        self.libc.fclose(stream)
        for name, value in values.items():
            key, boolean = ctypes.c_void_p(), ctypes.c_void_p()
            assert lib.sepol_bool_key_create(handle, name.encode(), ctypes.byref(key)) == 0
            assert lib.sepol_bool_create(handle, ctypes.byref(boolean)) == 0
            assert lib.sepol_bool_set_name(handle, boolean, name.encode()) == 0
            lib.sepol_bool_set_value(boolean, int(value))
            assert lib.sepol_bool_set(handle, policy, key, boolean) == 0
            lib.sepol_bool_free(boolean)
            lib.sepol_bool_key_free(key)
        image, size = ctypes.c_void_p(), ctypes.c_size_t()
        assert lib.sepol_policydb_to_image(handle, policy, ctypes.byref(image), ctypes.byref(size)) == 0
        changed = self.binary.with_suffix(".changed")
        changed.write_bytes(ctypes.string_at(image, size.value))
        self.libc.free(image)
        lib.sepol_policy_file_free(file)
        lib.sepol_policydb_free(policy)
        lib.sepol_handle_destroy(handle)
        self._load(changed)

    def sid(self, context: str) -> int | None:
        """The number of a context, ``None`` when it is not valid."""
        if context not in self._sids:
            sid = ctypes.c_uint32()
            text = context.encode()
            failed = self.lib.sepol_context_to_sid(text, ctypes.c_size_t(len(text) + 1), ctypes.byref(sid))
            self._sids[context] = None if failed else sid.value
        return self._sids[context]

    def text(self, sid: int) -> str:
        """The context of a number."""
        text, size = ctypes.c_char_p(), ctypes.c_size_t()
        assert self.lib.sepol_sid_to_context(ctypes.c_uint32(sid), ctypes.byref(text), ctypes.byref(size)) == 0
        assert text.value is not None
        return text.value.decode()

    def tclass(self, name: str) -> int:
        """The number of a class."""
        if name not in self._classes:
            number = ctypes.c_uint16()
            assert self.lib.sepol_string_to_security_class(name.encode(), ctypes.byref(number)) == 0
            self._classes[name] = number.value
        return self._classes[name]

    def bit(self, tclass: str, permission: str) -> int:
        """The bits of a permission."""
        bits = ctypes.c_uint32()
        number = ctypes.c_uint16(self.tclass(tclass))
        assert self.lib.sepol_string_to_av_perm(number, permission.encode(), ctypes.byref(bits)) == 0
        return bits.value

    def av(self, source: str, target: str, tclass: str) -> Decision | None:
        """``sepol_compute_av``, ``None`` when a context is not valid."""
        first, second = self.sid(source), self.sid(target)
        if first is None or second is None:
            return None
        found = Decision()
        arguments = (ctypes.c_uint32(first), ctypes.c_uint32(second), ctypes.c_uint16(self.tclass(tclass)))
        failed = self.lib.sepol_compute_av(*arguments, ctypes.c_uint32(0), ctypes.byref(found))
        assert failed == 0, errno.errorcode.get(-failed, failed)
        return found

    def new(self, kind: str, source: str, target: str, tclass: str) -> str | None:
        """The context of a new object (``sepol_change_sid``, ``sepol_member_sid``), ``None`` without one."""
        first, second = self.sid(source), self.sid(target)
        if first is None or second is None:
            return None
        made = ctypes.c_uint32()
        act = getattr(self.lib, f"sepol_{kind}_sid")
        arguments = (ctypes.c_uint32(first), ctypes.c_uint32(second), ctypes.c_uint16(self.tclass(tclass)))
        if act(*arguments, ctypes.byref(made)):
            return None
        return self.text(made.value)

    def transitions(self, asked: list[tuple[str, str, str]]) -> list[str | None]:
        """``sepol_transition_sid`` of valid (source, target, class), by ``checkpolicy -d``: the library hides it."""
        contexts = list(dict.fromkeys(one for source, target, _ in asked for one in (source, target)))
        words = [word for one in contexts for word in ("2", one)]
        first = self._debug([*words, "q"])[1:]
        numbers = {one: said.split("sid ")[1].split()[0] for one, said in zip(contexts, first, strict=False)}
        for source, target, tclass in asked:
            words += ["3", numbers[source], numbers[target], tclass]
        *answers, listed, _ = self._debug([*words, "6", "q"])[1 + len(contexts) :]
        lines = [line.strip().removeprefix("sid ") for line in listed.splitlines() if " -> scontext " in line]
        texts = dict(line.split(" -> scontext ") for line in lines)
        return [texts[said.split("sid ")[-1].split()[0]] if "\nsid " in said else None for said in answers]

    def _debug(self, words: list[str]) -> list[str]:
        """What ``checkpolicy -d`` says after each prompt; the first is what it says before."""
        typed = "\n".join(words) + "\n"
        levels = ["-M"] if any(one.count(":") > 2 for one in self._sids) else []
        command = ["checkpolicy", *levels, "-d", "-b", self.loaded]
        done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60)
        return done.stdout.split("Choose:")
