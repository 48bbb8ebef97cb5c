"""The options: each its handler, whether it takes a value, and the key of a first part without one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError

from cardcage_qemu import backends
from cardcage_qemu.actions import on_action, on_gdb, on_incoming, on_loadvm, on_s, on_watchdog, on_watchdog_action
from cardcage_qemu.board import add_accelerator, choose_memory, on_machine
from cardcage_qemu.devices import add_device
from cardcage_qemu.keyval import Options
from cardcage_qemu.line import GLOBALS, MODELS, QUIET, Line

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPTIONS"]
PLAIN = dict.fromkeys(("qemu64", "kvm64"), "x86-64-v2")
"""QEMU's processors without anybody's features, and what is closest to them."""
SOURCES = ("/dev/random", "/dev/urandom", "/dev/hwrng")


def on_accel(line: Line, options: Options) -> None:
    options.harmless(thread="single multi", tb_size="", split_wx="off", one_insn_per_tb="off")
    add_accelerator(line, options, options.need("accel"))
    options.end()


def on_kvm(line: Line, options: Options) -> None:
    add_accelerator(line, options, "kvm")


def on_cpu(line: Line, options: Options) -> None:
    model = options.need("model")
    if model in PLAIN:
        line.warnings.append(f"{options.option} {model}: the guest finds cardcage's {PLAIN[model]}")
    elif model not in MODELS:
        raise options.error(f"{model}: cardcage has {', '.join(MODELS)}")
    line.machine["cpu"] = PLAIN.get(model, model)
    options.harmless(
        check="", enforce="", migratable="on off", host_phys_bits="", host_cache_info="", kvm="on", topoext=""
    )
    features: dict[str, bool] = {}
    for key, value in options.pairs:
        if key[:1] in "+-" and value == "on":
            features[key[1:]] = key[0] == "+"
        elif value in ("on", "off"):
            features[key] = value == "on"
        else:
            raise options.error(f"{key}={value}: expected on or off")
    if features:
        line.machine["features"] = features


def on_m(line: Line, options: Options) -> None:
    size = options.size("size", "m")
    most = options.size("maxmem", "m")
    if options.take("slots") not in (None, "0") or most not in (None, size):
        raise options.error("slots, maxmem: cardcage's memory is not plugged in later")
    options.end()
    if size:
        line.machine["memory"] = size


def on_smp(line: Line, options: Options) -> None:
    count, most = options.number("cpus"), options.number("maxcpus")
    shape = [options.number(key) for key in ("sockets", "dies", "clusters", "cores", "threads")]
    product = 1
    for one in shape:
        product *= one or 1
    options.end()
    if count is None:
        count = most if most is not None else product
    if most not in (None, count):
        raise options.error("maxcpus: cardcage's processors are not plugged in later")
    if any(shape) and shape[0] is not None and product != count:
        raise options.error(f"sockets, cores and threads make {product} processors, not {count}")
    line.machine["cpus"] = count


def on_drive(line: Line, options: Options) -> None:
    kind, id = options.take("if") or "ide", options.take("id")
    if kind == "pflash":
        unit = options.number("unit", "index")
        spec, device = backends.drive(options, line.fdsets)
        options.end()
        line.flash_chip(options, spec, unit)
        return
    disc = kind == "ide" and ("media", "cdrom") in options.pairs
    if kind not in ("none", "virtio") and not disc:
        raise options.error(f"if={kind}: cardcage has virtio disks alone: say if=virtio")
    if disc:
        options.all("media")
    spec, device = backends.drive(options, line.fdsets)
    options.end()
    if disc:
        line.disc_drive(options, spec, device, id)
        return
    name = id or f"drive{len(line.drives)}"
    if name in line.drives:
        raise options.error(f"the id {name} is taken")
    line.drives[name] = spec, device
    if kind == "virtio":
        line.names[name] = name
        line.devices.append({"type": "virtio-blk", "id": name, "drive": spec, **device})


def on_hd(line: Line, options: Options) -> None:
    name = options.option.removeprefix("-")
    line.warnings.append(f"{options.option}: the guest finds its disk behind virtio (/dev/vda), not on IDE")
    line.names[name] = name
    line.devices.append({"type": "virtio-blk", "id": name, "drive": {"file": options.text, "discard": "ignore"}})


def on_cdrom(line: Line, options: Options) -> None:
    line.disc_drive(options, {"file": options.text}, {}, None)


def on_pflash(line: Line, options: Options) -> None:
    line.flash_chip(options, {"file": options.text}, None)


def on_blockdev(line: Line, options: Options) -> None:
    nodes = dict(line.nodes)
    below = {value for key, value in options.pairs if key in ("file", "backing") and value}
    backends.block_nodes(options, nodes, line.fdsets)
    options.end()
    for name in nodes.keys() - line.nodes.keys():
        line.drives[name], line.below[name] = (nodes[name], {}), below
    line.nodes = nodes


def on_netdev(line: Line, options: Options) -> None:
    kind, id = options.need("type"), options.need("id")
    line.netdevs[id] = backends.netdev(options, kind)
    options.end()


def on_nic(line: Line, options: Options) -> None:
    kind = options.need("type")
    if kind == "none":
        options.end()
        return
    model, mac = options.take("model"), options.take("mac", "macaddr")
    if model not in ("virtio", "virtio-net-pci"):
        raise options.error(f"model={model}: cardcage has virtio network cards alone: say model=virtio")
    device: dict[str, Any] = {"type": "virtio-net"}
    if id := options.take("id"):
        device["id"] = id
    device["net"] = backends.netdev(options, kind)
    if mac:
        device["mac"] = mac
    options.end()
    line.devices.append(device)


def on_net(line: Line, options: Options) -> None:
    """``-net nic`` and ``-net user``, ``tap`` ... together are a card; QEMU has a hub between them."""
    kind = options.need("type")
    if kind == "none":
        options.end()
        return
    if not line.hub:
        line.later.append(lambda: _hub(line, options))
    if kind in line.hub or (kind != "nic" and line.hub.keys() - {"nic"}):
        raise options.error("cardcage has no hub: say -net nic and one network, or -nic for each card")
    if kind == "nic":
        model = options.take("model")
        if model not in ("virtio", "virtio-net-pci"):
            raise options.error(f"model={model}: cardcage has virtio network cards alone: say model=virtio")
        keys = {"id": options.take("id", "name"), "mac": options.take("macaddr")}
        options.harmless(vectors="")
        line.hub[kind] = {"type": "virtio-net", **{key: value for key, value in keys.items() if value}}
    else:
        options.harmless(id="", name="")
        line.hub[kind] = backends.netdev(options, kind)
    options.end()


def _hub(line: Line, options: Options) -> None:
    """Make the card of what was said. Raises ConfigError."""
    card = line.hub.pop("nic", None)
    if card is None or not line.hub:
        raise options.error("cardcage has no hub: -net nic and -net user (or tap ...) come together")
    line.devices.append({**card, "net": line.hub.popitem()[1]})


def on_chardev(line: Line, options: Options) -> None:
    if options.text.startswith("{") or any(key.startswith("backend.") for key, _ in options.pairs):  # chardev-add's
        options.pairs = [(re.sub(r"\bdata\.", "", key.removeprefix("backend.")), one) for key, one in options.pairs]
        options.pairs = [("path" if key == "out" else key, one) for key, one in options.pairs]
    id = options.need("id")
    line.chardevs[id] = backends.chardev(options, line.fdsets)
    options.end()


def on_serial(line: Line, options: Options) -> None:
    head, _, rest = options.text.partition(":")
    device: dict[str, Any] = {"type": "isa-serial"}
    if head == "chardev":
        device |= {"id": f"serial{line.serials}", "char": line.char_for(options, rest)}
        line.names[device["id"]] = rest
    else:
        table = backends.word_chardev(options)
        device["char"] = "null" if table is None else line.spec(options, table)
    line.serial_port(device)
    line.devices.append(device)


def _monitor(line: Line, options: Options, **keys: Any) -> None:
    text = options.text
    if text in ("none", "null", "vc"):
        return
    head, _, rest = text.partition(":")
    if head == "chardev":
        line.monitors.append({**backends.monitor_socket(options, line.char(options, rest)), **keys})
    elif text == "stdio":
        line.monitors.append({"socket": "stdio", **keys})
    elif head in ("unix", "tcp") and rest:
        socket = options.first()
        table: dict[str, Any] = {"type": "socket", "server": bool(options.truth("server")), "path": ""}
        wait = options.truth("wait")
        table["wait"] = table["server"] if wait is None else wait
        options.harmless(nodelay="", ipv4="", ipv6="", delay="")
        options.end()
        device = backends.monitor_socket(options, table)
        line.monitors.append({**device, "socket": socket, **keys})
    else:
        raise options.error("cardcage has none, stdio, unix:PATH, tcp:HOST:PORT and chardev:ID")


def on_mon(line: Line, options: Options) -> None:
    mode = options.take("mode") or "readline"
    keys: dict[str, Any] = {} if mode == "control" else {"mode": mode}
    if options.truth("pretty"):
        keys["pretty"] = True
    table = line.char(options, options.need("chardev"))
    options.harmless(id="")
    options.end()
    line.monitors.append({**backends.monitor_socket(options, table), **keys})


def on_virtfs(line: Line, options: Options) -> None:
    tag, id = options.need("mount_tag"), options.take("id")
    device = {"type": "virtio-9p", **({"id": id} if id else {}), "tag": tag, **backends.share(options)}
    options.end()
    line.devices.append(device)


def on_fsdev(line: Line, options: Options) -> None:
    id = options.need("id")
    line.shares[id] = backends.share(options)
    options.end()


def on_object(line: Line, options: Options) -> None:
    kind, id = options.need("qom-type", "object"), options.need("id")
    made: dict[str, Any] = {"type": kind}
    if kind == "rng-random":
        if (source := options.take("filename")) not in (None, *SOURCES):
            raise options.error(f"filename={source}: cardcage's entropy is the kernel's, /dev/urandom")
    elif kind in ("memory-backend-ram", "memory-backend-memfd", "memory-backend-file"):
        made |= _backend(options, kind)
    elif kind == "secret":
        options.harmless(data="", file="", format="", keyid="", iv="", qom_type="")
    elif kind == "tls-creds-x509":
        made["credentials"] = backends.tls_credentials(options)
    elif kind != "rng-builtin":
        raise options.error(
            f"{kind}: cardcage has rng-random, rng-builtin, memory-backend-ram, -memfd and -file, secret, "
            "tls-creds-x509"
        )
    options.end()
    line.objects[id] = made


def _backend(options: Options, kind: str) -> dict[str, Any]:
    size = options.size("size")
    if not size:
        raise options.error("expected size=...")
    shared = options.truth("share")
    memory: dict[str, Any] = {}
    if kind == "memory-backend-memfd" or (kind == "memory-backend-ram" and shared):
        memory["type"] = "memfd"
    elif kind == "memory-backend-file":
        memory |= {"type": "file", "path": options.need("mem-path")}
        if shared is not None:
            memory["shared"] = shared
    if options.truth("prealloc"):
        memory["preallocate"] = True
    options.harmless(seal="", dump="", merge="", reserve="", discard_data="", prealloc_threads="", hugetlb="off")
    options.harmless(x_use_canonical_path_for_ramblock_id="", align="", policy="default")
    return {"memory": memory, "size": size}


def on_numa(line: Line, options: Options) -> None:
    if options.need("type") != "node":
        raise options.error("cardcage has one node, of all memory")
    options.harmless(nodeid="0", cpus="")
    memory = options.take("memdev")
    options.end()
    if memory is not None:
        line.later.append(lambda: choose_memory(line, options, memory))


def on_name(line: Line, options: Options) -> None:
    options.harmless(debug_threads="", process="")
    line.machine["name"] = options.need("guest")
    options.end()


def on_smbios(line: Line, options: Options) -> None:
    if (kind := options.take("type")) != "1":
        raise options.error(f"type={kind}: cardcage has type=1, the system")
    for key in ("manufacturer", "product", "version", "serial", "uuid", "sku", "family"):
        if (value := options.take(key)) is not None:
            line.smbios[key] = value
    options.end()


def on_fw_cfg(line: Line, options: Options) -> None:
    name = options.need("name")
    text, path = options.take("string"), options.take("file")
    options.end()
    if (text is None) is (path is None):
        raise options.error("expected file=... or string=...")
    table = line.firmware.setdefault("files" if path is None else "paths", {})
    table[name] = text if path is None else path


def on_rtc(line: Line, options: Options) -> None:
    base = options.take("base")
    options.harmless(clock="host", driftfix="none slew")
    options.end()
    if base is not None:
        line.rtc["base"] = base


def on_boot(line: Line, options: Options) -> None:
    order, menu = options.take("order"), options.truth("menu")
    options.harmless(strict="", reboot_timeout="", splash_time="")
    options.end()
    if order is not None:
        if len(order) > 3:
            raise options.error(f"order={order:.40}: the machine's clock has room for three letters")
        line.rtc["boot"] = order
    if menu is not None:
        line.firmware["boot_menu"] = menu


def on_add_fd(line: Line, options: Options) -> None:
    fd, set_ = options.number("fd"), options.number("set")
    options.harmless(opaque="")
    options.end()
    if fd is None or set_ is None:
        raise options.error("expected fd=N,set=M")
    line.fdsets[set_] = fd


def on_global(line: Line, options: Options) -> None:
    if options.text.replace(",", ".", 1) not in GLOBALS and options.text not in GLOBALS:
        known = "; ".join(GLOBALS[:3])
        raise options.error(f"cardcage has no such property: say it of -device (these are known: {known})")


def on_sandbox(line: Line, options: Options) -> None:
    on = options.truth("enable")
    options.harmless(obsolete="", elevateprivileges="", spawn="", resourcecontrol="")
    if later := options.all("open_later"):  # cardcage's own
        line.security["open_later"] = [*line.security.get("open_later", []), *later]
    options.end()
    line.security["jail"] = "on" if on else "off"


def setting(name: str) -> Callable[[Line, Options], None]:
    """A handler that keeps the text under *name* of ``[boot]``."""

    def handler(line: Line, options: Options) -> None:
        line.boot[name] = options.text

    return handler


def on_uuid(line: Line, options: Options) -> None:
    line.smbios["uuid"] = options.text


def on_pidfile(line: Line, options: Options) -> None:
    line.pidfile = options.text


def flag(name: str) -> Callable[[Line, Options], None]:
    """A handler that sets an attribute."""

    def handler(line: Line, options: Options) -> None:
        setattr(line, name, True)

    return handler


def on_no_reboot(line: Line, options: Options) -> None:
    line.machine["on_reset"] = "stop"


def quiet(name: str) -> Callable[[Line, Options], None]:
    """A handler of an option that changes nothing."""

    def handler(line: Line, options: Options) -> None:
        known = QUIET[name]
        if name == "audiodev":
            options.harmless(driver="none", id="")
            options.end()
        elif known and options.text not in known.split():
            raise ConfigError(f"cardcage has {' or '.join(known.split())} alone", file=f"-{name} {options.text}")
        line.nographic |= name == "nographic"
        line.plain |= name == "nodefaults"

    return handler


Option = tuple[bool, "Callable[[Line, Options], None]", str | None]
OPTIONS: dict[str, Option] = {
    "machine": (True, on_machine, "type"),
    "M": (True, on_machine, "type"),
    "accel": (True, on_accel, "accel"),
    "enable-kvm": (False, on_kvm, ""),
    "cpu": (True, on_cpu, "model"),
    "m": (True, on_m, "size"),
    "smp": (True, on_smp, "cpus"),
    "kernel": (True, setting("kernel"), None),
    "initrd": (True, setting("initrd"), None),
    "append": (True, setting("append"), None),
    "bios": (True, setting("firmware"), None),
    "drive": (True, on_drive, "file"),
    **dict.fromkeys(("hda", "hdb", "hdc", "hdd"), (True, on_hd, None)),
    "snapshot": (False, flag("temporary"), ""),
    "cdrom": (True, on_cdrom, None),
    "pflash": (True, on_pflash, None),
    "blockdev": (True, on_blockdev, "driver"),
    "netdev": (True, on_netdev, "type"),
    "nic": (True, on_nic, "type"),
    "net": (True, on_net, "type"),
    "device": (True, add_device, "driver"),
    "chardev": (True, on_chardev, "backend"),
    "serial": (True, on_serial, "text"),
    "monitor": (True, lambda line, options: _monitor(line, options, mode="readline"), "text"),
    "qmp": (True, lambda line, options: _monitor(line, options), "text"),
    "qmp-pretty": (True, lambda line, options: _monitor(line, options, pretty=True), "text"),
    "mon": (True, on_mon, "chardev"),
    "gdb": (True, on_gdb, "text"),
    "s": (False, on_s, ""),
    "virtfs": (True, on_virtfs, "fsdriver"),
    "fsdev": (True, on_fsdev, "fsdriver"),
    "object": (True, on_object, "qom-type"),
    "numa": (True, on_numa, "type"),
    "name": (True, on_name, "guest"),
    "uuid": (True, on_uuid, None),
    "smbios": (True, on_smbios, "file"),
    "fw_cfg": (True, on_fw_cfg, "name"),
    "rtc": (True, on_rtc, "base"),
    "boot": (True, on_boot, "order"),
    "add-fd": (True, on_add_fd, ""),
    "global": (True, on_global, None),
    "sandbox": (True, on_sandbox, "enable"),
    "pidfile": (True, on_pidfile, None),
    "incoming": (True, on_incoming, None),
    "loadvm": (True, on_loadvm, None),
    "daemonize": (False, flag("daemonize"), ""),
    "action": (True, on_action, ""),
    "watchdog-action": (True, on_watchdog_action, None),
    "watchdog": (True, on_watchdog, None),
    "no-reboot": (False, on_no_reboot, ""),
    "no-shutdown": (False, flag("linger"), ""),
    "S": (False, flag("freeze"), ""),
    **{
        name: (known is not None, quiet(name), "driver" if name == "audiodev" else None)
        for name, known in QUIET.items()
    },
}
"""By name: whether it takes a value, its handler, and the key of a first part without one; None for plain text."""
