"""A KVM vCPU: the run loop that serves guest exits, kicks, and interrupt injection where KVM holds no 8259.

How a vCPU is brought out of guest code: whoever wants it sets ``attention`` and, when ``inside`` says that the thread
is in or about to enter KVM_RUN, sets ``immediate_exit`` and sends the kick signal. The loop sets ``inside`` before it
looks at ``attention``, the other side writes them in the opposite order; with the GIL's ordering one of both always
sees the other, so no kick is lost. The signal's handler is a C function that does nothing (:mod:`cardcage_kvm.kick`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import threading
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit, VCpuExit

from cardcage_kvm import abi, report, state

if TYPE_CHECKING:
    from cardcage.vcpu import Ops
    from cardcage.x86 import VCpuState

    from cardcage_kvm.vm import KvmVm

# Where fields of struct kvm_run are, in bytes.
REQUEST_INTERRUPT_WINDOW, IMMEDIATE_EXIT, EXIT_REASON, READY_FOR_INTERRUPT, IF_FLAG = 0, 1, 8, 12, 13
CR8, UNION = 16, 32
MASKS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}
KVM_RUN = abi.RUN.number
IO, MMIO, INTERRUPTED = int(abi.ExitReason.IO), int(abi.ExitReason.MMIO), -1


class KvmVCpu:
    """One logical processor of a :class:`~cardcage_kvm.vm.KvmVm`; satisfies :class:`cardcage.vcpu.VCpu`."""

    def __init__(self, vm: KvmVm, index: int, kick_signal: int) -> None:
        self.index, self.vm, self._gate, self._kick_signal = index, vm, vm.gate, kick_signal
        self.open()
        self.attention = self.inside = self._kicked = self._nmi = self._halted = self._incomplete = self._unsure = False
        self._thread: int | None = None
        self._thread_lock = threading.Lock()
        self.power_up: tuple[dict[int, int], bytes | None] = ({}, None)
        self.held: threading.Event | None = None  # a debugger holds it: set by a kick

    def open(self) -> None:
        """Have KVM make it, in the VM as it is now."""
        self.fd = abi.ioctl(self.vm.fd, abi.CREATE_VCPU, self.index)
        self._map = mmap.mmap(self.fd, abi.ioctl(self.vm.system_fd, abi.GET_VCPU_MMAP_SIZE))
        page = memoryview(self._map)
        self.bytes, self._longs, self._words = page, page.cast("I"), page.cast("Q")
        self._views = {1: page, 2: page.cast("H"), 4: self._longs}

    def close(self) -> None:
        """Release the descriptor and the shared page. Idempotent."""
        if self.fd >= 0:
            for view in (self._words, *reversed(self._views.values())):
                view.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    # from any thread

    def kick(self) -> None:
        """Make the current, or else the next, :meth:`run` return ``KICKED`` soon."""
        self._kicked = True
        self.interrupt()
        if (held := self.held) is not None:
            held.set()

    def interrupt(self) -> None:
        """Bring the thread out of guest code and through :meth:`_attend`, without ending :meth:`run`."""
        self.attention = True
        if self.inside:
            with self._thread_lock:
                if self._thread is not None:
                    self.bytes[IMMEDIATE_EXIT] = 1
                    signal.pthread_kill(self._thread, self._kick_signal)

    def post_nmi(self) -> None:
        """Have an NMI injected (KVM_NMI itself would wait for the running vCPU)."""
        self._nmi = True
        self.interrupt()

    # on the vCPU's thread

    def run(self, ops: Ops, /) -> VCpuExit:
        """Run guest code until something ends the loop; see :class:`cardcage.vcpu.VCpu`."""
        # The loop is written for speed: everything it needs is local, and one OUT or IN is served in place. ioctl is
        # called without its third argument, which Python would try as a buffer and as bytes first (1.3 µs).
        if (held := self.held) is not None:
            held.wait()
            held.clear()
            return VCpuExit(Exit.KICKED)
        fd, ioctl, longs, words, gate = self.fd, fcntl.ioctl, self._longs, self._words, self._gate
        reason_at, io_at, data_at, views = EXIT_REASON // 4, UNION // 8, UNION // 8 + 1, self._views
        pio_read, pio_write = ops.pio_read, ops.pio_write
        with self._thread_lock:
            self._thread = threading.get_ident()
        self.attention = True
        try:
            while True:
                self.inside = True
                if self.attention:
                    self.inside = False
                    ended = self._attend(ops)
                    if ended is not None:
                        return ended
                    continue
                try:
                    ioctl(fd, KVM_RUN)
                    reason = longs[reason_at]
                except (InterruptedError, BlockingIOError):
                    reason = INTERRUPTED  # EAGAIN: an INIT or SIPI changed the state that the thread waited in
                except OSError as error:
                    self.inside = False
                    return self._cannot_run(error)
                self.inside = self._incomplete = False
                if self.attention:
                    gate.left()
                if reason == IO:
                    self._incomplete = True
                    io = words[io_at]  # direction, size, port, count: 8, 8, 16 and 32 bits
                    size = io >> 8 & 0xFF
                    if io >> 32 != 1:
                        self._serve_string_io(ops)
                    elif io & 0xFF:
                        pio_write(io >> 16 & 0xFFFF, size, views[size][words[data_at] // size])
                    else:
                        views[size][words[data_at] // size] = pio_read(io >> 16 & 0xFFFF, size) & MASKS[size]
                elif reason == MMIO:
                    self._incomplete = True
                    self._serve_mmio(ops)
                elif reason == INTERRUPTED:
                    self.bytes[IMMEDIATE_EXIT] = 0
                else:
                    ended = self._other_exit(reason, ops)
                    if ended is not None:
                        return ended
        finally:
            self.inside = False
            self._complete(None)
            with self._thread_lock:
                self._thread = None

    def _serve_string_io(self, ops: Ops) -> None:
        """The iterations of INS and OUTS, which KVM hands over several at once."""
        io = self._words[UNION // 8]
        size, port, count = io >> 8 & 0xFF, io >> 16 & 0xFFFF, io >> 32
        first, view = self._words[UNION // 8 + 1] // size, self._views[size]
        for at in range(first, first + count):
            if io & 0xFF:
                ops.pio_write(port, size, view[at])
            else:
                view[at] = ops.pio_read(port, size) & MASKS[size]

    def _serve_mmio(self, ops: Ops) -> None:
        words = self._words
        address, size = words[4], words[6] & 0xFFFFFFFF
        mask = MASKS.get(size)
        if mask is None:
            self._serve_odd_mmio(ops, address, size)
        elif words[6] >> 32 & 0xFF:
            ops.mmio_write(address, size, words[5] & mask)
        else:
            words[5] = ops.mmio_read(address, size) & mask

    def _serve_odd_mmio(self, ops: Ops, address: int, size: int) -> None:
        """An access of 3, 5, 6 or 7 bytes (one that crosses a page was cut by KVM): byte by byte."""
        data = self.bytes[40 : 40 + size]
        for at in range(size):
            if self.bytes[52]:
                ops.mmio_write(address + at, 1, data[at])
            else:
                data[at] = ops.mmio_read(address + at, 1) & 0xFF

    def _attend(self, ops: Ops) -> VCpuExit | None:
        """Do what others asked for, with the thread out of guest code."""
        self.attention = False
        if self._gate.stopping:
            self._gate.wait()
        if self._kicked:
            self._kicked = False
            self._complete(ops)
            return VCpuExit(Exit.KICKED)
        if self._nmi:
            self._nmi = self._halted = False
            abi.ioctl(self.fd, abi.NMI)
        if self.index == 0 and self.vm.irqchip != "full":
            self._inject_extint(ops)
        return VCpuExit(Exit.HALTED) if self._halted else None

    def _inject_extint(self, ops: Ops) -> None:
        """Give KVM the 8259's interrupt once the guest can take it, else ask to be told when it can."""
        page = self.bytes
        if self.vm.extint and self._unsure:
            self._find_out()
        if self.vm.extint and page[READY_FOR_INTERRUPT]:
            vector = ops.acknowledge_extint()
            if vector is not None:
                self._halted = False
                abi.ioctl(self.fd, abi.INTERRUPT, abi.Interrupt(irq=vector & 0xFF))
                page[READY_FOR_INTERRUPT] = 0
        page[REQUEST_INTERRUPT_WINDOW] = int(self.vm.extint and not self._halted)

    def _find_out(self) -> None:
        """Have KVM say if the guest can take an interrupt, after its state was set: one that halts in KVM would never
        leave it to be told of a window."""
        self._unsure = False
        self.bytes[IMMEDIATE_EXIT] = 1
        try:
            fcntl.ioctl(self.fd, KVM_RUN)
        except InterruptedError:
            pass
        except OSError as error:
            raise abi.failure(abi.RUN, error) from error
        finally:
            self.bytes[IMMEDIATE_EXIT] = 0

    def _other_exit(self, reason: int, ops: Ops) -> VCpuExit | None:
        """Serve or report an exit that is neither a port nor a memory-mapped access. ``None`` to go on."""
        page, codes = self.bytes, abi.ExitReason
        match reason:
            case codes.IRQ_WINDOW_OPEN:
                self.attention = True
            case codes.HLT:
                self._halted = self.attention = True
            case codes.IOAPIC_EOI:
                ops.end_of_interrupt(page[UNION])
            case codes.INTR | codes.X86_BUS_LOCK | codes.NOTIFY | codes.SET_TPR:
                pass  # nothing to serve: a signal, or a notice that only a limiter of the guest would use
            case codes.DIRTY_RING_FULL:
                self.vm.dirty.collect()
            case codes.SHUTDOWN:
                return VCpuExit(Exit.SHUTDOWN, report.describe(self, "triple fault"))
            case codes.DEBUG:
                if self.vm.debug.stopped(self, self._words[UNION // 8 + 2]):
                    return VCpuExit(Exit.DEBUG, f"at {self._words[UNION // 8 + 1]:#x}")
            case codes.SYSTEM_EVENT:
                return self._system_event(self._longs[UNION // 4])
            case _:
                return VCpuExit(Exit.FAILED, report.explain(self, reason))
        return None

    def _system_event(self, kind: int) -> VCpuExit:
        if kind == 2:
            return VCpuExit(Exit.RESET, "KVM system event: reset")
        word = {1: "shutdown", 3: "crash"}.get(kind, str(kind))
        return VCpuExit(Exit.SHUTDOWN if kind == 1 else Exit.FAILED, f"KVM system event: {word}")

    def _complete(self, ops: Ops | None) -> None:
        """Finish the instruction of the last port or memory access, so that the registers are whole.

        KVM cuts some accesses in pieces; the rest of them are served by *ops*, or dropped without it.
        """
        while self._incomplete:
            self.bytes[IMMEDIATE_EXIT] = 1
            try:
                fcntl.ioctl(self.fd, KVM_RUN)
            except InterruptedError:
                self._incomplete = False
                return
            except OSError as error:
                self._incomplete = False
                raise abi.failure(abi.RUN, error) from error
            finally:
                self.bytes[IMMEDIATE_EXIT] = 0
            if ops is not None and self._longs[EXIT_REASON // 4] == MMIO:
                self._serve_mmio(ops)
            elif ops is not None and self._longs[EXIT_REASON // 4] == IO:
                self._serve_string_io(ops)

    def _cannot_run(self, error: OSError) -> VCpuExit:
        return VCpuExit(Exit.FAILED, report.describe(self, str(abi.failure(abi.RUN, error))))

    # state

    def get_state(self) -> VCpuState:
        """Read all registers. Raises :exc:`~cardcage.errors.AcceleratorError`."""
        found = state.read(self)
        found.events.halted = found.events.halted or self._halted
        return found

    def set_state(self, new: VCpuState, /) -> None:
        """Set all registers; MSRs that *new* does not name take their values after power-up.

        Raises :exc:`~cardcage.errors.UsageError` for what this vCPU cannot hold.
        """
        if self.fd < 0:
            raise AcceleratorError(f"vCPU {self.index}: closed")
        state.write(self, new)
        self._halted = new.events.halted and self.vm.irqchip == "none"
        self.bytes[READY_FOR_INTERRUPT], self._unsure = 0, True
        self._words[CR8 // 8] = new.system.cr8
