"""``Machine.restore()``: a machine that goes on from a snapshot."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve, field, frozen
from cardcage.abilities import has
from cardcage.backends import NetBackend
from cardcage.boot import Firmware
from cardcage.config import Draft
from cardcage.errors import CardcageError, ConfigError, NotOffered
from cardcage.host import Host
from cardcage.registry import BootOffer, DeviceOffer
from cardcage.security import Act

from cardcage_snapshot.chain import Chain
from cardcage_snapshot.creating import STATE, may_read
from cardcage_snapshot.disks import file_sum, overlays
from cardcage_snapshot.manifest import read
from cardcage_snapshot.pages import touched
from cardcage_snapshot.places import Folder, located
from cardcage_snapshot.sealing import original
from cardcage_snapshot.state import loads
from cardcage_snapshot.state import restore as load_state
from cardcage_snapshot.tables import config_of, ids_of, tables_of
from cardcage_snapshot.working import fetch, known, record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cardcage.boot import BootContext, BootImage
    from cardcage.machine import Machine
    from cardcage.x86 import VCpuState

    from cardcage_snapshot.chain import Level
    from cardcage_snapshot.manifest import DeviceCard, Manifest
    from cardcage_snapshot.state import MachineState
    from cardcage_snapshot.working import WorkingSet

    M = TypeVar("M", bound=Machine)

__all__ = ["SavedBoot", "SavedBootOptions", "check_files", "given", "machine_of", "may_boot", "restore", "settle"]

STATE_MOST = 64 << 20
"""Bytes of ``state.json``."""
PATIENCE = 5.0
"""Seconds that the agent of a restored guest may take."""
UNPACKERS = 4
"""Threads that unpack RAM, at most: each has a piece, and its sum, in memory."""
ALONE = ("null", "user")
"""Networks on which a guest is by itself."""
_host: ContextVar[Host] = ContextVar("cardcage_snapshot_host")


def restore(
    cls: type[M],
    where: str | os.PathLike[str],
    *,
    name: str | None = None,
    accel: str | Iterable[str] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    trust: bool = False,
    verify: bool = False,
    disks: str | os.PathLike[str] | None = None,
    any_cpu: bool = False,
    start: bool = True,
    host: Host | None = None,
) -> M:
    """A machine that goes on where a snapshot was made; it runs when this returns.

    Its RAM is mapped, not read: what the guest does not touch stays in the file. That of a compressed one is unpacked
    while the guest runs, where the host lets it; a damaged piece ends the machine then. Where the guest had an agent,
    that is found again, told the time, and given new randomness, before this returns.

    Args:
        where: a name or a path, as of ``vm.snapshot``.
        name: of the machine, by default the saved one's; a number is added to one that is taken.
        accel: accelerators to try, by default as the saved machine's configuration says.
        config: the machine's configuration, a TOML file or tables, instead of the one in the snapshot.
        trust: take the configuration of a snapshot that this account did not make. It can name any file of this host.
        verify: read all of it first, and compare sums.
        disks: a directory where the disks' overlays stay; one that holds them already is gone on with. By default what
            the guest writes is thrown away with the machine.
        any_cpu: go on also where the processor lacks features that the guest was told of.
        start: False for a machine that is built and waits for ``start(boot=False)`` and :func:`settle`.
        host: whose cards to use; by default a private one.

    Raises ConfigError that names file, key or card for what does not fit or is damaged; and what Machine raises.
    """
    path = located(where)
    with ExitStack() as failing, Folder(path) as folder, ExitStack() as end:
        manifest, ours = read(folder)
        if config is None and not (ours or trust):
            raise ConfigError(
                "was not made by this account, and its configuration can name any file of this host: look at it "
                '("cardcage snapshot show"), then trust it (--trust), or give another configuration (--config)',
                file=str(path),
            )
        if verify:
            check_files(folder, manifest)
        saved = read_state(folder, manifest)
        tables = given(config) if config is not None else copy.deepcopy(manifest.config)
        kept = copy.deepcopy(tables)
        machine = tables.setdefault("machine", {})
        if not isinstance(machine, dict):
            raise ConfigError("expected a table", file=folder.where("manifest.json"), key="config.machine")
        machine |= {"name": name or manifest.machine}
        if accel is not None:
            machine["accel"] = [accel] if isinstance(accel, str) else list(accel)
        if manifest.label != manifest.machine:
            machine["label"] = manifest.label
        chain = end.enter_context(Chain(folder, manifest))
        mapped = _memory(tables, chain.levels[0])
        had = _ahead(folder, manifest, chain.levels[0]) if mapped else None
        temporary = None
        if manifest.disks:
            target = _overlay_folder(disks, path)
            if disks is None:
                temporary = target
                failing.callback(rmtree, target, ignore_errors=True)
            overlays(folder, manifest, tables, target)
        vm = machine_of(cls, tables, manifest.devices, folder.where("manifest.json"), str(path), host)
        failing.callback(vm.dismantle)
        if temporary is not None:
            rmtree(temporary, ignore_errors=True)  # they are open: nothing of them is left, however the machine ends
        original(vm, kept)
        may_boot(vm, (vm.config.boot or {}).get("table", {}))
        for level in chain.levels[:-1]:
            may_read(vm, level.folder.path)
        if mapped:
            chain.put_over(vm.memory.ranges[0].block.view)
            others = touched(vm.memory.ranges[0].block, own=True) if len(chain.levels) > 1 else []
        elif not _arrives(vm, chain):
            fill(vm.memory.ranges[0].block.view, chain)
        _load(vm, saved, folder.where(STATE), any_cpu)
        with vm.lock:
            for plugged in vm.devices.values():  # it may go on from there for the second time
                if (reverted := getattr(plugged.device, "reverted", None)) is not None:
                    reverted()
        if vm.name != manifest.machine:
            _same_addresses(vm)
        if mapped and ours:
            record(vm, path, manifest, had, others)
        if start:
            vm.start(boot=False)
            settle(vm, manifest.agent)
        failing.pop_all()
        return vm


def _arrives(vm: Machine, chain: Chain) -> bool:
    """True where RAM comes while the guest runs, from now on."""
    if chain.levels[0].ram.compression == "none":
        return False
    from cardcage_snapshot.arriving import arrive

    return arrive(vm, chain)


def _ahead(folder: Folder, manifest: Manifest, root: Level) -> WorkingSet | None:
    """Have what the guest will touch first read ahead, where that is known."""
    try:
        had = known(folder, manifest)
    except ConfigError:  # it is made anew
        return None
    if had is not None:
        fetch(root.fd, had.runs)
    return had


def machine_of(
    cls: type[M], tables: dict[str, Any], devices: list[DeviceCard], where: str, path: str, host: Host | None
) -> M:
    """A machine of the configuration *tables* (of *where*), which opens what it boots once it is reset.

    Raises ConfigError for a device of *devices* whose card is not here, and what Machine raises.
    """
    made = config_of(tables, where)
    host = host or Host(security=made.security)
    if made.boot:
        jailed = host.owns_process or "jail" in made.guards  # in a jail files are opened before the guest runs
        made = evolve(made, boot={"protocol": "saved", "table": made.boot, "now": jailed})
    _cards_there(host, devices, path)
    token = _host.set(host)
    try:
        return cls.from_config(made, host=host)
    finally:
        _host.reset(token)


def read_state(folder: Folder, manifest: Manifest) -> MachineState:
    """The state of devices and vCPUs. Raises ConfigError that names the file."""
    data = folder.read(STATE, STATE_MOST)
    if hashlib.blake2b(data, digest_size=16).hexdigest() != manifest.state.sum or len(data) != manifest.state.size:
        raise ConfigError("is damaged: its sum is not that of the manifest", file=folder.where(STATE))
    try:
        return loads(data.decode())
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", file=folder.where(STATE)) from error
    except ConfigError as error:
        raise ConfigError(error.problem, file=folder.where(STATE)) from error


def given(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a configuration, a TOML file or tables."""
    draft = Draft()
    if isinstance(config, str | os.PathLike):
        draft.add_file(os.fspath(config))
    else:
        draft.add(config)
    return tables_of(draft.config())


