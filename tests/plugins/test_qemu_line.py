"""QEMU's command line: its syntax, what each option becomes, and what is refused by name."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from cardcage.config import Draft
from cardcage.errors import ConfigError
from cardcage.host import Host
from cardcage_qemu import translate
from cardcage_qemu.keyval import parse, size_of, split
from cardcage_qemu.line import QUIET, REFUSED
from cardcage_qemu.listing import answer
from cardcage_qemu.options import OPTIONS
from cardcage_qemu.toml import dump
from hypothesis import given
from hypothesis import strategies as st

KERNEL = ("-kernel", "vmlinuz")


def config(*words: str) -> dict[str, Any]:
    """The tables that *words* come to, which a draft takes."""
    tables = translate([*KERNEL, *words]).config()
    Draft.of(tables).config()
    return tables


def devices(*words: str) -> list[dict[str, Any]]:
    """The devices."""
    return list(config(*words).get("device", []))


# syntax


@given(st.lists(st.from_regex(r"[ab=.{ é][ab,=.{ é]*", fullmatch=True), min_size=1))
def test_commas_are_doubled(parts: list[str]) -> None:
    """Parts that were joined with their commas doubled come apart as they were."""
    assert split(",".join(one.replace(",", ",,") for one in parts)) == parts


keys = st.text(alphabet="abcd-_", min_size=1, max_size=6)
leaves = st.text(alphabet="ab,=/é", max_size=6) | st.booleans() | st.integers(-5, 5)
tables = st.recursive(
    st.dictionaries(keys, leaves, min_size=1, max_size=3),
    lambda one: st.dictionaries(keys, one | leaves, min_size=1, max_size=3),
    max_leaves=6,
)


def flat(table: dict[str, Any], path: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = (
                {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
            )
    return found


@given(tables)
def test_json_is_what_dotted_keys_are(table: dict[str, Any]) -> None:
    """An object and its pairs with dotted keys are the same options."""
    wanted = sorted(flat(table).items())
    assert sorted(parse("-x", json.dumps(table)).pairs) == wanted
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in wanted)
    if not text.startswith("{"):
        assert sorted(parse("-x", text).pairs) == wanted


@given(st.text(max_size=40))
def test_any_text(text: str) -> None:
    """Whatever stands behind an option, it is parsed or refused in one line that begins with the option."""
    for name, (takes, _, first) in OPTIONS.items():
        if not takes or first is None or name in ("machine", "M"):
            continue
        error = refusal(f"-{name}", text)
        assert error is None or error.startswith(("-", "give -kernel"))
        assert error is None or "\n" not in error or "\n" in text


def refusal(*words: str) -> str | None:
    """The error that *words* come to, if any."""
    try:
        translate(words).config()
    except ConfigError as error:
        return str(error)
    return None


def test_shorthands() -> None:
    """A word alone is on, one with "no" before it is off, and the first may be a value."""
    assert parse("-x", "unix,server,nowait,a=b", "type").pairs == [
        ("type", "unix"),
        ("server", "on"),
        ("wait", "off"),
        ("a", "b"),
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512 << 20),
        ("1G", 1 << 30),
        ("1.5g", 3 << 29),
        ("1048576k", 1 << 30),
        ("0x10", 16 << 20),
        ("4096b", 4096),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Sizes have QEMU's suffixes; a bare number is megabytes where QEMU has it so."""
    assert size_of(text, "m") == size
    assert config("-m", text)["machine"]["memory"] == size


@pytest.mark.parametrize("text", ["", "G", "1Q", "-1", "1e9", "9" * 40, "9999999E"])
def test_sizes_that_are_none(text: str) -> None:
    """What is no size is refused."""
    with pytest.raises(ConfigError, match="expected a size"):
        config("-m", f"size={text}")


