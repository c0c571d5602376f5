"""How operations say what they found: in pyfuse3's types, or as the kernel wants it.

An operation treats what it makes here as a whole and hands it back; only the channel looks into it.
"""

import sys
from typing import Any, Protocol, cast

import pyfuse3

from mxfs_proto.fuse import ATTR, ATTR_OUT_HEAD, DIRENT, ENTRY_OUT
from mxfs_proto.ops import Attr

_BLOCK = 4096
_NS = 1_000_000_000
_MODE_AT = ENTRY_OUT.size - ATTR.size + 60
"""Where the mode is in an ENTRY_OUT."""


class Replies(Protocol):
    """Makes answers. *nodeid* is the kernel's number of the inode; times to live are in seconds."""

    def entry(self, nodeid: int, attr: Attr, attr_ttl: float, entry_ttl: float) -> Any:
        """Attributes, and an entry that leads to them."""

    def absent(self, entry_ttl: float) -> Any:
        """A name that is known not to be there."""

    def add(self, token: Any, name: bytes, entry: Any, next_id: int) -> bool:
        """Add an entry to a listing; False: it has no room left."""


class LibfuseReplies:
    """pyfuse3's types."""

    def entry(self, nodeid: int, attr: Attr, attr_ttl: float, entry_ttl: float) -> pyfuse3.EntryAttributes:
        """Attributes, and an entry that leads to them."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = cast(Any, nodeid)
        entry.generation = attr[1]
        entry.st_mode = cast(Any, attr[2])
        entry.st_nlink = attr[3]
        entry.st_uid = attr[4]
        entry.st_gid = attr[5]
        entry.st_rdev = attr[6]
        entry.st_size = attr[7]
        entry.st_blocks = attr[8]
        entry.st_blksize = _BLOCK
        entry.st_atime_ns = attr[9]
        entry.st_mtime_ns = attr[10]
        entry.st_ctime_ns = attr[11]
        entry.attr_timeout = attr_ttl
        entry.entry_timeout = entry_ttl
        return entry

    def absent(self, entry_ttl: float) -> pyfuse3.EntryAttributes:
        """A name that is known not to be there."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = cast(Any, 0)
        entry.entry_timeout = entry_ttl
        return entry

    def add(self, token: Any, name: bytes, entry: Any, next_id: int) -> bool:
        """Add an entry to a listing; False: it has no room left."""
        return pyfuse3.readdir_reply(token, name, entry, next_id)


class NativeReplies:
    """Structs of <linux/fuse.h>: an entry is a packed ENTRY_OUT."""

    def entry(self, nodeid: int, attr: Attr, attr_ttl: float, entry_ttl: float) -> bytes:
        """Attributes, and an entry that leads to them."""
        ino, generation, mode, nlink, uid, gid, rdev, size, blocks, atime, mtime, ctime = attr
        attr_ns, entry_ns = int(attr_ttl * _NS), int(entry_ttl * _NS)
        a_s, a_ns = divmod(atime, _NS)
        m_s, m_ns = divmod(mtime, _NS)
        c_s, c_ns = divmod(ctime, _NS)
        return ENTRY_OUT.pack(
            nodeid, generation, entry_ns // _NS, attr_ns // _NS, entry_ns % _NS, attr_ns % _NS,
            nodeid, size, blocks, a_s & _U64, m_s & _U64, c_s & _U64, a_ns, m_ns, c_ns,
            mode, nlink, uid, gid, rdev & 0xFFFFFFFF, _BLOCK, 0,
        )  # fmt: skip

    def absent(self, entry_ttl: float) -> bytes:
        """A name that is known not to be there."""
        ns = int(entry_ttl * _NS)
        return ENTRY_OUT.pack(0, 0, ns // _NS, 0, ns % _NS, *[0] * 17)

    def add(self, token: "Listing", name: bytes, entry: bytes, next_id: int) -> bool:
        """Add an entry to a listing; False: it has no room left."""
        return token.add(name, entry, next_id)


_U64 = (1 << 64) - 1


def attr_out(entry: bytes) -> bytes:
    """Return the answer to GETATTR and SETATTR (struct fuse_attr_out) with the attributes of an entry."""
    fields = ENTRY_OUT.unpack(entry)
    return ATTR_OUT_HEAD.pack(fields[3], fields[5], 0) + entry[-ATTR.size :]


class Listing:
    """The answer to READDIRPLUS (struct fuse_direntplus), to READDIR without attributes, of *size* bytes at most."""

    def __init__(self, size: int, plus: bool) -> None:
        self._left = size
        self._plus = plus
        self.parts: list[bytes] = []

    def add(self, name: bytes, entry: bytes, next_id: int) -> bool:
        """Add an entry; False: there is no room left."""
        length = DIRENT.size + len(name)
        padding = -length % 8
        total = length + padding + (len(entry) if self._plus else 0)
        if total > self._left:
            return False
        self._left -= total
        ino = int.from_bytes(entry[:8], sys.byteorder)
        mode = int.from_bytes(entry[_MODE_AT : _MODE_AT + 4], sys.byteorder)
        if self._plus:
            self.parts.append(entry)
        self.parts.append(DIRENT.pack(ino, next_id, len(name), mode >> 12 & 15))
        self.parts.append(name + bytes(padding))
        return True
