"""Sandboxes: forks of a template that has booted once, used from Python, other processes, and e2b's SDK."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.errors import CardcageError, ConfigError, UsageError
from cardcage_fleet.control import command, find
from cardcage_fleet.roster import Roster
from cardcage_fleet.session import Kind, converse
from cardcage_sandbox import CommandFailed, Sandbox, stop_templates
from cardcage_sandbox.template import keepers, load_template
from installed import PROGRAM
from sandbox_kit import ends

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
KEY = "e2b_0123456789abcdef"
LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
GROUPS = [Path("/sys/fs/cgroup", name, f"cardcage-test-{os.getpid()}") for name in ("unified", "pids", "")]
"""A control group of the tests' own, where the host lets us."""
SETUP = "echo made >/etc/made; mkdir -m 777 /srv"


@pytest.fixture(scope="module")
def template(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A template in a file, in a run directory of its own; its process boots for the first sandbox."""
    folder = tmp_path_factory.mktemp("sandbox")
    run = folder / "run"
    run.mkdir(mode=0o700)
    path = folder / "small.toml"
    group = next((one for one in GROUPS if os.access(one.parent, os.W_OK)), None)
    keys = f'memory = "128M"\ndisk = "16M"\nsetup = ["{SETUP}"]\nmost = 12\ncgroup = "{group or ""}"\n'
    path.write_text(f'{keys}[envs]\nOF_TEMPLATE = "t"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(run))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        try:
            yield path
        finally:
            stop_templates()
        assert not Roster().read()[0], "a machine is left"
    if group is not None:
        empty(group).rmdir()


def empty(group: Path) -> Path:
    """Wait until nobody is in a control group: a process that is reaped may have a thread that is on its way out."""
    if (events := group / "cgroup.events").exists():
        with events.open() as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while "populated 0" not in file.read():
                assert poll.poll(60_000), "somebody is left in it"
                file.seek(0)
    return group


@pytest.fixture
def sandbox(template: Path) -> Iterator[Sandbox]:
    with Sandbox.create(template, metadata={"test": "yes"}, envs={"GREETING": "hello"}) as made:
        yield made


def test_commands(sandbox: Sandbox) -> None:
    """Commands have the sandbox's user, home and variables, streams apart, callbacks, a status and a time."""
    run = sandbox.commands.run
    done = run("id -un; pwd; echo $GREETING $OF_TEMPLATE $MORE; cat /etc/made; echo oops >&2", envs={"MORE": "m"})
    assert done.stdout == "user\n/home/user\nhello t m\nmade\n"
    assert (done.exit_code, done.stderr) == (0, "oops\n")
    assert run(["id", "-un"], user="root", cwd="/").stdout == "root\n"
    heard: list[str] = []
    assert run("echo 1; echo 2 >&2; exit 7", on_stdout=heard.append, on_stderr=heard.append).exit_code == 7
    assert sorted(heard) == ["1\n", "2\n"]
    with pytest.raises(CommandFailed, match="ended with 7: why"):
        run("echo why >&2; exit 7", check=True)
    assert run("kill -9 $$").exit_code == -9
    with pytest.raises(subprocess.TimeoutExpired):
        run("echo part; sleep 1000", timeout="500ms")
    with pytest.raises(FileNotFoundError):
        run(["nonesuch"])
    with pytest.raises(UsageError, match="no user"):
        run("true", user="nobody-here")
    with pytest.raises(UsageError, match="more than 1000 bytes, and was killed"):
        run("head -c 2000000 /dev/zero", limit=1000)
    with pytest.raises(UsageError, match="a request of"):
        run("x" * 70_000)


@pytest.mark.parametrize("timeout", ["soon", -1, float("nan"), [1]])
def test_a_time_that_is_none(sandbox: Sandbox, timeout: Any) -> None:
    """What is no time is refused by its name, for a command as for a terminal."""
    for act in (sandbox.commands.run, lambda *_, **keys: sandbox.pty.create(**keys)):
        with pytest.raises(UsageError, match="timeout: "):
            act("true", timeout=timeout)


def test_background_commands(sandbox: Sandbox) -> None:
    """A command in the background goes on when nobody listens, and is found again by its number."""
    commands = sandbox.commands
    with commands.run("while read x; do echo got $x; done; exit 3", background=True, stdin=True, tag="t") as one:
        pid = one.pid
    (found,) = commands.list()
    assert (found.pid, found.command[-1][:5], found.user, found.tag) == (pid, "while", "user", "t")
    again = commands.connect(pid)
    commands.send_stdin(pid, "a\n")
    assert next(iter(again)) == (1, "got a\n")
    again.send_stdin("b" * 200_000 + "\n", close=True)
    done = again.wait()
    assert (done.exit_code, len(done.stdout)) == (3, len("got a\ngot \n") + 200_000)
    assert commands.list() == []
    assert not commands.kill(pid)
    with pytest.raises(ProcessLookupError):
        commands.connect(pid)
    sleeper = commands.run("sleep 1000", background=True)
    assert sleeper.kill()
    assert sleeper.wait().exit_code == -9
    commands.run("(sleep 1000 >/dev/null 2>&1 &)")
    assert commands.run("ps | grep -q '[s]leep 1000'").exit_code == 0  # it outlives its shell


def test_a_terminal(sandbox: Sandbox) -> None:
    """A terminal has a size, which can change, and its output in one stream."""
    terminal = sandbox.pty.create(30, 90)
    terminal.resize(50, 132)
    terminal.send_stdin("stty size; exit 5\n")
    done = terminal.wait()
    assert "50 132" in done.stdout
    assert done.exit_code == 5


def test_files(sandbox: Sandbox) -> None:
    """Files are the user's where they are new, below the home where they are relative, and refused as by the kernel."""
    files = sandbox.files
    entry = files.write("deep/er/hello", "hello\n")
    assert (entry.path, entry.owner, entry.size) == ("/home/user/deep/er/hello", "user", 6)
    assert files.stat("deep").owner == "user"
    assert files.read_text("~/deep/er/hello") == "hello\n"
    data = os.urandom(3_000_000)
    files.write("big", iter([data[:1_000_000], data[1_000_000:]]))
    assert files.read("big") == data
    assert [one.path for one in files.list("deep", depth=2)] == ["/home/user/deep/er", "/home/user/deep/er/hello"]
    assert files.make_dir("dir/in/dir")
    assert not files.make_dir("dir/in/dir")
    assert files.rename("deep/er/hello", "there").name == "there"
    sandbox.commands.run("ln -s there link", check=True)
    assert files.stat("link").target == "there"
    assert files.exists("there")
    files.remove("dir")
    assert not files.exists("dir")
    with pytest.raises(FileNotFoundError):
        files.read("none")
    with pytest.raises(IsADirectoryError):
        files.read("/etc")
    assert sandbox.commands.run("echo x >/etc/made").exit_code != 0  # it is root's


def test_the_control_group(sandbox: Sandbox) -> None:
    """A sandbox is in its template's control group."""
    group = next((one for one in GROUPS if one.exists()), None)
    if group is None:
        pytest.skip("needs a control group file system that can be written")
    assert sandbox.made.pid in map(int, (group / "cgroup.procs").read_text().split())


def test_a_watch(sandbox: Sandbox) -> None:
    """Changes of a directory are told from the moment that the watch is there."""
    with sandbox.files.watch("/srv") as changes:
        sandbox.commands.run("echo x >/srv/new; mkdir /srv/d", check=True)
        found = [next(changes) for _ in range(4)]
    assert [(one.kind, one.name) for one in found] == [
        ("create", "new"),
        ("modify", "new"),
        ("close_write", "new"),
        ("create", "d"),
    ]
    assert found[3].is_dir


def test_the_limit_of_files(sandbox: Sandbox) -> None:
    """Files take as much as the template says, and there is no other place for more."""
    done = sandbox.commands.run("for at in / /tmp ~ /srv /dev/shm; do dd if=/dev/zero of=$at/x bs=1M count=64; done")
    assert "No space left" in done.stderr
    sizes = [one.size for at in ("/tmp", "", "/srv", "/dev/shm") for one in sandbox.files.list(at) if one.name == "x"]
    assert 0 < sum(sizes) < 20 << 20


def test_no_way_out(sandbox: Sandbox) -> None:
    """There is no network card: by name or address, IPv4 or IPv6, TCP, UDP, ICMP or raw, nothing comes out."""
    files, run = sandbox.files, sandbox.commands.run
    assert [one.name for one in files.list("/sys/class/net")] == ["lo"]
    for bus in ("virtio", "pci", "usb"):
        where = f"/sys/bus/{bus}/devices"
        for one in files.list(where) if files.exists(where) else []:
            assert not files.exists(f"{where}/{one.name}/net")
    addresses = ["1.1.1.1", "10.0.2.2", "169.254.169.254", "2606:4700:4700::1111", "255.255.255.255", "224.0.0.251"]
    ports = range(1, 60) if LONG else (53, 443)
    tries = [f"echo x | nc {how} -w 1 {at} {port}" for at in addresses for port in ports for how in ("", "-u")]
    tries += [f"ping -c 1 -W 1 {at}" for at in addresses]
    tries += [
        "nslookup secret.example.com 1.1.1.1",
        "wget -T 1 -O- http://1.1.1.1",
        "wget -T 1 -O- http://[2606:4700::]",
    ]
    tries += ["arping -c 1 -w 1 -I lo 10.0.2.2", "ip link add eth0 type veth", "ip link add br0 type bridge"]
    tries += ["sh -c 'ip route add default dev lo && nslookup example.com 1.1.1.1'"]
    script = "\n".join(f"(timeout 1 {one}) >/dev/null 2>&1 && echo {number}" for number, one in enumerate(tries))
    files.write("tries", script)
    came = run("sh /home/user/tries", user="root", timeout=250).stdout
    assert not [tries[int(line)] for line in came.splitlines()]
    with pytest.raises(UsageError, match="no network card"):
        Sandbox.create(network={"allow_out": ["example.com"]})


def test_forks(sandbox: Sandbox) -> None:
    """Copies have what the sandbox had, and nothing of what either does then; each has randomness of its own."""
    sandbox.files.write("word", "before")
    running = sandbox.commands.run("sleep 1000", background=True)
    copies = sandbox.fork(3)
    try:
        copies[0].files.write("word", "after")
        assert [one.files.read_text("word") for one in [sandbox, *copies]] == ["before", "after", "before", "before"]
        assert [one.info().metadata for one in copies] == [{"test": "yes"}] * 3
        assert [one.commands.list() for one in copies] == [[]] * 3
        assert [one.pid for one in sandbox.commands.list()] == [running.pid]
        assert copies[1].commands.run("echo $GREETING").stdout == "hello\n"
        assert len({one.commands.run("cat /proc/sys/kernel/random/uuid").stdout for one in copies}) == 3
    finally:
        for one in copies:
            assert one.kill()


def test_the_jail(sandbox: Sandbox) -> None:
    """The template's process, its sandboxes and their forks are in a jail; what was forked there can be ended."""
    (keeper,) = keepers()
    (fork,) = sandbox.fork(1)
    pids = [keeper.pid, sandbox.info().pid, fork.info().pid]
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status  # SECCOMP_MODE_FILTER
    assert fork.kill()
    assert ends(pids[2])


def test_pause_and_resume(sandbox: Sandbox) -> None:
    """A paused sandbox stands, and has this host's time when it goes on."""
    assert sandbox.pause()
    assert not sandbox.pause()
    assert sandbox.info().state == "paused"
    assert not sandbox.is_running
    assert sandbox.resume(timeout=100)
    assert not sandbox.resume()
    assert abs(int(sandbox.commands.run("date +%s").stdout) - time.time()) < 30
    assert 90 < sandbox.info().ends - time.time() < 101


def test_the_time_of_one_whose_maker_is_gone(template: Path) -> None:
    """A sandbox outlives the process that made it, is found from another, and ends when its time is over."""
    program = f"from cardcage_sandbox import Sandbox; s = Sandbox.create({str(template)!r}); print(s.id, s.made.pid)"
    made = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    id, pid = made.stdout.split()
    found = Sandbox.connect(id)
    assert found.commands.run("echo here").stdout == "here\n"
    assert id in [one.id for one in Sandbox.list()]
    found.set_timeout(200)
    found.set_timeout(100, longer=True)
    assert 190 < found.info().ends - time.time() < 201
    found.set_timeout(0.01)
    assert ends(int(pid))
    with pytest.raises(UsageError, match="was found"):
        found.info()
    with pytest.raises(CardcageError):
        found.commands.run("true")
    assert not found.kill()


def test_one_that_pauses_when_its_time_is_over(template: Path) -> None:
    """``on_timeout="pause"`` brings it to a stand in place of ending it."""
    with Sandbox.create(template, timeout=0.01, on_timeout="pause") as made:
        while made.info().state != "paused":
            pass
        assert made.resume()
        assert made.commands.run("echo on").stdout == "on\n"


def test_one_whose_guest_ends(sandbox: Sandbox) -> None:
    """A sandbox whose guest powers off, or whose process is killed, is soon on no list."""
    (copy,) = sandbox.fork()
    os.kill(copy.made.pid, signal.SIGKILL)
    with pytest.raises(CardcageError):
        sandbox.commands.run("poweroff -f", user="root")
    assert not {copy.id, sandbox.id} & {one.id for one in Sandbox.list()}
    assert ends(sandbox.made.pid)


def test_how_many_there_may_be(template: Path) -> None:
    """A template has so many sandboxes at most; one more is refused, and nothing is left of it."""
    with Sandbox.create(template) as one:
        before = len(Sandbox.list())
        with pytest.raises(UsageError, match="expected 12 at most"):
            one.fork(12)
        assert len(Sandbox.list()) == before


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": 10**6}, "timeout"),
        ({"timeout": "soon"}, "expected a time"),
        ({"metadata": {"a": 1}}, "metadata: expected a table of text"),
        ({"metadata": {"a": "x" * 5000}}, "4096 bytes"),
        ({"envs": {"A=B": "c"}}, "the name of a variable"),
        ({"on_timeout": "explode"}, "on_timeout"),
        ({"memory": "1M"}, "limits"),
        ({"cpus": 0}, "limits"),
    ],
)
def test_what_is_refused(template: Path, keys: dict[str, Any], why: str) -> None:
    """What is no limit, time or table is refused in one line."""
    with pytest.raises(UsageError, match=why) as caught:
        Sandbox.create(template, **keys)
    assert "\n" not in str(caught.value)


