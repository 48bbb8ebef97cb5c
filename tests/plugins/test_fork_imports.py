"""A fork waits for imports of other threads: the copy could never import what they were importing."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
from cardcage.errors import HostError
from cardcage_fork import forking

SLOW = "import threads_of_test\nthreads_of_test.began.set()\nassert threads_of_test.go.wait(60)\n"


class Gate:
    """What the module meets as it is imported."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    (tmp_path / "slow_of_test.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Gate()
    monkeypatch.setitem(sys.modules, "threads_of_test", made)
    monkeypatch.delitem(sys.modules, "slow_of_test", raising=False)
    return made


def test_a_copy_can_import_what_was_being_imported(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork while another thread imports a module comes after that, and the new process imports the module."""
    monkeypatch.setattr(forking, "sleep", lambda seconds: gate.go.set())
    thread = threading.Thread(target=__import__, args=("slow_of_test",))
    thread.start()
    assert gate.began.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: there are threads
        pid = forking.fork_between_imports()
    if pid == 0:
        os._exit(__import__("slow_of_test").__name__ != "slow_of_test")
    child = os.pidfd_open(pid)
    try:
        ended = select.select([child], [], [], 30)[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(child)
        gate.go.set()
        thread.join()
    assert (bool(ended), status) == (True, 0)
    __import__("json.tool")  # imports go on here


def test_a_module_can_fork_as_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork in the middle of this thread's own import waits for nobody; the import ends in both processes."""
    text = "import os\nfrom cardcage_fork.forking import fork_between_imports\npid = fork_between_imports()\n"
    (tmp_path / "forks_of_test.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: there are threads
        pid: int = __import__("forks_of_test").pid
    if pid == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    del sys.modules["forks_of_test"]


def test_an_import_without_end_is_told(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an import does not end, there is no fork but an error that names the module."""
    monkeypatch.setattr(forking, "PATIENCE", 0.05)
    thread = threading.Thread(target=__import__, args=("slow_of_test",))
    thread.start()
    assert gate.began.wait(60)
    with pytest.raises(HostError, match="slow_of_test"):
        forking.fork_between_imports()
    gate.go.set()
    thread.join()
