"""Jobs: work that a command begins and that goes on, told of by events until somebody dismisses it (qapi/job.json)."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict
from weakref import WeakKeyDictionary

from attrs import Factory, define
from cardcage.errors import FAULTS, CardcageError, in_words
from cardcage.waiting import Event

from cardcage_qmp.errors import QmpError
from cardcage_qmp.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_qmp.control import Control

__all__ = ["BlockJobChange", "GaveUp", "Job", "JobChange", "JobInfo", "begin", "begin_job", "block_job_cancel"]
__all__ += ["block_job_complete", "change", "job_cancel", "job_complete", "job_dismiss", "query_block_jobs"]
__all__ += ["query_jobs"]

MOST = 64
"""Jobs that a machine has at once, those that nobody has dismissed too."""
JobStatus = Literal["created", "running", "ready", "waiting", "pending", "aborting", "concluded", "null"]
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


BlockJobInfo = TypedDict(
    "BlockJobInfo",
    {
        "type": str,
        "device": str,
        "len": int,
        "offset": int,
        "busy": bool,
        "paused": bool,
        "speed": int,
        "io-status": Literal["ok"],
        "ready": bool,
        "status": JobStatus,
        "auto-finalize": bool,
        "auto-dismiss": bool,
    },
)


class JobChange(TypedDict):
    """A job's new status."""

    id: str
    status: JobStatus


class BlockJobChange(TypedDict):
    """How far a job about a disk is; *error* where it failed."""

    type: str
    device: str
    len: int
    offset: int
    speed: int
    error: NotRequired[str]


class GaveUp(Exception):
    """Work ends early, since somebody has said ``cancel``."""


@define(eq=False)
class Job:
    """A job; it is over once it is concluded.

    Attributes:
        done, total: how much of it. told: set once it is to end: to complete what is ready, or *cancelled*.
        block: it is about a disk, and is told of as such. auto: it is dismissed by its end.
    """

    id: str
    type: str
    status: JobStatus = "created"
    error: str = ""
    done: int = 0
    total: int = 1
    cancelled: bool = False
    block: bool = False
    auto: bool = False
    told: Event = Factory(Event)

    def goes_on(self) -> bool:
        """False once somebody has cancelled it."""
        return not self.cancelled


_jobs: WeakKeyDictionary[Control, dict[str, Job]] = WeakKeyDictionary()
_lock = threading.Lock()


def begin_job(session: Session, id: str, type: str, work: Callable[[], object]) -> None:
    """Carry *work* out as job *id*, on a thread of its own. Raises QmpError for an id that is taken.

    Args:
        type: a word for the kind of job, as ``query-jobs`` tells it. work: what it raises is the job's error.
    """
    begin(session, Job(id, type), lambda _: work())


def begin(session: Session, job: Job, work: Callable[[Job], object]) -> None:
    """Carry *work*, which tells the job how far it is, out as :func:`begin_job` does. Cancelled, it raises GaveUp."""
    control, id = session.control, job.id
    if not id or len(id) > 256:
        raise QmpError("Parameter 'job-id' expects an id of up to 256 letters")
    with _lock:
        there = _jobs.setdefault(control, {})
        if id in there:
            raise QmpError(f"Job ID '{id}' already in use")
        if len(there) >= MOST:
            raise QmpError(f"{MOST} jobs are there already: dismiss those that are concluded")
        there[id] = job
    change(control, job, "created")

    def run() -> None:
        change(control, job, "running")
        try:
            work(job)
        except GaveUp:
            change(control, job, "aborting")
            _tell(control, job, "BLOCK_JOB_CANCELLED")
        except FAULTS as error:
            job.error = str(error) if isinstance(error, CardcageError) else in_words(error)
            change(control, job, "aborting")
            _tell(control, job, "BLOCK_JOB_COMPLETED")
        else:
            job.done = job.total
            change(control, job, "waiting")
            change(control, job, "pending")
            _tell(control, job, "BLOCK_JOB_COMPLETED")
        change(control, job, "concluded")
        if job.auto:
            with _lock:
                _jobs[control].pop(id, None)
            change(control, job, "null")

    threading.Thread(target=run, name=f"{control.name}-job", daemon=True).start()


def change(control: Control, job: Job, status: JobStatus) -> None:
    """The job has another status, which is told."""
    job.status = status
    control.emit("JOB_STATUS_CHANGE", {"id": job.id, "status": status})
    if status == "ready":
        _tell(control, job, "BLOCK_JOB_READY")


def _tell(control: Control, job: Job, event: str) -> None:
    if job.block:
        about: dict[str, object] = {"type": job.type, "device": job.id, "len": job.total, "offset": job.done}
        about["speed"] = 0
        if job.error and event == "BLOCK_JOB_COMPLETED":
            about["error"] = job.error
        control.emit(event, about)


def _found(session: Session, id: str) -> Job:
    with _lock:
        found = _jobs.get(session.control, {}).get(id)
    if found is None or found.status == "concluded":
        raise QmpError(f"Job not found: '{id:.256}'" if found is None else f"Job '{id}' is over")
    return found


def job_complete(session: Session, id: str) -> None:
    """Have a job that is ready do its last step."""
    job = _found(session, id)
    if job.status != "ready":
        raise QmpError(f"Job '{id}' in state '{job.status}' cannot accept command verb 'complete'")
    job.told.set()


def job_cancel(session: Session, id: str) -> None:
    """Have a job end early: nothing that can be seen has changed."""
    job = _found(session, id)
    if not job.block:
        raise QmpError(f"Job '{id}' cannot be cancelled")
    job.cancelled = True
    job.told.set()


def block_job_complete(session: Session, device: str) -> None:
    """``job-complete`` by an older name."""
    job_complete(session, device)


def block_job_cancel(session: Session, device: str, force: bool = False) -> None:
    """``job-cancel`` by an older name."""
    job_cancel(session, device)


def query_block_jobs(session: Session) -> list[BlockJobInfo]:
    """The jobs about disks."""
    with _lock:
        there = [one for one in _jobs.get(session.control, {}).values() if one.block and one.status != "concluded"]
    return [
        {
            "type": one.type,
            "device": one.id,
            "len": one.total,
            "offset": one.done,
            "busy": True,
            "paused": False,
            "speed": 0,
            "io-status": "ok",
            "ready": one.status == "ready",
            "status": one.status,
            "auto-finalize": True,
            "auto-dismiss": one.auto,
        }
        for one in there
    ]


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
            "current-progress": int(over) if one.total == 1 else one.done,
            "total-progress": one.total,
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
    change(session.control, job, "null")
