"""WRITEs of a node that is not the home: how they are shipped, and how their data outlives a home that dies.

The home answers a WRITE when its page cache has the data. Until a commit (FSYNC) has made it durable this node keeps
it (`mxfsd/core/unstable.py`), and writes it again through the next home before anything else is asked of that one. A
replay must not undo what was done later, so data is kept only while nobody else can change the file:

* Only what is written under PW or EX is kept. Everything else is a STABLE WRITE: durable before it is answered.
* What is kept is committed before the lock goes, and before this node changes attributes or writes a STABLE one.
* To the next home a file with kept data is claimed in EX, so nobody sees it before this node has written it again.
  A claim that is denied means that the file was given to somebody else: the data is lost, and the next write, fsync and
  close say EIO.
"""

import asyncio
import errno
import functools
import os
from typing import Any

import structlog

from mxfs_fuse.nodes import Handle, Node
from mxfs_fuse.state import State
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid, Op, WriteFlag, pack_writes
from mxfsd.core.unstable import Pieces, Sent, chunks
from mxfsd.io.clock import now_ms
from mxfsd.io.lower import kill_priv

log = structlog.get_logger(__name__)

_PW = LockMode.PW
_EX = LockMode.EX
_BEHIND_MAX = 32 << 20
"""Bytes of answered but unconfirmed WRITEs at most."""
_SMALL = 16 << 10
_BATCH = 32
"""WRITEs of at most so many bytes go together, at most so many at once."""
_GATHER_S = 0.002
"""So long a batch grows while nothing is under way: one at a time, each would cost the home an operation of its own."""
_COMMIT_AGE_MS = 4000
"""Data of this age is committed."""
_COMMIT_BYTES = 32 << 20
"""With so many bytes kept, commits begin at once,"""
_FULL_BYTES = 64 << 20
"""and with so many, writers wait for them."""
_COMMITS = 8
"""Commits of single files at once; where more are due, one SYNC commits all."""
_REPLAYS = 32
"""Files written again at once."""
_TICK_S = 1.0
_SYNCED = os.O_SYNC | os.O_DSYNC


