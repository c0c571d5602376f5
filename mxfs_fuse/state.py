"""What all operations of one mount share: inodes, locks, the link to the home, the lower mount where this is it."""

import asyncio
import errno
import functools
import os
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from mxfs_fuse.callers import LOOK_S, caller, is_dying
from mxfs_fuse.kernel import KernelNotifier
from mxfs_fuse.link import OperationLink
from mxfs_fuse.locks import LockClient
from mxfs_fuse.nodes import Node
from mxfs_proto.frames import ReclaimEntry
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Attr, Fid, Grant, Op
from mxfs_proto.records import Record
from mxfsd.core.unstable import UnstableData
from mxfsd.io.clock import now_ms
from mxfsd.io.lower import Lower

_FUSE_ROOT = 1
_PR = LockMode.PR
_EX = LockMode.EX
_OTHERS = LockFlag.OTHER_OPEN | LockFlag.OTHER_WRITER
_DIRTY_MAX = 1 << 16
_POLL_S = 0.001


def is_down(lower: Lower) -> bool:
    """Whether the XFS is shut down: stat(2) says EIO then (xfs_vn_getattr)."""
    try:
        os.fstat(lower.mount_fd)
    except OSError:
        return True
    return False


class State:
    """Shared state of one mount. All of it belongs to the event loop's thread."""

    def __init__(self, root: Fid, kernel_cache_ms: int, readonly: bool, send: Callable[[Record], None]) -> None:
        self.root = root
        self.readonly = readonly
        self.nodes: dict[int, Node] = {}
        self.link = OperationLink(self._adopt)
        self.unstable = UnstableData()
        """What this node wrote, while it was not the home, and no home has made durable yet (mxfs_fuse/writes.py)."""
        self.before_forget: Callable[[Node], bool] = lambda _node: False
        """Asked before an inode is forgotten. True: it is forgotten later, its lock is needed still."""
        self.forgotten: Callable[[int], None] = lambda _ino: None
        """Called when it is."""
        self.locks = LockClient(self.nodes, send, self._sync_of, self._before_release, self.nodeid_of, self._lock_lost)
        self.lower: Lower | None = None
        self.kernel: KernelNotifier | None = None
        self.gate: asyncio.Event | None = asyncio.Event()
        """While not None, operations wait: there is no home to serve them (or our lease is over)."""
        self.dead = ""
        """Why this mount answers nothing but EIO any more; empty while it lives."""
        self.kept_all = True
        """Nothing was lost when the lower mount went away the last time."""
        self.on_lower_down: Callable[[], None] = lambda: None
        """Called when the lower mount is found shut down under us."""
        self.lease_until_ms = 0
        self.changes = 0
        """Begins and ends of this node's own shipped changes."""
        self._lower_users = 0
        """Threads that work on the lower mount."""
        self.losses = 0
        """Locks lost so far: while it stays the same, whatever was read under a lock is still current."""
        self.lease_margin_ms = kernel_cache_ms // 8
        """So long before the end of the lease what is cached begins to be dropped."""
        self._kernel_cache_ms = kernel_cache_ms
        self._dirty: set[int] = set()
        self._dirty_sync: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.known(root).nlookup = 1

    # -- inode numbers ---------------------------------------------------------------------------------------------

    def nodeid_of(self, ino: int) -> int:
        """The kernel's node id of a lower inode."""
        return _FUSE_ROOT if ino == self.root.ino else ino

    def ino_of(self, nodeid: int) -> int:
        """The lower inode of the kernel's node id."""
        return self.root.ino if nodeid == _FUSE_ROOT else nodeid

    def node(self, nodeid: int) -> Node:
        """The inode that the kernel names; ESTALE where we do not know it."""
        node = self.nodes.get(self.root.ino if nodeid == _FUSE_ROOT else nodeid)
        if node is None:
            raise OSError(errno.ESTALE, f"unknown inode {nodeid}")
        return node

    def known(self, fid: Fid) -> Node:
        """The node of *fid*, made where it is new; a reused inode number keeps only the kernel's references."""
        node = self.nodes.get(fid[0])
        if node is None:
            node = self.nodes[fid[0]] = Node(fid)
        elif node.fid[1] != fid[1]:
            fresh = Node(fid)
            fresh.nlookup = node.nlookup
            node = self.nodes[fid[0]] = fresh
        return node

    def fid_of(self, attr: Attr) -> Fid:
        """The object that has these attributes; for one that is known its node's: there may be very many."""
        node = self.nodes.get(attr.ino)
        return node.fid if node is not None and node.fid.gen == attr.gen else Fid(attr.ino, attr.gen)

    def forget(self, node: Node) -> None:
        """The kernel has no reference left: give the lock back and drop the node, unless it is open here."""
        if node.nlookup > 0 or node.opens_r or node.opens_w:
            return
        ino = node.fid.ino
        if self.nodes.get(ino) is node:
            if self.before_forget(node):
                return
            del self.nodes[ino]
            node.may_have_pages = False  # they went with the kernel's inode
            if self.lower is None:
                self.locks.run(self.locks.cache.forget(now_ms(), ino))
            self.forgotten(ino)

    # -- locks -----------------------------------------------------------------------------------------------------

    def may_read(self, ino: int) -> bool:
        """Whether a lock is held under which reads need nobody."""
        return self.locks.mode(ino) >= _PR

    def may_change(self, ino: int) -> bool:
        """Whether a lock is held under which a change on the home needs nobody."""
        return self.locks.mode(ino) == _EX

    def may_free(self, ino: int) -> bool:
        """Whether, besides, no other node has it open: then this node alone decides what becomes of the last name."""
        return self.locks.mode(ino) == _EX and not self.locks.cache.flags(ino) & _OTHERS

    def granted(self, grants: Iterable[Grant], ino: int) -> bool:
        """Whether a reply came with the lock on *ino* that is held now: then what it says may be kept."""
        seq = self.locks.seq(ino)
        return any(grant.ino == ino and grant.seq == seq for grant in grants)

    def attr_holds(self, node: Node) -> bool:
        """Whether the attributes kept of a node are still under the lock that they were read under."""
        return node.attr is not None and node.attr_seq == self.locks.seq(node.fid.ino) and self.may_read(node.fid.ino)

    def remember_attr(self, node: Node, attr: Attr, grants: Iterable[Grant], changes: int) -> None:
        """Keep attributes of a reply that came with a lock (not on the home: its lower mount is as near).

        *changes* is ``node.changes`` when they were asked for: those from before a change of our own are not kept.
        """
        if node.changes != changes:
            return
        if self.lower is None and self.granted(grants, node.fid.ino) and self.may_read(node.fid.ino):
            node.attr = attr
            node.attr_seq = self.locks.seq(node.fid.ino)

    def own_change(self, *nodes: Node) -> None:
        """A shipped change of this node's begins, or has ended: what was asked for before is not kept from now on."""
        self.changes += 1
        for node in nodes:
            node.changes += 1
            node.attr = None

    def _adopt(self, grants: list[Grant]) -> None:
        """Take the locks of a reply."""
        now = now_ms()
        for ino, mode, seq in grants:
            with self.locks.granting(ino):
                self.locks.run(self.locks.cache.adopt(now, ino, LockMode(mode), seq))

    def _lock_lost(self, ino: int) -> None:
        """Another node may change, or remove, this object: keep no descriptor that would hold it."""
        self.losses += 1
        if self.lower is not None:
            self.lower.forget(ino)

    def held_rows(self) -> list[ReclaimEntry]:
        """What this node holds and has open, for the next home. What was held implicitly (this was the home) is named
        where the kernel caches something under it: EX for a file with a cached writer, else PR. A file with data that
        the next home must be sent first is named with EX, also where its lock was dropped with the lease: nobody may
        see it before that, and if somebody has it by now the data must not be sent.

        What is not named here (a lock on an inode that the kernel has forgotten meanwhile) is held no more."""
        rows = []
        for ino, node in self.nodes.items():
            mode = self.locks.cache.data_mode(ino)
            if node.behind or self.unstable.holds(node.fid):
                mode = _EX
            elif mode > _PR and not node.cached_writers:
                mode = _PR
            if mode != LockMode.NL or node.opens_r or node.opens_w:
                node.registered = node.opens
                rows.append(ReclaimEntry(*node.fid, mode, *node.opens))
        self.locks.cache.hold_named({row.ino: row.mode for row in rows})
        return rows

    # -- time ------------------------------------------------------------------------------------------------------

    def ttl(self) -> float:
        """Seconds that the kernel may keep attributes: shorter than what is left of our lease."""
        left = min(self._kernel_cache_ms, self.lease_until_ms - self.lease_margin_ms - now_ms())
        return left / 1000 if left > 0 else 0.0

    def entry_ttl(self, ttl: float, parent_ino: int) -> float:
        """Seconds that the kernel may keep an entry of the directory."""
        if self.kernel is None or not self.kernel.has_epoch or not self.may_read(parent_ino):
            return 0.0
        return ttl

    # -- the gate --------------------------------------------------------------------------------------------------

    async def pass_gate(self) -> None:
        """Wait until operations may run. Raises OSError: EIO when they never will, EINTR when the caller is dying."""
        while self.gate is not None:
            if self.dead:
                raise OSError(errno.EIO, self.dead)
            tid = caller.get()
            if not tid:
                await self.gate.wait()
                continue
            opened = asyncio.ensure_future(self.gate.wait())
            try:
                # (Not wait_for(), which from Python 3.12 on wants a task: see mxfs_fuse/channel/native.py.)
                done, _ = await asyncio.wait((opened,), timeout=LOOK_S)
            finally:
                opened.cancel()
            if not done and is_dying(tid):
                raise OSError(errno.EINTR, "the caller is dying")

    def die(self, reason: str) -> None:
        """This mount is dead: everything that waits, and everything to come, fails with EIO."""
        self.dead = reason
        self.close_gate()
        assert self.gate is not None
        self.gate.set()  # who waits there looks again; the gate itself stays
        self.link.fail_all()
        self.locks.fail_all(errno.EIO)

    def close_gate(self) -> None:
        """Hold new operations back."""
        if self.gate is None:
            self.gate = asyncio.Event()

    def open_gate(self) -> None:
        """Let operations run."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.set()

    def check_writable(self) -> None:
        """The one guard of the local way: EROFS on a read-only mount."""
        if self.readonly:
            raise OSError(errno.EROFS, "mounted read-only")

    # -- durability of local changes on the home -------------------------------------------------------------------

    def changed(self, *inos: int) -> None:
        """Note inodes that the local way changed: before another node may see them they are made durable."""
        self._dirty.update(inos)
        if len(self._dirty) > _DIRTY_MAX and self._dirty_sync is None:
            self._dirty_sync = asyncio.get_running_loop().create_task(self._clean_dirty())

    async def _clean_dirty(self) -> None:
        """Keep the set of changed inodes small."""
        lower = self.lower
        before = set(self._dirty)
        try:
            if lower is not None:
                self._dirty.clear()
                try:
                    await self.in_lower(lower.syncfs)
                except OSError:
                    self._dirty |= before
                    raise
        finally:
            self._dirty_sync = None

    def _sync_of(self, ino: int) -> Callable[[], None] | None:
        """What makes local changes of *ino* durable, to be run in a thread; None where there are none."""
        lower = self.lower
        node = self.nodes.get(ino)
        if lower is None or (ino not in self._dirty and not (node is not None and node.pinned)):
            return None
        self._dirty.discard(ino)

        def sync() -> None:
            try:
                if node is not None:
                    lower.sync(node.fid)
                else:
                    lower.syncfs()
            except OSError:
                self._dirty.add(ino)
                raise

        return sync

    @property
    def unsynced(self) -> set[int]:
        """Inodes that the local way changed and that were not made durable since."""
        return self._dirty

    def lower_is_down(self) -> None:
        """The lower mount was shut down under us: begin nothing more."""
        self.close_gate()
        self.on_lower_down()

    def lower_ended(self, kept_all: bool) -> int:
        """The lower mount is gone. Where not everything was *kept*, the next fsync and close of what was changed here
        say so. Returns the number of inodes with changes that are lost."""
        lost, self._dirty = self._dirty, set()
        self.kept_all = kept_all
        if kept_all:
            return 0
        for ino in lost:
            node = self.nodes.get(ino)
            if node is not None:
                node.lose(errno.EIO)
        return len(lost)

    async def sync_local(self, node: Node) -> None:
        """Make an object on the lower mount durable. Raises OSError."""
        lower = self.lower
        assert lower is not None
        changed = node.fid.ino in self._dirty
        self._dirty.discard(node.fid.ino)  # what is changed from now on is not covered
        try:
            await self.in_lower(functools.partial(lower.sync, node.fid))
        except OSError:
            if changed:
                self._dirty.add(node.fid.ino)
            raise

    async def _before_release(self, work: Callable[[], None]) -> None:
        """Make durable what a lock covers that is given up. Raises OSError, and then the lock stays."""
        lower = self.lower
        try:
            await self.in_lower(work)
        except OSError:
            if lower is None or (self.lower is lower and not is_down(lower)):
                raise
            # Gone with the home that the lock was of. Nothing is told to that home's daemon any more.
            self.lower_is_down()
            while self.lower is lower:
                await asyncio.sleep(_POLL_S)

    async def in_lower(self, work: Callable[[], None]) -> None:
        """Run *work* on the lower mount in a thread; the mount is not left before it ends."""
        self._lower_users += 1
        try:
            await asyncio.get_running_loop().run_in_executor(None, work)
        finally:
            self._lower_users -= 1

    async def leave_lower(self) -> None:
        """Close the lower mount; what still runs on it ends first. The gate is closed, so nothing new begins."""
        lower, self.lower = self.lower, None
        while self._lower_users:
            await asyncio.sleep(_POLL_S)
        if lower is not None:
            lower.close()

    @staticmethod
    def later(seconds: float, work: Callable[[], None]) -> None:
        """Call *work* after a while."""
        asyncio.get_running_loop().call_later(seconds, work)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that raises nothing, in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- in the background -----------------------------------------------------------------------------------------

    def reap(self, fid: Fid) -> None:
        """Tell the home that this node has not open (any more) what it keeps among the orphans."""

        async def run() -> None:
            try:
                await self.link.ship(Op.REAP, 0, 0, fid)
            except OSError:
                pass  # the next home looks through the orphans anyway

        self.spawn(run())
