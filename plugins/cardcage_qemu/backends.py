"""Back ends of devices on QEMU's command line: character devices, disks, networks, shares, as specs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from cardcage.errors import ConfigError

if TYPE_CHECKING:
    from cardcage_migrate.credentials import Credentials

    from cardcage_qemu.keyval import Options

__all__ = ["block_nodes", "chardev", "drive", "monitor_socket", "nbd_place", "netdev", "share", "tls_credentials"]
__all__ += ["word_chardev"]

FDSET = re.compile(r"/dev/fdset/(\d{1,9})")


def host_path(options: Options, path: str, fdsets: dict[int, int]) -> str:
    """A path of the host; one of a set of ``-add-fd`` is that of its descriptor."""
    if (found := FDSET.fullmatch(path)) is None:
        return path
    if int(found[1]) not in fdsets:
        raise options.error(f"{path}: no -add-fd made this set")
    return f"/proc/self/fd/{fdsets[int(found[1])]}"


def chardev(options: Options, fdsets: dict[int, int]) -> dict[str, Any]:
    """``-chardev``: a char back end's table; for a monitor's sake, ``host``, ``fd`` and ``wait`` are kept in it."""
    kind = options.need("backend", "type", "")
    options.harmless(mux="on off", signal="on off", logappend="")
    if options.take("logfile") is not None:
        raise options.error("logfile: cardcage has no copy of a character device's output")
    if kind in ("stdio", "null"):
        return {"type": kind}
    if kind == "file":
        found: dict[str, Any] = {"type": "file", "path": host_path(options, options.need("path"), fdsets)}
        if options.truth("append"):
            found["append"] = True
        return found
    if kind == "pty":
        path = options.take("path")
        return {"type": "pty", **({"link": path} if path else {})}
    if kind == "socket":
        return _socket(options, fdsets)
    raise options.error(f"{kind}: cardcage has stdio, null, file, pty and socket")


def _socket(options: Options, fdsets: dict[int, int]) -> dict[str, Any]:
    options.harmless(delay="", nodelay="", ipv4="", ipv6="", telnet="off", websocket="off", tight="off")
    options.harmless(addr__type="unix inet fd")
    found: dict[str, Any] = {"type": "socket", "server": bool(options.truth("server"))}
    wait = options.truth("wait")
    if wait is None:
        wait = found["server"]
    if options.take("reconnect") not in (None, "0"):
        raise options.error("reconnect: cardcage connects once")
    path, fd = options.take("path", "addr.path"), options.take("fd", "addr.str")
    host, port = options.take("host", "addr.host"), options.take("port", "addr.port")
    if path is not None:
        return {**found, "path": path, "wait": wait}
    if fd is not None:
        return {**found, "fd": fd, "wait": wait}
    if port is not None:
        return {**found, "host": host or "", "port": port, "wait": wait}
    raise options.error("expected path=..., fd=... or port=...")


def word_chardev(options: Options) -> dict[str, Any] | None:
    """``-serial``'s own words: a char back end's table, None for ``none``. ``chardev:ID`` is the caller's."""
    text = options.text
    head, _, rest = text.partition(":")
    if text == "none":
        return None
    if text in ("null", "stdio", "mon:stdio", "pty"):
        return {"type": text.removeprefix("mon:")}
    if head == "file" and rest:
        return {"type": "file", "path": rest}
    if head == "unix" and rest:
        options.pairs.append(("path", options.first().removeprefix("unix:")))
        found = _socket(options, {})
        options.end()
        return found
    raise options.error("cardcage has none, null, stdio, mon:stdio, pty, file:PATH, unix:PATH and chardev:ID")


def monitor_socket(options: Options, table: dict[str, Any]) -> dict[str, Any]:
    """The keys of a ``qmp`` device for a character device's *table*."""
    kind = table["type"]
    if kind == "stdio":
        return {"socket": "stdio"}
    if kind == "socket":
        if "path" in table:
            where = f"unix:{table['path']}"
        elif "fd" in table:
            where = f"fd:{table['fd']}"
        else:
            where = f"tcp:{table['host']}:{table['port']}"
        found: dict[str, Any] = {"socket": where}
        if not table["server"]:
            found["server"] = False
        if table["server"] and table["wait"]:
            found["wait"] = True
        return found
    raise options.error(f"a monitor on {kind}: cardcage has it on stdio and sockets")


