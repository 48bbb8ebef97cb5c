"""Linux's own drivers on every virtio device, under the translator."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from guest_boot import BOOT, boot
from listens import listens

pytestmark = pytest.mark.usefixtures("kernel")
WARNINGS = "dmesg -r | grep -E '^<[0-4]>'"
VIRTIOFSD = next((path for path in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd") if os.path.exists(path)), None)
MIB = 1 << 20

ECHO = r"""
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int count, char **words)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = atoi(words[2]), .svm_cid = VMADDR_CID_HOST};
    int end = socket(AF_VSOCK, SOCK_STREAM, 0);
    char bytes[65536];
    ssize_t got;
    if (*words[1] == 'c') {
        if (connect(end, (void *)&address, sizeof address))
            return perror("connect"), 1;
    } else {
        address.svm_cid = VMADDR_CID_ANY;
        if (bind(end, (void *)&address, sizeof address) || listen(end, 1))
            return perror("listen"), 1;
        puts("listening");
        fflush(stdout);
        end = accept(end, 0, 0);
    }
    while ((got = read(end, bytes, sizeof bytes)) > 0)
        for (ssize_t at = 0, put; at < got; at += put)
            if ((put = write(end, bytes + at, got - at)) <= 0)
                return perror("write"), 1;
    return 0;
}
"""

# Reads code straight from the disk into one page, over what it ran there last, and calls it.
CALL = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void)
{
    int disk = open("/dev/vda", O_RDONLY | O_DIRECT);
    void *page = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 3000; i++) {
        int which = i * 7 % 64, got;
        if (pread(disk, page, 4096, which * 4096L) != 4096)
            return perror("pread"), 1;
        if ((got = ((int (*)(void))page)()) != which)
            return printf("call %d gave %d instead of %d\n", i, got, which), 1;
    }
    puts("all new");
    return 0;
}
"""


def disk(path: Path, size: int = 32 * MIB) -> str:
    path.touch()
    os.truncate(path, size)
    return str(path)


def test_linux_probes_every_device_without_a_warning(tmp_path: Path) -> None:
    """Each driver binds its device, on PCI and on MMIO, and the kernel warns of nothing."""
    arguments = ["--share", str(tmp_path), "--vsock", f"5,uds={tmp_path}/v", "--net", "null"]
    arguments += ["--drive", f"{disk(tmp_path / 'd')},format=raw", "--device", "virtio-rng"]
    arguments += ["--device", "virtio-balloon", "--device", "virtio-console,char=null"]
    arguments += ["--device", "virtio-rng-mmio,address=0xd0000000,irq=5"]
    arguments += ["--device", f"virtio-9p,path={tmp_path},tag=n!"]  # a tag that init leaves alone
    script = "for d in /sys/bus/virtio/devices/*; do echo $(cat $d/device) $(basename $(readlink $d/driver)); done; "
    script += f"{WARNINGS}; :"
    lines = boot(*arguments, script=script)
    drivers = {int(line.split()[0], 16): line.split()[1:] for line in lines}
    assert drivers.pop(9) in ([""], [], ["9pnet_virtio"])  # Debian's cloud kernel has no 9p
    assert drivers == {
        1: ["virtio_net"],
        2: ["virtio_blk"],
        3: ["virtio_console"],
        4: ["virtio_rng"],
        5: ["virtio_balloon"],
        19: ["vmw_vsock_virtio_transport"],
        26: ["virtiofs"],
    }
    assert len(lines) == 11  # with the consoles whose ports carry what this script prints, and the agent


