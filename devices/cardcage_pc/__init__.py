"""Card cardcage_pc: the devices of a PC's main board, its ACPI tables, and character back ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.device import Mmio, Pio
from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the platforms ``pc`` and ``microvm``, their devices, and the ``char`` back ends."""
    registry.platform("pc", "cardcage_pc.platform:Pc", help="a PC: i440FX, ACPI, one serial port")
    registry.platform("microvm", "cardcage_pc.microvm:Microvm", help="a board for virtio over MMIO, without PCI")
    _devices(registry)
    _backends(registry)


def _devices(registry: Registry) -> None:
    registry.device(
        "pic",
        "cardcage_pc.chips.pic:Pic",
        options="cardcage_pc.chips.pic:PicOptions",
        regions=(
            Pio(2, 0x20, "master", "read_master", "write_master"),
            Pio(2, 0xA0, "slave", "read_slave", "write_slave"),
            Pio(2, 0x4D0, "elcr", "read_elcr", "write_elcr"),
        ),
        help="two 8259A interrupt controllers",
    )
    registry.device(
        "ioapic", "cardcage_pc.chips.ioapic:IoApic", regions=(Mmio(0x1000, 0xFEC00000),), help="82093AA I/O APIC"
    )
    registry.device(
        "pit",
        "cardcage_pc.chips.pit:Pit",
        regions=(Pio(4, 0x40), Pio(1, 0x61, "speaker", "read_speaker", "write_speaker")),
        help="8254 interval timer",
    )
    registry.device(
        "rtc",
        "cardcage_pc.chips.rtc:Rtc",
        options="cardcage_pc.chips.rtc:RtcOptions",
        regions=(Pio(2, 0x70),),
        help="MC146818 real-time clock and CMOS RAM",
    )
    registry.device(
        "hpet", "cardcage_pc.chips.hpet:Hpet", regions=(Mmio(0x400, 0xFED00000),), help="IA-PC HPET, three timers"
    )
    registry.device(
        "i8042",
        "cardcage_pc.chips.i8042:I8042",
        regions=(
            Pio(1, 0x60, "data", "read_data", "write_data"),
            Pio(1, 0x64, "command", "read_status", "write_command"),
            Pio(1, 0x92, "fast", "read_fast", "write_fast"),
        ),
        help="keyboard controller, PS/2 keyboard and mouse, reset",
    )
    registry.device(
        "acpi-pm",
        "cardcage_pc.acpi.pm:AcpiPm",
        regions=(Pio(16, 0x600), Pio(4, 0xAFE0, "gpe", "read_gpe", "write_gpe")),
        help="ACPI PM timer, power button, general-purpose events",
    )
    registry.device(
        "pci-hotplug",
        "cardcage_pc.acpi.hotplug:PciHotplug",
        regions=(Pio(20, 0xAE00),),
        bus="pci",
        help="ACPI hot-plug of PCI devices",
    )
    registry.device(
        "microvm",
        "cardcage_pc.microvm:MicrovmBoard",
        options="cardcage_pc.microvm:MicrovmOptions",
        regions=(Pio(1, 0x610),),
        help="what is on the board of the platform microvm, and its reset register",
    )
    registry.device("acpi", "cardcage_pc.acpi.tables:Acpi", help="ACPI tables generated from the devices")
    registry.device(
        "bios-data", "cardcage_pc.firmware.bios:BiosData", help="BIOS data areas and MP tables, without firmware"
    )
    registry.device(
        "smbios",
        "cardcage_pc.firmware.smbios:Smbios",
        options="cardcage_pc.firmware.smbios:SmbiosOptions",
        help="SMBIOS tables: maker, product, serial number, UUID",
    )
    registry.device(
        "fw_cfg",
        "cardcage_pc.chips.fw_cfg:FwCfg",
        options="cardcage_pc.chips.fw_cfg:FwCfgOptions",
        regions=(Pio(12, 0x510),),
        help="files for firmware and guests",
    )
    registry.device(
        "i440fx",
        "cardcage_pc.chips.i440fx:HostBridge",
        bus="pci",
        help="host bridge identity and PAM registers (at 00.0)",
    )
    for name, factory, what in (
        ("piix3", "IsaBridge", "ISA bridge, for firmware that looks for it (at 01.0)"),
        ("piix4-pm", "PowerManagement", "power management function, which tells firmware the ports (at 01.3)"),
    ):
        registry.device(name, f"cardcage_pc.chips.piix:{factory}", bus="pci", help=what)
    registry.device(
        "pflash",
        "cardcage_pc.chips.flash:Flash",
        options="cardcage_pc.chips.flash:FlashOptions",
        help="flash that firmware keeps its variables in",
    )
    registry.device(
        "isa-serial",
        "cardcage_pc.chips.serial:Serial",
        options="cardcage_pc.chips.serial:SerialOptions",
        regions=(Pio(8, 0x3F8),),
        help="16550A UART",
    )
    registry.device("port80", "cardcage_pc.chips.debug:Port80", regions=(Pio(1, 0x80),), help="POST codes, logged")
    registry.device(
        "pvpanic", "cardcage_pc.chips.debug:PvPanic", regions=(Pio(1, 0x505),), help="guest panic notification"
    )
    registry.device(
        "isa-debug-exit",
        "cardcage_pc.chips.debug:IsaDebugExit",
        options="cardcage_pc.chips.debug:IsaDebugExitOptions",
        regions=(Pio(4, 0xF4),),
        help="ends the machine with the status that the guest writes",
    )
    registry.device(
        "debugcon",
        "cardcage_pc.chips.debug:DebugCon",
        options="cardcage_pc.chips.debug:DebugConOptions",
        regions=(Pio(1, 0xE9),),
        help="debug console",
    )
    registry.device(
        "pc-testdev",
        "cardcage_pc.chips.testdev:PcTestdev",
        regions=(
            Pio(4, 0xE0),
            Pio(4, 0xE4, "flush", "read_flush", "write_flush"),
            Pio(4, 0xE8, "bytes"),
            Pio(24, 0x2000, "lines", "read_line", "write_line"),
            Mmio(0x10000, 0xFF000000, "memory", "read_memory", "write_memory"),
        ),
        help="test device for suites of test kernels: a register, interrupt lines, memory",
    )


def _backends(registry: Registry) -> None:
    registry.backend(
        "char",
        "stdio",
        "cardcage_pc.char.stdio:open_stdio",
        options="cardcage_pc.char.stdio:StdioOptions",
        help="this terminal (Ctrl-] to leave) or plain pipes",
    )
    registry.backend(
        "char",
        "pty",
        "cardcage_pc.char.pty:open_pty",
        options="cardcage_pc.char.pty:PtyOptions",
        help="a new pseudo-terminal",
    )
    registry.backend(
        "char",
        "socket",
        "cardcage_pc.char.socket:open_socket",
        options="cardcage_pc.char.socket:SocketOptions",
        shorthand="cardcage_pc.char.fd:parse_path",
        help="a unix socket",
    )
    registry.backend(
        "char",
        "file",
        "cardcage_pc.char.fd:open_file",
        options="cardcage_pc.char.fd:FileOptions",
        shorthand="cardcage_pc.char.fd:parse_path",
        help="output to a file",
    )
    registry.backend("char", "null", "cardcage_pc.char.fd:open_null", help="output is discarded, input is empty")
