"""File locks at the home: the operations on the table of all nodes, and which node may decide alone.

The lock master has a second resource of each inode (mxfs_proto.filelocks): whoever has it in EX decides about the
file locks of that inode alone, and this table may be behind. Every operation here takes it in CR first, so such a node
is called back and brings the table up to date (LK_ADOPT) before it lets go. From then on the home decides; as long as
somebody has locks or waits, a lock of nobody's on the resource (a *pin*, CR too) keeps the master from giving EX to the
home's own FUSE layer, which has it wherever the master has no record. docs/architecture.md, "File locks".
"""

import errno
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mxfs_proto.errors import PeerError
from mxfs_proto.filelocks import MAX_LOCKS, RESOURCE_BIT, UNLOCK, Held, check, is_resource, resource_of, unpack_held
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Op
from mxfsd.core.dlm import LockMaster
from mxfsd.core.filelocks import LockTables, LockView, Verdict

if TYPE_CHECKING:
    from mxfsd.home import HomeService, _Context

_ASKERS = 4096
_ERRNO = {Verdict.BUSY: errno.EAGAIN, Verdict.DEADLOCK: errno.EDEADLK, Verdict.FULL: errno.ENOLCK}


class FileLockOps:
    """The file locks of the volume. *on_wake* (node, inode, wait id) tells a waiter to ask again."""

    def __init__(self, service: "HomeService", master: LockMaster) -> None:
        self._service = service
        self._master = master
        self._home = master.home
        self.tables = LockTables(2 * MAX_LOCKS)  # some are of inodes about which the node decides, and gone there

        self._pins: dict[int, int] = {}
        self._askers: OrderedDict[int, int] = OrderedDict()
        """Who asked last. A node decides alone when it asks twice in a row, or nobody else has asked lately."""
        self._reclaimed: dict[int, set[int]] = {}
        self.on_wake: Callable[[int, int, int], None] = lambda _node, _ino, _wait_id: None
        self.connection_of: Callable[[int], int] = lambda _node: 0
        """Differs after each connection of a node: what it sent over an earlier one may be behind what it says now."""

    def handlers(self) -> dict[Op, Callable[..., Any]]:
        """Return what executes each operation."""
        return {Op.LK_SET: self._set, Op.LK_TEST: self._test, Op.LK_ADOPT: self._adopt, Op.LK_CANCEL: self._cancel}

    # -- operations ------------------------------------------------------------------------------------------------

    async def _enter(self, c: "_Context", ino: int) -> None:
        """Call back whoever decides alone. Nothing awaits from the end of this to the end of the operation."""
        if is_resource(ino):
            raise PeerError(f"inode {ino:#x} of a file lock is none")
        connection = self.connection_of(c.node)
        await c.lock((resource_of(ino), LockMode.CR))
        if connection != self.connection_of(c.node):
            raise OSError(errno.ENOTCONN, "asked before the node named its locks anew")  # nobody is answered
        c.executed = True

    async def _set(
        self, c: "_Context", ino: int, owner: int, start: int, end: int, pid: int, kind: int, flock: int, wait_id: int
    ) -> list[Any]:
        lock = Held(owner, start, end, pid, kind, bool(flock))
        check(lock)
        await self._enter(c, ino)
        before = self._askers.pop(ino, c.node)
        self._askers[ino] = c.node
        if len(self._askers) > _ASKERS:
            self._askers.popitem(last=False)
        verdict = self.tables.request(ino, c.node, lock, wait_id)
        nodes = self.tables.nodes_of(ino)
        alone = nodes <= {c.node} and c.node != self._home and not self.tables.waited_for(ino)
        if alone and c.want_lock and (not nodes or before == c.node):
            self._unpin(ino)
            c.grant(resource_of(ino), LockMode.EX)
        self._settle(ino, alone=before == c.node)
        self._send_wakes()
        if verdict in _ERRNO:
            raise OSError(_ERRNO[verdict], verdict.value)
        return [int(verdict is Verdict.WAITING)]

    async def _test(
        self, c: "_Context", ino: int, owner: int, start: int, end: int, pid: int, kind: int, flock: int
    ) -> list[Any]:
        lock = Held(owner, start, end, pid, kind, bool(flock))
        check(lock)
        await self._enter(c, ino)
        found = self.tables.test(ino, c.node, lock)
        if found is None:
            return [UNLOCK, start, end, 0, 0]
        node, held = found
        return [held.type, held.start, held.end, held.pid, node]

    async def _adopt(self, c: "_Context", ino: int, blob: bytes) -> list[Any]:
        locks = unpack_held(blob)
        await self._enter(c, ino)
        fits = self.tables.adopt(ino, c.node, locks)
        self._settle(ino)
        self._send_wakes()
        if not fits:
            raise OSError(errno.EBUSY, "others hold what conflicts")
        return []

    async def _cancel(self, c: "_Context", ino: int, wait_id: int) -> list[Any]:
        await self._enter(c, ino)
        self.tables.cancel(ino, c.node, wait_id)
        self._settle(ino)
        self._send_wakes()
        return []

    # -- nodes -----------------------------------------------------------------------------------------------------

    def reclaim(self, node: int, ino: int, locks: list[Held]) -> bool:
        """A node names all that it holds of an inode. False where that is not its any more."""
        if self._master.serving and not self._recorded_for(node, ino):
            return False  # nobody gave that to the node, or it was put out since
        self._reclaimed.setdefault(node, set()).add(ino)
        fits = self.tables.adopt(ino, node, locks)
        self._settle_later(ino)
        return fits

    def reclaimed(self, node: int) -> None:
        """The node has named everything: it holds and waits for nothing else."""
        named = self._reclaimed.pop(node, set())
        for ino in self.tables.inodes_of(node):
            if ino not in named:
                self.tables.drop(ino, node)
                self._settle_later(ino)
        self._send_wakes()

    def node_gone(self, node: int) -> None:
        """A node left, or was put out."""
        self._reclaimed.pop(node, None)
        for ino in self.tables.drop_node(node):
            self._settle_later(ino)
        self._send_wakes()

    def grace_over(self) -> None:
        """All nodes have named their locks: keep the home's own FUSE layer from deciding where others have some."""
        for ino in self.tables.inodes():
            self._settle(ino)

    # -- views -----------------------------------------------------------------------------------------------------

    def view(self) -> list[tuple[LockView, bool]]:
        """Return each lock and waiter, and whether its node decides alone (then this may be behind)."""
        return [
            (row, self._master.mode_of(row.node, resource_of(row.ino)) is LockMode.EX) for row in self.tables.view()
        ]

    def is_pin(self, op_id: int) -> bool:
        """Whether an operation's lock is one of ours on nobody's behalf."""
        return bool(op_id & RESOURCE_BIT)

    # -- who decides -----------------------------------------------------------------------------------------------

    def _recorded_for(self, node: int, ino: int) -> bool:
        """Whether the home knows that the node has locks there, or that it may decide alone. (Where nobody else has any
        the home's own FUSE layer is about to: no pin any more, and no lock yet.)"""
        alone = self._master.mode_of(node, resource_of(ino)) is LockMode.EX
        return alone or ino in self._pins or node in self.tables.nodes_of(ino)

    def _settle_later(self, ino: int) -> None:
        """As _settle(), outside an operation; in the grace period that comes at its end."""
        if self._master.serving:
            self._settle(ino)

    def _settle(self, ino: int, alone: bool = True) -> None:
        """Pin the resource where somebody has something to lose by the home's EX, else let go of it."""
        nodes = self.tables.nodes_of(ino)
        if not nodes or (alone and nodes == {self._home}):
            self._unpin(ino)
        elif ino not in self._pins:
            # The number of a pin cannot be that of an operation, which are counted from 1.
            self._pins[ino] = op_id = resource_of(ino)
            self._master.pin(self._service.now(), op_id, resource_of(ino))

    def _unpin(self, ino: int) -> None:
        op_id = self._pins.pop(ino, None)
        if op_id is not None:
            self._service.release_pin(op_id, resource_of(ino))

    def _send_wakes(self) -> None:
        for node, ino, wait_id in self.tables.take_wakes():
            self.on_wake(node, ino, wait_id)