@pytest.mark.parametrize("options", ["queues=2", "packed=true", "threads=4"])
def test_a_disk_keeps_what_linux_writes(tmp_path: Path, options: str) -> None:
    """What two processors write comes back after the page cache was dropped, and is in the file; discards reach it."""
    path = tmp_path / "d"
    script = """
        dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null
        dd if=/tmp/r of=/dev/vda bs=64k conv=fsync 2>/dev/null &
        dd if=/tmp/r of=/dev/vda bs=4k seek=2048 conv=fsync 2>/dev/null
        wait; echo 3 > /proc/sys/vm/drop_caches
        md5sum < /tmp/r; head -c 8388608 /dev/vda | md5sum; tail -c +8388609 /dev/vda | head -c 8388608 | md5sum
        dd if=/dev/vda iflag=direct bs=1M count=8 2>/dev/null | md5sum
        ls /sys/block/vda/mq | wc -l; blkdiscard -o 0 -l 1048576 /dev/vda;
    """
    drive = f"virtio-blk,drive=raw:{disk(path)},{options}"
    *sums, queues = boot("--cpus", "2", "--device", drive, script=script)
    assert len(set(sums)) == 1
    assert len(sums) == 4
    assert queues == ("2" if options == "queues=2" else "1")
    data = path.read_bytes()
    assert data[:MIB].strip(b"\0") == b""
    assert data[9 * MIB : 16 * MIB] == data[MIB : 8 * MIB]


def test_the_example_device_serves_linux() -> None:
    """The example card's disk is read by Linux's own driver."""
    pytest.importorskip("virtio_card", reason="pip install ./examples/virtio-card")
    script = "dd if=/dev/vda bs=512 skip=77 count=1 2>/dev/null | head -n 1; blockdev --getsize64 /dev/vda"
    assert boot("--device", "number-disk,size=4M", script=script) == ["sector 77", "4194304"]


def test_a_balloon_takes_and_reports_memory() -> None:
    """Free page reporting is on, and entropy flows."""
    script = "dmesg | grep -c 'Free page reporting enabled'; head -c 65536 /dev/hwrng | wc -c"
    assert boot("--device", "virtio-balloon", "--device", "virtio-rng", script=script) == ["1", "65536"]


