"""The streams of one guest, by their ports and by the descriptors of their host sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import select
    from collections.abc import Iterator

    from cardcage_virtio.vsock.stream import Stream

__all__ = ["Streams"]


class Streams:
    """All streams that there are.

    Attributes:
        by_ports: by host port and guest port. by_fd: the same streams, by the host socket's descriptor.
    """

    def __init__(self) -> None:
        self.by_ports: dict[tuple[int, int], Stream] = {}
        self.by_fd: dict[int, Stream] = {}
        self._next_port = 1 << 30

    def __len__(self) -> int:
        return len(self.by_ports)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self.by_ports.values()))

    def free_port(self, peer: int) -> int:
        """A host port for a new stream to guest port *peer*."""
        while (self._next_port, peer) in self.by_ports:
            self._next_port = (self._next_port + 1) % (1 << 31) | 1 << 30
        port, self._next_port = self._next_port, (self._next_port + 1) % (1 << 31) | 1 << 30
        return port

    def add(self, stream: Stream, epoll: select.epoll) -> None:
        """A new stream, which *epoll* watches from now on."""
        self.by_ports[stream.local, stream.peer] = stream
        self.by_fd[stream.fd] = stream
        stream.watch(epoll)

    def forget(self, stream: Stream) -> None:
        """Close a stream, if it is one of these."""
        if self.by_ports.pop((stream.local, stream.peer), None) is not None:
            self.by_fd.pop(stream.fd, None)
            stream.close()
