"""Jobs: work that a command begins and that goes on, told of by events until somebody dismisses it (qapi/job.json)."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict
from weakref import WeakKeyDictionary

from attrs import define
from cardcage.errors import FAULTS, CardcageError, in_words

from cardcage_qmp.errors import QmpError
from cardcage_qmp.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_qmp.control import Control

__all__ = ["JobChange", "JobInfo", "begin_job", "job_dismiss", "query_jobs"]

MOST = 64
"""Jobs that a machine has at once, those that nobody has dismissed too."""
JobStatus = Literal["created", "running", "waiting", "pending", "aborting", "concluded", "null"]
JobInfo = TypedDict(
    "JobInfo",
    {
        "id": str,
        "type": str,
        "status": JobStatus,
        "current-progress": int,
        "total-progress": int,
        "error": NotRequired[str],
    },
)


class JobChange(TypedDict):
    """A job's new status."""

    id: str
    status: JobStatus


@define(eq=False)
class Job:
    """A job; it is over once it is concluded."""

    id: str
    type: str
    status: JobStatus = "created"
    error: str = ""


_jobs: WeakKeyDictionary[Control, dict[str, Job]] = WeakKeyDictionary()
_lock = threading.Lock()


def begin_job(session: Session, id: str, type: str, work: Callable[[], object]) -> None:
    """Carry *work* out as job *id*, on a thread of its own. Raises QmpError for an id that is taken.

    Args:
        type: a word for the kind of job, as ``query-jobs`` tells it. work: what it raises is the job's error.
    """
    control = session.control
    if not id or len(id) > 256:
        raise QmpError("Parameter 'job-id' expects an id of up to 256 letters")
    job = Job(id, type)
    with _lock:
        there = _jobs.setdefault(control, {})
        if id in there:
            raise QmpError(f"Job ID '{id}' already in use")
        if len(there) >= MOST:
            raise QmpError(f"{MOST} jobs are there already: dismiss those that are concluded")
        there[id] = job
    _change(control, job, "created")

    def run() -> None:
        _change(control, job, "running")
        try:
            work()
        except FAULTS as error:
            job.error = str(error) if isinstance(error, CardcageError) else in_words(error)
            _change(control, job, "aborting")
        else:
            _change(control, job, "waiting")
            _change(control, job, "pending")
        _change(control, job, "concluded")

    threading.Thread(target=run, name=f"{control.name}-job", daemon=True).start()


def _change(control: Control, job: Job, status: JobStatus) -> None:
    job.status = status
    control.emit("JOB_STATUS_CHANGE", {"id": job.id, "status": status})


def query_jobs(session: Session) -> list[JobInfo]:
    """The jobs that nobody has dismissed."""
    with _lock:
        there = list(_jobs.get(session.control, {}).values())
    found: list[JobInfo] = []
    for one in there:
        over = one.status == "concluded"
        made: JobInfo = {
            "id": one.id,
            "type": one.type,
            "status": one.status,
            "current-progress": int(over),
            "total-progress": 1,
        }
        if over and one.error:
            made["error"] = one.error
        found.append(made)
    return found


def job_dismiss(session: Session, id: str) -> None:
    """Forget a job that is concluded."""
    with _lock:
        there = _jobs.get(session.control, {})
        if id not in there:
            raise QmpError(f"Job not found: '{id:.256}'")
        if there[id].status != "concluded":
            raise QmpError(f"Job '{id}' in state '{there[id].status}' cannot accept command verb 'dismiss'")
        job = there.pop(id)
    _change(session.control, job, "null")
