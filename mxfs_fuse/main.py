"""The FUSE process of one mount: connects to the daemon, mounts, serves until it is unmounted."""

import argparse
import asyncio
import errno
import os
import signal
import struct
import sys
import uuid
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from mxfs_fuse import channel
from mxfs_fuse.kernel import KernelNotifier, open_abort, unlimit_background
from mxfs_fuse.loss import LowerEnd
from mxfs_fuse.nextdaemon import NextDaemon
from mxfs_fuse.nodes import Node
from mxfs_fuse.operations import Operations
from mxfs_fuse.passthrough import leases_enabled
from mxfs_fuse.state import State
from mxfs_proto.errors import IoFailure, MxfsError, PeerError
from mxfs_proto.filelocks import pack_tables
from mxfs_proto.frames import MAX_PAYLOAD, Frame, FrameType, pack_json, pack_reclaim, unpack_json
from mxfs_proto.ondisk import volume_id
from mxfs_proto.ops import Fid
from mxfs_proto.records import (
    CacheInval,
    DaemonReady,
    LockBast,
    LockDeny,
    LockGrant,
    NodeStatus,
    Record,
    RecoveryDone,
    RecoveryStart,
)
from mxfsd import log as logging
from mxfsd import rundir
from mxfsd.core.epochs import first_seq
from mxfsd.io import libc
from mxfsd.io.cachelist import CacheList
from mxfsd.io.clock import now_ms
from mxfsd.io.lower import Lower
from mxfsd.io.netlink import NetlinkEndpoint
from mxfsd.io.stream import FrameConnection
from mxfsd.io.unixconn import UnixFrameConnection, connect_unix

log = structlog.get_logger(__name__)

_RECLAIM_ROWS = 50_000
_CONNECT_TRIES = 200
_CONNECT_S = 0.02
_COMMIT_S = 10.0
_DROP_MS = 500
_HELD_NAMED = 8


class Resume(NamedTuple):
    """Go on under this home; on the home itself with the lower mount, and what others hold locks on."""

    epoch: int
    implicit: bool
    mount_fd: int
    recorded: list[int]
    direct: asyncio.Task[FrameConnection | None] | None
    """Our own connection to the home on another node, on its way; its result None: there is none."""


