"""The device: its configuration space, its features, and what it does with a request."""

from struct import pack, unpack

from attrs import frozen
from cardcage.units import Size
from cardcage_virtio.queue.request import RingError

READ, OK, IO_ERROR, UNSUPPORTED = 0, 0, 1, 2


@frozen
class Options:
    size: Size = Size("1M")  # noqa: RUF009  a size is an int


class NumberDisk:
    device_id = 2  # a block device: Linux uses it with the driver that it has for those
    queue_sizes = (64,)
    features = 1 << 5  # VIRTIO_BLK_F_RO

    def __init__(self, options):
        self.sectors = options.size // 512

    def config(self):
        return pack("<Q", self.sectors)

    def handle(self, request):
        header = request.read()
        if len(header) != 16 or not request.writable_size:
            raise RingError("not a read request")
        kind, sector = unpack("<I4xQ", header)
        count, rest = divmod(request.writable_size - 1, 512)
        data = bytes(count * 512 + rest)
        if kind != READ:
            status = UNSUPPORTED
        elif rest or sector + count > self.sectors:
            status = IO_ERROR
        else:
            status = OK
            data = b"".join(f"sector {sector + at}\n".encode().ljust(512, b".") for at in range(count))
        request.done(request.write(data + bytes([status])))
