"""The guest agent itself, as a process of this host: processes, streams, files, and what it must not be held up by."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CalledProcessError, TimeoutExpired
from types import SimpleNamespace
from typing import Any

import pytest
from agent_kit import HostAgent
from cardcage.errors import UsageError
from cardcage_agent import verbs
from cardcage_agent.errors import AgentError, AgentTimeout
from cardcage_agent.frames import BUFFER, WINDOW, Kind, Verb, frame

MIB = 1 << 20


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostAgent]:
    made = HostAgent(tmp_path_factory.mktemp("agent"))
    yield made
    made.close()


@pytest.fixture
def vm(agent: HostAgent) -> Iterator[Any]:
    """Its verbs; the test has left no call behind, and no descriptor in the agent."""
    before = agent.open_files()
    yield agent.vm
    assert not agent.link._calls
    end = time.monotonic() + 30
    while agent.open_files() != before and time.monotonic() < end:  # processes that were killed have ended soon
        agent.vm.agent.ping()
    assert agent.open_files() == before


def test_a_command_runs_as_subprocess_has_it(vm: Any) -> None:
    """Text is for the shell, a list is run as it is; both outputs, status and signal come back, as bytes or text."""
    done = vm.run("echo out; echo err >&2; exit 3")
    assert (done.args, done.returncode) == ("echo out; echo err >&2; exit 3", 3)
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert vm.run(["echo", "a  b", "$HOME"], text=True).stdout == "a  b $HOME\n"
    assert vm.run("kill -TERM $$").returncode == -signal.SIGTERM
    assert vm.run("cat; cat", text=True).stdout == ""
    assert vm.run("printf 'a\\r\\nb'", text=True).stdout == "a\nb"


def test_streams_go_where_they_are_told(vm: Any) -> None:
    """STDOUT joins the two in the order of writing; DEVNULL gives None; other streams are refused."""
    joined = vm.run("echo 1; echo 2 >&2; echo 3", stderr=STDOUT)
    assert (joined.stdout, joined.stderr) == (b"1\n2\n3\n", None)
    quiet = vm.run("echo 1; echo 2 >&2", stdout=DEVNULL)
    assert (quiet.stdout, quiet.stderr) == (None, b"2\n")
    with pytest.raises(UsageError, match="expected PIPE or DEVNULL"):
        vm.run("x", stdout=7)


def test_environment_directory_and_user(vm: Any) -> None:
    """By default root's, at home; else exactly what was given."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    assert vm.run("echo $USER $HOME; pwd", text=True).stdout == "root /root\n/root\n"
    assert vm.run(["/usr/bin/env"], env={"A": "1", "B": "x y"}, text=True).stdout == "A=1\nB=x y\n"
    assert vm.run(["pwd"], cwd="/usr", text=True).stdout == "/usr\n"
    assert (
        vm.run("id -un; id -G; echo $HOME", user="nobody", cwd="/", text=True).stdout == "nobody\n65534\n/nonexistent\n"
    )
    assert vm.run("id -u; id -g", user=12345, text=True).stdout == "12345\n12345\n"


def test_what_cannot_be_started_is_the_guests_own_error(vm: Any) -> None:
    """The exceptions of subprocess, with the machine's name before the path."""
    with pytest.raises(FileNotFoundError, match="'vm:nonesuch'"):
        vm.run(["nonesuch"])
    with pytest.raises(FileNotFoundError, match="'vm:/none'"):
        vm.run("pwd", cwd="/none")
    with pytest.raises(PermissionError, match="'vm:/etc/passwd'"):
        vm.run(["/etc/passwd"])
    with pytest.raises(AgentError, match='vm: the guest has no user "who"'):
        vm.run("id", user="who")
    with pytest.raises(AgentError, match="a request of"):
        vm.run(["echo", "x" * BUFFER])
    with pytest.raises(UsageError, match="no NUL"):
        vm.run(["echo", "a\0b"])
    with pytest.raises(CalledProcessError) as caught:
        vm.run("echo why >&2; exit 9", check=True)
    assert (caught.value.returncode, caught.value.stderr) == (9, b"why\n")


def test_long_arguments_come_whole(vm: Any) -> None:
    """A request of several frames: a hundred kilobytes of arguments."""
    words = [f"{at:0100}" for at in range(900)]
    assert vm.run(["echo", *words], text=True).stdout.split() == words