class Server:
    """Ties the channels to the state: hand-shake, recovery, leases."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._channel = channel.make(args.channel)
        self._channel.wants_passthrough = args.passthrough
        self._volume = uuid.UUID(args.volume)
        self._conn: UnixFrameConnection | None = None
        self._run_dir = Path(args.socket).parent
        self._netlink = NetlinkEndpoint(self._on_record, volume_id(self._volume.bytes))
        self._welcome: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._resumes: deque[Resume] = deque()
        self._recorded: list[int] = []
        self._held_back: list[Record] | None = None
        """Records behind a RECOVERY_DONE whose RESUME has not come over the socket yet."""
        self._node = 0
        self._incarnation = 0
        self._restart: list[str] = []
        self._restart_ms = 0
        self._heartbeat: rundir.Process | None = None
        self._outage: NextDaemon | None = None
        """Since the daemon was lost, until operations go on."""
        self._reattaching: asyncio.Task[None] | None = None
        self._serving = False
        self.state: State | None = None
        self.operations: Operations | None = None
        self._lease_timer: asyncio.TimerHandle | None = None
        self._lapsed = False
        self._leaving: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._drops: list[asyncio.Future[None]] = []
        self._reopen_ms = 0
        self._frozen = True
        self._listed = CacheList()
        Node.listed = self._listed
        self._handed: list[int] = []
        """What the heartbeat process ends our caches with when we cannot: `mxfsd.caches`."""

    # -- start -----------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Meet the daemon; return when operations may be served."""
        for _ in range(_CONNECT_TRIES):
            if self._dial():
                break
            await asyncio.sleep(_CONNECT_S)
        else:
            raise PeerError(f"{self._args.socket}: no daemon answers")
        self._hello()
        fields = await self._welcome
        root = Fid(*fields["root"])
        self.state = State(root, int(fields["kernel_cache_ms"]), bool(fields["readonly"]), self._send_record)
        self.state.on_lower_down = self._lower_is_down
        self.operations = Operations(self.state)
        self.operations.local_locks = self._args.local_locks
        logging.context.volume = str(self._volume)
        logging.context.node = str(fields["name"])
        self._welcomed(fields)

    def _dial(self) -> bool:
        """Connect to the daemon's socket, if there is one."""
        try:
            self._conn = connect_unix(self._args.socket, self._frame_came, self._on_lost)
        except IoFailure:
            return False
        return True

    def _hello(self) -> None:
        """Say who we are: to a later daemon also whose locks we have."""
        assert self._conn is not None
        fields: dict[str, Any] = {"portid": self._netlink.open(), "pid": os.getpid(), "fds": len(self._handed)}
        if self._incarnation:
            fields.update(node=self._node, incarnation=self._incarnation)
        self._conn.send(FrameType.FUSE_HELLO, [pack_json(fields)], fds=self._handed)

    def _welcomed(self, fields: dict[str, Any]) -> None:
        """The daemon has joined the volume and knows its home."""
        assert self.state is not None and self._conn is not None
        self._node = int(fields["node"])
        self._incarnation = int(fields["incarnation"])
        self._restart = [str(word) for word in fields["restart"]]
        self._restart_ms = int(fields["restart_ms"])
        self._heartbeat = rundir.recall(self._run_dir, rundir.HEARTBEAT)
        self.state.link.attach(self._conn)
        self._netlink.connect(int(fields["portid"]))

    def _send_record(self, record: Record) -> None:
        """Put a record on the netlink channel. Without a daemon it is dropped: reclaims make up for it."""
        if self._netlink.is_open:
            self._netlink.send(record)

    async def serve(self) -> None:
        """Mount and serve until the mount is gone."""
        assert self.state is not None and self.operations is not None and self._conn is not None
        while self.state.gate is not None:
            await self.state.gate.wait()
        options = {f"fsname={self._args.fsname}", "default_permissions", "allow_other", "dev", "suid"}
        options.update(word for word in self._args.options.split(",") if word)
        device = self._channel.mount(self.operations, self._args.mountpoint, options)
        try:
            kernel = KernelNotifier(device)
            self.state.kernel = self.state.locks.kernel = kernel
            loop = asyncio.get_running_loop()
            main = loop.create_task(self._channel.serve())
            ticks = loop.create_task(self._ticks())
            st_dev = await self._answers(main)
            self._begin_passthrough()
            set_readahead(st_dev)
            if self._channel.limits_background:
                unlimit_background(st_dev)
            self._handed = [device, self._listed.fd, open_abort(st_dev)]
            if self._conn is not None:
                self._conn.send(FrameType.FUSE_READY, [pack_json({"pid": os.getpid()})], fds=self._handed)
            log.info(
                "mounted",
                mountpoint=self._args.mountpoint,
                channel=self._args.channel,
                entry_epochs=kernel.has_epoch,
            )
            self._serving = True
            if self._conn is None:
                self._daemon_gone()
            await main
            await self._commit()
            ticks.cancel()
            if self._reattaching is not None:
                self._reattaching.cancel()
            if self._outage is not None and self._conn is None:
                self._outage.abandon()
        finally:
            self.operations.io.passthrough.close()
            self._channel.close()

    def _begin_passthrough(self) -> None:
        """Let the kernel read and write files by itself, where that was asked for and can be."""
        assert self.operations is not None
        if not self._args.passthrough:
            return
        if not self._channel.has_passthrough or not leases_enabled():
            log.warning("no passthrough on this host", kernel=self._channel.has_passthrough, leases=leases_enabled())
            return
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # what the kernel sends to whoever has a lease
        self.operations.io.passthrough.backing = self._channel

    async def _commit(self) -> None:
        """Unmounted: what was written here is durable then, as on any file system."""
        assert self.state is not None and self.operations is not None
        if self.state.dead:
            return
        try:
            async with asyncio.timeout(_COMMIT_S):
                await self.operations.io.writes.commit_all()
        except (OSError, TimeoutError) as exc:
            log.error("not everything written here is durable", bytes=self.state.unstable.total, reason=str(exc))

    async def _ticks(self) -> None:
        """Forgotten locks go back, requests without an answer are sent again."""
        assert self.state is not None
        while True:
            await asyncio.sleep(1)
            self.state.locks.tick()
            if self.operations is not None:
                self.operations.io.passthrough.tick()
            self._dropped()
            self._channel.name_long_waits()

    async def _answers(self, serving: asyncio.Task[None]) -> int:
        """Return the mount's st_dev when it answers: a stat of its root through the kernel. Raises OSError.

        The one time that we ask our own mount for something, and from a thread: this one has to answer.
        """
        answer = asyncio.get_running_loop().run_in_executor(None, os.stat, self._args.mountpoint)
        await asyncio.wait((answer, serving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise OSError(errno.EPROTO, "the kernel and the FUSE layer do not agree: mount with channel=pyfuse3")
        return (await answer).st_dev

    def terminate(self) -> None:
        """End as if unmounted."""
        self._channel.terminate()

    def close(self) -> None:
        """Say good-bye to the daemon."""
        if self.operations is not None:
            self.operations.io.close_lower()
        if self.state is not None:
            self.state.locks.close()
            if self.state.lower is not None:
                self.state.lower.close()
        if self._conn is not None:
            self._conn.send(FrameType.FUSE_BYE, [pack_json({})])
            self._conn.close()
        self._netlink.close()

    # -- life without a daemon -------------------------------------------------------------------------------------

    def _on_lost(self, conn: UnixFrameConnection, _error: MxfsError | None) -> None:
        if conn is not self._conn:
            return
        self._conn = None
        if not self._welcome.done():
            self._welcome.set_exception(PeerError("the daemon closed the connection"))
        elif self._serving:
            self._daemon_gone()

    def _daemon_gone(self) -> None:
        """The daemon died, or ended itself: hold everything back until the next one."""
        state = self.state
        assert state is not None
        if state.dead or (self._reattaching is not None and not self._reattaching.done()):
            return
        log.warning("the daemon is gone: operations wait for the next one")
        self._freeze()
        self._netlink.close()
        self._recorded = []
        self._held_back = None
        while self._resumes:
            resume = self._resumes.popleft()
            if resume.mount_fd >= 0:
                os.close(resume.mount_fd)
            if resume.direct is not None:
                resume.direct.add_done_callback(_abort)
        self._drop_kernel_caches()
        if self._outage is None:
            self._outage = NextDaemon(self._restart, self._restart_ms, now_ms())
        self._reattaching = asyncio.get_running_loop().create_task(self._reattach(self._outage))

    async def _reattach(self, outage: NextDaemon) -> None:
        """Leave the lower mount, and go on with the next daemon; without one the mount is dead in the end."""
        state = self.state
        assert state is not None and self.operations is not None
        outage.step(now_ms(), connected=False)  # it starts while we close things
        await self._lower_ends()
        while not state.dead and outage.step(now_ms(), connected=False):
            if not self._dial():
                await asyncio.sleep(_CONNECT_S)
                continue
            self._netlink.close()
            self._netlink = NetlinkEndpoint(self._on_record, volume_id(self._volume.bytes))
            self._welcome = asyncio.get_running_loop().create_future()
            self._hello()
            conn = self._conn
            try:
                fields = await self._welcome
            except PeerError:
                continue
            if conn is not None and conn is self._conn:
                log.info("the next daemon is here", starts=outage.starts)
                self._welcomed(fields)
                return
        if not state.dead:
            outage.abandon()
            self._give_up(f"no daemon came within {self._restart_ms} ms")

    def _give_up(self, reason: str) -> None:
        """This node is out of the volume, or will not have a daemon again: nothing waits any longer."""
        state = self.state
        assert state is not None
        if state.dead:
            return
        log.error("the mount is dead: every operation fails until it is unmounted", reason=reason)
        state.die(reason)
        self._drop_kernel_caches()
        try:
            (self._run_dir / rundir.DEAD).write_text(reason + "\n", encoding="utf-8")
        except OSError as exc:
            log.warning("cannot note that the mount is dead", reason=str(exc))

    async def _refused(self, reason: str) -> None:
        """The daemon says that this node is out: leave the lower mount, if there is one, and serve nothing more."""
        state = self.state
        assert state is not None and self.operations is not None
        self._freeze()
        await self._lower_ends()
        self._give_up(reason)

    async def _lower_ends(self) -> None:
        """The lower mount is not left in good order, but shut down under us."""
        assert self.state is not None and self.operations is not None
        passthrough = self.operations.io.passthrough
        self.operations.io.close_lower()
        end = LowerEnd(self.state, self._run_dir, self._heartbeat, self._restart_ms / 1000)
        await end.leave(passthrough.pinned())
        left = passthrough.lower_gone()
        if left:
            log.error("files open for passthrough have lost their lower mount", inodes=left[:8], count=len(left))

    def _lower_is_down(self) -> None:
        """The lower mount was shut down under us: the daemon cannot go on with it."""
        if self._conn is not None:
            self._conn.send(FrameType.FREEZE, [pack_json({"down": True})])

    def _drop_kernel_caches(self) -> None:
        """Have the kernel forget pages, attributes and entries: until we go on, this node is told of no change."""
        state = self.state
        assert state is not None
        self._lapsed = True
        self._drop_pages([node for node in state.nodes.values() if state.locks.may_be_readable(node)])
        for node in state.nodes.values():
            node.forget_cached()
        self._drops.append(state.locks.drop_attributes(list(state.nodes)))
        self._when_dropped()

    # -- frames ----------------------------------------------------------------------------------------------------

    def _frame_came(self, _conn: UnixFrameConnection, frame: Frame) -> None:
        if frame.type is FrameType.OP_REPLY:
            assert self.state is not None
            self.state.link.on_reply(frame)
        elif frame.type is FrameType.WELCOME:
            if not self._welcome.done():
                self._welcome.set_result(unpack_json(frame.payload))
        elif frame.type is FrameType.REFUSE:
            reason = str(unpack_json(frame.payload).get("reason", "this node is out of the volume"))
            self._leaving = asyncio.get_running_loop().create_task(self._refused(reason))
        elif frame.type is FrameType.RECLAIM:
            self._recorded = list(struct.unpack(f"!{len(frame.payload) // 8}Q", frame.payload))
        elif frame.type is FrameType.RESUME:
            assert self._conn is not None
            fields = unpack_json(frame.payload)
            implicit = bool(fields["implicit"])
            mount_fd = self._conn.take_fds(1)[0] if implicit else -1
            direct = self._connect_home(fields["direct"]) if fields["direct"] else None
            self._resumes.append(Resume(int(fields["epoch"]), implicit, mount_fd, self._recorded, direct))
            self._maybe_go_on()
        elif frame.type is FrameType.SYNC:
            self._syncing = asyncio.get_running_loop().create_task(self._sync(int(unpack_json(frame.payload)["id"])))
        elif frame.type is FrameType.FREEZE:
            self._leaving = asyncio.get_running_loop().create_task(self._leave_lower())

    async def _sync(self, number: int) -> None:
        """An operator wants everything that was written here to be durable."""
        assert self.operations is not None
        code = 0
        try:
            await self.operations.sync_all()
        except (OSError, MxfsError) as exc:
            code = exc.errno or errno.EIO
        if self._conn is not None:
            self._conn.send(FrameType.SYNC, [pack_json({"id": number, "errno": code})])

    # -- records ---------------------------------------------------------------------------------------------------

    def _on_record(self, record: Record) -> None:
        state = self.state
        assert state is not None
        if self._held_back is not None:
            self._held_back.append(record)  # RECOVERY_DONE came before the RESUME it belongs to
            return
        if isinstance(record, LockGrant | LockBast | LockDeny | CacheInval):
            state.locks.on_record(record)
        elif isinstance(record, NodeStatus):
            self._on_status(record)
        elif isinstance(record, RecoveryStart):
            if record.node:
                self._reclaim(record.epoch, record.number)
            else:
                self._freeze()
        elif isinstance(record, RecoveryDone):
            # Each RECOVERY_DONE (netlink) has its RESUME (socket); the two may come in any order.
            self._held_back = []
            self._maybe_go_on()
        elif isinstance(record, DaemonReady):
            log.debug("daemon ready", daemon_pid=record.daemon_pid)

    def _on_status(self, record: NodeStatus) -> None:
        """Our lease, renewed: until when what we cache may be used."""
        state = self.state
        assert state is not None
        if record.node != self._node:
            return
        state.lease_until_ms = max(state.lease_until_ms, now_ms() + record.lease_ms)
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        left_ms = state.lease_until_ms - now_ms()
        delay = max(0, left_ms - state.lease_margin_ms) / 1000
        self._lease_timer = asyncio.get_running_loop().call_later(delay, self._lease_ends)
        self._maybe_reopen()

    def _lease_ends(self) -> None:
        """Nothing was heard from the home for almost a lease: what is cached here may soon be old. Drop it in time."""
        state = self.state
        assert state is not None
        if self._lapsed:
            return
        self._lapsed = True
        if state.gate is None:
            log.warning("lease runs out: operations wait until the home is heard again")
            state.close_gate()
        readable = [node for node in state.nodes.values() if state.locks.may_be_readable(node)]
        state.locks.cache.drop_all()
        state.losses += 1
        self._drop_pages(readable)
        for node in state.nodes.values():
            node.forget_cached()
        if state.kernel is not None and state.kernel.has_epoch:
            state.kernel.inc_epoch()
        self._when_dropped()

    def _drop_pages(self, nodes: list[Node]) -> None:
        """Begin to drop their pages; files with upcalls under way each by themselves, since they may take long."""
        assert self.state is not None
        locks, loop = self.state.locks, asyncio.get_running_loop()
        busy = [node for node in nodes if node.in_flight or node.serving]
        idle = [node for node in nodes if not node.in_flight and not node.serving]
        self._drops = [loop.create_task(locks.drop_pages_of(node), name=f"inode {node.fid.ino}") for node in busy]
        self._drops.append(loop.create_task(locks.drop_pages_of_many(idle), name=f"{len(idle)} inodes"))

    def _when_dropped(self) -> None:
        """Say so, and perhaps go on, when each of the drops under way has ended."""
        for work in self._drops:
            work.add_done_callback(lambda _done: self._dropped())
        self._dropped()

    def _dropped(self) -> None:
        if self._lapsed and all(_is_over(work) for work in self._drops):
            self._listed.set_dropped(True)
        self._maybe_reopen()

    def _maybe_reopen(self) -> None:
        """After a lapse: go on once the home is heard again and nothing old is left in the kernel."""
        state = self.state
        if not self._lapsed or self._frozen or state is None:
            return  # (frozen: nothing is cached again before we go on, whatever is left of the lease)
        if now_ms() >= state.lease_until_ms - state.lease_margin_ms:
            return
        if not all(work.done() for work in self._drops):
            # A pass may wait for a folio of a request that only comes when others are answered: it ends behind them.
            self._reopen_ms = self._reopen_ms or now_ms() + _DROP_MS
            if now_ms() < self._reopen_ms:
                return
            late = [work.get_name() for work in self._drops if isinstance(work, asyncio.Task) and not work.done()]
            log.warning("a drop of caches waits for requests: they go on", of=late[:8], count=len(late))
        self._reopen_ms = 0
        self._listed.set_dropped(False)
        self._lapsed = False
        self._drops = []
        if not self._frozen:
            state.open_gate()

    # -- a change of home ------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        state = self.state
        assert state is not None
        self._frozen = True
        state.close_gate()
        state.link.suspend()
        state.locks.suspend()

    async def _leave_lower(self) -> None:
        """The home is about to unmount: close everything below."""
        state = self.state
        assert state is not None and self.operations is not None
        self._freeze()
        held = self.operations.io.passthrough.held()
        if not held:
            self.operations.io.close_lower()
            await state.leave_lower()
        if self._conn is not None:
            self._conn.send(FrameType.FREEZE, [pack_json({"held": held[:_HELD_NAMED], "count": len(held)})])

    def _reclaim(self, epoch: int, number: int) -> None:
        """Every message of the old home has come: say what this node holds and has open. *number*: of the question."""
        state = self.state
        assert state is not None and self.operations is not None
        if self._conn is None:
            return  # what the daemon said before it died
        self._freeze()
        state.link.epoch = epoch
        state.locks.reclaim()
        rows = state.held_rows()
        tables = pack_tables(self.operations.file_locks.reclaim(), MAX_PAYLOAD)
        state.locks.cache.set_implicit(False)
        state.locks.cache.new_epoch(first_seq(epoch))
        for at in range(0, len(rows), _RECLAIM_ROWS):
            self._conn.send(FrameType.RECLAIM, [pack_reclaim(rows[at : at + _RECLAIM_ROWS])], epoch, seq=number)
        for payload in tables:
            self._conn.send(FrameType.RECLAIM_LOCKS, [payload], epoch, seq=number)
        self._conn.send(FrameType.RECLAIM_DONE, [pack_json({"rows": len(rows)})], epoch, state.link.session, number)

    def _connect_home(self, fields: dict[str, Any]) -> asyncio.Task[FrameConnection | None]:
        """Connect to the home by ourselves, for operations."""
        from mxfs_fuse.direct import connect_home  # TLS: the home's own FUSE layer does without

        async def connect() -> FrameConnection | None:
            try:
                return await connect_home(fields, self._home_frame, self._home_lost)
            except (MxfsError, OSError) as exc:  # TimeoutError is one
                log.info("operations go through the daemon", reason=str(exc) or "the home does not answer in time")
                return None

        return asyncio.get_running_loop().create_task(connect())

    def _home_frame(self, conn: FrameConnection, frame: Frame) -> None:
        assert self.state is not None
        if frame.type is FrameType.OP_REPLY and self.state.link.is_direct(conn):
            self.state.link.on_reply(frame)

    def _home_lost(self, conn: FrameConnection, error: MxfsError | None) -> None:
        """Our own connection to the home is gone: the daemon makes both anew, and asks what we hold."""
        assert self.state is not None
        if not self.state.link.is_direct(conn):
            return
        reason = str(error) if error is not None else "closed by the home"
        self._freeze()
        if self._conn is not None:
            self._conn.send(FrameType.FREEZE, [pack_json({"cut": reason})])

    def _maybe_go_on(self) -> None:
        """Go on when both halves of a resumption are here, and our own way to the home is made, or given up."""
        if self._held_back is None or not self._resumes:
            return
        direct = self._resumes[0].direct
        if direct is None or direct.done():
            self._go_on()
        else:
            direct.add_done_callback(lambda _done: self._maybe_go_on())

    def _go_on(self) -> None:
        """Both halves of a resumption are here."""
        state = self.state
        assert state is not None
        resume = self._resumes.popleft()
        if resume.implicit and state.lower is None:
            state.lower = Lower(resume.mount_fd)
        elif resume.implicit:
            os.close(resume.mount_fd)  # it is the same: it was not left
        state.locks.cache.new_epoch(first_seq(resume.epoch))
        state.locks.cache.set_implicit(resume.implicit, resume.recorded)
        if resume.implicit:
            for node in state.nodes.values():
                node.forget_cached()
        logging.context.epoch = resume.epoch
        direct = resume.direct.result() if resume.direct is not None else None
        state.link.resume(resume.epoch, direct)
        state.locks.resume()
        held_back, self._held_back = self._held_back or [], None
        while held_back:
            self._on_record(held_back.pop(0))
            if self._held_back is not None:  # another RECOVERY_DONE was among them
                self._held_back.extend(held_back)
                break
        self._frozen = False
        self._outage = None
        if self._lapsed:
            self._maybe_reopen()
        else:
            state.open_gate()
        assert self.operations is not None
        self.operations.file_locks.resumed()
        if direct is not None and direct.closed:
            self._home_lost(direct, None)  # nobody used it yet when it was lost


def _abort(connecting: asyncio.Task[FrameConnection | None]) -> None:
    """End a connection that nobody needs any more."""
    conn = connecting.result() if not connecting.cancelled() else None
    if conn is not None:
        conn.abort()


def _is_over(work: asyncio.Future[None]) -> bool:
    """Whether nothing can be read that a drop was to make unreadable."""
    return work.done() and not work.cancelled() and work.exception() is None


def set_readahead(device: int) -> None:
    """Let the kernel read ahead in requests of 1 MiB: at 128 KiB, its default, a node waits for the home too often.

    *device*: the mount's st_dev.
    """
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write("1024")
    except OSError as exc:
        log.warning("read-ahead stays at the kernel's default", reason=str(exc))


async def _run(args: argparse.Namespace) -> int:
    server = Server(args)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.terminate)
    try:
        await server.connect()
        await server.serve()
    except (MxfsError, OSError, RuntimeError) as exc:
        log.error("the FUSE layer failed", reason=str(exc))
        if server._conn is not None:
            server._conn.send(FrameType.REFUSE, [pack_json({"reason": str(exc)})])
        return 1
    finally:
        server.close()
    return 0


def main() -> int:
    """Entry point: ``python -m mxfs_fuse.main``, started by the daemon."""
    parser = argparse.ArgumentParser(prog="mxfs_fuse")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--volume", required=True)
    parser.add_argument("--fsname", required=True)
    parser.add_argument("--options", default="")
    parser.add_argument("--channel", default="native", choices=channel.NAMES)
    parser.add_argument("--local-locks", action="store_true")
    parser.add_argument("--passthrough", action="store_true")
    parser.add_argument("--log", default="info")
    args = parser.parse_args()
    logging.configure(level=args.log)
    libc.keep_freed_memory()
    return asyncio.run(_run(args))


if __name__ == "__main__":
    sys.exit(main())