@given(
    st.dictionaries(keys, st.text() | st.booleans() | st.integers(-9, 9) | st.lists(st.text(max_size=3)), max_size=4)
)
def test_toml_is_read_as_it_was(table: dict[str, Any]) -> None:
    """What --dump-toml prints is TOML of what was meant, whatever letters are in it."""
    for value in table.values():
        if (isinstance(value, str) and not value.isprintable()) or isinstance(value, list):
            return
    text = dump({"machine": table, "device": [{"type": "x", "inner": table}]})
    found = tomllib.loads(text)
    assert found.get("machine", {}) == table
    assert found["device"] == [{"type": "x", "inner": table}]


# what options become


def test_the_machine() -> None:
    """Processor, memory, accelerators, name and ends are keys of [machine]."""
    words = "-machine pc-i440fx-7.2,accel=kvm:tcg,usb=off -smp 4,sockets=2,cores=2 -no-reboot"
    words += " -name guest=vm,debug-threads=on"
    machine = config(*words.split(), "-cpu", "max,+avx2,-sse4.2,check,smap=off")["machine"]
    assert machine == {
        "memory": "128M",
        "accel": ["kvm", "tcg"],
        "cpus": 4,
        "on_reset": "stop",
        "name": "vm",
        "cpu": "max",
        "features": {"avx2": True, "sse4.2": False, "smap": False},
        "console": "none",
    }
    assert config("-enable-kvm", "-accel", "tcg,thread=single")["machine"]["accel"] == ["kvm", "tcg"]
    assert translate(["-machine", "none"]).config()["machine"]["platform"] == "none"


def test_q35_is_said_to_be_another_board() -> None:
    """q35 is taken, for those who always say it, with a line that says what the guest finds."""
    (said,) = translate([*KERNEL, "-machine", "q35,accel=tcg"]).warnings
    assert said.startswith("-machine q35: ")


def test_what_is_booted() -> None:
    """Kernel, initrd and command line as they stand, commas and all."""
    boot = config("-initrd", "/proc/self/fd/9", "-append", "console=ttyS0,115200 a,,b")["boot"]
    assert boot == {"kernel": "vmlinuz", "initrd": "/proc/self/fd/9", "append": "console=ttyS0,115200 a,,b"}
    assert translate(["-bios", "b.bin"]).config()["boot"] == {"firmware": "b.bin"}


def test_disks() -> None:
    """-drive, and -blockdev as libvirt has it, are virtio disks; an fd set is its descriptor."""
    (one,) = devices("-drive", "file=a,,b.img,if=virtio,format=raw,cache=none,readonly=on,serial=S,id=d0")
    assert one == {
        "type": "virtio-blk",
        "id": "d0",
        "drive": {"file": "a,b.img", "format": "raw", "readonly": True, "cache": "none", "discard": "ignore"},
        "serial": "S",
    }
    file = '{"driver":"file","filename":"/dev/fdset/2","node-name":"s","auto-read-only":true,"discard":"unmap"}'
    base = '{"driver":"file","filename":"/base.img","node-name":"bs"}'
    (one,) = devices(
        *(
            "-device",
            '{"driver":"virtio-blk-pci","bus":"pci.0","addr":"0x1f.0x7","drive":"f","id":"disk","bootindex":1}',
        ),
        *("-add-fd", "set=2,fd=7,opaque=x", "-blockdev", file, "-blockdev", base),
        *("-blockdev", '{"driver":"raw","node-name":"bf","file":"bs"}'),
        *("-blockdev", '{"node-name":"f","driver":"qcow2","file":"s","backing":"bf","cache":{"direct":true}}'),
    )
    spec = {"file": "/proc/self/fd/7", "discard": "unmap", "format": "qcow2", "backing": ["/base.img"], "cache": "none"}
    assert one == {"type": "virtio-blk", "id": "disk", "address": "1f.7", "drive": spec}