def test_megabytes_go_both_ways_at_once(vm: Any) -> None:
    """Input and output far beyond every buffer come back unchanged."""
    data = os.urandom(3 * MIB)
    done = vm.run(["cat"], input=data, check=True, timeout=60)
    assert done.stdout == data


def test_input_that_nobody_reads_holds_nothing_up(vm: Any) -> None:
    """A command that ends without reading has its own status; writing to it is a broken pipe."""
    assert vm.run("exit 4", input=bytes(MIB)).returncode == 4
    with vm.popen("exec <&-; echo closed; sleep 100", stdin=PIPE) as process:
        assert process.stdout.readline() == b"closed\n"
        with pytest.raises(BrokenPipeError):
            process.stdin.write(bytes(4 * MIB))
        process.kill()


def test_a_reader_that_does_not_read_blocks_no_other(vm: Any) -> None:
    """Processes whose output stays unread stop at their windows, while others run, and go on when they are read."""
    stuck = [vm.popen("head -c 2000000 /dev/zero; echo end >&2", stderr=PIPE) for _ in range(5)]
    unread = vm.popen(["sleep", "100"], stdin=PIPE)
    assert vm.run("echo through", text=True).stdout == "through\n"
    raw = unread.stdin.detach()
    sent = 0
    while sent < BUFFER:  # as much as the agent keeps, and the pipe in the guest
        sent += raw.write(bytes(65536))
    assert vm.run(["cat"], input=bytes(MIB)).stdout == bytes(MIB)
    for one in stuck:
        assert len(one._call.inboxes[0].kept) <= WINDOW
        out, err = one.communicate()
        assert (len(out), err, one.returncode) == (2_000_000, b"end\n", 0)
    unread.kill()
    assert unread.wait() == -signal.SIGKILL
    unread.close()


def test_a_timeout_ends_the_command(vm: Any) -> None:
    """TimeoutExpired names the command and the seconds; the call is gone."""
    with pytest.raises(TimeoutExpired, match=r"'sleep 1000' timed out after 0\.05 seconds"):
        vm.run("sleep 1000", timeout=0.05)


def test_one_that_is_given_up_takes_all_with_it(vm: Any) -> None:
    """close() kills what the command began, in the background too; TimeoutExpired holds what came before."""
    one = vm.popen("(sleep 1000 & echo $!; wait) & wait")
    child = Path(f"/proc/{int(one.stdout.readline())}/stat")
    with pytest.raises(TimeoutExpired):
        one.communicate(timeout=0.01)
    one.close()
    end = time.monotonic() + 30
    while child.exists() and ") Z " not in child.read_text():
        assert time.monotonic() < end, "it runs on"
        vm.agent.ping()


def test_more_output_than_its_limit_kills_the_command(vm: Any) -> None:
    """AgentError names the limit."""
    with pytest.raises(AgentError, match=r"'yes'.* wrote more than 100000 bytes"):
        vm.run(["yes"], limit=100_000)


def test_a_process_is_followed_as_popen_has_it(vm: Any) -> None:
    """Lines as they come, signals, poll, wait with a time limit, text both ways."""
    with vm.popen(
        "trap 'echo term; exit 5' TERM; echo $$; read x; echo got $x; sleep 100 & wait", stdin=PIPE, text=True
    ) as one:
        assert int(one.stdout.readline()) == one.pid
        assert one.poll() is None
        one.stdin.write("line\n")
        one.stdin.flush()
        assert one.stdout.readline() == "got line\n"
        with pytest.raises(TimeoutExpired):
            one.wait(timeout=0.01)
        one.terminate()
        assert one.stdout.readline() == "term\n"
        assert one.wait() == 5
    assert one.returncode == 5


def test_communicate_goes_on_after_a_timeout(vm: Any) -> None:
    """What came before TimeoutExpired is not lost."""
    one = vm.popen("echo a; read x; echo $x; sleep 1", stdin=PIPE)
    with pytest.raises(TimeoutExpired):
        one.communicate(b"b\n", timeout=0.01)
    assert one.communicate()[0] == b"a\nb\n"


