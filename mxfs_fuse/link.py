"""The FUSE layer's end of its two channels to the daemon: shipped operations that end exactly once, and lock messages.

An operation is kept until it is answered. When the home changes, or the daemon was restarted, every unanswered one is
sent again under the new epoch with its old sequence; the home's reply cache answers those that had been executed.
WRITEs whose data is kept beyond the answer are an exception: mxfs_fuse/writes.py sends them again itself, before all
else.
"""

import asyncio
import errno
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from mxfs_proto.frames import Frame, FrameType
from mxfs_proto.ops import Grant, Op, OpFlag, pack_request, unpack_reply
from mxfsd.io.stream import FrameConnection
from mxfsd.io.unixconn import UnixFrameConnection


class _Pending:
    __slots__ = ("future", "kept", "op", "parts")

    def __init__(self, op: Op, parts: list[bytes], future: asyncio.Future[Any], kept: bool) -> None:
        self.op = op
        self.parts = parts
        self.future = future
        self.kept = kept
        """Whoever started it keeps what is needed to do it again, and does so when its effect may be lost. Then it ends
        the future too, and the operation is not sent any more."""


class OperationLink:
    """Ships operations through the daemon. *on_grants* adopts the locks that came with a reply, before it is used."""

    def __init__(self, on_grants: Callable[[list[Grant]], None]) -> None:
        self.session = secrets.randbits(63) | 1
        self.epoch = 0
        self._seq = 0
        self._pending: dict[int, _Pending] = {}
        self._conn: UnixFrameConnection | None = None
        self._direct: FrameConnection | None = None
        self._on_grants = on_grants
        self._open = False
        self._resuming = False
        self._failed = 0
        self.shipped = 0
        self.before_send: Callable[[], None] | None = None
        """Called before an operation is sent: what was held back to be sent together must go first."""
        self.before_resume: Callable[[int], bool] | None = None
        """Called with the epoch of a home to go on with. True: something must be sent *ahead*; proceed() follows."""

    @property
    def pending(self) -> int:
        """Operations sent and not answered."""
        return len(self._pending)

    def attach(self, conn: UnixFrameConnection) -> None:
        """Use this connection from now on (after a restart of the daemon: a new one)."""
        self._conn = conn

    def is_direct(self, conn: FrameConnection) -> bool:
        """Whether operations go over *conn*, which is ours alone."""
        return conn is self._direct

    def suspend(self) -> None:
        """Keep operations back: the home is changing."""
        self._open = self._resuming = False
        if self._direct is not None:
            self._direct.abort()
            self._direct = None

    def resume(self, epoch: int, direct: FrameConnection | None = None) -> None:
        """Send everything unanswered to the home of *epoch*, in the order of the first sending.

        *direct*: a connection to the home itself, else operations go through the daemon. It is the same one until
        suspend(): operations that took two ways could overtake each other.
        """
        self._direct = direct
        self.epoch = epoch
        self._resuming = True
        if self.before_resume is None or not self.before_resume(epoch):
            self.proceed()

    def proceed(self) -> None:
        """What had to go ahead was answered: send the rest. Nothing happens where the home is changing again."""
        if not self._resuming:
            return
        self._open = True
        for seq, pending in sorted(self._pending.items()):
            if pending.kept and pending.future.done():
                del self._pending[seq]
            else:
                self._send(seq, pending.parts)

    def _send(self, seq: int, parts: list[bytes], ahead: bool = False) -> None:
        conn = self._direct or self._conn
        if (self._open or (ahead and self._resuming)) and conn is not None:
            conn.send(FrameType.OP_REQ, parts, epoch=self.epoch, session=self.session, seq=seq)

    async def ship(
        self, op: Op, uid: int, gid: int, values: Sequence[Any], want_lock: bool = False
    ) -> tuple[list[Grant], list[Any]]:
        """Run *op* at the home; return (locks that came with the reply, reply values). Raises OSError."""
        return await self.start(op, uid, gid, values, want_lock)

    def start(
        self,
        op: Op,
        uid: int,
        gid: int,
        values: Sequence[Any],
        want_lock: bool = False,
        *,
        kept: bool = False,
        ahead: bool = False,
    ) -> asyncio.Future[tuple[list[Grant], list[Any]]]:
        """Send *op*, return the future of what ``ship`` returns. Operations reach the home in the order of sending.

        *kept*: where somebody else ends its future it is not sent again. *ahead*: send it now, though others wait for
        proceed().
        """
        if self.before_send is not None and not ahead:
            self.before_send()
        self._seq += 1
        seq = self._seq
        ack = next(iter(self._pending), seq) - 1  # insertion order is sequence order
        parts = pack_request(op, OpFlag.WANT_LOCK if want_lock else 0, uid, gid, ack, values)
        future: asyncio.Future[tuple[list[Grant], list[Any]]] = asyncio.get_running_loop().create_future()
        if self._failed:
            future.set_exception(OperationError(self._failed, []))
            return future
        self._pending[seq] = _Pending(op, parts, future, kept)
        self.shipped += 1
        self._send(seq, parts, ahead)
        return future

    def on_reply(self, frame: Frame) -> None:
        """Take an OP_REPLY; one of an earlier epoch was lost on purpose (its operation was sent again)."""
        if frame.epoch != self.epoch or frame.session != self.session:
            return
        pending = self._pending.get(frame.seq)
        if pending is None:
            return
        code, grants, values = unpack_reply(pending.op, frame.payload)
        del self._pending[frame.seq]
        if grants:
            self._on_grants(grants)
        if pending.future.done():
            return
        if code:
            error = OperationError(code, grants)
            pending.future.set_exception(error)
        else:
            pending.future.set_result((grants, values))

    def fail_all(self, code: int = errno.EIO) -> None:
        """End every operation with an error: this node was put out of the volume."""
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(OperationError(code, []))
        self._pending.clear()
        self._failed = code


class OperationError(OSError):
    """A shipped operation failed; ``grants`` are the locks that came with the answer all the same."""

    def __init__(self, code: int, grants: list[Grant]) -> None:
        super().__init__(code, f"shipped operation failed: {errno.errorcode.get(code, code)}")
        self.grants = grants
