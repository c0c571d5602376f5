"""A node's FUSE layer over a home in memory, whose page cache is lost when it crashes."""

import asyncio
import errno
import os
from collections import deque
from typing import Any, NamedTuple

from mxfs_fuse.nodes import Handle, Node
from mxfs_fuse.operations import Operations
from mxfs_fuse.state import State
from mxfs_proto.frames import Frame, FrameType
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import (
    Attr,
    Fid,
    Op,
    Request,
    Valid,
    WriteFlag,
    pack_error,
    pack_reply,
    unpack_request,
    unpack_writes,
)
from mxfs_proto.records import LockBast, LockDeny, LockGrant, LockRelease, LockReq, Record
from mxfsd.core.epochs import first_seq

FID = Fid(77, 1)
FH: Any = 1
READS = (Op.READ, Op.GETATTR, Op.FSYNC, Op.SYNC)


class Asked(NamedTuple):
    epoch: int
    session: int
    seq: int
    request: Request


def put(target: bytearray, offset: int, data: bytes | memoryview) -> None:
    if data:
        target.extend(bytes(max(0, offset - len(target))))
        target[offset : offset + len(data)] = data


class Home:
    """One file: what its page cache has of it, and what the disk has. Executes requests when it is told to."""

    def __init__(self) -> None:
        self.epoch = 1
        self.cache = bytearray()
        self.disk = bytearray()
        self.queue: deque[Asked] = deque()
        self.replies: deque[Frame] = deque()
        self.log: list[tuple[str, Any]] = []
        self.answered: dict[tuple[int, int], bytes] = {}
        self.outcomes: dict[tuple[int, int], bytes] = {}
        self.error: dict[Op, int] = {}

    def crash(self) -> None:
        self.epoch += 1
        self.cache[:] = self.disk
        self.queue.clear()
        self.replies.clear()
        self.answered = dict(self.outcomes)

    def execute(self) -> None:
        """The first request that waits."""
        asked = self.queue.popleft()
        if asked.epoch != self.epoch:
            return
        key = (asked.session, asked.seq)
        payload = self.answered.get(key)
        if payload is None:
            op = asked.request.op
            if op in self.error:
                payload = b"".join(pack_error(self.error[op]))
            else:
                payload = b"".join(pack_reply(op, [], self._do(asked.request)))
            if op not in READS:
                self.answered[key] = payload
                if op is Op.SETATTR or (op is Op.WRITE and asked.request.values[3] & WriteFlag.STABLE):
                    self.outcomes[key] = payload
        self.replies.append(Frame(FrameType.OP_REPLY, asked.epoch, asked.session, asked.seq, payload))

    def _do(self, request: Request) -> list[Any]:
        op, values = request.op, request.values
        self.log.append((op.name, values[2:]))
        if op is Op.WRITE:
            offset, flags, data = values[2:]
            offset = len(self.cache) if flags & WriteFlag.APPEND else offset
            put(self.cache, offset, data)
            if flags & WriteFlag.STABLE:
                self.disk[:] = self.cache
            return [offset, len(data)]
        if op is Op.WRITES:
            pieces = unpack_writes(values[3])
            for offset, data in pieces:
                put(self.cache, offset, data)
            return [sum(len(data) for _, data in pieces)]
        if op in (Op.FSYNC, Op.SYNC):
            self.disk[:] = self.cache
            return []
        if op is Op.READ:
            return [bytes(self.cache[values[2] : values[2] + values[3]])]
        if op is Op.SETATTR and values[2] & Valid.SIZE:
            for target in (self.cache, self.disk):
                target.extend(bytes(max(0, values[6] - len(target))))
                del target[values[6] :]
        if op in (Op.SETATTR, Op.GETATTR):
            return [Attr(*FID, 0o100644, 1, 0, 0, 0, len(self.cache), 0, 0, 0, 0)]
        assert op in (Op.SETXATTR, Op.REMOVEXATTR), op
        return []

    @property
    def names(self) -> list[str]:
        """What was executed since the last call."""
        log, self.log = self.log, []
        return [name for name, _ in log]