def test_a_terminal_has_a_size_that_changes(vm: Any) -> None:
    """With pty the process has a terminal, its controlling one, whose new size it is told."""
    script = "trap 'stty size; exit 0' WINCH; tty -s && stty size; echo > /dev/tty; while :; do read x; done"
    one = vm.popen(script, pty=(24, 80), text=True)
    assert one.stdout.readline() == "24 80\n"
    assert one.stdout.readline() == "\n"
    one.resize(50, 132)
    assert one.stdout.read() == "50 132\n"
    assert (one.wait(), one.stderr) == (0, None)


def test_a_dropped_process_is_killed(vm: Any, agent: HostAgent) -> None:
    """A ResourceWarning says so, and its call is gone."""
    one = vm.popen(["sleep", "1000"])
    with pytest.warns(ResourceWarning, match="was dropped: it is killed"):
        del one
    assert not agent.link._calls


def test_a_table_that_is_full_refuses(vm: Any, agent: HostAgent) -> None:
    """The agent serves 128 calls at once; one more is refused, and served once there is room."""
    many = [vm.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL) for _ in range(128)]
    with pytest.raises(BlockingIOError):
        vm.run(["true"])
    for one in many:
        one.kill()
    assert {one.wait() for one in many} == {-signal.SIGKILL}
    assert vm.run(["true"]).returncode == 0


