"""What the FUSE layer remembers of an inode that the kernel knows, and of an open descriptor."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Attr, Fid, pack_attr, unpack_attr
from mxfsd.io.cachelist import CacheList

if TYPE_CHECKING:
    from mxfs_fuse.passthrough import PassthroughFile

Names: TypeAlias = dict[bytes, Fid | None]
"""Directory entries by name; None is a name that is known not to be there."""
Span: TypeAlias = tuple[int, int]
"""Offset and end, in bytes."""
Waiting: TypeAlias = tuple[int, int, asyncio.Future[None]]
"""Offset, end, future of its end."""
Call: TypeAlias = Literal["write", "fsync", "close"]

_NO_SPANS: Mapping[int, Span] = MappingProxyType({})
_NO_WRITES: Mapping[int, Waiting] = MappingProxyType({})
_NONE_LATE: frozenset[int] = frozenset()
_NO_OPENS = (0, 0)


class Revocation:
    """A cached lock on its way out: how READ and WRITE upcalls behave meanwhile (docs/architecture.md)."""

    __slots__ = ("_waiters", "again", "held", "serve")

    def __init__(self, held: LockMode) -> None:
        self.held = held
        self.serve = False
        """Upcalls are answered under the lock still held: the invalidation waits for folios of theirs."""
        self.again = False
        """One was answered since the pass began: its folios must be invalidated too."""
        self._waiters: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Return when the lock may be used once more, or is gone."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        await future

    def wake(self) -> None:
        """Let the waiting upcalls look again."""
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)


class Node:
    """An inode that the kernel has looked up (``nlookup`` > 0) or has open.

    There may be very many, most of them idle. So what only a busy one needs is an attribute of the class at first, and
    one of its own, in a dict that is made for it, when it is set.
    """

    listed: ClassVar[CacheList | None] = None
    """Where inodes with pages in the kernel are listed for whoever has to drop them when this process is dead."""

    __slots__ = (
        "__dict__",
        "_attr",
        "_may_have_pages",
        "attr_seq",
        "cached_writers",
        "changes",
        "confirmed",
        "fid",
        "is_dir",
        "nlookup",
        "opens_r",
        "opens_w",
        "privileged",
        "registered",
    )

    # -- directories
    names: Names | None = None
    names_seq = -1
    names_whole = False
    """``names`` has every entry: a name that is not in it does not exist."""
    misses = 0
    """Lookups in this directory that went to the home under the present lock."""

    # -- what was written
    no_capability_seq = -1
    """Grant sequence of the lock under which security.capability was seen not to be set."""
    batch: list[tuple[int, bytes]] | None = None
    batch_flags = 0
    """Small WRITEs that go to the home together, when the ones before are confirmed, and their WriteFlag."""
    behind = 0
    """WRITEs answered to the application that the home has not confirmed yet (only under EX)."""
    behind_error = 0
    """errno of the last change that was answered and came to nothing: see ``Descriptor``,"""
    errors = 0
    """how many there were,"""
    errors_told = 0
    """and of how many somebody has been told."""
    end = 0
    """Size of the file in bytes, where ``end_seq`` is the sequence of the EX lock that is held."""
    end_seq = -1

    # -- upcalls under way, and pages that are dropped
    _in_flight: dict[int, Span] | None = None
    _writes: dict[int, Waiting] | None = None
    late = _NONE_LATE
    """Those of them that came during a revocation and wait for it: they are answered where it waits for them."""
    first_write = False
    """No WRITE has come since the last invalidation: the next one may be older than that, and than READs since."""
    refilled = False
    """A READ was answered since the last invalidation and before a WRITE came."""
    _serving: dict[int, Span] | None = None
    _left_out = _NONE_LATE
    revocation: Revocation | None = None
    unnamed = False
    """Made with O_TMPFILE, and not linked anywhere since: it may have a name, unlike what has lost its last one."""
    pinned = False
    """The kernel may write it by itself, and nobody hears of it (mxfs_fuse/passthrough.py)."""
    pin_told = False
    """What the master was told of that last."""
    removing: asyncio.Future[None] | None = None
    """Its last name may be going away just now: opens wait."""

    def __init__(self, fid: Fid) -> None:
        self.fid = fid
        self.nlookup = 0
        self.confirmed = False
        """The kernel has named this inode in a request, so that it has one that an invalidation finds. Before that, the
        attributes of a lookup's reply might be put into an inode made after the invalidation: they get no timeout."""
        self.is_dir = True
        """So it is taken for, until a reply that names it says what it is: names are kept under its lock."""
        self._attr: bytes | None = None  # packed, it takes a third of the memory
        self.attr_seq = -1
        """Grant sequence of the PR (or stronger) lock that ``attr`` was read under."""
        self.opens_r = 0
        self.opens_w = 0
        self.cached_writers = 0
        self.changes = 0
        """Begins and ends of this node's own shipped changes: what was asked before one is not kept after it."""
        self.registered = _NO_OPENS
        """The open counts that the master was told last."""
        self._may_have_pages = False
        self.privileged = False
        """Its mode has set-id bits: a write takes them away."""

    @property
    def may_have_pages(self) -> bool:
        """The kernel may have pages of it. Raises OSError where that cannot be listed."""
        return self._may_have_pages

    @may_have_pages.setter
    def may_have_pages(self, may: bool) -> None:
        if self.listed is not None:
            if may:
                self.listed.add(self.fid.ino)
            else:
                self.listed.remove(self.fid.ino)
        self._may_have_pages = may

    @property
    def attr(self) -> Attr | None:
        """Attributes, as the home told them."""
        return None if self._attr is None else unpack_attr(self._attr)

    @attr.setter
    def attr(self, attr: Attr | None) -> None:
        self._attr = None if attr is None else pack_attr(attr)

    @property
    def in_flight(self) -> Mapping[int, Span]:
        """READ and WRITE upcalls of cached descriptors that wait, by serial. Their folios may be locked."""
        return self._in_flight or _NO_SPANS

    def came(self, serial: int, start: int, end: int) -> None:
        """An upcall waits."""
        if self._in_flight is None:
            self._in_flight = {}
        self._in_flight[serial] = (start, end)

    def waits_no_more(self, serial: int) -> None:
        """It is served, or given up."""
        if self._in_flight is not None:
            self._in_flight.pop(serial, None)
            self._in_flight = self._in_flight or None

    @property
    def serving(self) -> Mapping[int, Span]:
        """READ and WRITE upcalls that run just now under the lock, by serial. Their folios may be locked: for long
        where the home has died that was to answer."""
        return self._serving or _NO_SPANS

    def serves(self, serial: int, start: int, end: int) -> None:
        """An upcall runs, and waits no more."""
        self.waits_no_more(serial)
        if self._serving is None:
            self._serving = {}
        self._serving[serial] = (start, end)

    def served(self, serial: int) -> bool:
        """It is over. True: its pages were left out when all others were dropped."""
        if self._serving is not None:
            self._serving.pop(serial, None)
            self._serving = self._serving or None
        left_out = serial in self._left_out
        self._left_out -= {serial}
        return left_out

    def leave_out_served(self) -> None:
        """Pages of upcalls that run just now are not dropped with the others."""
        self._left_out |= self.serving.keys()

    @property
    def writes(self) -> Mapping[int, Waiting]:
        """WRITE upcalls of cached descriptors that are not answered, by serial.

        The kernel holds their folios locked, but not those that were up to date: these may be invalidated and read
        again meanwhile, and a READ that the home runs before the WRITE would leave old data in the cache.
        """
        return self._writes or _NO_WRITES

    def write_came(self, serial: int, start: int, end: int, answered: asyncio.Future[None]) -> None:
        """A WRITE upcall is to be answered."""
        if self._writes is None:
            self._writes = {}
        self._writes[serial] = (start, end, answered)

    def write_over(self, serial: int) -> None:
        """It is answered; who waits for that may go on."""
        assert self._writes is not None
        self._writes.pop(serial)[2].set_result(None)
        self._writes = self._writes or None

    @property
    def opens(self) -> tuple[int, int]:
        """Descriptors open for reading, for writing."""
        return (self.opens_r, self.opens_w) if self.opens_r or self.opens_w else _NO_OPENS

    def expect_old_write(self) -> None:
        """Pages were dropped just now."""
        self.first_write = True

    def pages_dropped(self) -> None:
        """All its pages were dropped just now: none is left that a READ since then has filled."""
        self.expect_old_write()
        self.refilled = False

    def granted_again(self, old: int, new: int) -> None:
        """The lock that was held all the time has another grant sequence: what is known under it stays known."""
        if self.attr_seq == old:
            self.attr_seq = new
        if self.__dict__:
            if self.names_seq == old:
                self.names_seq = new
            if self.no_capability_seq == old:
                self.no_capability_seq = new

    def lose(self, code: int) -> None:
        """Something that was answered came to nothing, for the reason *code* (errno)."""
        self.behind_error = code
        self.errors += 1

    def forget_cached(self) -> None:
        """Drop what was read under a lock that is no longer held."""
        self.attr = None
        if self.__dict__:
            self.names = None
            self.names_whole = False
            self.misses = 0
            self.no_capability_seq = -1


