"""The kernel's own gdb scripts (scripts/gdb of its sources) on a Debian guest, with the debug symbols of its kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from cardcage.errors import HostError
from cardcage_agent import Machine
from cardcage_boot.apt import Apt, unpack
from cardcage_boot.cache import cache_root, locked
from gdb_kit import gdb, needs_gdb

LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
INCLUDES = ("arch/x86/include{}", "arch/x86/include/generated{}", "include{}", "include/generated{}")


@pytest.fixture
def symbols(kernel: Path) -> Path:
    """A folder with vmlinux and vmlinux-gdb.py, as a kernel's build leaves them: 600 MB, fetched once."""
    release = kernel.name.removeprefix("vmlinuz-")
    folder = cache_root() / "tests" / f"gdb-{release}"
    try:
        with locked(cache_root() / "lock", lambda: None):
            if not folder.exists():
                _make(folder, release)
    except HostError as error:
        pytest.skip(str(error))
    return folder


def _make(folder: Path, release: str) -> None:
    apt = Apt(cache_root() / "apt", lambda what, percent: None)
    apt.update()
    version, _, _ = release.rpartition("-")
    common = version.removesuffix("-cloud")
    source = "-".join(["linux-source", ".".join(release.split(".")[:2])])
    packages = [f"linux-image-{release}-dbg", source, f"linux-headers-{common}-common", f"linux-headers-{release}"]
    missing = [one for one in packages if apt.show(one) is None]
    if missing:
        raise HostError(f"the sources of this host's apt have no {' '.join(missing)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch, fresh = Path(name), Path(name) / "fresh"
        fresh.mkdir()
        debug, sources, *headers = (apt.download(one, scratch) for one in packages)
        vmlinux, archive = f"./usr/lib/debug/boot/vmlinux-{release}", f"./usr/src/{source}.tar.xz"
        _tar(["dpkg-deb", "--fsys-tarfile", str(debug)], fresh, "--strip-components=5", vmlinux)
        (fresh / f"vmlinux-{release}").rename(fresh / "vmlinux")
        _tar(["dpkg-deb", "--fsys-tarfile", str(sources)], scratch, "--strip-components=3", archive)
        _tar(["xz", "-dc", str(scratch / f"{source}.tar.xz")], fresh, "--strip-components=1", f"{source}/scripts/gdb")
        shutil.copy(fresh / "scripts" / "gdb" / "vmlinux-gdb.py", fresh)
        for one in headers:
            unpack(one, scratch / "headers")
        places = [scratch / "headers" / "usr" / "src" / f"linux-headers-{one}" for one in (f"{common}-common", release)]
        linux = fresh / "scripts" / "gdb" / "linux"
        (linux / "constants.py").write_text(_constants(linux / "constants.py.in", *places))
        fresh.rename(folder)


def _tar(words: list[str], folder: Path, *more: str) -> None:
    with subprocess.Popen(words, stdout=subprocess.PIPE) as unpacking:
        subprocess.run(["tar", "-x", "-C", str(folder), *more], stdin=unpacking.stdout, check=True)


def _constants(source: Path, common: Path, own: Path) -> str:
    """The module that the kernel's build makes of its headers."""
    words = ["gcc", "-E", "-x", "c", "-P", "-nostdinc", "-std=gnu11", "-D__KERNEL__", "-DCC_USING_FENTRY"]
    for kind in ("", "/uapi"):
        words += [f"-I{one / include.format(kind)}" for include in INCLUDES for one in (common, own)]
    for name in ("compiler-version.h", "kconfig.h", "compiler_types.h"):
        words += ["-include", str(common / "include" / "linux" / name)]
    made = subprocess.run([*words, str(source)], capture_output=True, text=True, check=True).stdout
    return made.partition("<!-- end-c-headers -->")[2].partition("\n")[2]


@needs_gdb
@pytest.mark.skipif(not LONG, reason="fetches 430 MB and keeps 600: set CARDCAGE_LONG_TESTS")
@pytest.mark.skipif(LONG and shutil.which("gcc") is None, reason="needs gcc, for the constants of the scripts")
def test_the_kernels_own_scripts(symbols: Path) -> None:
    """lx-ps, lx-dmesg and others list what the guest itself does, and a backtrace has the kernel's functions."""
    with Machine.debian(memory="256M", accel="tcg", cpus=2, append="nokaslr") as vm:
        where = vm.gdb()
        vm.start()
        vm.agent.wait(timeout=120)
        asked = "cat /proc/cmdline; cut -d' ' -f1 /proc/modules; echo marked > /dev/kmsg; cat /proc/[0-9]*/comm || true"
        with vm.popen("exec sleep 1000") as sleeps:
            cmdline, *there = vm.run(asked, text=True, check=True).stdout.splitlines()
            said = gdb(
                where,
                *("detach", f"file {symbols}/vmlinux", f"source {symbols}/vmlinux-gdb.py", f"target remote {where}"),
                *"lx-version lx-cmdline lx-ps lx-dmesg lx-lsmod lx-mounts".split(),
                "thread apply all backtrace",
                *('print $lx_per_cpu("cpu_number", 1)', "print $lx_task_by_pid(1).comm", "detach"),
                timeout=120,
            )
            sleeps.kill()
    assert "Error" not in said, said[-3000:]
    listed = {" ".join(line.split()[2:]) for line in re.findall(r"^0x\w+ +\d+ +.*$", said, re.MULTILINE)}
    stays = {
        one for one in there if one.startswith(("kthreadd", "ksoftirqd/", "rcu_preempt", "init", "agent", "sleep"))
    }
    assert stays <= listed, stays - listed
    assert {"swapper/0", "sleep"} <= listed
    assert cmdline in said.splitlines()
    assert re.search(r"^\[ +[\d.]+\] Linux version ", said, re.MULTILINE)
    assert re.search(r"^\[ +[\d.]+\] marked$", said, re.MULTILINE)
    assert re.search(r"^0x\w+ virtio_console ", said, re.MULTILINE)
    assert re.search(r"^0x\w+ 0x\w+ proc /proc proc ", said, re.MULTILINE)
    assert "= 1\n" in said
    assert '= "init"' in said
    assert "cpu_startup_entry" in said