def test_callers_on_many_threads(vm: Any) -> None:
    """Each gets its own answers."""
    found: dict[int, list[bytes]] = {}

    def work(number: int) -> None:
        found[number] = [vm.run(["cat"], input=b"%d" % number * 10000).stdout for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {number: [b"%d" % number * 10000] * 10 for number in range(8)}


def test_files_are_written_and_read(vm: Any, tmp_path: Path) -> None:
    """Contents, modes, appending, text; errors are the kernel's."""
    path = tmp_path / "file"
    data = os.urandom(2 * MIB + 1)
    vm.files.write(path, data, mode=0o600)
    assert (path.read_bytes() == data, path.stat().st_mode & 0o777) == (True, 0o600)
    assert vm.files.read(path) == data
    vm.files.write(path, "äb\n")
    vm.files.write(path, [b"c", b"", b"d"], append=True)
    assert vm.files.read_text(path) == "äb\ncd"
    vm.files.write(path, b"")
    assert vm.files.read(path) == b""
    with pytest.raises(FileExistsError, match=f"'vm:{path}'"):
        vm.files.write(path, b"x", exclusive=True)
    with pytest.raises(FileNotFoundError, match="'vm:/none/x'"):
        vm.files.write("/none/x", b"x")
    with pytest.raises(IsADirectoryError):
        vm.files.read(tmp_path)
    with pytest.raises(AgentError, match="more than 10 bytes"):
        vm.files.read("/dev/zero", limit=10)


def test_directories_are_listed_made_and_removed(vm: Any, tmp_path: Path) -> None:
    """Thousands of names come whole; stat tells what lstat does; a tree goes with recursive alone."""
    top = tmp_path / "top"
    vm.files.mkdir(top / "a/b", parents=True)
    vm.files.mkdir(top / "a/b", parents=True)
    with pytest.raises(FileExistsError):
        vm.files.mkdir(top)
    names = sorted(f"{at}-{'x' * (at % 200)}" for at in range(3000))
    for name in names:
        (top / name).touch()
    (top / "link").symlink_to("nowhere")
    found = vm.files.list(top)
    assert [one.name for one in found] == sorted([*names, "a", "link"])
    info = vm.files.stat(top / "link", follow=False)
    own = (top / "link").lstat()
    assert (info.is_symlink, info.inode, info.modified, info.size) == (True, own.st_ino, own.st_mtime_ns, own.st_size)
    assert not vm.files.exists(top / "link")
    assert (vm.files.exists(top), vm.files.stat(top).is_dir, vm.files.stat(top).name) == (True, True, "top")
    with pytest.raises(AgentError, match="more than 100 entries"):
        vm.files.list(top, limit=100)
    vm.files.rename(top / "a", top / "c")
    with pytest.raises(OSError, match="not empty"):
        vm.files.remove(top / "c")
    vm.files.remove(top, recursive=True)
    assert not top.exists()


def test_files_are_copied_between_the_two(vm: Any, tmp_path: Path) -> None:
    """put keeps the permission bits, get gives the umask's; one that fails leaves nothing behind."""
    here, there, back = tmp_path / "here", tmp_path / "there", tmp_path / "back"
    here.write_bytes(os.urandom(MIB))
    here.chmod(0o750)
    vm.put(here, there)
    vm.get(there, back)
    assert (there.stat().st_mode & 0o777, back.read_bytes()) == (0o750, here.read_bytes())
    with pytest.raises(FileNotFoundError, match="vm:"):
        vm.get("/none", tmp_path / "x")
    with pytest.raises(AgentError, match="more than 5 bytes"):
        vm.get(there, tmp_path / "x", limit=5)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["back", "here", "there"]


def test_a_fifo_without_a_peer_holds_nothing_up(vm: Any, tmp_path: Path) -> None:
    """Opening one for writing is the kernel's error; reading one waits for a writer, and meets the time limit."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device or address"):
        vm.files.write(tmp_path / "fifo", b"x")
    with pytest.raises(AgentTimeout):
        vm.files.read(tmp_path / "fifo", timeout=0.01)


def test_arguments_of_the_agents_own_calls(vm: Any) -> None:
    """A time before 1970, or that is no number, and an empty seed are refused here."""
    for seconds in (-1, 1e10, math.inf, math.nan):
        with pytest.raises(UsageError, match="seconds since 1970"):
            vm.agent.set_time(seconds)
    with pytest.raises(UsageError, match="1 to 512"):
        vm.agent.reseed(b"")


def test_what_was_left_in_the_port_is_passed_over(tmp_path: Path) -> None:
    """An agent that begins in a guest that was reset serves nothing of what was meant for the one before."""
    request = bytes(16) + b"\0\0/bin/sh\0"
    stale = frame(7, Kind.REQUEST, Verb.RUN, request) + frame(7, Kind.DATA, 0, bytes(16000)) * 4
    agent = HostAgent(tmp_path, stale)
    try:
        assert agent.vm.run(["cat"], input=bytes(MIB)).stdout == bytes(MIB)
        assert not agent.slot.log.entries
    finally:
        agent.close()


def test_another_link_finds_the_same_agent(tmp_path: Path) -> None:
    """As after a snapshot: the agent forgets the calls of the link before, with their processes, and greets anew."""
    agent = HostAgent(tmp_path)
    try:
        before = agent.open_files()
        old = agent.vm.popen(["sleep", "1000"])
        agent.attach()
        assert agent.vm.run("echo new", text=True).stdout == "new\n"
        for _ in range(1000):
            if agent.open_files() == before:
                break
            agent.vm.agent.ping()
        assert agent.open_files() == before
        assert not agent.slot.log.entries
        old._link.close()
    finally:
        agent.close()


def test_trees_go_in_and_out(vm: Any, tmp_path: Path) -> None:
    """Files, directories and links come back as they were; what is there is kept, or refused on the way out."""
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(os.urandom(3 * WINDOW))
    (source / "deep" / "file").chmod(0o750)
    (source / "deep").chmod(0o750)
    (source / "empty").write_bytes(b"")
    (source / "out").symlink_to("/etc/passwd")
    os.mkfifo(source / "fifo")
    there = tmp_path / "there"
    there.mkdir()
    (there / "kept").write_text("kept")
    vm.put(source, there)
    assert (there / "kept").read_text() == "kept"
    assert (there / "deep").stat().st_mode & 0o777 == 0o750
    vm.get(there, tmp_path / "back")
    assert (tmp_path / "back" / "deep").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == (source / "deep" / "file").read_bytes()
    assert (tmp_path / "back" / "deep" / "file").stat().st_mode & 0o777 == 0o750
    assert os.readlink(tmp_path / "back" / "out") == "/etc/passwd"
    assert sorted(os.listdir(tmp_path / "back")) == ["deep", "empty", "kept", "out"]
    with pytest.raises(FileExistsError, match="exists"):
        vm.get(there, tmp_path / "back")
    with pytest.raises(AgentError, match="more than 1000 bytes"):
        vm.get(there, tmp_path / "less", limit=1000)
    many = tmp_path / "source" / "many"
    many.mkdir()
    for number in range(100):
        (many / f"{number:03}").touch()
    with pytest.raises(AgentError, match="more than 399 bytes"):  # files without contents
        vm.get(many, tmp_path / "less", limit=399)
    assert sorted(one.name for one in tmp_path.iterdir() if one.name not in ("back", "source", "there")) == []
    with pytest.raises(FileNotFoundError, match="'vm:/none'"):
        vm.get("/none", tmp_path / "none")


def test_symbolic_links(vm: Any, tmp_path: Path) -> None:
    """Made and read, with the kernel's own errors."""
    vm.files.symlink("target/of it", tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "target/of it"
    assert vm.files.readlink(tmp_path / "link") == "target/of it"
    with pytest.raises(FileExistsError):
        vm.files.symlink("x", tmp_path / "link")
    with pytest.raises(OSError, match="Invalid argument"):
        vm.files.readlink(tmp_path)


def test_what_cannot_be_frozen_says_so(vm: Any) -> None:
    """The file systems of the kernel itself, and what is no directory."""
    with pytest.raises(OSError, match="'vm:/proc'"):
        vm.agent.freeze(["/proc"])
    with pytest.raises(NotADirectoryError):
        vm.agent.freeze(["/proc/version"])
    assert vm.agent.freeze([]) == []


def test_calls_are_awaited(vm: Any, tmp_path: Path) -> None:
    """More at once than a pool of threads has; results and errors are those of the calls that wait."""

    async def main() -> None:
        begun = [vm.aio.run(f"read x; echo {at}", input="x\n", text=True, check=True) for at in range(40)]
        assert [one.stdout for one in await asyncio.gather(*begun)] == [f"{at}\n" for at in range(40)]
        await vm.aio.files.write(tmp_path / "file", "text")
        assert await vm.aio.files.read(tmp_path / "file") == b"text"
        assert await vm.aio.agent.ping() > 0
        with pytest.raises(FileNotFoundError, match="'vm:/none'"):
            await vm.aio.files.stat("/none")
        process = await vm.aio.popen("echo streamed; exit 3")
        assert await vm.aio.call(process.stdout.readline) == b"streamed\n"
        assert await vm.aio.call(process.wait) == 3

    asyncio.run(main())


def test_a_cancelled_command_is_killed(vm: Any, tmp_path: Path) -> None:
    """The task goes on at once, and the command's processes are gone."""
    script = f"echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/there; sleep 1000"

    async def main() -> None:
        task = asyncio.create_task(vm.aio.run(script))
        while not (tmp_path / "there").exists() and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    pid = (tmp_path / "there").read_text().strip()
    while Path(f"/proc/{pid}").exists():
        vm.agent.ping()


def test_calls_are_awaited_under_trio(vm: Any) -> None:
    """The same, with trio's cancellation."""
    trio = pytest.importorskip("trio")

    async def main() -> None:
        assert (await vm.aio.run("echo trio", text=True)).stdout == "trio\n"
        with trio.move_on_after(0.2) as scope:
            await vm.aio.run("sleep 1000")
        assert scope.cancelled_caught
        with pytest.raises(FileNotFoundError):
            await vm.aio.run(["nonesuch"])

    trio.run(main)


def test_changes_are_watched(vm: Any, tmp_path: Path) -> None:
    """From when it begins, in order, until what is watched is gone; moves have one cookie."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with vm.files.watch(folder) as changes:
        (folder / "one").write_text("x")
        (folder / "one").rename(folder / "two")
        (folder / "sub").mkdir()
        found = [changes.get(timeout=60) for _ in range(6)]
        assert [(one.kind, one.name) for one in found] == [
            ("create", "one"),
            ("modify", "one"),
            ("close_write", "one"),
            ("moved_from", "one"),
            ("moved_to", "two"),
            ("create", "sub"),
        ]
        assert found[3].cookie == found[4].cookie != 0
        assert found[5].is_dir
        with pytest.raises(AgentTimeout, match=r"no change within 0\.01 s"):
            changes.get(timeout=0.01)
        (folder / "two").unlink()
        (folder / "sub").rmdir()
        folder.rmdir()
        assert [one.kind for one in changes][-2:] == ["delete_self", "ignored"]
        assert changes.get() is None
    with pytest.raises(FileNotFoundError, match="'vm:/none'"):
        vm.files.watch("/none")


def test_waiting_for_the_agent_takes_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """``agent.wait`` waits its own time, also where other calls give the guest 60 seconds."""
    waited: list[float] = []
    monkeypatch.setattr(verbs, "reach", lambda *_: SimpleNamespace(await_agent=waited.append))
    machine: Any = SimpleNamespace(name="vm")
    verbs.Agent(machine).wait(900)
    verbs.link_of(machine, "run", 900)
    assert waited == [900, 60]