def test_disks_of_nbd_servers() -> None:
    """-drive by QEMU's four ways to name one, and -blockdev, are disks of an NBD server."""
    unix = {"type": "nbd", "path": "/a b", "export": "x:y"}
    for text, spec in {
        "nbd:unix:/a b:exportname=x:y": unix,
        "nbd+unix:///x:y?socket=/a%20b": unix,
        "nbd:h:7": {"type": "nbd", "host": "h", "port": 7},
        "nbd:[::1]:7:exportname=e": {"type": "nbd", "host": "::1", "port": 7, "export": "e"},
        "nbd://[::1]/e": {"type": "nbd", "host": "::1", "port": 10809, "export": "e"},
    }.items():
        (one,) = devices("-drive", f"file={text},if=virtio,format=raw,cache=none,readonly=on,id=d,serial=S")
        assert one == {"type": "virtio-blk", "id": "d", "drive": {**spec, "readonly": True}, "serial": "S"}
    node = '{"driver":"nbd","server":{"type":"inet","host":"h","port":"7"},"export":"e","node-name":"s"}'
    (one,) = devices(
        *("-blockdev", node, "-blockdev", '{"driver":"raw","node-name":"f","file":"s","read-only":true}'),
        *("-device", "virtio-blk-pci,drive=f"),
    )
    assert one["drive"] == {"type": "nbd", "host": "h", "port": 7, "export": "e", "readonly": True}


@given(st.text(max_size=30))
def test_any_name_of_an_nbd_disk(text: str) -> None:
    """Whatever stands behind nbd, it is a disk's place or refused by the option's name."""
    for head in ("nbd:", "nbd://", "nbd+unix://", "nbd+"):
        error = refusal(*KERNEL, "-drive", f"if=virtio,file={head}{text.replace(',', ',,')}")
        assert error is None or error.startswith("-drive")


def test_discs_and_flash() -> None:
    """A CD-ROM is a drive behind virtio SCSI, which is said; flash is the firmware, and keeps what is written to it."""
    read = {"format": "raw", "readonly": True}
    line = translate(["-bios", "b", "-cdrom", "a,b.iso", "-drive", "file=c.iso,media=cdrom,id=c,serial=S"])
    assert line.config()["device"] == [
        {"type": "virtio-cdrom", "id": "c", "drive": {"file": "c.iso", **read}, "serial": "S"},
        {"type": "virtio-cdrom", "id": "cd1", "drive": {"file": "a,b.iso", **read}},
    ]
    assert [one.partition(":")[0] for one in line.warnings] == ["-drive", "-cdrom"]
    words = "-drive if=pflash,format=raw,unit=1,file=vars -drive if=pflash,format=raw,unit=0,readonly=on,file=code"
    tables = translate(words.split()).config()
    assert tables["boot"] == {"firmware": "code"}
    assert tables["device"] == [{"type": "pflash", "file": "vars", "below": "code"}]
    node = "driver=file,read-only=on,node-name=c,filename=code"
    words = ["-machine", "pc,pflash0=c,pflash1=v", "-blockdev", node, "-blockdev", "file,filename=vars,node-name=v"]
    assert translate(words).config()["device"] == tables["device"]
    tables = translate(["-pflash", "both"]).config()
    assert (tables["boot"], tables["device"]) == ({"firmware": "both"}, [{"type": "pflash", "file": "both"}])


def test_networks() -> None:
    """-netdev and -nic are virtio network cards."""
    (one,) = devices(
        "-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01,addr=3", "-netdev", "user,id=n,hostfwd=tcp::1-:2"
    )
    assert one == {
        "type": "virtio-net",
        "address": "03.0",
        "net": {"type": "user", "hostfwd": ["tcp::1-:2"]},
        "mac": "52:54:00:00:00:01",
    }
    (one,) = devices("-nic", "tap,ifname=t0,script=no,downscript=no,model=virtio")
    assert one["net"] == {"type": "tap", "ifname": "t0"}
    (one,) = devices("-nic", "stream,addr.type=unix,addr.path=/s,server=off,model=virtio")
    assert one["net"] == {"type": "stream", "connect": "unix:/s"}
    assert devices("-net", "none", "-nic", "none") == []
    (one,) = devices("-net", "nic,model=virtio,macaddr=52:54:00:00:00:02", "-net", "user,hostfwd=tcp::1-:2")
    assert one == {
        "type": "virtio-net",
        "mac": "52:54:00:00:00:02",
        "net": {"type": "user", "hostfwd": ["tcp::1-:2"]},
    }