class Rig:
    """A mount that is not the home, with one open file under EX. Everything the home does is a step of the test's."""

    def __init__(self, flags: int = os.O_WRONLY) -> None:
        self.home = Home()
        self.records: list[Record] = []
        self.state = State(Fid(128, 1), 1000, False, self.records.append)
        self.operations = Operations(self.state)
        self.io = self.operations.io
        self.writes = self.io.writes
        self.locks = self.state.locks
        self.state.link.attach(self)  # type: ignore[arg-type]
        self.state.link.resume(1)
        self.state.open_gate()
        self.node = self.state.known(FID)
        self.node.opens_w = 1
        self.io.handles[FH] = self.handle(flags)
        self.seq = first_seq(1)
        self.grant(LockMode.EX)
        self.auto = True

    def handle(self, flags: int) -> Handle:
        return Handle(self.node, flags, True, bool(flags & os.O_APPEND), True, privileged=True)

    def send(self, kind: FrameType, parts: list[bytes], *, epoch: int, session: int, seq: int) -> None:
        self.home.queue.append(Asked(epoch, session, seq, unpack_request(b"".join(parts))))

    # -- locks -----------------------------------------------------------------------------------------------------

    def grant(self, mode: LockMode, flags: LockFlag = LockFlag.NONE) -> None:
        self.seq += 1
        self.locks.on_record(LockGrant(0, FID.ino, mode, self.seq, flags))

    def bast(self, mode: LockMode = LockMode.EX, flags: LockFlag = LockFlag.NONE) -> None:
        self.locks.on_record(LockBast(FID.ino, self.seq, mode, flags))

    @property
    def releases(self) -> list[LockMode]:
        return [record.mode for record in self.records if isinstance(record, LockRelease)]

    def serve_locks(self) -> None:
        """Grant what was asked for."""
        for record in list(self.records):
            if isinstance(record, LockReq):
                self.records.remove(record)
                self.seq += 1
                self.locks.on_record(LockGrant(record.req_id, record.ino, record.mode, self.seq, LockFlag.NONE))

    def lapse(self) -> None:
        """The lease ended: as Server._lease_ends does."""
        self.locks.cache.drop_all()

    # -- a change of home ------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        self.state.close_gate()
        self.state.link.suspend()
        self.locks.suspend()

    def resume(self, deny: bool = False) -> dict[int, LockMode]:
        """As Server._reclaim and Server._go_on do; returns what was claimed."""
        self.freeze()
        state = self.state
        state.link.epoch = self.home.epoch
        self.locks.reclaim()
        claimed = {row.ino: row.mode for row in state.held_rows() if row.mode != LockMode.NL}
        self.locks.cache.new_epoch(first_seq(self.home.epoch))
        self.seq = max(self.seq, first_seq(self.home.epoch))
        for ino, mode in claimed.items():
            self.seq += 1
            if deny:
                self.locks.on_record(LockDeny(0, ino, errno.EBUSY))
            else:
                self.locks.on_record(LockGrant(0, ino, mode, self.seq, LockFlag.RECLAIM))
        state.link.resume(self.home.epoch)
        self.locks.resume()
        state.open_gate()
        return claimed

    def crash(self, deny: bool = False) -> dict[int, LockMode]:
        """The home dies, another one serves."""
        self.home.crash()
        return self.resume(deny)

    # -- running ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the home has done everything that it was asked, and will be asked by itself."""
        while True:
            for _ in range(5):
                await asyncio.sleep(0)
                while self.home.queue or self.home.replies:
                    self.step()
                    await asyncio.sleep(0)
            if not any(node.batch and node.behind == len(node.batch) for node in self.state.nodes.values()):
                return
            await asyncio.sleep(0.001)

    def step(self) -> None:
        if self.home.queue:
            self.home.execute()
        if self.home.replies:
            self.state.link.on_reply(self.home.replies.popleft())

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(10):
            while not what():
                await asyncio.sleep(0)

    def start(self, work: Any) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(work)

    async def do(self, work: Any) -> Any:
        """Run *work* to its end; the home works where it has to."""
        task = self.start(work)
        for _ in range(4):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            while not task.done():
                self.step()
                await asyncio.sleep(0)
        return task.result()

    async def write(self, offset: int, data: bytes, fh: int = FH) -> int:
        return int(await self.do(self.io.write(fh, offset, data)))  # type: ignore[arg-type]

    async def truncate(self, size: int) -> None:
        await self.do(self.operations._setattr(self.node, (Valid.SIZE, 0, 0, 0, size, 0, 0)))

    def known(self, fid: Fid) -> Node:
        """Another file, written through a descriptor with the number of its inode."""
        node = self.state.known(fid)
        node.opens_w = 1
        self.io.handles[fid.ino] = Handle(node, os.O_WRONLY, True, False, True, privileged=True)
        self.seq += 1
        self.locks.on_record(LockGrant(0, fid.ino, LockMode.EX, self.seq, LockFlag.NONE))
        return node