def fill(view: memoryview, chain: Chain) -> None:
    """Put a snapshot's RAM into memory that is all zeros. Raises ConfigError that names the first damaged piece."""
    from concurrent.futures import ThreadPoolExecutor

    def put(number: int) -> None:
        data, at = chain.piece(number), number * chain.levels[0].ram.chunk
        view[at : at + len(data)] = data

    threads = ThreadPoolExecutor(min(UNPACKERS, len(os.sched_getaffinity(0))), "snapshot-unpack")
    try:
        for _ in threads.map(put, chain.numbers()):
            pass
    finally:
        threads.shutdown(cancel_futures=True)


def _memory(tables: dict[str, Any], root: Level) -> bool:
    """Say where RAM comes from; True when that is a map of the snapshot *root*, False when it is to be filled."""
    memory, path = tables.setdefault("memory", {}), str(root.folder.path)
    if not isinstance(memory, dict):
        raise ConfigError("expected a table", file=path, key="config.memory")
    kind = memory.get("type", "anonymous")
    if kind == "file":  # what the file holds is another machine's by now
        tables["memory"] = memory = {"type": "memfd"}
    if kind != "anonymous":
        return False
    if root.ram.compression != "none":
        if not memory.get("preallocate"):
            memory |= {"type": "arriving"}
        return False
    memory |= {"type": "snapshot", "path": path, "file": root.ram.file}
    return True


def _overlay_folder(disks: str | os.PathLike[str] | None, path: Path) -> Path:
    """The directory of the overlays, made where it is not there."""
    try:
        if disks is not None:
            made = Path(os.path.abspath(disks))
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
            return made
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".disks", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"no overlay of a disk can be made there: {error.strerror}", file=error.filename) from error


