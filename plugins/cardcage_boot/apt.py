"""Packages from the host's own Debian or Ubuntu archive, without root and without touching the host's apt state.

apt runs with lists, cache and status of its own under the cache folder, and with the host's sources and keyrings.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Apt", "depends", "unpack"]

ROOM = 256 << 20
"""Bytes that lists, a kernel package and what is in it need, rounded up."""

# What a host's apt.conf.d may run around an update is the host's business, not ours; -c files are read after it.
CONFIG = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::State "{root}/state/";
Dir::State::lists "{root}/lists/";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache/";
Dir::Log "{root}/log/";
APT::Sandbox::User "";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
"""
SILENCE = 5.0
"""Seconds in which nothing moved, after which the person who waits is told so."""
GIVE_UP = 30.0
"""Seconds after which a source that never answered is given up."""
INSTEAD = "give --kernel and --initrd"


@define
class Apt:
    """apt with state of its own in *root*.

    Args:
        root: a folder that only one process uses at a time.
        progress: called with (what is done, percent 0 to 100) as apt reports it; what is done has a name and sizes.
        say: called with one line for the person who waits, when something goes wrong or nothing moves.
    """

    root: Path
    progress: Callable[[str, float], None]
    say: Callable[[str], None] = field(default=lambda line: None)

    def _command(self, program: str) -> list[str]:
        found = shutil.which(program)
        if found is None:
            raise HostError(f"{program} is not installed: give --kernel and --initrd")
        for name in ("state/lists/partial", "lists/partial", "cache/archives/partial", "log"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        config = self.root / "apt.conf"
        config.write_text(CONFIG.format(root=self.root))
        return [found, "-c", str(config)]

    def _fetch(self, what: str, *arguments: str, folder: Path | None = None, size: int = 0) -> tuple[int, str]:
        """Run apt-get; returns its status and last error line.

        Args:
            what: the download's name. size: its bytes, 0 when they are not known.
        """
        source, sink = os.pipe()
        command = [*self._command("apt-get"), "-q", "-y", "-o", f"APT::Status-Fd={sink}", *arguments]
        self.progress(f"{what}: 0 of {size / 1e6:.1f} MB" if size else what, 0)
        process = subprocess.Popen(
            command,
            cwd=folder or self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(sink,),
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
        os.close(sink)
        assert process.stdout is not None
        try:
            with open(source, "rb", buffering=0) as numbers, process.stdout as words:
                text, problems = self._follow(what, size, numbers.fileno(), words.fileno())
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        (self.root / "apt.log").write_text("\n".join(text))
        errors = problems[:1] or [line for line in text if line.startswith(("E:", "W:", "Err:"))]
        return status, (errors or text or ["no output"])[-1]

    def _follow(self, what: str, size: int, numbers: int, words: int) -> tuple[list[str], list[str]]:
        """Tell the progress while apt writes its *numbers* and *words*.

        Returns the words, line by line, and what went wrong, as ``HOST: WHY``. Raises HostError when nothing at all has
        come for :data:`GIVE_UP` seconds: apt itself goes on for minutes.
        """
        text: list[str] = []
        problems: list[str] = []
        kept = {numbers: b"", words: b""}
        now, host, percent, came = what, "", 0.0, False
        since = told = time.monotonic()  # of what moved last, and of the last word about that nothing does
        with selectors.DefaultSelector() as selector:
            for one in kept:
                selector.register(one, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(SILENCE):
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fd)
                    *lines, kept[key.fd] = (kept[key.fd] + data).split(b"\n")
                    for line in (one.decode("utf-8", "replace").rstrip() for one in lines):
                        if key.fd == words:
                            text.append(line)
                        if found := re.match(r"(?:Get|Hit|Ign|Err):\d+ \w+:/*([^/ ]+)", line):
                            host = found[1]
                            if line.startswith(("Get", "Hit")):
                                since, came = time.monotonic(), True
                        if found := re.match(r"Get:\d+ \S+ (.+) \[(.+)\]$", line):
                            now = what if size else f"{what}: {host} {found[1]}, {found[2]}"
                        elif line.startswith("  ") and text[-2:-1] and text[-2].startswith(("Ign:", "Err:")):
                            problem = f"{host}: {line.strip()}"
                            if problem not in problems:
                                problems.append(problem)
                                self.say(problem)
                        elif found := re.match(r"dlstatus:[^:]*:([\d.]+):", line):
                            if float(found[1]) != percent:
                                since = time.monotonic()
                            percent = min(float(found[1]), 100.0)
                            done = f"{what}: {size * percent / 1e8:.1f} of {size / 1e6:.1f} MB" if size else now
                            self.progress(done, percent)
                moment = time.monotonic()
                if min(moment - told, moment - since) >= SILENCE:
                    told, host = moment, host or self._hosts()
                    silent = f"{host}: no answer for {moment - since:.0f} s"
                    if moment - since >= GIVE_UP and not came:
                        raise HostError(f"{silent}: is there a network? {INSTEAD}")
                    self.say(f"{silent}, of {GIVE_UP:.0f}" if not came else silent)
        return text, problems

    def _hosts(self) -> str:
        """The hosts that package lists come from."""
        command = [*self._command("apt-get"), "--print-uris", "update"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return ", ".join(dict.fromkeys(re.findall(r"^'\w+://([^/']+)", done.stdout, re.MULTILINE))) or "apt"

    def update(self) -> None:
        """Fetch package lists. A source that fails is not fatal: a package that is then missing is.

        Raises HostError without room for what is fetched (apt itself waits for ever on a full disk), and when no source
        gave a list.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < ROOM:
            raise HostError(
                f"{self.root}: {free >> 20} MiB are free, and fetching needs {ROOM >> 20} MiB: "
                "free some space, or set XDG_CACHE_HOME to a directory that has it"
            )
        _, error = self._fetch("package lists", "update")
        if not any("_Packages" in one.name for one in (self.root / "lists").iterdir()):
            raise HostError(f"no package list could be fetched: {error}; {INSTEAD}")

    def show(self, package: str) -> dict[str, str] | None:
        """Fields of the candidate version, ``None`` when no source has the package."""
        command = [*self._command("apt-cache"), "show", "--no-all-versions", "--quiet", package]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        fields = dict(re.findall(r"^([\w-]+): (.*)$", done.stdout, re.MULTILINE))
        return fields or None

    def download(self, package: str, folder: Path) -> Path:
        """Fetch the package file into *folder*. Raises HostError with apt's last error."""
        size = (self.show(package) or {}).get("Size", "")
        status, error = self._fetch(
            package, "download", package, folder=folder, size=int(size) if size.isdecimal() else 0
        )
        files = sorted(folder.glob(f"{package}_*.deb"))
        if status or not files:
            raise HostError(f"apt-get download {package} failed: {error}; give --kernel and --initrd instead")
        return files[-1]


def depends(fields: dict[str, str], pattern: str) -> str | None:
    """The first package that ``Depends`` names and *pattern* matches from its start."""
    for one in re.split(r"[,|]", fields.get("Depends", "")):
        name = one.strip().split(" ")[0]
        if re.match(pattern, name):
            return name
    return None


def unpack(package: Path, folder: Path) -> None:
    """Unpack a package's files below *folder*. Raises HostError."""
    tool = shutil.which("dpkg-deb")
    if tool is None:
        raise HostError("dpkg-deb is not installed: give --kernel and --initrd")
    done = subprocess.run([tool, "-x", package, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"{package.name} cannot be unpacked: {done.stderr.strip().splitlines()[-1:]}")
