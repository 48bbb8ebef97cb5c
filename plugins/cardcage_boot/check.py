"""``cardcage doctor``: can ``cardcage boot`` find a kernel and a busybox here?"""

from __future__ import annotations

import shutil

from cardcage.errors import HostError

from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import KERNELS, Shelf, distribution

__all__ = ["check"]


def check() -> tuple[bool, str, str]:
    """For ``doctor``: the kernel and static busybox in the cache or on the host, and tools missing to fetch them."""
    try:
        shelf = Shelf(cache_root(), lambda what, percent: None, lambda line: None)
    except HostError as error:
        return False, str(error), "export XDG_CACHE_HOME=/a/writable/directory"
    kept, busybox = shelf.kept_kernel(), shelf.kept_busybox()
    found = f"kernel {kept.release if kept else 'not fetched yet'}, busybox {busybox or 'not fetched yet'}"
    if kept is not None and busybox is not None:
        return True, found, ""
    name, _, likes = distribution()
    if not any(one in KERNELS for one in (name, *likes)):
        return False, f"{found}; fetching is not supported on {name}", "cardcage boot --kernel FILE --initrd FILE"
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        return False, f"{found}; no {', '.join(missing)}", "sudo apt install apt dpkg"
    return True, f"{found}; apt can fetch them", ""
