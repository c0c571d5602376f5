"""Which inodes of a mount the kernel may hold pages of: written by the FUSE layer, read by the heartbeat process.

It is there for the moment when the FUSE layer is dead or stuck: whoever has a descriptor of /dev/fuse can then have the
kernel drop these pages. The memory has no name (memfd_create(2)) and ends with its last descriptor.

Layout, host byte order: HEADER, then *count* node ids of 8 bytes. A reader sees every id that is listed, at any moment:
an id is written before the count that includes it, and the last one is copied into a gap before the count excludes it.
"""

import mmap
import os
from struct import Struct

from mxfs_proto.errors import MediaError

MAGIC = b"MXFSpage"
_HEADER = Struct("=8sQQ")  # magic, whether everything is dropped and stays so, count
_DROPPED_AT = 8
_COUNT_AT = 16
_ID = Struct("=Q")
_FIRST_BYTES = 1 << 16


class CacheList:
    """The writer's side; belongs to one thread."""

    def __init__(self) -> None:
        """Make an empty list. Raises OSError."""
        self.fd = os.memfd_create("mxfs-cached", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _FIRST_BYTES)
        self._map = mmap.mmap(self.fd, _FIRST_BYTES)
        _HEADER.pack_into(self._map, 0, MAGIC, 0, 0)
        self._ids: list[int] = []
        self._place: dict[int, int] = {}

    def __len__(self) -> int:
        """Return how many inodes are listed."""
        return len(self._ids)

    def add(self, nodeid: int) -> None:
        """The kernel may have pages of this inode from now on; to be called before it can. Raises OSError."""
        if nodeid in self._place:
            return
        place = len(self._ids)
        end = _HEADER.size + (place + 1) * _ID.size
        if end > len(self._map):
            self._map.resize(2 * len(self._map))
        _ID.pack_into(self._map, end - _ID.size, nodeid)
        _ID.pack_into(self._map, _COUNT_AT, place + 1)
        self._ids.append(nodeid)
        self._place[nodeid] = place

    def remove(self, nodeid: int) -> None:
        """The kernel has no page of this inode any more."""
        place = self._place.pop(nodeid, None)
        if place is None:
            return
        last = self._ids.pop()
        if last != nodeid:
            self._ids[place] = last
            self._place[last] = place
            _ID.pack_into(self._map, _HEADER.size + place * _ID.size, last)
        _ID.pack_into(self._map, _COUNT_AT, len(self._ids))

    def set_dropped(self, dropped: bool) -> None:
        """Say that nothing old can be read, and will not be before this is taken back."""
        _ID.pack_into(self._map, _DROPPED_AT, dropped)

    def close(self) -> None:
        """Close this end; more than once is allowed."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1


def _header(fd: int) -> tuple[int, int]:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) != _HEADER.size:
        raise MediaError("no list of cached inodes: too short")
    magic, dropped, count = _HEADER.unpack(header)
    if magic != MAGIC:
        raise MediaError("no list of cached inodes: other magic")
    return dropped, count


def is_dropped(fd: int) -> bool:
    """Return what the writer said last with ``set_dropped``. Raises MediaError: *fd* is no such list; OSError."""
    return bool(_header(fd)[0])


def read_list(fd: int) -> list[int]:
    """Return the listed node ids. Raises MediaError: *fd* is no such list; OSError."""
    _dropped, count = _header(fd)
    data = os.pread(fd, count * _ID.size, _HEADER.size)
    if len(data) != count * _ID.size:
        raise MediaError(f"a list of {count} cached inodes: {len(data)} bytes")
    return [number for (number,) in _ID.iter_unpack(data)]
