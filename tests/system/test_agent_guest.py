"""The agent in a real guest: Machine.debian() with nothing else, from the first command to the end of the machine."""

from __future__ import annotations

import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

import pytest
from cardcage import GuestFailed, Machine, Panicked
from cardcage.errors import ConfigError, StateError
from cardcage_agent import AgentError, NoAgent
from cardcage_agent import Machine as TypedMachine
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Shelf
from cardcage_snapshot.state import capture, restore

MIB = 1 << 20


@pytest.fixture(scope="module")
def vm(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TypedMachine]:
    """A guest, up and running, with a disk."""
    disk = tmp_path_factory.mktemp("disk") / "disk.img"
    with disk.open("wb") as file:
        file.truncate(8 * MIB)
    drive = {"type": "virtio-blk", "drive": {"file": str(disk), "format": "raw"}}
    with TypedMachine.debian(memory="256M", accel="tcg", name="agent", devices=[drive]) as machine:
        machine.start()
        machine.agent.wait(timeout=120)
        yield machine


def test_commands_run_in_the_guest(vm: TypedMachine) -> None:
    """Output, errors, status, signal, input, environment, directory and user are the guest's."""
    done = vm.run("uname -n; echo err >&2; exit 3", text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("cardcage\n", "err\n", 3)
    assert vm.run(["cat"], input=b"\0\xff", check=True, timeout=60).stdout == b"\0\xff"
    assert vm.run("kill -9 $$").returncode == -9
    assert vm.run("echo $A; pwd", env={"A": "b"}, cwd="/tmp", text=True).stdout == "b\n/tmp\n"
    assert vm.run("id -u", user=1000, cwd="/", text=True).stdout == "1000\n"
    assert vm.run("cat /proc/self/oom_score_adj", text=True).stdout == "0\n"
    with pytest.raises(FileNotFoundError, match="'agent:nonesuch'"):
        vm.run(["nonesuch"])


def test_megabytes_go_in_and_out(vm: TypedMachine, tmp_path: Path) -> None:
    """Files and streams beyond every buffer come back unchanged."""
    data = os.urandom(20 * MIB)
    vm.files.write("/tmp/data", data)
    assert vm.files.stat("/tmp/data").size == len(data)
    assert vm.run("cat /tmp/data", check=True).stdout == data
    assert vm.run("cat > /tmp/again; cmp /tmp/data /tmp/again", input=data).returncode == 0
    vm.get("/tmp/again", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    vm.files.remove("/tmp/data")
    assert not vm.files.exists("/tmp/data")


def test_one_that_is_not_read_holds_up_no_other(vm: TypedMachine) -> None:
    """While several outputs and inputs are left alone, commands and files go on."""
    stuck = [vm.popen("cat /dev/zero") for _ in range(4)]
    reads = vm.files.chunks("/dev/zero")
    assert next(reads)
    assert vm.run(["cat"], input=bytes(MIB), timeout=120).stdout == bytes(MIB)
    for one in stuck:
        one.kill()
        assert one.communicate(timeout=60)[0].strip(b"\0") == b""
    reads.close()  # type: ignore[attr-defined]  # a generator


def test_a_terminal_in_the_guest(vm: TypedMachine) -> None:
    """A shell on a pty of a size that changes."""
    with vm.popen(["sh", "-i"], pty=(24, 80), text=True) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.resize(50, 132)
        shell.stdin.write("stty size; exit 6\n")
        shell.stdin.flush()
        assert "50 132\n" in shell.stdout.read()
        assert shell.wait() == 6


def test_the_clock_and_randomness_are_set(vm: TypedMachine) -> None:
    """The guest's date is what was set, and then this host's."""
    vm.agent.set_time(1_000_000_000)
    assert vm.run("date -u +%Y-%m", text=True).stdout == "2001-09\n"
    vm.agent.set_time()
    assert vm.run("date -u +%Y", text=True).stdout >= "2024\n"
    vm.agent.reseed()
    vm.agent.reseed(b"x" * 512)


def test_file_systems_are_frozen(vm: TypedMachine) -> None:
    """What is on a block device holds writers up until it is thawed; both can be done twice."""
    vm.run("until [ -e /dev/vda ]; do usleep 1000; done; mke2fs /dev/vda", check=True)
    vm.run("mkdir '/a disk' && mount /dev/vda '/a disk'", check=True)
    assert vm.agent.freeze() == ["/a disk"]
    assert vm.agent.freeze() == ["/a disk"]
    writer = vm.popen("echo through > '/a disk/file'")
    with pytest.raises(TimeoutExpired):
        writer.wait(timeout=0.2)
    vm.agent.thaw()
    vm.agent.thaw()
    assert writer.wait(timeout=60) == 0
    assert vm.files.read("/a disk/file") == b"through\n"


def test_a_tree_comes_back(vm: TypedMachine, tmp_path: Path) -> None:
    """What busybox made in the guest."""
    vm.run("mkdir -p /srv/tree/dir && echo one > /srv/tree/dir/file && ln -s dir/file /srv/tree/link", check=True)
    vm.get("/srv/tree", tmp_path / "tree")
    assert (tmp_path / "tree" / "link").read_text() == "one\n"
    vm.put(tmp_path / "tree", "/srv/again")
    assert vm.run("cat /srv/again/link", text=True).stdout == "one\n"


def check_qemus_agent(vm: TypedMachine) -> None:
    """Debian's agent, on the port that it knows: the time, a program, and a file of several pieces both ways."""
    found = vm.run("grep -lx org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name", text=True, check=True).stdout
    words = ["/usr/sbin/qemu-ga", "-p", f"/dev/{found.split('/')[-2]}", "-t", "/run", "-f", "/run/qga.pid"]
    with vm.popen(words) as process:
        vm.qga.set_time(1_000_000_000)
        assert vm.qga.run(["/bin/date", "-u", "+%Y"], check=True).stdout == b"2001\n"
        data = os.urandom(400_000)
        vm.qga.write("/root/pieces", data)
        assert vm.qga.read("/root/pieces") == vm.files.read("/root/pieces") == data
        process.kill()


def check_ssh(vm: TypedMachine, folder: Path) -> None:
    """OpenSSH's own client runs commands and copies files by ssh_config(), without a network; a stranger has no key."""

    vm.run("rm -f /root/.bashrc", check=True)  # which may take seconds, and is run for a command by sshd
    ours, other = vm.ssh_config(), vm.ssh_config()

    def client(*words: str, program: str = "ssh", config: Path = ours) -> CompletedProcess[str]:
        text = [program, "-F", str(config), *words]
        return subprocess.run(text, input="given", capture_output=True, text=True, timeout=120, check=False)

    done = client(vm.name, "cat; echo $USER; echo told >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == ("givenroot\n", "told\n", 3)
    assert client(f"{vm.name}:/etc/cardcage-test", str(folder / "copied"), program="scp").returncode == 0
    assert (folder / "copied").read_text() == "of the guest\n"
    (folder / "copied").unlink()
    stranger = ours.with_name("stranger")
    stranger.write_text(ours.read_text().replace(f"{ours.parent}/user", f"{other.parent}/user"))
    done = client(vm.name, "true", config=stranger)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr
    with pytest.raises(StateError, match="no OpenSSH server at /sbin/none in the guest"):
        vm.ssh_config(server="/sbin/none")


def test_the_hosts_root_is_a_guests(kernel: Path, tmp_path: Path) -> None:
    """Its programs run there and its files are read; what the guest writes stays in the guest, but for a share."""
    (tmp_path / "given").write_text("given")
    inside = {"host": tmp_path, "kept": {"path": str(tmp_path), "readonly": True}}
    port = {"name": "org.qemu.guest_agent.0", "char": "qemu-agent"}
    devices = [{"type": "virtio-console", "char": "null", "ports": [port]}]
    with TypedMachine.host_root(memory="384M", accel="tcg", share=inside, devices=devices) as vm:
        vm.start()
        assert vm.files.read("/etc/passwd") == Path("/etc/passwd").read_bytes()
        script = "cat /mnt/host/given; echo of the guest > /etc/cardcage-test; echo back > /mnt/host/back"
        done = vm.run(["/bin/bash", "-c", f"{script}; touch /mnt/kept/x"], text=True)
        assert done.stdout == "given"
        assert "/mnt/kept/x" in done.stderr
        assert vm.files.read("/etc/cardcage-test") == b"of the guest\n"
        if Path("/usr/sbin/qemu-ga").exists():
            check_qemus_agent(vm)
        if Path("/usr/sbin/sshd").exists():
            check_ssh(vm, tmp_path)
    assert not Path("/etc/cardcage-test").exists()
    assert sorted(os.listdir(tmp_path)) == ["back", "given"]


def test_a_tar_archive_is_a_guests_root(kernel: Path, tmp_path: Path) -> None:
    """Its files are there as its archive has them, and can be changed."""
    busybox = Shelf(cache_root(), lambda what, percent: None, lambda line: None).busybox()
    with tarfile.open(tmp_path / "root.tar.gz", "w:gz") as archive:
        archive.add(busybox, "bin/busybox")
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        archive.addfile(link)
        name = tarfile.TarInfo("etc/name")
        name.uid = 7
        archive.addfile(name)
    with TypedMachine.debian(memory="256M", accel="tcg", root=tmp_path / "root.tar.gz") as vm:
        vm.start()
        assert vm.run("echo /*", text=True, check=True).stdout == "/bin /dev /etc /lib /proc /root /run /sys /tmp\n"
        assert vm.files.stat("/etc/name").uid == 7
        vm.files.write("/etc/name", "changed")


def test_a_share_that_is_not_there_ends_the_machine(kernel: Path, tmp_path: Path) -> None:
    """A command never takes an empty directory for what was shared: the kernel panics, and the console says why."""
    for name in ("a/b", "..", ".", "-o", "", "cardcage-root"):
        with pytest.raises(ConfigError, match=f'share: "{name}": expected letters'):
            TypedMachine.debian(share={name: tmp_path})
    with pytest.raises(ConfigError, match=r"share\.a: expected no tag"):
        TypedMachine.debian(share={"a": {"path": str(tmp_path), "tag": "b"}})
    with TypedMachine.debian(memory="128M", accel="tcg", share=tmp_path, append="module_blacklist=virtiofs") as vm:
        vm.start()
        with pytest.raises(GuestFailed, match="Attempted to kill init") as failed:
            vm.wait(timeout=120, check=True)
        assert isinstance(failed.value.outcome, Panicked)
        assert "cardcage: /mnt/share is not mounted" in vm.console.output


def test_a_pause_keeps_a_caller_waiting_and_no_more(vm: TypedMachine) -> None:
    """A paused guest meets the caller's timeout, and answers once it goes on."""
    vm.pause()
    with pytest.raises(TimeoutError):
        vm.agent.ping(timeout=0.05)
    vm.resume()
    assert vm.agent.ping() > 0


@pytest.mark.once
def test_a_guest_that_is_reset_has_an_agent_again(kernel: Path) -> None:
    """What was under way ends with a line about it, and the next command runs in the guest that booted again."""
    with TypedMachine.debian(memory="128M", accel="tcg") as vm:
        vm.start()
        before = vm.popen("echo begun; sleep 1000")
        assert before.stdout is not None
        assert before.stdout.readline() == b"begun\n"
        vm.reset()
        with pytest.raises(AgentError, match="began anew"):
            before.wait(timeout=200)
        assert vm.run(["echo", "again"], text=True).stdout == "again\n"


@pytest.mark.once
def test_a_guest_that_goes_on_elsewhere_has_its_agent(kernel: Path) -> None:
    """A machine restored from another's state and RAM runs commands in the guest that this left, without its calls."""

    def machine() -> TypedMachine:
        return TypedMachine.debian(memory="128M", accel="tcg")

    with machine() as first:
        first.start()
        first.files.write("/root/kept", "from before")
        left = first.popen("echo begun; cat /dev/zero")
        assert left.stdout is not None
        assert left.stdout.read(6) == b"begun\n"
        first.pause()
        state = capture(first)
        ram = {slot.address: first.memory.read(slot.address, slot.size) for slot in first.memory.slots}
    with machine() as second:
        for address, data in ram.items():
            for at in range(0, len(data), MIB):
                if any(data[at : at + MIB]):  # what is zero there is zero here
                    second.memory.write(address + at, data[at : at + MIB])
        restore(second, state)
        second.start(boot=False)
        assert second.files.read("/root/kept") == b"from before"
        second.agent.set_time()
        second.agent.reseed()
        assert second.run("pidof cat", text=True).stdout == ""


def test_the_end_of_the_machine_ends_what_waits(kernel: Path) -> None:
    """A command that powers the guest off raises AgentError with the outcome; so does each later one."""
    with Machine.debian(memory="128M", accel="tcg") as vm:  # type: ignore[attr-defined]  # a verb of a card
        with pytest.raises(StateError, match="the machine was not started"):
            vm.run("true")
        vm.start()
        with pytest.raises(AgentError, match=r"the machine ended \(the guest powered off\)"):
            vm.run("poweroff -f; sleep 1000")
        with pytest.raises(AgentError, match="ended"):
            vm.files.read("/init")


def test_a_guest_without_an_agent_is_one_clear_line(kernel: Path) -> None:
    """A port that nobody opens in the guest: NoAgent after the caller's timeout. No port at all: StateError."""
    table = {"type": "virtio-console", "char": "null", "ports": [{"name": "org.cardcage.agent.0", "char": "agent"}]}
    with TypedMachine(kernel=kernel, memory="128M", accel="tcg", devices=[table]) as vm:
        vm.start()
        with pytest.raises(NoAgent, match=r"no agent has answered within 0\.1 s: the guest has none, or hangs$"):
            vm.run("true", timeout=0.1)
    with TypedMachine(kernel=kernel, memory="128M", accel="tcg") as vm, pytest.raises(StateError, match="no port for"):
        vm.run("true")


def test_many_callers_share_one_guest(vm: TypedMachine) -> None:
    """Eight threads, each with its own answers."""
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = [vm.run(["echo", str(number)], text=True).stdout for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {number: [f"{number}\n"] * 5 for number in range(8)}