def test_serial_ports_and_consoles() -> None:
    """Serial ports have the PC's places; standard input and output are the machine's console; ports of a virtio
    console keep their order."""
    tables = config("-serial", "mon:stdio", "-serial", "file:out", "-serial", "none")
    assert tables["machine"]["console"] == "stdio"
    assert tables["device"] == [
        {"type": "isa-serial", "char": "console"},
        {"type": "isa-serial", "char": {"type": "file", "path": "out"}, "port": 0x2F8, "irq": 3},
        {"type": "isa-serial", "char": "null", "port": 0x3E8, "irq": 4},
    ]
    assert config("-nographic")["machine"]["console"] == "stdio"
    assert config("-nographic", "-nodefaults")["machine"]["console"] == "none"
    words = "-device virtio-serial-pci,id=v -chardev null,id=a -chardev socket,path=/s,server=on,wait=off,id=b"
    words += " -device virtserialport,chardev=b,name=org.q,bus=v.0 -device virtconsole,chardev=a"
    (one,) = devices(*words.split())
    socket = {"type": "socket", "server": True, "path": "/s"}
    assert one == {"type": "virtio-console", "id": "v", "char": "null", "ports": [{"char": socket, "name": "org.q"}]}


def test_monitors() -> None:
    """-qmp, -mon and -monitor are qmp devices; QMP has the names that QEMU has for what is behind devices."""
    words = "-qmp unix:/q,server=on,wait=off -monitor tcp:127.0.0.1:4,server,nowait"
    words += " -chardev socket,id=m,fd=5,server=on,wait=off"
    found = devices(*words.split(), "-mon", "chardev=m,mode=control", "-drive", "file=f,if=virtio,id=d")
    assert found[1:] == [
        {"type": "qmp", "socket": "unix:/q", "names": {"d": "d"}},
        {"type": "qmp", "socket": "tcp:127.0.0.1:4", "mode": "readline"},
        {"type": "qmp", "socket": "fd:5"},
    ]
    assert devices("-qmp", "unix:/q,server=on")[0]["wait"] is True
    assert devices("-qmp", "unix:/q")[0] == {"type": "qmp", "socket": "unix:/q", "server": False}
    assert devices("-monitor", "none") == []
    assert devices("-qmp", "unix:/a,,b=c,server=on,wait=off")[0] == {"type": "qmp", "socket": "unix:/a,b=c"}
    (port,) = devices("-serial", "unix:/a,,b=c,server=on,wait=off")
    assert port["char"] == {"type": "socket", "server": True, "path": "/a,b=c"}


def test_shares_memory_and_the_rest() -> None:
    """Shares, memory back ends, SMBIOS, fw_cfg, the clock and boot order have their places."""
    (one,) = devices("-virtfs", "local,path=/srv,mount_tag=t,security_model=none,readonly=on")
    assert one == {"type": "virtio-9p", "tag": "t", "path": "/srv", "readonly": True}
    (one,) = devices(
        "-fsdev",
        "local,id=f,path=/srv,security_model=none,multidevs=remap",
        "-device",
        "virtio-9p-pci,fsdev=f,mount_tag=r",
    )
    assert one == {"type": "virtio-9p", "path": "/srv", "tag": "r"}
    tables = config("-object", "memory-backend-memfd,id=m,size=256M,share=on", "-machine", "pc,memory-backend=m")
    assert (tables["memory"], tables["machine"]["memory"]) == ({"type": "memfd"}, 256 << 20)
    found = devices(
        *("-uuid", "u", "-smbios", "type=1,product=p", "-fw_cfg", "name=opt/a,string=b", "-fw_cfg", "opt/c,file=d"),
        *("-rtc", "base=localtime", "-boot", "menu=off,order=dc,strict=on"),
    )
    assert found == [
        {"type": "smbios", "uuid": "u", "product": "p"},
        {"type": "fw_cfg", "files": {"opt/a": "b"}, "paths": {"opt/c": "d"}, "boot_menu": False},
        {"type": "rtc", "base": "localtime", "boot": "dc"},
    ]
    assert config("-sandbox", "on,spawn=deny")["security"] == {"jail": "on"}


