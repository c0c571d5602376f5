"""What the FUSE layer remembers of an inode that the kernel knows, and of an open descriptor."""

import asyncio
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Attr, Fid
from mxfsd.io.cachelist import CacheList

Names: TypeAlias = dict[bytes, Fid | None]
"""Directory entries by name; None is a name that is known not to be there."""


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
    """An inode that the kernel has looked up (``nlookup`` > 0) or has open."""

    listed: ClassVar[CacheList | None] = None
    """Where inodes with pages in the kernel are listed for whoever has to drop them when this process is dead."""

    __slots__ = (
        "_may_have_pages",
        "attr",
        "attr_seq",
        "batch",
        "batch_flags",
        "behind",
        "behind_error",
        "cached_writers",
        "changes",
        "confirmed",
        "end",
        "end_seq",
        "fid",
        "first_write",
        "in_flight",
        "late",
        "misses",
        "names",
        "names_seq",
        "names_whole",
        "nlookup",
        "no_capability_seq",
        "opens_r",
        "opens_w",
        "privileged",
        "refilled",
        "registered",
        "removing",
        "revocation",
        "serving",
        "settled",
        "writes",
    )

    def __init__(self, fid: Fid) -> None:
        self.fid = fid
        self.nlookup = 0
        self.confirmed = False
        """The kernel has named this inode in a request, so that it has one that an invalidation finds. Before that, the
        attributes of a lookup's reply might be put into an inode made after the invalidation: they get no timeout."""
        self.attr: Attr | None = None
        self.attr_seq = -1
        """Grant sequence of the PR (or stronger) lock that ``attr`` was read under."""
        self.names: Names | None = None
        self.names_seq = -1
        self.names_whole = False
        """``names`` has every entry: a name that is not in it does not exist."""
        self.misses = 0
        """Lookups in this directory that went to the home under the present lock."""
        self.no_capability_seq = -1
        """Grant sequence of the lock under which security.capability was seen not to be set."""
        self.batch: list[tuple[int, bytes]] = []
        self.batch_flags = 0
        """Small WRITEs that go to the home together, when the ones before are confirmed, and their WriteFlag."""
        self.behind = 0
        """WRITEs answered to the application that the home has not confirmed yet (only under EX)."""
        self.behind_error = 0
        """errno of one that failed, for the next write, fsync or close."""
        self.settled: asyncio.Event | None = None
        self.end = 0
        """Size of the file in bytes, where ``end_seq`` is the sequence of the EX lock that is held."""
        self.end_seq = -1
        self.opens_r = 0
        self.opens_w = 0
        self.cached_writers = 0
        self.changes = 0
        """Begins and ends of this node's own shipped changes: what was asked before one is not kept after it."""
        self.registered = (0, 0)
        """The open counts that the master was told last."""
        self._may_have_pages = False
        self.privileged = False
        """Its mode has set-id bits: a write takes them away."""
        self.in_flight: dict[int, tuple[int, int]] = {}
        """READ and WRITE upcalls of cached descriptors that wait: serial -> (offset, end). The kernel may hold their
        folios locked."""
        self.writes: dict[int, tuple[int, int, asyncio.Future[None]]] = {}
        """WRITE upcalls of cached descriptors that are not answered: serial -> (offset, end, future of its end). The
        kernel holds their folios locked, but not those that were up to date: these may be invalidated and read again
        meanwhile, and a READ that the home runs before the WRITE would leave old data in the cache."""
        self.late: set[int] = set()
        """Those of them that came during a revocation and wait for it: they are answered where it waits for them."""
        self.first_write = False
        """No WRITE has come since the last invalidation: the next one may be older than that, and than READs since."""
        self.refilled = False
        """A READ was answered since the last invalidation and before a WRITE came."""
        self.serving = 0
        """READ and WRITE upcalls that run just now under the lock."""
        self.revocation: Revocation | None = None
        self.removing: asyncio.Future[None] | None = None
        """Its last name may be going away just now: opens wait."""

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
    def opens(self) -> tuple[int, int]:
        """Descriptors open for reading, for writing."""
        return (self.opens_r, self.opens_w)

    def expect_old_write(self) -> None:
        """Pages were dropped just now."""
        self.first_write = True

    def forget_cached(self) -> None:
        """Drop what was read under a lock that is no longer held."""
        self.attr = None
        self.names = None
        self.names_whole = False
        self.misses = 0
        self.no_capability_seq = -1

    async def settle(self) -> None:
        """Wait until the home has confirmed every WRITE."""
        while self.behind:
            if self.settled is None:
                self.settled = asyncio.Event()
            await self.settled.wait()


class Handle:
    """An open regular file."""

    __slots__ = ("append", "direct", "fd", "flags", "ino", "node", "privileged", "writable")

    def __init__(self, node: Node, flags: int, writable: bool, append: bool, direct: bool, *, privileged: bool) -> None:
        self.node = node
        self.ino = node.fid.ino
        self.flags = flags
        self.writable = writable
        self.append = append
        self.direct = direct
        self.privileged = privileged
        """Opened by root, whose writes leave set-id bits alone (a WRITE upcall does not say who writes)."""
        self.fd = -1
        """Descriptor of the lower file, on the home; -1: not opened yet, or not the home."""


class DirHandle:
    """An open directory: the listing that its current pass goes through."""

    __slots__ = ("attr", "entries", "losses", "node")

    def __init__(self, node: Node, attr: Attr) -> None:
        self.node = node
        self.attr = attr
        """Its attributes when it was opened: what is left to say of it once another node removed it."""
        self.entries: Sequence[tuple[bytes, Attr | None]] | None = None
        self.losses = 0
        """``State.losses`` when the listing was taken."""