def _cards_there(host: Host, devices: list[DeviceCard], path: str) -> None:
    """Raise ConfigError for a device whose card is not here."""
    for one in devices:
        try:
            host.registry.get(DeviceOffer, one.type)
        except NotOffered as error:
            whose = f"card {one.card}, {one.distribution} {one.release}"
            what = f'device "{one.id}" is of type "{one.type}" ({whose[:200]}), which is not installed here'
            raise ConfigError(what, file=path) from error


def _load(vm: Machine, saved: MachineState, where: str, any_cpu: bool) -> None:
    """Give the machine the state. Raises ConfigError that names the file; Denied."""
    try:
        load_state(vm, saved, any_cpu=any_cpu)
    except ConfigError as error:
        raise ConfigError(error.problem, file=where, key=error.key) from error


def _same_addresses(vm: Machine) -> None:
    """Say which network cards may meet those of other machines of the snapshot, which have the same address."""
    options = dict(zip(ids_of(vm), (one.options for one in vm.config.devices), strict=True))
    for one in vm.devices.values():
        net = options.get(one.id, {}).get("net", "")
        kind = net.get("type") if isinstance(net, dict) else str(net).partition(":")[0]
        if kind not in ALONE and any(has(backend, NetBackend) for backend in one.slot.host.opened):
            vm.log.warning(
                "a network card has the MAC address of the saved machine, and so have all others of this snapshot",
                device=one.id,
            )


def settle(machine: Machine, agent: bool) -> None:
    """Tell the agent of a guest that goes on the time, and give it new randomness; say so where there is none."""
    if agent and machine.services.get("agent") is not None:
        try:
            face: Any = machine
            face.agent.wait(PATIENCE)
            face.agent.reseed(timeout=PATIENCE)
            face.agent.set_time(timeout=PATIENCE)
            return
        except (CardcageError, TimeoutError, OSError) as error:
            why = f"its agent does not answer: {error}"
    else:
        why = "no agent runs in it"
    machine.log.warning(
        "the guest's clock stands where it was saved, and machines of one snapshot share their random numbers for a "
        "while",
        why=why,
    )


def check_files(folder: Folder, manifest: Manifest) -> None:
    """Read all of a snapshot. Raises ConfigError that names the damaged part."""
    read_state(folder, manifest)
    for disk in manifest.disks:
        if disk.file:
            fd = folder.open(disk.file)
            try:
                if os.fstat(fd).st_size != disk.length or file_sum(fd) != disk.sum:
                    what = f'the disk of device "{disk.device}" is damaged: its sum is another'
                    raise ConfigError(what, file=folder.where(disk.file))
            finally:
                os.close(fd)
    with Chain(folder, manifest) as chain:
        chain.check()


# what a reset boots


@frozen
class SavedBootOptions:
    """Options of boot protocol ``saved``.

    Attributes:
        table: ``[boot]`` as it was, which a reset of the restored machine boots.
        now: open its files at once, where that can be; else at the first reset.
    """

    table: dict[str, Any] = field(factory=dict)
    now: bool = False


class SavedBoot:
    """Opens what a restored machine boots when it is reset, and not before: most never are."""

    def __init__(self, options: SavedBootOptions) -> None:
        self._table, self._now, self._host = options.table, options.now, _host.get(None)
        self._image: BootImage | None = None

    def open(self) -> SavedBoot:
        if self._host is None:
            raise ConfigError('protocol "saved" is that of restored machines only', key="protocol")
        if self._now:
            try:
                self._opened()
            except CardcageError as error:  # it goes on all the same: most machines are never reset
                self._host.log.warning("what a reset would boot cannot be opened", why=str(error))
        return self

    def _opened(self) -> BootImage:
        if self._image is None:
            assert self._host is not None
            table = dict(self._table)
            offer = self._host.registry.get(BootOffer, str(table.pop("protocol", "auto")))
            options = self._host.options(offer, table, key="boot")
            factory = offer.load()
            loader = factory(options) if options is not None else factory()
            self._image = loader.open()
        return self._image

    @property
    def firmware(self) -> bool:
        """See :class:`cardcage.boot.Firmware`. A kernel's file is not opened for it."""
        if self._image is None and "firmware" not in self._table:
            return False
        image = self._opened()
        return has(image, Firmware) and image.firmware

    def load(self, context: BootContext, /) -> VCpuState:
        """See :class:`cardcage.boot.BootImage`."""
        return self._opened().load(context)


def may_boot(machine: Machine, table: Mapping[str, Any]) -> None:
    """Ask for the files that *table* names. Raises Denied."""
    for value in table.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and os.path.lexists(text):
                facts = {"machine": machine.name, "readonly": True}
                machine.mediator.ask(Act(machine.label, machine.label, "image", ("open", "read"), facts), text)