def test_flags_of_the_process() -> None:
    """-S, -no-shutdown, -daemonize and -pidfile are no part of the configuration, and said beside it."""
    line = translate([*KERNEL, "-S", "-no-shutdown", "-daemonize", "-pidfile", "p"])
    assert (line.freeze, line.linger, line.daemonize, line.pidfile) == (True, True, True, "p")
    assert [one.partition(":")[0] for one in line.notes()] == ["-S", "-no-shutdown"]


def test_what_happens_then() -> None:
    """-action and -watchdog-action are the machine's, the watchdog's and the process's; its address is a device's."""
    words = "-device i6300esb,id=w,addr=0x7 -watchdog-action pause -action panic=none,reboot=shutdown,shutdown=pause"
    line = translate([*KERNEL, *words.split()])
    tables = line.config()
    assert tables["device"] == [{"type": "i6300esb", "id": "w", "address": "07.0", "action": "pause"}]
    assert (tables["machine"]["on_panic"], tables["machine"]["on_reset"], line.linger) == ("ignore", "stop", True)
    assert devices("-watchdog", "i6300esb", "-action", "watchdog=none") == [{"type": "i6300esb", "action": "none"}]


def test_descriptors_that_others_opened() -> None:
    """A tap's descriptors, one for each queue, and what a jail may open later."""
    (card,) = devices("-netdev", "tap,id=n,fds=7:9,vhost=on,vhostfds=3:4", "-device", "virtio-net-pci,netdev=n")
    assert card == {"type": "virtio-net", "net": {"type": "tap", "fds": [7, 9], "queues": 2}, "queues": 2}
    found = config("-sandbox", "on,obsolete=deny", "-sandbox", "on,open_later=/a,open_later=/b")["security"]
    assert found == {"jail": "on", "open_later": ["/a", "/b"]}


def test_lists() -> None:
    """A list is printed where an option asks for it; what is another option's value asks for nothing."""
    host = Host()
    said = {"-device help": 'name "virtio-blk-pci"', "-M help": "pc-i440fx-7.2", "-cpu ?": "x86-64-v2"}
    said |= {"-accel help": "tcg", "--version": "QEMU emulator version 7.2.0", "-S -h": "-cdrom ..."}
    said |= {"-device virtio-blk-pci,help": "drive=<str>", "-name h -machine help": "Supported machines"}
    for words, part in said.items():
        assert part in (answer(words.split(), host) or ""), words
    for words in ("-name h", "-append version", "-append help", "-name -version", "-kernel help", "-m"):
        assert answer(words.split(), host) is None, words


# what is refused