def test_streams_between_guest_and_host(tmp_path: Path) -> None:
    """Megabytes go both ways over vsock, from connections of either side."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    (tmp_path / "echo.c").write_text(ECHO)
    subprocess.run(["gcc", "-static", "-O1", "-o", tmp_path / "echo", tmp_path / "echo.c"], check=True)
    disk(tmp_path / "echo", 2 * MIB)
    data, results = os.urandom(2 * MIB), []

    def exchange(end: socket.socket) -> None:
        back = bytearray()

        def read() -> None:
            while part := end.recv(65536):
                back.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)
        reader.join()
        results.append(bytes(back) == data)

    path = tmp_path / "v"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}_80")
    listener.listen()
    script = "cp /dev/vda /tmp/e; chmod +x /tmp/e; /tmp/e c 80 && /tmp/e l 99; /tmp/e c 81 2>&1"
    command = [*BOOT, "--vsock", f"5,uds={path}"]
    command += ["--device", f"virtio-blk,drive=raw:{tmp_path / 'echo'}", "--exec", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as guest:
        listener.settimeout(200)
        exchange(listener.accept()[0])
        assert guest.stdout is not None
        assert guest.stdout.readline() == "listening\n"
        caller = socket.socket(socket.AF_UNIX)
        caller.connect(str(path))
        caller.sendall(b"CONNECT 99\n")
        assert caller.makefile("rb", buffering=0).readline().startswith(b"OK ")
        exchange(caller)
        assert guest.stdout.readline() == "connect: Connection reset by peer\n"
    listener.close()
    assert results == [True, True]


def test_a_disk_of_another_process_survives_its_death(tmp_path: Path) -> None:
    """A guest copies through vhost-user-blk while qemu-storage-daemon is killed and restarted; nothing is lost."""
    daemon = shutil.which("qemu-storage-daemon")
    if daemon is None:
        pytest.skip("needs qemu-storage-daemon (Debian: qemu-system-common)")
    image, path = disk(tmp_path / "d"), tmp_path / "s"

    def serve() -> subprocess.Popen[bytes]:
        path.unlink(missing_ok=True)
        (tmp_path / "pid").unlink(missing_ok=True)
        blocks = ["--object", "throttle-group,id=t,x-bps-total=6000000"]
        blocks += ["--blockdev", f"driver=file,node-name=f,filename={image},locking=off"]
        blocks += ["--blockdev", "driver=throttle,node-name=d,throttle-group=t,file=f"]
        export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=d,writable=on"
        process = subprocess.Popen([daemon or "", *blocks, "--export", export, "--pidfile", str(tmp_path / "pid")])
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        return process

    process = serve()
    script = """
        dd if=/dev/urandom of=/tmp/r bs=1M count=24 2>/dev/null; echo ready
        dd if=/tmp/r of=/dev/vda bs=256k conv=fsync 2>/dev/null; echo written
        echo 3 > /proc/sys/vm/drop_caches; md5sum < /tmp/r; head -c 25165824 /dev/vda | md5sum
    """
    command = [*BOOT, "--set", "memory.type=memfd"]
    command += ["--device", f"vhost-user-blk,socket={path}", "--exec", script]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as guest:
            assert guest.stdout is not None
            assert guest.stderr is not None
            for line in ("ready\n", "written\n"):
                assert guest.stdout.readline() == line
                before = os.stat(image).st_blocks
                if line == "ready\n":
                    while os.stat(image).st_blocks < before + 1000:
                        os.sched_yield()
                process.kill()
                process.wait()
                process = serve()
            sums = guest.stdout.read().split()
            errors = guest.stderr.read()
        assert guest.returncode == 0, errors
        assert sums[0] == sums[2]
        assert "back end is gone" in errors
    finally:
        process.kill()
        process.wait()


def test_a_directory_of_virtiofsd(tmp_path: Path) -> None:
    """virtiofsd's directory is mounted in the guest, read and written."""
    if VIRTIOFSD is None or os.geteuid() != 0:
        pytest.skip("needs virtiofsd (Debian: qemu-system-common) and root")
    folder, path = tmp_path / "host", tmp_path / "s"
    folder.mkdir()
    (folder / "hello").write_text("from the host")
    command = [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={folder}", "-o", "sandbox=chroot", "-f"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not listens(path):
            if server.poll() is not None:
                pytest.skip("virtiofsd may not run here")
            os.sched_yield()
        script = "mkdir -p /m; mount -t virtiofs host /m && cat /m/hello && echo from the guest > /m/answer; umount /m"
        arguments = ["--set", "memory.type=memfd", "--device", f"vhost-user-fs,socket={path},tag=host"]
        assert boot(*arguments, script=script) == ["from the host"]
        assert (folder / "answer").read_text() == "from the guest\n"
    finally:
        server.kill()
        server.wait()


@pytest.mark.once
@pytest.mark.parametrize("back", ["blk", "vhost-user"])
def test_code_that_a_disk_brings_over_other_code_runs(tmp_path: Path, back: str) -> None:
    """Code that is read, past the guest's caches, into the page of code that ran is what runs next, also when another
    process writes it into guest memory."""
    daemon = shutil.which("qemu-storage-daemon")
    if shutil.which("gcc") is None or daemon is None:
        pytest.skip("needs gcc and qemu-storage-daemon (Debian: qemu-system-common)")
    (tmp_path / "call.c").write_text(CALL)
    subprocess.run(["gcc", "-O2", "-static", "-o", tmp_path / "call", tmp_path / "call.c"], check=True)
    blocks = [b"\xb8" + which.to_bytes(4, "little") + b"\xc3" for which in range(64)]  # mov eax, which; ret
    (tmp_path / "code").write_bytes(b"".join(block.ljust(4096, b"\xcc") for block in blocks))
    devices, process = ["--device", f"virtio-blk,drive=raw:{tmp_path / 'code'}"], None
    if back == "vhost-user":
        path = tmp_path / "s"
        export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=f"
        drive = f"driver=file,node-name=f,filename={tmp_path / 'code'},read-only=on"
        process = subprocess.Popen([daemon, "--blockdev", drive, "--export", export, "--pidfile", tmp_path / "pid"])
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            os.sched_yield()
        devices = ["--set", "memory.type=memfd", "--device", f"vhost-user-blk,socket={path}"]
    try:
        devices += ["--device", f"virtio-blk,drive=raw:{tmp_path / 'call'}"]
        script = "cat /dev/vdb > /tmp/call; chmod +x /tmp/call; /tmp/call"
        assert boot("--cpus", "2", *devices, script=script) == ["all new"]
    finally:
        if process is not None:
            process.kill()
            process.wait()