class Descriptor:
    """An open file or directory, which is told what was answered and came to nothing, as errseq_t is in the kernel.

    Each kind of call is told once, and fsync for all. No other would do for all: of what a WRITE is told in the middle
    of a write(2) the program hears nothing but how much was written before, and a process that exits closes what others
    go on using.
    """

    __slots__ = ("_before", "_told", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self._before = node.errors_told
        self._told: dict[Call, int] | None = None

    def raise_error(self, call: Call) -> None:
        """Raise OSError where such a call has not been told yet."""
        node = self.node
        told = self._before if self._told is None else self._told.get(call, self._before)
        if told < node.errors:
            if call == "fsync":
                self._before, self._told = node.errors, None
            else:
                self._told = {**(self._told or {}), call: node.errors}
            node.errors_told = node.errors
            raise OSError(node.behind_error, os.strerror(node.behind_error))


class Handle(Descriptor):
    """An open regular file."""

    __slots__ = ("append", "direct", "fd", "flags", "free", "ino", "passthrough", "privileged", "writable")

    def __init__(self, node: Node, flags: int, writable: bool, append: bool, direct: bool, *, privileged: bool) -> None:
        super().__init__(node)
        self.ino = node.fid.ino
        self.flags = flags
        self.writable = writable
        self.append = append
        self.direct = direct
        self.privileged = privileged
        """Its writes leave set-id bits alone: as the last WRITE upcall said, or, where these say nothing, as who opened
        it may (root)."""
        self.passthrough: PassthroughFile | None = None
        """The kernel maps it by itself, and with ``free`` reads and writes it too (mxfs_fuse/passthrough.py)."""
        self.free = False
        self.fd = -1
        """Descriptor of the lower file, on the home; -1: not opened yet, or not the home."""


class DirHandle(Descriptor):
    """An open directory: the listing that its current pass goes through."""

    __slots__ = ("attr", "entries", "losses")

    def __init__(self, node: Node, attr: Attr) -> None:
        super().__init__(node)
        self.attr = attr
        """Its attributes when it was opened: what is left to say of it once another node removed it."""
        self.entries: Sequence[tuple[bytes, Attr | None]] | None = None
        self.losses = 0
        """``State.losses`` when the listing was taken."""