@pytest.mark.parametrize(
    "words",
    [
        "disk.img",
        "-no-such-option",
        "-m",
        "-machine microvm,pit=off,kernel-irqchip=on",
        "-machine microvm,pit=perhaps",
        "-machine pc,rtc=on",
        "-machine pc,pit=off",
        "-device virtio-rng-device",
        "-machine pc,sev=on",
        "-machine pc,pflash0=none",
        "-accel hvf",
        "-cpu Haswell",
        "-cpu max,vendor=x",
        "-smp 2,maxcpus=4",
        "-smp 2,sockets=3",
        "-m 1G,slots=2,maxmem=2G",
        "-drive file=a",
        "-drive if=virtio",
        "-drive file=nbd:x,if=virtio",
        "-drive file=a,if=virtio,format=vmdk",
        "-drive file=a,if=virtio,cache=writethrough",
        "-drive file=a,if=virtio,media=cdrom",
        "-drive file=a,media=cdrom,werror=report",
        "-drive file=nbd:h:7,media=cdrom",
        "-drive file=nbd:h:7,if=virtio,format=qcow2",
        "-drive file=nbd:h:7,if=virtio,discard=ignore",
        "-drive file=nbd://h/e?tls=on,if=virtio",
        "-drive file=a,if=pflash,unit=1",
        "-drive file=a,if=pflash,unit=2",
        "-drive file=a,if=pflash,format=qcow2",
        "-blockdev driver=nbd,node-name=a,server.type=vsock",
        "-boot order=cdna",
        "-serial unix:/a,server=on,wait=off,colour=red",
        "-drive file=a,if=virtio,throttling.iops-total=4",
        "-drive file=/dev/fdset/4,if=virtio",
        "-device e1000",
        "-device virtio-blk-pci,drive=none",
        "-device virtio-net-pci,netdev=none",
        "-net user",
        "-net nic,model=virtio",
        "-net nic,model=virtio -net user -net tap",
        "-net nic -net user",
        "-device virtio-rng-pci,addr=99",
        "-device virtio-rng-pci,bus=pci.7",
        "-device virtio-rng-pci,colour=red",
        "-device virtserialport,chardev=x",
        "-device virtio-balloon-pci,deflate-on-oom=perhaps",
        "-netdev vde,id=n",
        "-netdev tap,id=n,fd=name",
        "-action reboot=never",
        "-action panic=pause",
        "-watchdog-action inject-nmi",
        "-watchdog ib700",
        "-nic user",
        "-chardev vc,id=a",
        "-chardev socket,id=a",
        "-serial vc",
        "-parallel stdio",
        "-monitor file:x",
        "-vga std",
        "-display gtk",
        "-object iothread,id=i",
        "-global virtio-blk-pci.x=1",
        "-virtfs local,path=/,mount_tag=t,security_model=mapped-xattr",
        "-smbios type=0,vendor=x",
        "-audiodev alsa,id=a",
        '-device {"driver"',
        *(f"-{one}" for one in REFUSED),
    ],
)
def test_what_cardcage_has_not_is_refused_by_name(words: str) -> None:
    """One line names the option; nothing is left out in silence."""
    given_ = words.split(" ", 1)
    with pytest.raises(ConfigError) as caught:
        config(*given_)
    assert str(caught.value).startswith(given_[0])
    assert "\n" not in str(caught.value)


def test_sizes_of_a_network_cards_queues() -> None:
    """Both queues have one size; two sizes are refused."""
    words = ["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,rx_queue_size=512,tx_queue_size="]
    assert devices(*words[:-1], f"{words[-1]}512")[0]["queue_size"] == 512
    assert "one size for both" in (refusal(*KERNEL, *words[:-1], f"{words[-1]}256") or "")


def test_what_changes_nothing_is_listed() -> None:
    """Each option that is taken and changes nothing is on the page."""
    from documents import ROOT

    page = (ROOT / "docs" / "qemu.md").read_text()
    for name, values in QUIET.items():
        value = {"": "driver=none" if name == "audiodev" else "x"}.get(values or "", (values or "").split(" ")[0])
        words = [f"-{name}"] if values is None else [f"-{name}", value]
        if name != "nographic":
            assert config() == config(*words), name
        assert f"-{name}" in page, name


@pytest.mark.parametrize("name", ["qemu64", "kvm64"])
def test_plain_processors_are_the_plainest_there_is(name: str) -> None:
    """QEMU's models without anybody's features become x86-64-v2, with a warning that says so."""
    line = translate([*KERNEL, "-cpu", f"{name},+x2apic"])
    assert line.config()["machine"]["cpu"] == "x86-64-v2"
    assert line.config()["machine"]["features"] == {"x2apic": True}
    assert line.warnings == [f"-cpu {name}: the guest finds cardcage's x86-64-v2"]


def test_help_begins_with_the_version() -> None:
    """Scripts that work out QEMU's version read the first line of -h."""
    with Host() as host:
        text = answer(["-h"], host)
    assert text is not None
    assert text.startswith("QEMU emulator version 7.2.0 (cardcage ")
