"""security.capability on a node that is not the home: the kernel asks for it before it caches a write."""

import asyncio
import errno
import os
from typing import Any

import pytest

from mxfs_fuse.fileio import CAPABILITY, FileIO
from mxfs_fuse.state import State
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid, Grant, Op
from mxfs_proto.records import LockBast, LockGrant, LockReq, Record

FILE = Fid(77, 1)


class Mount:
    """A mount that is not the home, whose home grants every lock, and answers every operation, in the next moment."""

    def __init__(self, answer: bytes | int = errno.ENODATA) -> None:
        self.answer = answer
        self.shipped: list[Op] = []
        self.under_way = self.most = 0
        self.seq = 0
        self.state = State(Fid(128, 1), 1000, False, self._record)
        self.state.open_gate()
        self.state.link.ship = self._ship  # type: ignore[method-assign, assignment]
        self.io = FileIO(self.state)
        self.node = self.state.known(FILE)

    def _record(self, record: Record) -> None:
        if isinstance(record, LockReq):
            asyncio.get_running_loop().call_soon(self.grant, record.req_id, record.mode)

    def grant(self, req_id: int = 0, mode: LockMode = LockMode.EX) -> None:
        self.seq += 1
        self.state.locks.on_record(LockGrant(req_id, FILE.ino, mode, self.seq, LockFlag.NONE))

    async def _ship(self, op: Op, _uid: int, _gid: int, args: tuple[Any, ...]) -> tuple[list[Grant], tuple[Any, ...]]:
        self.shipped.append(op)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        if op is Op.GETXATTR:
            assert args == (*FILE, CAPABILITY)
            if isinstance(self.answer, int):
                raise OSError(self.answer, os.strerror(self.answer))
            return [], (self.answer,)
        return [], (None,)

    async def asked(self) -> bytes | int:
        """What the kernel is told."""
        try:
            return await self.io.capability(self.node)
        except OSError as error:
            assert error.errno is not None
            return error.errno


async def test_an_open_for_writing_asks_beside_the_question_whether_it_is_there() -> None:
    mount = Mount()
    await mount.io.open(mount.node, os.O_RDWR, 0)
    assert (sorted(mount.shipped), mount.most) == (sorted([Op.GETATTR, Op.GETXATTR]), 2)
    assert await mount.asked() == errno.ENODATA
    assert len(mount.shipped) == 2


async def test_an_open_under_a_lock_for_reading_asks_beside_the_question_for_another_lock() -> None:
    mount = Mount()
    mount.grant(mode=LockMode.PR)
    await mount.io.open(mount.node, os.O_RDWR, 0)
    assert mount.shipped == [Op.GETXATTR]
    assert await mount.asked() == errno.ENODATA
    assert mount.shipped == [Op.GETXATTR]


async def test_an_answer_that_comes_after_the_lock_was_lost_is_not_kept() -> None:
    mount = Mount()
    mount.grant(mode=LockMode.PR)
    asking = asyncio.ensure_future(mount.asked())
    await asyncio.sleep(0)
    mount.state.locks.cache.drop_all()
    mount.state.losses += 1
    mount.grant()
    assert await asking == errno.ENODATA
    mount.answer = b"\1\0\0\2"
    assert await mount.asked() == mount.answer


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_DIRECT])
async def test_an_open_whose_writes_are_not_cached_does_not(flags: int) -> None:
    mount = Mount()
    await mount.io.open(mount.node, flags, 0)
    assert mount.shipped == [Op.GETATTR]


@pytest.mark.parametrize("answer", [b"\1\0\0\2", errno.EIO])
async def test_what_is_set_or_not_known_is_asked_for_each_time(answer: bytes | int) -> None:
    mount = Mount(answer)
    await mount.io.open(mount.node, os.O_RDWR, 0)
    assert await mount.asked() == answer
    assert await mount.asked() == answer
    assert mount.shipped.count(Op.GETXATTR) == 3


async def test_it_is_asked_anew_when_another_node_had_the_file() -> None:
    mount = Mount()
    await mount.io.open(mount.node, os.O_RDWR, 0)
    mount.state.locks.on_record(LockBast(FILE.ino, mount.seq, LockMode.EX, LockFlag.NONE))
    while mount.state.locks.seq(FILE.ino) >= 0:
        await asyncio.sleep(0)
    mount.grant()
    mount.answer = b"\1\0\0\2"
    assert await mount.asked() == mount.answer


async def test_a_file_that_was_made_here_has_none() -> None:
    mount = Mount()
    mount.grant()
    mount.io.made(mount.node, os.O_RDWR, [Grant(FILE.ino, LockMode.EX, mount.seq)])
    assert await mount.asked() == errno.ENODATA
    assert mount.shipped == []


@pytest.mark.parametrize(("flags", "older"), [(os.O_RDWR, 1), (os.O_WRONLY, 0)])
async def test_but_not_where_the_lock_is_another_or_nobody_will_ask(flags: int, older: int) -> None:
    mount = Mount()
    mount.grant()
    mount.io.made(mount.node, flags, [Grant(FILE.ino, LockMode.EX, mount.seq - older)])
    assert await mount.asked() == errno.ENODATA
    assert mount.shipped == [Op.GETXATTR]