class ShippedWrites:
    """Ships WRITEs, keeps their data, commits it, and replays it. Raises OSError."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.kept = state.unstable
        self._behind_bytes = 0
        self._batched: dict[Fid, Node] = {}
        self._sending_batches = False
        self._flying: dict[Fid, dict[int, asyncio.Future[Any]]] = {}
        """Results of WRITEs that are not answered, by file and serial."""
        self._commits: dict[Fid, asyncio.Task[None]] = {}
        self._sync: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._room: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._replay: asyncio.Task[None] | None = None
        self._has_it_all = 0
        """Epoch of the home that has everything that was answered."""
        state.link.before_send = self._send_batches
        state.link.before_resume = self._resume
        state.locks.settle = self.settle
        state.locks.before_release = self._before_release
        state.locks.holds_data = self.dirty
        state.locks.claim_denied = self._claim_denied
        state.before_forget = self._before_forget

    def dirty(self, node: Node) -> bool:
        """Whether anything written to it is unconfirmed, or confirmed and not durable."""
        return bool(node.behind) or self.kept.holds(node.fid)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def write(self, handle: Handle, off: int, buf: bytes) -> int:
        """Ship a WRITE of *handle*; return the bytes written. Under EX it may be answered before the home has it."""
        node = handle.node
        state = self.state
        flags = 0 if handle.privileged else int(WriteFlag.KILL_PRIV)
        while True:
            handle.raise_error("write")
            if self.kept.total >= _FULL_BYTES:
                await self._wait_for_room()
                continue
            append = handle.append
            if append:
                end = await self._end_of(node)
                if end >= 0:
                    off, append = end, False
            # A direct descriptor needs a lock that is not on its way out; giving one up waits for a cached WRITE.
            held = state.locks.mode(handle.ino) if handle.direct else state.locks.cache.data_mode(handle.ino)
            if not append and held >= _PW and not handle.flags & _SYNCED:
                return await self._write_unstable(handle, off, flags, buf)
            if not self.dirty(node):
                break
            await self.commit(node)  # else a replay would undo this one
        state.own_change(node)
        flags |= WriteFlag.STABLE | (WriteFlag.APPEND if append else 0) | (WriteFlag.BESIDE if node.pinned else 0)
        _, (placed, done) = await state.link.start(Op.WRITE, 0, 0, (*node.fid, off, flags, buf))
        state.own_change(node)
        self._grew(node, placed + done)
        return int(done)

    async def _end_of(self, node: Node) -> int:
        """Where an append goes: under EX the end of the file as the home told it and this node has moved it since.

        So an append under EX is a WRITE to a place, which may be repeated. -1: the home must place it.
        """
        state = self.state
        locks = state.locks
        ino = node.fid.ino
        seq = locks.seq(ino)
        if locks.mode(ino) is not _EX:
            return -1
        if node.end_seq == seq:
            return node.end
        await self.settle(node)
        changes = node.changes
        if state.attr_holds(node) and node.attr is not None:
            size = node.attr.size
        else:
            _, (attr,) = await state.link.ship(Op.GETATTR, 0, 0, node.fid)
            size = attr.size
        if locks.mode(ino) is not _EX or locks.seq(ino) != seq or node.changes != changes:
            return -1
        node.end, node.end_seq = size, seq
        return int(size)

    def _grew(self, node: Node, end: int) -> None:
        """Data was written up to *end*."""
        if node.end_seq == self.state.locks.seq(node.fid.ino):
            node.end = max(node.end, end)

    async def _write_unstable(self, handle: Handle, off: int, flags: int, buf: bytes) -> int:
        node = handle.node
        size = len(buf)
        self.state.own_change(node)
        self._grew(node, off + size)
        node.behind += 1
        if not self._may_run_behind(handle, size):
            future = self._send(node, flags, [(off, buf)], behind=False)
            _, values = await asyncio.shield(future)
            return int(values[-1])
        self._behind_bytes += size
        if node.behind == 1 or size > _SMALL:
            self._send(node, flags, [(off, buf)], behind=True)
            return size
        if node.batch and (node.batch_flags != flags or len(node.batch) >= _BATCH):
            self._send_batch(node)
        node.batch_flags = flags
        node.batch = node.batch or []
        node.batch.append((off, buf))
        self._batched[node.fid] = node
        return size

    def _may_run_behind(self, handle: Handle, size: int) -> bool:
        """Whether a WRITE may be answered before the home has confirmed it.

        Only under EX: nobody else sees the file before this node has given the lock up, and that waits for all of them.
        The page cache of a local file system promises no more before fsync; close and fsync wait, and report errors.
        """
        return (
            self.state.locks.mode(handle.ino) == _EX
            and self.state.gate is None
            and self._behind_bytes + size <= _BEHIND_MAX
        )

    def _send(self, node: Node, flags: int, pieces: Pieces, behind: bool) -> asyncio.Future[Any]:
        # Before it counts as sent: batches that link.start() sends first must come first in what is kept, too.
        self._send_batches()
        sent = self.kept.sent(now_ms(), node.fid, flags, pieces)
        future = _request(self.state, sent.fid, flags, pieces)
        self._flying.setdefault(sent.fid, {})[sent.serial] = future
        future.add_done_callback(functools.partial(self._answered, node, sent, len(pieces), sent.size, behind))
        return future

    def _send_batches(self) -> None:
        """Before any other operation: the home must see what was written before it."""
        if self._sending_batches:
            return
        self._sending_batches = True
        try:
            while self._batched:
                self._send_batch(next(iter(self._batched.values())))
        finally:
            self._sending_batches = False

    def _send_batch(self, node: Node) -> None:
        del self._batched[node.fid]
        pieces, node.batch = node.batch, None
        self._send(node, node.batch_flags, pieces or (), behind=True)

    def _send_gathered(self, node: Node) -> None:
        """Send a batch that has had its time to grow; while something is under way it has until that is answered.

        Its writers have their answers, and whoever needs the home to have the data sends it at once (settle()).
        """
        if node.batch and node.behind == len(node.batch):
            self._send_batch(node)

    def _answered(
        self, node: Node, sent: Sent, count: int, size: int, behind: bool, future: asyncio.Future[Any]
    ) -> None:
        flying = self._flying[sent.fid]
        del flying[sent.serial]
        if not flying:
            del self._flying[sent.fid]
        node.behind -= count
        self.state.own_change(node)
        error = future.exception()
        if error is not None:
            self.kept.failed(sent)
            code = getattr(error, "errno", None) or errno.EIO
        else:
            written = future.result()[1][-1]
            self.kept.answered(sent, written)
            code = errno.ENOSPC if written < size else 0
        if code:
            node.end_seq = -1
        if behind:
            self._behind_bytes -= size
            if code:
                node.lose(code)
        if node.batch and node.behind == len(node.batch):
            asyncio.get_running_loop().call_later(_GATHER_S, self._send_gathered, node)
        self._look_after()

    # -- errors ----------------------------------------------------------------------------------------------------

    def _note_error(self, fid: Fid, code: int) -> None:
        """Data that was answered is lost: the next write, fsync and close of the file say so."""
        if code == errno.ESTALE:
            return  # the file is gone, nobody can ask for it
        log.error("data of a file is lost", ino=fid.ino, error=errno.errorcode.get(code, str(code)))
        node = self.state.nodes.get(fid.ino)
        if node is not None and node.fid == fid:
            node.lose(code)
            node.end_seq = -1

    def _lose(self, fid: Fid, code: int) -> None:
        """Nothing of this file is written any more."""
        answered = any(sent.answered for sent in self.kept.entries(fid))
        unanswered = self.kept.drop(fid)
        node = self._batched.pop(fid, None)
        if node is not None and node.batch:
            node.behind -= len(node.batch)
            self._behind_bytes -= sum(len(data) for _, data in node.batch)
            node.batch = None
        flying = self._flying.get(fid, {})
        for sent in unanswered:
            future = flying.get(sent.serial)
            if future is not None and not future.done():
                future.set_exception(OSError(code, os.strerror(code)))
        if answered or node is not None:
            self._note_error(fid, code)
        self._make_room()

    def _claim_denied(self, ino: int) -> None:
        """The home has given the file to another node while nothing was heard of this one."""
        node = self.state.nodes.get(ino)
        if node is not None and self.dirty(node):
            self._lose(node.fid, errno.EIO)

    # -- committing ------------------------------------------------------------------------------------------------

    async def settle(self, node: Node) -> None:
        """Wait until the home has answered every WRITE to it that came before this; writers may go on meanwhile."""
        if node.behind:
            self._send_batches()
            await asyncio.wait(self._flying[node.fid].values())

    async def commit(self, node: Node) -> None:
        """Make everything written to it durable. What fails is told at the next write, fsync and close."""
        while self.dirty(node):
            await self.settle(node)
            try:
                await self._fsync(node.fid)
            except OSError as exc:
                self._note_error(node.fid, exc.errno or errno.EIO)

    async def commit_all(self) -> None:
        """The mount is going. Raises OSError where the home cannot make everything durable."""
        self._send_batches()
        while self.kept.total:
            fids = list(self.kept.files())
            tickets = {fid: self.kept.ticket(fid) for fid in fids}
            await self.state.link.ship(Op.SYNC, 0, 0, ())
            for fid, ticket in tickets.items():
                self.kept.committed(fid, ticket)

    async def fsync(self, node: Node) -> None:
        """fsync(2) of an application. Raises OSError."""
        await self.settle(node)
        await self._fsync(node.fid)

    async def before_change(self, node: Node) -> None:
        """This node changes attributes: a replay would bring back data cut off, times, and take set-id bits away."""
        await self.commit(node)

    async def _fsync(self, fid: Fid) -> None:
        ticket = self.kept.ticket(fid)
        try:
            await self.state.link.ship(Op.FSYNC, 0, 0, (*fid, 0))
        finally:
            # After an error too: it is told, and the data is not fit to be tried for ever.
            self.kept.committed(fid, ticket)
            self._make_room()

    async def _commit_behind(self, fid: Fid) -> None:
        try:
            await self._fsync(fid)
        except OSError as exc:
            self._note_error(fid, exc.errno or errno.EIO)
        finally:
            del self._commits[fid]
            self._look_after()

    async def _sync_all(self, fids: list[Fid]) -> None:
        tickets = {fid: self.kept.ticket(fid) for fid in fids}
        try:
            await self.state.link.ship(Op.SYNC, 0, 0, ())
            for fid, ticket in tickets.items():
                self.kept.committed(fid, ticket)
        except OSError as exc:
            log.warning("the home could not sync", reason=str(exc))  # each is tried for itself, and its error told
            for fid in fids[:_COMMITS]:
                self._begin_commit(fid)
        finally:
            self._sync = None
            self._make_room()

    def _begin_commit(self, fid: Fid) -> None:
        if fid not in self._commits and len(self._commits) < _COMMITS and self.kept.ticket(fid):
            self._commits[fid] = asyncio.get_running_loop().create_task(self._commit_behind(fid))

    def _look_after(self) -> None:
        """Begin commits where much is kept; look again in a while where anything is."""
        if self.kept.total >= _COMMIT_BYTES:
            for fid in self.kept.files():
                if len(self._commits) >= _COMMITS:
                    break
                self._begin_commit(fid)
        if self._timer is None and self.kept.total:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        due = [fid for fid in self.kept.due(now_ms(), _COMMIT_AGE_MS) if self.kept.ticket(fid)]
        if len(due) <= _COMMITS:
            for fid in due:
                self._begin_commit(fid)
        elif self._sync is None:
            self._sync = asyncio.get_running_loop().create_task(self._sync_all(due))
        self._look_after()

    async def _wait_for_room(self) -> None:
        if self._room is None:
            self._room = asyncio.Event()
        self._look_after()
        await self._room.wait()

    def _make_room(self) -> None:
        if self._room is not None and self.kept.total < _FULL_BYTES:
            self._room.set()
            self._room = None

    # -- giving locks up -------------------------------------------------------------------------------------------

    async def _before_release(self, node: Node, target: LockMode) -> None:
        """The lock goes down to *target* after this: others will see, or change, what was written."""
        while self._replay is not None and self.kept.holds(node.fid):
            await asyncio.wait((self._replay,))
        if target < _PW:
            await self.commit(node)

    def _before_forget(self, node: Node) -> bool:
        """The kernel forgot the inode. True: its lock must stay for now, and it is forgotten after a commit."""
        if not self.dirty(node):
            return False

        async def forget() -> None:
            await self.commit(node)
            self.state.forget(node)

        task = asyncio.get_running_loop().create_task(forget())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    # -- a change of home ------------------------------------------------------------------------------------------

    def _resume(self, epoch: int) -> bool:
        """Another home serves (or the same one again): write again what the one before may have lost."""
        if self._replay is not None:
            self._replay.cancel()
            self._replay = None
        if epoch == self._has_it_all:
            return False
        files = list(self.kept.files())
        if self.state.lower is not None or not files:
            for fid in files:
                self._write_here(fid)
            self._has_it_all = epoch
            return False
        log.info("writing again what the former home may have lost", files=len(files), bytes=self.kept.total)
        self._replay = asyncio.get_running_loop().create_task(self._replay_all(epoch, files))
        return True

    def _write_here(self, fid: Fid) -> None:
        """This node is the home now: what it keeps goes to the lower mount, like everything that it writes from now."""
        lower = self.state.lower
        assert lower is not None
        try:
            fd = lower.file_fd(fid)
            for sent in self.kept.entries(fid):
                for offset, data in sent.pieces:
                    if os.pwrite(fd, data, offset) < len(data):
                        raise OSError(errno.ENOSPC, "no room to write it again")
                if sent.flags & WriteFlag.KILL_PRIV:
                    kill_priv(fd)
                self._settled_by_replay(sent)
        except OSError as exc:
            self._lose(fid, exc.errno or errno.EIO)
        self.kept.drop(fid)
        self.state.changed(fid.ino)

    async def _replay_all(self, epoch: int, files: list[Fid]) -> None:
        turns = asyncio.Semaphore(_REPLAYS)

        async def one(fid: Fid) -> None:
            async with turns:
                await self._replay_file(fid)

        await asyncio.gather(*(one(fid) for fid in files))
        self._has_it_all = epoch
        self._replay = None
        self.state.link.proceed()

    async def _replay_file(self, fid: Fid) -> None:
        for chunk in chunks(self.kept.entries(fid)):
            pieces = [piece for sent in chunk for piece in sent.pieces]
            size = sum(sent.size for sent in chunk)
            try:
                _, values = await _request(self.state, fid, chunk[0].flags, pieces, ahead=True)
                if values[-1] < size:
                    raise OSError(errno.ENOSPC, "no room to write it again")
            except OSError as exc:
                self._lose(fid, exc.errno or errno.EIO)
                return
            for sent in chunk:
                self._settled_by_replay(sent)

    def _settled_by_replay(self, sent: Sent) -> None:
        """Where nobody had answered it yet, this is the answer."""
        future = self._flying.get(sent.fid, {}).get(sent.serial)
        if future is not None and not future.done():
            future.set_result(([], [sent.size]))


def _request(state: State, fid: Fid, flags: int, pieces: Pieces, ahead: bool = False) -> asyncio.Future[Any]:
    if len(pieces) == 1:
        return state.link.start(Op.WRITE, 0, 0, (*fid, pieces[0][0], flags, pieces[0][1]), kept=True, ahead=ahead)
    return state.link.start(Op.WRITES, 0, 0, (*fid, flags, pack_writes(pieces)), kept=True, ahead=ahead)