def test_templates_that_are_none(template: Path, tmp_path: Path) -> None:
    """A wrong file is named with the key; a root that is not there says so."""
    path = tmp_path / "wrong.toml"
    for text, why in (
        ("memory = 5x", "not TOML"),
        ("memry = 1", "memory"),
        ('name = "A B"', "name"),
        ("most = 0", "most"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why) as caught:
            load_template(path)
        assert "wrong.toml" in str(caught.value)
    with pytest.raises(UsageError, match="expected"):
        load_template("nonesuch")
    before = len(keepers())
    with pytest.raises(ConfigError, match="expected a directory, a tar archive or an OCI image layout"):
        Sandbox.create(root=tmp_path / "none")
    assert len(keepers()) == before


def test_callers_that_talk_nonsense(sandbox: Sandbox) -> None:
    """What is no request is answered in one line, by the sandbox and by the template's process."""
    entry = find(str(sandbox.made.pid))
    for data in (b"", b"[]", b"{", b'{"do":"explode"}', b'{"do":"stat"}', b'{"do":"stat","path":5}', b"[" * 9999):
        with converse(entry, "sandbox", {}) as talk:
            talk.send(Kind.DATA, data)
            with pytest.raises(UsageError):
                talk.result(talk.receive())
    for keys in ({}, {"do": "explode"}, {"do": "kill"}, {"do": "kill", "id": 5}, {"do": "list", "more": 1}):
        with pytest.raises(UsageError):
            command(keepers()[0], "sandbox-pool", keys)
    with pytest.raises(UsageError, match="no template"):
        command(entry, "sandbox-pool", {"do": "list"})
    assert sandbox.commands.run("echo well").stdout == "well\n"


def test_many_at_once(template: Path) -> None:
    """Threads that make, use and end sandboxes do not disturb each other, and nothing is left of them."""
    wrong: list[BaseException] = []

    def use(number: int) -> None:
        try:
            with Sandbox.create(template) as made:
                assert made.commands.run(f"echo {number}").stdout == f"{number}\n"
        except BaseException as error:  # it is looked at below
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    assert Sandbox.list() == []


def test_the_commands(template: Path) -> None:
    """``cardcage sandbox`` makes, lists, uses, keeps and ends sandboxes."""

    def cardcage(*words: str, status: int = 0) -> str:
        done = subprocess.run([*PROGRAM, "sandbox", *words], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if not status else done.stdout + done.stderr

    id = cardcage("create", "--template", str(template), "--metadata", "a=b").strip()
    assert cardcage("run", "--in", id, "--", "echo $HOME; exit 3", status=3) == "/home/user\n"
    assert id in cardcage("list")
    assert "/kept: " in cardcage("snapshot", id, "kept")
    assert "kept" in cardcage("snapshot", id, "kept", status=2)  # it is there
    cardcage("kill", id)
    with pytest.raises(UsageError):
        Sandbox.connect(id)


def test_a_model_s_tools(template: Path) -> None:
    """``cardcage mcp`` gives a client of the official SDK a sandbox of its own, which ends with it."""
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client

    words = [*PROGRAM, "mcp", "--template", str(template)]

    async def talk() -> list[Any]:
        server = StdioServerParameters(command=words[0], args=words[1:], env=dict(os.environ))
        async with Client(stdio_client(server)) as client:
            tools = {one.name for one in (await client.list_tools()).tools}
            assert tools == {"run_command", "read_file", "write_file", "list_files"}
            calls: list[tuple[str, dict[str, Any]]] = [
                ("write_file", {"path": "in/word", "text": "hello"}),
                ("run_command", {"command": "cat in/word -; exit 3", "stdin": " there"}),
                ("read_file", {"path": "in/word"}),
                ("list_files", {"path": "in"}),
                ("read_file", {"path": "none"}),
                ("run_command", {"command": "sleep 100", "timeout": 0.2}),
                ("run_command", {"command": "true", "timeout": -1}),
            ]
            found = [await client.call_tool(name, given) for name, given in calls]
            assert len(Sandbox.list()) == 1
            return found

    wrote, ran, read, listed, none, late, wrong = asyncio.run(talk())
    assert wrote.content[0].text == "/home/user/in/word"
    assert ran.structured_content == {"exit_code": 3, "stdout": "hello there", "stderr": ""}
    assert read.content[0].text == "hello"
    assert "word" in listed.content[0].text
    assert [one.is_error for one in (wrote, ran, read, listed, none, late, wrong)] == [False] * 4 + [True] * 3
    assert "No such file" in none.content[0].text
    assert "was killed" in late.content[0].text
    assert Sandbox.list() == []


@pytest.fixture
def served(template: Path) -> Iterator[str]:
    """The HTTP face, in a process of its own."""
    words = [*PROGRAM, "sandbox", "serve", "--port", "0", "--template", str(template)]
    environment = {**os.environ, "CARDCAGE_SANDBOX_KEY": KEY}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            yield line.split("E2B_API_URL=")[1].split()[0]
        finally:
            server.terminate()


def test_the_e2b_sdk(served: str) -> None:
    """e2b's own SDK takes the face for its cloud: of its calls all pass that docs/sandbox.md lists as such."""
    environment = {**os.environ, "E2B_API_URL": served, "E2B_SANDBOX_URL": served, "E2B_API_KEY": KEY}
    words = [sys.executable, str(HERE / "e2b_calls.py"), "small"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) >= 83
    assert {name: why for name, why in rows.items() if why} == {}