def device_spec(options: Options, table: dict[str, Any]) -> dict[str, Any]:
    """The char spec of a device for a character device's *table*."""
    table = dict(table)
    if table["type"] == "socket":
        if "path" not in table:
            raise options.error("a device's socket: cardcage has path=... alone")
        if table.pop("wait") and table["server"]:
            raise options.error("wait=on: cardcage starts without the peer: say wait=off")
    return table


# disks

NBD_PORT = 10809
CACHES = {"writeback": "writeback", "none": "none", "unsafe": "unsafe"}


def drive(options: Options, fdsets: dict[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``-drive``: the block spec, and options that are the device's."""
    spec: dict[str, Any] = {}
    options.harmless(aio="threads native io_uring", detect_zeroes="off", copy_on_read="off")
    temporary = options.truth("snapshot")
    options.harmless(index="", bus="", unit="", media="disk", auto_read_only="")
    driver, format = options.take("driver"), options.take("format")
    file = options.take("file.filename", "file", "filename")
    if not file:
        raise options.error("expected file=..., a path")
    if file.startswith(("nbd:", "nbd+")) and driver in (None, "nbd", "raw") and format in (None, "raw"):
        if temporary:
            raise options.error("snapshot=on: cardcage has it for image files")
        return _nbd_spec(options, nbd_place(options, file)), _device_keys(options)
    if driver not in (None, "raw", "qcow2", "file") or options.take("file.driver") not in (None, "file", "host_device"):
        raise options.error(f"driver={driver}: cardcage has raw and qcow2 images")
    if ":" in file.split("/")[0]:
        raise options.error(f"{file}: cardcage has files, block devices and NBD")
    spec["file"] = host_path(options, file, fdsets)
    format = format or (driver if driver != "file" else None)
    if format is not None:
        if format not in ("raw", "qcow2"):
            raise options.error(f"format={format}: cardcage has raw and qcow2")
        spec["format"] = format
    if options.truth("readonly", "read-only"):
        spec["readonly"] = True
    spec |= _cache(options)
    if (discard := options.take("discard")) is not None:
        spec["discard"] = {"on": "unmap", "off": "ignore"}.get(discard, discard)
    else:
        spec["discard"] = "ignore"
    if (locking := options.take("file.locking")) is not None:
        spec["locking"] = locking
    if temporary:
        make_temporary(spec)
    return spec, _device_keys(options)


def make_temporary(spec: dict[str, Any]) -> None:
    """Have writes to the image of a block spec end with the machine, where there are any."""
    if "file" in spec and not spec.get("readonly"):
        spec["type"] = "temporary"


def _device_keys(options: Options) -> dict[str, Any]:
    """Keys of a drive that are its device's."""
    found = {key: options.take(key) for key in ("serial", "werror", "rerror")}
    return {key: value for key, value in found.items() if value is not None}


def nbd_place(options: Options, text: str) -> dict[str, Any]:
    """Keys of a block spec for a disk of an NBD server by QEMU's names for it, an URI or ``nbd:HOST:PORT``."""
    wrong = options.error(
        f"{text}: expected nbd:HOST:PORT or nbd:unix:PATH, with :exportname=NAME or not; or "
        "nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH"
    )
    if text.startswith(("nbd://", "nbd+")):
        try:
            parts = urlsplit(text)
            host, port, query = parts.hostname, parts.port, dict(parse_qsl(parts.query))
        except ValueError:
            raise wrong from None
        export, path = unquote(parts.path.removeprefix("/")), query.pop("socket", "")
        if (
            parts.scheme not in ("nbd", "nbd+tcp", "nbd+unix")
            or query
            or (parts.scheme == "nbd+unix") is not bool(path)
        ):
            raise wrong
        found: dict[str, Any] = {"path": path} if path else {"host": host or "", "port": port or NBD_PORT}
    else:
        where, _, export = text.removeprefix("nbd:").partition(":exportname=")
        if where.startswith("unix:"):
            found = {"path": where.removeprefix("unix:")}
        else:
            host, _, said = where.rpartition(":")
            if not (said.isascii() and said.isdigit() and len(said) <= 5):
                raise wrong
            found = {"host": (host or "").strip("[]"), "port": int(said)}
    if not found.get("path", found.get("host")):
        raise wrong
    return {**found, "export": export} if export else found


def _nbd_spec(options: Options, place: dict[str, Any]) -> dict[str, Any]:
    """The block spec of a disk at *place*: the server has the cache, and is sent discards and flushes."""
    spec: dict[str, Any] = {"type": "nbd", **place}
    _cache(options)
    if options.truth("readonly", "read-only"):
        spec["readonly"] = True
    if (discard := options.take("discard")) not in (None, "unmap", "on"):
        raise options.error(f"discard={discard}: cardcage sends the guest's discards to an NBD server: say unmap")
    return spec


def _cache(options: Options) -> dict[str, Any]:
    cache = options.take("cache")
    direct, no_flush = options.truth("cache.direct"), options.truth("cache.no-flush")
    if options.truth("cache.writeback") is False:
        raise options.error("cache.writeback=off: cardcage has writeback, none and unsafe")
    if no_flush:
        return {"cache": "unsafe"}
    if direct:
        return {"cache": "none"}
    if cache is None:
        return {}
    if cache not in CACHES:
        raise options.error(f"cache={cache}: cardcage has writeback, none and unsafe")
    return {"cache": CACHES[cache]}


def block_nodes(options: Options, nodes: dict[str, dict[str, Any]], fdsets: dict[int, int]) -> None:
    """``-blockdev``: adds its node, a block spec, to *nodes*; a format's node takes over that of its file."""
    driver, name = options.need("driver"), options.take("node-name")
    if name is None:
        raise options.error("expected node-name=...")
    options.harmless(auto_read_only="", detect_zeroes="off", force_share="off", aio="threads native io_uring")
    options.harmless(file__aio="", file__auto_read_only="", file__node_name="")
    spec: dict[str, Any] = {}
    if driver == "nbd":
        if (kind := options.need("server.type")) not in ("unix", "inet"):
            raise options.error(f"server.type={kind}: cardcage has unix and inet")
        place: dict[str, Any] = (
            {"path": options.need("server.path")}
            if kind == "unix"
            else {"host": options.need("server.host"), "port": options.number("server.port") or NBD_PORT}
        )
        if export := options.take("export"):
            place["export"] = export
        nodes[name] = _nbd_spec(options, place)
        return
    if driver in ("file", "host_device"):
        spec["file"] = host_path(options, options.need("filename"), fdsets)
    elif driver in ("raw", "qcow2"):
        below = options.take("file")
        inner = options.take("file.driver")
        if below is not None:
            if below not in nodes:
                raise options.error(f"file={below}: no -blockdev before it has this node-name")
            spec |= nodes[below]
            if spec.get("type") == "nbd":
                if driver != "raw":
                    raise options.error(f"driver={driver}: cardcage has raw disks of NBD servers")
                nodes[name] = spec | _nbd_spec(options, {})
                return
        elif inner in ("file", "host_device"):
            spec["file"] = host_path(options, options.need("file.filename"), fdsets)
        else:
            raise options.error(f"file.driver={inner}: cardcage has files and block devices alone")
        spec["format"] = driver
        if backing := options.take("backing"):
            if backing not in nodes:
                raise options.error(f"backing={backing}: no -blockdev before it has this node-name")
            below_it = nodes[backing]
            if "file" not in below_it:
                raise options.error(f"backing={backing}: cardcage has backing files alone")
            spec["backing"] = [below_it["file"], *below_it.get("backing", [])]
    else:
        raise options.error(f"driver={driver}: cardcage has file, host_device, nbd, raw and qcow2")
    if options.truth("read-only", "readonly"):
        spec["readonly"] = True
    spec |= _cache(options)
    discard = options.take("discard")
    spec["discard"] = {"on": "unmap", None: spec.get("discard", "ignore")}.get(discard, discard or "ignore")
    if (locking := options.take("locking", "file.locking")) is not None:
        spec["locking"] = locking
    nodes[name] = spec


# networks and shares


def netdev(options: Options, kind: str) -> dict[str, Any]:
    """``-netdev``: a net spec."""
    options.harmless(vhost="on off", vhostforce="off", restrict="off", ipv4="on", script="no", downscript="no")
    found: dict[str, Any] = {"type": kind}
    if kind == "user":
        if forwards := options.all("hostfwd"):
            found["hostfwd"] = forwards
        if (ipv6 := options.truth("ipv6")) is not None:
            found["ipv6"] = ipv6
        if (dns := options.take("dns")) is not None:
            found["dns"] = dns
        if (host := options.take("host")) is not None:
            found["gateway"] = host
    elif kind in ("tap", "bridge"):
        found["type"] = "tap"
        options.harmless(vhostfd="", vhostfds="")
        if (fds := options.take("fd", "fds")) is not None:
            if not re.fullmatch(r"\d{1,9}(:\d{1,9})*", fds):
                raise options.error(f"fd={fds}: expected numbers of open descriptors")
            found["fds"] = [int(one) for one in fds.split(":")]
            found["queues"] = len(found["fds"])
        if (name := options.take("ifname")) is not None:
            found["ifname"] = name
        if (bridge := options.take("br")) is not None or kind == "bridge":
            found["bridge"] = bridge or "br0"
        if (queues := options.number("queues")) is not None:
            found["queues"] = queues
    elif kind == "socket":
        found["type"] = "stream"
        for key in ("listen", "connect"):
            if (address := options.take(key)) is not None:
                found[key] = address
    elif kind == "stream":
        where = _address(options, "addr")
        found["listen" if options.truth("server") else "connect"] = where
        if (again := options.number("reconnect")) is not None:
            found["reconnect"] = again
    elif kind == "dgram":
        for key in ("remote", "local"):
            if any(name.startswith(f"{key}.") for name, _ in options.pairs):
                found[key] = _address(options, key)
    else:
        raise options.error(f"{kind}: cardcage has user, tap, bridge, socket, stream and dgram")
    return found


def _address(options: Options, key: str) -> str:
    kind = options.take(f"{key}.type")
    if kind == "unix":
        return f"unix:{options.need(f'{key}.path')}"
    if kind == "inet":
        return f"{options.need(f'{key}.host')}:{options.need(f'{key}.port')}"
    raise options.error(f"{key}.type={kind}: cardcage has unix and inet")


def share(options: Options) -> dict[str, Any]:
    """``-fsdev`` and ``-virtfs``: the options of ``virtio-9p`` but its tag."""
    if (kind := options.take("fsdriver", "")) != "local":
        raise options.error(f"{kind}: cardcage has local")
    options.harmless(security_model="none passthrough", multidevs="warn remap forbid", writeout="immediate")
    found: dict[str, Any] = {"path": options.need("path")}
    if options.truth("readonly"):
        found["readonly"] = True
    return found


def unknown(options: Options, what: str, name: str, known: dict[str, Any]) -> ConfigError:
    """The error about a name that no other option gave."""
    there = f" ({', '.join(sorted(known))})" if known else ""
    return options.error(f"no {what} {name} before it{there}")


# certificates


def tls_credentials(options: Options) -> Credentials:
    """``-object tls-creds-x509``: certificates, which are read now."""
    from cardcage_migrate.credentials import read_credentials

    if (endpoint := options.take("endpoint") or "client") not in ("client", "server"):
        raise options.error(f"endpoint={endpoint}: expected client or server")
    if options.truth("verify-peer") is False:
        raise options.error("verify-peer=off: cardcage wants a certificate of the other side's, always")
    options.truth("sanity-check")
    return read_credentials(options.need("dir"), "server" if endpoint == "server" else "client")
