"""The daemon's side of its FUSE layer: starts it, or goes on with the one that an earlier daemon had; speaks with it
over daemon.sock and netlink.

The FUSE layer outlives the daemon: when the daemon dies, it waits for the next one (mxfs_fuse/main.py).
"""

import asyncio
import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from mxfs_proto.errors import MxfsError
from mxfs_proto.frames import Frame, FrameType, pack_json, unpack_json
from mxfs_proto.ondisk import volume_id
from mxfs_proto.records import DaemonReady, LockRecord, Record, RecoveryDone, RecoveryStart
from mxfsd import rundir
from mxfsd.caches import DESCRIPTORS
from mxfsd.io.netlink import NetlinkEndpoint
from mxfsd.io.unixconn import UnixFrameConnection, UnixFrameServer

log = structlog.get_logger(__name__)

SOCKET_NAME = "daemon.sock"
_RECLAIMS = frozenset({FrameType.RECLAIM, FrameType.RECLAIM_LOCKS, FrameType.RECLAIM_DONE})
_LOST_S = 1.0
_LAST_WORDS_S = 0.5
_LOOK_S = 0.005


class FuseLink:
    """One FUSE layer. Callbacks run in the event loop.

    *on_frame* gets its frames (operations, reclaims), *on_record* its lock messages, *on_gone* is called once when it
    has ended or was unmounted.
    """

    def __init__(
        self,
        run_dir: Path,
        volume: uuid.UUID,
        on_frame: Callable[[Frame], None],
        on_record: Callable[[Record], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._run_dir = run_dir
        self._path = run_dir / SOCKET_NAME
        self._volume = volume
        self._on_frame = on_frame
        self._on_record = on_record
        self._on_gone = on_gone
        self._server: UnixFrameServer | None = None
        self._conn: UnixFrameConnection | None = None
        self._netlink: NetlinkEndpoint | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._welcome: dict[str, Any] | None = None
        self._hello: dict[str, Any] | None = None
        self._said_hello: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None
        self.mounted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.attached = asyncio.Event()
        self.gone = asyncio.Event()
        self._cache_fds: list[int] = []
        self._resumed = False
        self._freezes = 0
        self._reclaims = False
        """It has been asked to name what it holds, and operations do not go on yet."""
        self._netlink_ended = False
        self._syncs: dict[int, asyncio.Future[int]] = {}
        self._leaving = False
        self.pid = 0
        self.on_broken: Callable[[str], None] = lambda _reason: None
        """Called when it lives and its connection is lost."""
        self.crashed = False
        """It ended without having been unmounted; known when ``gone`` is set."""
        self.adopted = False
        """It was there before this daemon."""
        self.continues = 0
        """The incarnation of this node that the FUSE layer, older than this daemon, belonged to; 0: it is new."""

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def served(self) -> bool:
        """Whether it was mounted at some time."""
        return self.mounted.done() and self.mounted.exception() is None

    @property
    def slot(self) -> int:
        """The slot that an older FUSE layer's locks belong to, 0 for a new one."""
        return int((self._hello or {}).get("node", 0))

    async def start(
        self,
        mountpoint: str,
        fuse_options: tuple[str, ...],
        fsname: str,
        log_level: str,
        *,
        channel: str,
        local_locks: bool,
        passthrough: bool = False,
    ) -> None:
        """Listen, and start the FUSE process: it loads its modules while the daemon joins."""
        self._server = UnixFrameServer(str(self._path), self._on_connection)
        self._server.start()
        command = [
            sys.executable,
            "-m",
            "mxfs_fuse.main",
            *("--socket", str(self._path)),
            *("--mountpoint", mountpoint),
            *("--volume", str(self._volume)),
            *("--fsname", fsname),
            *("--options", ",".join(fuse_options)),
            *("--channel", channel),
            *(["--local-locks"] if local_locks else []),
            *(["--passthrough"] if passthrough else []),
            *("--log", log_level),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self.pid = self._process.pid
        rundir.remember(self._run_dir, rundir.FUSE, self.pid)
        self._watching = asyncio.get_running_loop().create_task(self._watch(os.pidfd_open(self.pid)))

    async def adopt(self, process: rundir.Process, limit_s: float) -> None:
        """Go on with the FUSE layer that an earlier daemon started: wait until it has connected and said who it is.

        Raises MxfsError where it ends before that, or does not come within *limit_s* seconds.
        """
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            raise MxfsError("the FUSE layer has ended") from None
        if not process.alive:
            os.close(pidfd)
            raise MxfsError("the FUSE layer has ended")
        self.pid = process.pid
        self.adopted = True
        self._server = UnixFrameServer(str(self._path), self._on_connection)
        self._server.start()
        self._watching = asyncio.get_running_loop().create_task(self._watch(pidfd))
        ended = asyncio.ensure_future(self.gone.wait())
        await asyncio.wait((self._said_hello, ended), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if self.gone.is_set():
            raise MxfsError("the FUSE layer has ended")
        if not self._said_hello.done():
            raise MxfsError(f"the FUSE layer (pid {process.pid}) did not connect within {limit_s:g} s")
        self.mounted.set_result(None)

    async def _watch(self, fd: int) -> None:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        loop.add_reader(fd, done.set)
        try:
            await done.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        until = loop.time() + _LAST_WORDS_S
        while self._conn is not None and loop.time() < until:
            await asyncio.sleep(_LOOK_S)  # what it said last, perhaps why it failed, is still to be read
        if self._process is None:  # not a child of ours: its status is not to be had
            self.crashed = True
            self._gone("the FUSE layer ended without a word")
            return
        code = self._process.wait()
        self.crashed = code != 0
        self._gone("unmounted" if code == 0 else f"the FUSE layer ended with status {code}")

    def _gone(self, reason: str) -> None:
        if not self.mounted.done():
            self.mounted.set_exception(MxfsError(reason))
            self.mounted.exception()
        if self.gone.is_set():
            return
        self.gone.set()
        callback, self._on_gone = self._on_gone, lambda _reason: None
        callback(reason)

    def take_cache_fds(self) -> list[int]:
        """Return what the caches of the mount can be ended with (`mxfsd.caches`), now the caller's to close.

        Whoever keeps them from being closed keeps the kernel from noticing that the FUSE layer is dead.
        """
        fds, self._cache_fds = self._cache_fds, []
        return fds

    def close(self) -> None:
        """Stop listening and talking; the FUSE process is ended if it still runs."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._conn is not None:
            self._conn.close()
        if self._netlink is not None:
            self._netlink.close()
        if self.pid and not self.gone.is_set() and not self._leaving:
            # Its pidfd is watched, so the pid is its own still, or that of nobody.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        if self.gone.is_set():
            rundir.forget(self._run_dir, rundir.FUSE)

    def refuse(self, reason: str) -> None:
        """Tell it that this node is out of the volume: the mount answers EIO from now on, until it is unmounted."""
        self._leaving = True
        self.frame(FrameType.REFUSE, [pack_json({"reason": reason})])

    # -- hand-shake ------------------------------------------------------------------------------------------------

    def welcome(self, fields: dict[str, Any]) -> None:
        """Tell the FUSE layer about the volume it serves, as soon as it has connected and the node has joined."""
        self._welcome = fields
        self._greet()

    def _on_connection(self, conn: UnixFrameConnection) -> None:
        if self._conn is not None:
            log.warning("second connection of a FUSE layer refused")
            conn.close()
            return
        self._conn = conn
        conn.start(self._frame, self._lost)

    def _lost(self, _conn: UnixFrameConnection, error: MxfsError | None) -> None:
        self._conn = None
        # As a rule the process has ended, and its pidfd says so in a moment.
        asyncio.get_running_loop().call_later(_LOST_S, self._broken, str(error) if error is not None else "closed")

    def _broken(self, reason: str) -> None:
        """It lives, but the connection does not: both sides have to begin anew."""
        if self._server is not None and not self.gone.is_set() and not self._leaving:
            self.on_broken(f"connection to the FUSE layer lost: {reason}")

    def _frame(self, conn: UnixFrameConnection, frame: Frame) -> None:
        if frame.type is FrameType.FUSE_HELLO:
            self._hello = unpack_json(frame.payload)
            self._cache_fds = conn.take_fds(int(self._hello.get("fds", 0)))
            self.continues = int(self._hello.get("incarnation", 0))
            if not self._said_hello.done():
                self._said_hello.set_result(None)
            self._greet()
        elif frame.type is FrameType.FUSE_READY:
            self._cache_fds = conn.take_fds(DESCRIPTORS)
            if not self.mounted.done():
                self.mounted.set_result(None)
        elif frame.type is FrameType.REFUSE:
            self._gone(str(unpack_json(frame.payload).get("reason", "the FUSE layer failed")))
        elif frame.type is FrameType.FUSE_BYE:
            self._gone("unmounted")
        elif frame.type is FrameType.SYNC:
            fields = unpack_json(frame.payload)
            waiter = self._syncs.pop(int(fields["id"]), None)
            if waiter is not None and not waiter.done():
                waiter.set_result(int(fields["errno"]))
        elif frame.type in _RECLAIMS and frame.seq != self._freezes:
            pass  # it answers what was asked for an earlier home or connection, perhaps in part only
        else:
            self._on_frame(frame)

    def _took(self, record: Record) -> None:
        """A record of the FUSE layer. What it sent before it named what it holds is no news, perhaps wrong."""
        if not (self._reclaims and isinstance(record, LockRecord)):
            self._on_record(record)

    def _greet(self) -> None:
        if self._welcome is None or self._hello is None or self._conn is None or self._netlink is not None:
            return
        if self._netlink_ended:
            return
        self._netlink = NetlinkEndpoint(self._took, volume_id(self._volume.bytes), on_lost=self._netlink_lost)
        portid = self._netlink.open()
        self._netlink.connect(int(self._hello["portid"]))
        self._conn.send(FrameType.WELCOME, [pack_json({**self._welcome, "portid": portid})])
        self._netlink.send(
            DaemonReady(
                os.getpid(),
                int(self._welcome["node"]),
                int(self._welcome["epoch"]),
                int(self._welcome["home"]),
                self._volume.bytes,
            )
        )
        self.attached.set()
        if self.continues:
            # It served before: what it holds has to be named before it goes on.
            self.freeze(int(self._welcome["epoch"]), int(self._welcome["home"]))

    def _netlink_lost(self, _error: MxfsError) -> None:
        """Its socket is gone: the process has ended, or will have in a moment; see _watch."""
        self._netlink = None
        self._netlink_ended = True

    # -- sending ---------------------------------------------------------------------------------------------------

    def record(self, record: Record) -> None:
        """Send a lock or state message over netlink; to a FUSE layer that has ended nothing is sent."""
        if self._netlink is not None and self._netlink.is_open:
            self._netlink.send(record)

    def frame(
        self, kind: FrameType, parts: list[bytes], epoch: int = 0, session: int = 0, seq: int = 0, fd: int = -1
    ) -> None:
        """Send a frame over daemon.sock, with a descriptor where *fd* is one."""
        if self._conn is not None:
            fds = [fd] if fd >= 0 else []
            self._conn.send(kind, parts, epoch=epoch, session=session, seq=seq, fds=fds)

    async def sync(self) -> None:
        """Have everything that was written on this node made durable. Raises OSError."""
        if self._conn is None:
            raise OSError(errno.ENOTCONN, "the FUSE layer is not there")
        number = max(self._syncs, default=0) + 1
        self._syncs[number] = asyncio.get_running_loop().create_future()
        self.frame(FrameType.SYNC, [pack_json({"id": number})])
        gone = asyncio.ensure_future(self.gone.wait())
        try:
            answer = self._syncs[number]
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            code = answer.result() if answer.done() else errno.ENOTCONN
        finally:
            gone.cancel()
            self._syncs.pop(number, None)
        if code:
            raise OSError(code, os.strerror(code))

    def freeze(self, epoch: int, home: int) -> None:
        """New operations wait from now on (RECOVERY_START of the epoch that ends); what is held is named to *home*."""
        self._resumed = False
        self._reclaims = home != 0
        self._freezes += 1
        self.record(RecoveryStart(epoch, home, self._freezes))

    def resume(
        self,
        epoch: int,
        home: int,
        implicit: bool,
        recorded: list[int],
        mount_fd: int,
        direct: dict[str, Any] | None = None,
    ) -> None:
        """Go on under *epoch*. On the home: *mount_fd* is the lower mount, *recorded* what others hold locks on.

        On other nodes *direct* says how to reach the home for operations (``ClientRole.direct``).
        """
        if self._resumed:
            return
        self._resumed = True
        self._reclaims = False
        fields = {"epoch": epoch, "home": home, "implicit": implicit, "direct": direct}
        self.frame(FrameType.RECLAIM, [struct.pack(f"!{len(recorded)}Q", *recorded)], epoch=epoch)
        self.frame(FrameType.RESUME, [pack_json(fields)], epoch=epoch, fd=mount_fd)
        self.record(RecoveryDone(epoch, home))
