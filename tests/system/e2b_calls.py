"""The calls of e2b's SDK, one after another: ``python e2b_calls.py TEMPLATE``, with ``E2B_API_URL`` and the rest set.

The last line is a table of JSON: each call, and why it failed, empty where it passed. It is a program of its own since
the SDK keeps its connections, and its settings, for its process.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import e2b
from e2b import (
    AsyncSandbox,
    CommandExitException,
    FilesystemEventType,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)

TEMPLATE = sys.argv[1]
ROWS: dict[str, str] = {}
Call = Callable[[], Any]


def check(name: str, call: Call, wanted: Any = None) -> Any:
    """One call: its result, when that is *wanted*, or anything for None."""
    began = time.monotonic()
    found, why = None, ""
    try:
        found = call()
        if wanted is not None and found != wanted:
            why = f"gave {found!r:.300}, expected {wanted!r}"
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:300] or "failed"
    ROWS[name] = why
    print(f"{'FAIL' if why else 'ok  '} {name:44s} {1000 * (time.monotonic() - began):8.1f} ms {why}", flush=True)
    return found


def refused(name: str, kind: type[BaseException], call: Call) -> None:
    """One call that raises *kind*."""

    def raises() -> bool:
        try:
            call()
        except kind:
            return True
        return False

    check(name, raises, True)


def new(**keys: Any) -> Sandbox:
    """Another sandbox."""
    return Sandbox.create(TEMPLATE, **{"timeout": 60, **keys})


def control(box: Sandbox) -> None:
    """Make, find, and what there is to know."""
    refused("Sandbox.create(allow_internet_access=True)", SandboxException, lambda: new(allow_internet_access=True))
    refused("Sandbox.create of no template", SandboxException, lambda: Sandbox.create("nonesuch"))
    refused("a wrong key", e2b.AuthenticationException, lambda: Sandbox.list(api_key="e2b_wrong").next_items())
    check("is_running", box.is_running, True)
    check("get_info: metadata", lambda: box.get_info().metadata, {"who": "me & you"})
    check("get_info: state", lambda: Sandbox.get_info(box.sandbox_id).state, SandboxState.RUNNING)
    check("list", lambda: box.sandbox_id in [one.sandbox_id for one in Sandbox.list().next_items()], True)
    for who, many in (("me & you", 1), ("other", 0)):
        query = SandboxQuery(metadata={"who": who})
        check(f"list by metadata, {many}", lambda query=query: len(Sandbox.list(query=query).next_items()), many)
    check("list by state", lambda: Sandbox.list(query=SandboxQuery(state=[SandboxState.PAUSED])).next_items(), [])
    check("list in pages", pages, 2)
    check("set_timeout", lambda: box.set_timeout(300))
    check("set_timeout: get_info", lambda: (box.get_info().end_at - datetime.now(UTC)).seconds > 250, True)
    check("get_metrics", lambda: box.get_metrics()[0].mem_total > 0, True)
    check("connect by its id", lambda: Sandbox.connect(box.sandbox_id).commands.run("echo x").stdout, "x\n")


def pages() -> int:
    """The sandboxes of the first two pages of one."""
    other = new()
    try:
        listed = Sandbox.list(limit=1, order="asc")
        first = listed.next_items()
        return len({one.sandbox_id for one in [*first, *listed.next_items()]}) if listed.has_next else 0
    finally:
        other.kill()


def commands(box: Sandbox) -> None:
    """Commands."""
    run, all_of = box.commands.run, box.commands
    check("commands.run: stdout", lambda: run("echo out; echo err >&2").stdout, "out\n")
    check("commands.run: stderr", lambda: run("echo out; echo err >&2").stderr, "err\n")
    refused("commands.run: exit code", CommandExitException, lambda: run("exit 3"))
    check("commands.run: its user and home", lambda: run("id -un; pwd").stdout, "user\n/home/user\n")
    check("commands.run(envs)", lambda: run("echo $A $GREETING", envs={"A": "b"}).stdout, "b hi\n")
    check("commands.run(cwd)", lambda: run("pwd", cwd="/tmp").stdout, "/tmp\n")
    check("commands.run(user)", lambda: run("id -un", user="root").stdout, "root\n")
    heard: list[str] = []
    check(
        "commands.run(on_stdout, on_stderr)",
        lambda: run("echo 1; echo 2 >&2", on_stdout=heard.append, on_stderr=heard.append),
    )
    check("commands.run(on_stdout, on_stderr): called", lambda: sorted(heard), ["1\n", "2\n"])
    refused("commands.run(timeout)", TimeoutException, lambda: run("sleep 100", timeout=0.5))
    check("commands.run: 1 MB", lambda: len(run("head -c 1000000 /dev/zero | tr '\\0' x").stdout), 1_000_000)
    loop = "while read x; do echo got $x; done"
    handle = check("commands.run(background)", lambda: run(loop, background=True, stdin=True))
    check("commands.list", lambda: [one.pid for one in all_of.list()], [handle.pid])
    check("commands.send_stdin", lambda: all_of.send_stdin(handle.pid, "1\n"))
    check("handle.send_stdin", lambda: handle.send_stdin("2\n"))
    check("commands.stream_input", lambda: all_of.stream_input(handle.pid, ["3\n", b"4\n"]))

    def connected() -> str:
        again = all_of.connect(handle.pid)
        handle.send_stdin("5\n")
        found = next(text for text, _, _ in again if text)
        again.disconnect()
        return str(found)

    check("commands.connect, handle.disconnect", lambda: "got" in connected(), True)
    check("commands.close_stdin", lambda: all_of.close_stdin(handle.pid))
    check("handle.wait", lambda: handle.wait().stdout, "".join(f"got {one}\n" for one in range(1, 6)))
    sleeper = run("sleep 100", background=True)
    check("commands.kill", lambda: all_of.kill(sleeper.pid), True)
    refused("handle.wait of a killed one", CommandExitException, sleeper.wait)
    check("commands.kill of none", lambda: all_of.kill(99_999), False)
    check("handle.kill", run("sleep 100", background=True).kill, True)
    refused("commands.connect to none", NotFoundException, lambda: all_of.connect(99_999))


def files(box: Sandbox) -> None:
    """Files."""
    of = box.files
    check("files.write", lambda: of.write("dir/a.txt", "hello").path, "/home/user/dir/a.txt")
    check("files.read", lambda: of.read("dir/a.txt"), "hello")
    check("files.read(format='bytes')", lambda: of.read("/home/user/dir/a.txt", format="bytes"), b"hello")
    check("files.read(format='stream')", lambda: b"".join(of.read("dir/a.txt", format="stream")), b"hello")
    refused("files.read of none", NotFoundException, lambda: of.read("none"))
    of.write("big", b"x" * 3_000_000)
    check("files.write, 3 MB", lambda: len(of.read("big", format="bytes")), 3_000_000)
    of.write("stream", io.BytesIO(b"stream" * 1000))
    check("files.write of a stream", lambda: of.read("stream"), "stream" * 1000)
    check("files.write(gzip=True)", lambda: of.write("zip", b"zip" * 1000, gzip=True).path, "/home/user/zip")
    check("files.write(gzip=True): read", lambda: of.read("zip", gzip=True), "zip" * 1000)
    several = [{"path": "m1", "data": "1"}, {"path": "m2", "data": b"2"}]
    check("files.write_files", lambda: len(of.write_files(several)), 2)  # type: ignore[arg-type]  # a TypedDict's
    check("files.write(user)", lambda: of.write("/root/r", "x", user="root").path, "/root/r")
    check("files.list", lambda: {"dir", "m1", "big"} <= {one.name for one in of.list("/home/user")}, True)
    check("files.list(depth)", lambda: "/home/user/dir/a.txt" in [one.path for one in of.list(".", depth=2)], True)
    check("files.exists", lambda: (of.exists("m1"), of.exists("m3")), (True, False))
    check("files.get_info", lambda: (of.get_info("m1").owner, of.get_info("m1").size), ("user", 1))
    box.commands.run("ln -s m1 link")
    check("files.get_info of a link", lambda: of.get_info("link").symlink_target, "m1")
    check("files.make_dir", lambda: (of.make_dir("new/deep"), of.make_dir("new/deep")), (True, False))
    check("files.rename", lambda: of.rename("m1", "m4").path, "/home/user/m4")
    refused("files.rename of none", NotFoundException, lambda: of.rename("none", "m5"))
    check("files.remove", lambda: of.remove("new"))
    check("files.remove: exists", lambda: of.exists("new"), False)
    watch = check("files.watch_dir", lambda: of.watch_dir("dir"))
    of.write("dir/b.txt", "x")

    both = {("b.txt", FilesystemEventType.CREATE), ("b.txt", FilesystemEventType.WRITE)}

    def events() -> set[Any]:
        found: set[Any] = set()
        until = time.monotonic() + 60
        while not both <= found and time.monotonic() < until:
            found |= {(one.name, one.type) for one in watch.get_new_events()}
        return found & both

    check("handle.get_new_events", events, both)
    check("handle.stop", watch.stop)
    refused("files.watch_dir of none", NotFoundException, lambda: of.watch_dir("none"))
    check("download_url", lambda: urllib.request.urlopen(box.download_url("m4")).read(), b"1")
    link = box.download_url("m4", use_signature_expiration=60)
    check("download_url(use_signature_expiration)", lambda: urllib.request.urlopen(link).read(), b"1")
    forged = link.replace("m4", "m2")
    refused("a link that was changed", urllib.error.HTTPError, lambda: urllib.request.urlopen(forged))


def terminals(box: Sandbox) -> None:
    """Terminals."""
    pty = box.pty
    made = check("pty.create", lambda: pty.create(PtySize(rows=24, cols=80)))
    check("pty.resize", lambda: pty.resize(made.pid, PtySize(rows=50, cols=132)))
    check("pty.send_stdin", lambda: pty.send_stdin(made.pid, b"stty size; exit\n"))
    heard: list[bytes] = []
    check("handle.wait(on_pty)", lambda: made.wait(on_pty=heard.append).exit_code, 0)
    check("handle.wait(on_pty): called", lambda: b"50 132" in b"".join(heard), True)
    made = pty.create(PtySize(rows=24, cols=80))
    check("pty.connect", lambda: pty.connect(made.pid).disconnect())
    check("pty.stream_input", lambda: pty.stream_input(made.pid, [b"echo a\n", b"echo b\n"]))
    check("pty.kill", lambda: pty.kill(made.pid), True)


def ends(box: Sandbox) -> None:
    """Forks, pauses, times and ends."""
    copies = check("fork(count)", lambda: box.fork(count=2))
    check("fork: its files", lambda: [one.files.read("m4") for one in copies], ["1", "1"])
    for one in copies:
        one.kill()
    kept = check("create_snapshot", box.create_snapshot)
    named = check("create_snapshot(name)", lambda: box.create_snapshot("ready").names, ["ready"])
    again = check("Sandbox.create(snapshot_id)", lambda: Sandbox.create(kept.snapshot_id, timeout=60))
    check("Sandbox.create(snapshot_id): its files", lambda: again.files.read("m4"), "1")
    check("list_snapshots", lambda: [one.snapshot_id for one in box.list_snapshots().next_items()][1:], named)
    refused("create_snapshot(mode='filesystem')", SandboxException, lambda: box.create_snapshot(mode="filesystem"))
    again.kill()
    check("delete_snapshot", lambda: [Sandbox.delete_snapshot(one) for one in (kept.snapshot_id, "ready")], [True] * 2)
    check("delete_snapshot of none", lambda: Sandbox.delete_snapshot("ready"), False)
    check("pause", box.pause, True)
    check("pause of a paused one", box.pause, False)
    check("is_running of a paused one", box.is_running, False)
    check("connect: resumes", lambda: box.connect(timeout=200).commands.run("echo y").stdout, "y\n")
    short = new(timeout=1)
    until = time.monotonic() + 60
    while short.is_running() and time.monotonic() < until:
        pass
    refused("create(timeout): its time is over", SandboxException, lambda: short.commands.run("true"))
    check("kill", box.kill, True)
    check("kill of none", lambda: Sandbox.kill(box.sandbox_id), False)
    refused("get_info of none", NotFoundException, box.get_info)
    refused("commands.run of an ended one", SandboxException, lambda: box.commands.run("true"))


async def asynchronous() -> None:
    """The same calls for ``await``, which stream what the others ask for."""
    box = await AsyncSandbox.create(TEMPLATE, timeout=60)
    try:
        done = await asyncio.gather(*(box.commands.run(f"echo {number}") for number in range(5)))
        check("AsyncSandbox: commands.run", lambda: [one.stdout for one in done], [f"{one}\n" for one in range(5)])
        happened = asyncio.Event()
        watch = await box.files.watch_dir("/tmp", on_event=lambda event: happened.set())
        await box.files.write("/tmp/new", "1")
        await asyncio.wait_for(happened.wait(), 60)
        await watch.stop()
        check("AsyncSandbox: files.watch_dir(on_event)", happened.is_set, True)
        handle = await box.commands.run("echo z", background=True)
        result = await handle.wait()
        check("AsyncSandbox: handle.wait", lambda: result.stdout, "z\n")
    finally:
        check("AsyncSandbox: kill", lambda: True, await box.kill())


def main() -> None:
    """All of them."""
    box = check("Sandbox.create", lambda: new(timeout=200, metadata={"who": "me & you"}, envs={"GREETING": "hi"}))
    for part in (control, commands, files, terminals, ends):
        part(box)
    asyncio.run(asynchronous())
    print(json.dumps(ROWS))


if __name__ == "__main__":
    main()
