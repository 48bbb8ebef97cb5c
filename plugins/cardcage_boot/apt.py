"""Packages from the host's own Debian or Ubuntu archive, without root and without touching the host's apt state.

apt runs with lists, cache and status of its own under the cache folder, and with the host's sources and keyrings.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from attrs import define
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
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""


@define
class Apt:
    """apt with state of its own in *root*.

    Args:
        root: a folder that only one process uses at a time.
        progress: called with (what is done, percent 0 to 100) as apt reports it.
    """

    root: Path
    progress: Callable[[str, float], None]

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

    def _fetch(self, what: str, *arguments: str, folder: Path | None = None) -> tuple[int, str]:
        """Run apt-get; returns its status and last error line."""
        source, sink = os.pipe()
        command = [*self._command("apt-get"), "-q", "-y", "-o", f"APT::Status-Fd={sink}", *arguments]
        log = self.root / "apt.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder or self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(sink,),
                env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            )
            os.close(sink)
            try:
                with open(source, encoding="utf-8", errors="replace") as lines:
                    for line in lines:
                        found = re.match(r"dlstatus:[^:]*:([\d.]+):", line)
                        if found:
                            self.progress(what, min(float(found[1]), 100.0))
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        text = log.read_text(errors="replace").splitlines()
        errors = [line for line in text if line.startswith(("E:", "W:", "Err:"))]
        return status, (errors or text or ["no output"])[-1]

    def update(self) -> None:
        """Fetch package lists. A source that fails is not fatal: a package that is then missing is.

        Raises HostError without room for what is fetched: apt itself waits for ever on a full disk.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < ROOM:
            raise HostError(
                f"{self.root}: {free >> 20} MiB are free, and fetching needs {ROOM >> 20} MiB: "
                "free some space, or set XDG_CACHE_HOME to a directory that has it"
            )
        self._fetch("package lists", "update")

    def show(self, package: str) -> dict[str, str] | None:
        """Fields of the candidate version, ``None`` when no source has the package."""
        command = [*self._command("apt-cache"), "show", "--no-all-versions", "--quiet", package]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        fields = dict(re.findall(r"^([\w-]+): (.*)$", done.stdout, re.MULTILINE))
        return fields or None

    def download(self, package: str, folder: Path) -> Path:
        """Fetch the package file into *folder*. Raises HostError with apt's last error."""
        status, error = self._fetch(package, "download", package, folder=folder)
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
