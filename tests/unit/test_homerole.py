"""The home's half of the protocol: each operation once, grants behind the commits they need, reclaims."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import xfsdisk
from homekit import A, B, GatedLower, fid_of, turns, until

from mxfs_proto.errors import PeerError
from mxfs_proto.frames import Frame, FrameType, ReclaimEntry, pack_reclaim
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import NO_FID, Fid, Grant, Op, OpFlag, WriteFlag, pack_request, unpack_reply
from mxfs_proto.records import LockBast, LockGrant, LockRecord, LockRelease, LockReq, Opens
from mxfsd.core.epochs import first_seq
from mxfsd.core.sessions import SessionTable
from mxfsd.core.timeouts import Timeouts
from mxfsd.home import INTERNAL_REQ
from mxfsd.homerole import HomeRole
from mxfsd.io import libc
from mxfsd.io.ranges import KEEP_SIZE, PUNCH_HOLE
from mxfsd.settling import recover_sessions

pytestmark = pytest.mark.needs("root", "loop", "xfs")
HOME = 1
EPOCH = 7


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path_factory.mktemp("xfs")) as device:
        yield device


class Rig:
    """A home whose messages are kept; the home's own FUSE layer answers every BAST."""

    def __init__(self, lower: GatedLower, epoch: int = EPOCH) -> None:
        self.lower = lower
        self.failures: list[str] = []
        sessions = SessionTable()
        self.recovered = recover_sessions(lower, sessions, 5)
        self.locks: list[tuple[int, LockRecord]] = []
        self.replies: list[tuple[int, int, int, bytes]] = []
        self.silent: list[int] = []
        self.fenced = False
        self.role = HomeRole(
            HOME,
            epoch,
            lower,
            Timeouts.named("fast"),
            sessions,
            False,
            self._send_lock,
            self._send_frame,
            self.silent.append,
            self.recovered.records,
            self.failures.append,
            is_fenced=self._is_fenced,
        )
        self.role.run(self.role.master.grace_over(0))

    async def _is_fenced(self) -> bool:
        return self.fenced

    def _send_lock(self, node: int, record: LockRecord) -> None:
        self.locks.append((node, record))
        if node == HOME and isinstance(record, LockBast):
            release = LockRelease(record.ino, record.seq, LockMode.NL, 0, 0)
            asyncio.get_running_loop().call_soon(self.role.on_lock, HOME, release)

    def _send_frame(self, node: int, kind: FrameType, parts: list[bytes], session: int, seq: int) -> None:
        assert kind is FrameType.OP_REPLY
        self.replies.append((node, session, seq, b"".join(parts)))

    def ship(
        self, node: int, seq: int, op: Op, *values: Any, ack: int = 0, epoch: int = EPOCH, session: int = 0
    ) -> None:
        payload = b"".join(pack_request(op, OpFlag.WANT_LOCK, 0, 0, ack, values))
        self.role.on_operation(node, Frame(FrameType.OP_REQ, epoch, session or node, seq, payload))

    async def reply(self, op: Op) -> tuple[int, list[Grant], list[Any]]:
        """Wait for one reply and take it."""
        await until(lambda: self.replies)
        return unpack_reply(op, self.replies.pop(0)[3])

    async def make(self, node: int, seq: int, name: bytes) -> Fid:
        self.ship(node, seq, Op.CREATE, *self.base, name, 0o644, os.O_EXCL)
        code, grants, values = await self.reply(Op.CREATE)
        assert code == 0
        for grant in grants:
            self.role.on_lock(node, LockRelease(grant.ino, grant.seq, LockMode.NL, 0, 0))
        return fid_of(values[1])

    base: Fid

    def of(self, node: int) -> list[LockRecord]:
        return [record for to, record in self.locks if to == node]


@pytest.fixture
async def rig(device: str, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    lower = GatedLower(libc.mount_detached(device, False))
    lower.prepare()
    xfsdisk.forget_operations(lower)
    rig = Rig(lower)
    rig.base = fid_of(lower.mkdir(lower.root, request.node.name.encode()[:200], 0o755, 0, 0))
    try:
        yield rig
    finally:
        lower.gate.open()
        async with asyncio.timeout(20):
            await rig.role.freeze()
        assert not rig.failures
        for fid in lower.orphans():
            lower.reap(fid)
        lower.close()


async def test_the_home_is_called_back_once_for_a_series_of_operations(rig: Rig) -> None:
    """What a node used just now is not given back at once, only to be called back by its next operation."""
    await rig.make(A, 1, b"first")
    rig.locks.clear()
    for seq in (2, 3):
        rig.ship(A, seq, Op.MKDIR, *rig.base, b"dir%d" % seq, 0o755)
        _, grants, _ = await rig.reply(Op.MKDIR)
        for got in grants:
            rig.role.on_lock(A, LockRelease(got.ino, got.seq, LockMode.NL, 0, 0))
    assert [record for record in rig.of(HOME) if record.ino == rig.base.ino] == []


# -- exactly once ------------------------------------------------------------------------------------------------


async def test_the_same_sequence_twice_is_executed_once(rig: Rig) -> None:
    rig.lower.mkdir(rig.base, b"dir", 0o755, 0, 0)
    for _ in range(2):
        rig.ship(A, 1, Op.RMDIR, *rig.base, b"dir")
        assert (await rig.reply(Op.RMDIR))[0] == 0
    rig.ship(A, 2, Op.RMDIR, *rig.base, b"dir")
    assert (await rig.reply(Op.RMDIR))[0] == errno.ENOENT
    rig.ship(A, 1, Op.RMDIR, *rig.base, b"dir", session=99)
    assert (await rig.reply(Op.RMDIR))[0] == errno.ENOENT, "another session counts for itself"


async def test_a_repetition_while_it_runs_starts_nothing(rig: Rig) -> None:
    rig.lower.gate.shut()
    for _ in range(3):
        rig.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755)
        await turns()
    rig.lower.gate.open()
    assert (await rig.reply(Op.MKDIR))[0] == 0
    await turns()
    assert rig.replies == []


async def test_what_runs_while_its_node_connects_anew_is_answered_without_locks(rig: Rig) -> None:
    """The node asks again and is told nothing, as it runs still: its end must answer."""
    rig.role.greet(A, 5)
    rig.lower.gate.shut()
    rig.ship(A, 1, Op.CREATE, *rig.base, b"file", 0o644, os.O_EXCL)
    rig.ship(A, 2, Op.GETATTR, *rig.base)
    await turns()
    rig.role.greet(A, 5, continues=5)
    rig.ship(A, 1, Op.CREATE, *rig.base, b"file", 0o644, os.O_EXCL)
    rig.ship(A, 2, Op.GETATTR, *rig.base)
    await turns()
    assert not rig.replies
    rig.lower.gate.open()
    await until(lambda: len(rig.replies) == 2)
    await turns()
    answers = {seq: payload for _node, _session, seq, payload in rig.replies}
    assert len(rig.replies) == len(answers) == 2
    code, grants, values = unpack_reply(Op.CREATE, answers[1])
    assert (code, grants, values[0]) == (0, [], 0)
    assert rig.role.service.executed == 3


async def test_a_replay_carries_no_grants(rig: Rig) -> None:
    rig.ship(A, 1, Op.CREATE, *rig.base, b"file", 0o644, os.O_EXCL)
    code, grants, values = await rig.reply(Op.CREATE)
    assert (code, len(grants)) == (0, 2)
    rig.ship(A, 1, Op.CREATE, *rig.base, b"file", 0o644, os.O_EXCL)
    assert await rig.reply(Op.CREATE) == (0, [], values)


async def test_another_epoch_and_settled_sequences_are_ignored(rig: Rig) -> None:
    for epoch in (EPOCH - 1, EPOCH + 1, 0):
        rig.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755, epoch=epoch)
        rig.ship(A, 2, Op.STATFS, epoch=epoch)
    await turns()
    assert (rig.replies, rig.lower.names(rig.base), rig.role.shipped) == ([], [], 0)
    rig.ship(A, 5, Op.MKDIR, *rig.base, b"five", 0o755, ack=4)
    await rig.reply(Op.MKDIR)
    rig.ship(A, 4, Op.MKDIR, *rig.base, b"four", 0o755)
    await turns()
    assert (rig.replies, rig.lower.names(rig.base)) == ([], [b"five"])


async def test_junk_is_refused_and_changes_nothing(rig: Rig) -> None:
    with pytest.raises(PeerError):
        rig.role.on_operation(A, Frame(FrameType.OP_REQ, EPOCH, A, 1, b"junk"))
    with pytest.raises(PeerError):
        rig.ship(A, 1, Op.MKDIR, *rig.base, b"..", 0o755)
    rig.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755)
    assert (await rig.reply(Op.MKDIR))[0] == 0, "its number was not used up"
    with pytest.raises(PeerError):
        rig.role.on_lock(A, LockReq(INTERNAL_REQ | 1, 5, LockMode.PR, LockFlag.NONE, 0, 0))
    with pytest.raises(PeerError):
        rig.role.on_lock(A, LockGrant(0, 5, LockMode.PR, 1, LockFlag.NONE))


async def test_replies_go_on_to_the_next_home(rig: Rig) -> None:
    rig.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755)
    _, _, values = await rig.reply(Op.MKDIR)
    await rig.role.freeze()
    after = Rig(rig.lower, EPOCH + 1)
    after.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755, epoch=EPOCH + 1)
    assert await after.reply(Op.MKDIR) == (0, [], values)
    await after.role.freeze()


async def test_what_freeze_dropped_may_be_sent_again(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(B, LockReq(1, file.ino, LockMode.EX, LockFlag.NONE, 0, 0))
    await until(lambda: rig.role.master.mode_of(B, file.ino) == LockMode.EX)
    rig.ship(A, 2, Op.UNLINK, *rig.base, b"file", *NO_FID)
    rig.lower.gate.shut()
    rig.ship(A, 3, Op.MKDIR, *rig.lower.root, b"made%d" % file.ino, 0o755)
    await until(rig.lower.gate.entered.is_set)
    freeze = asyncio.get_running_loop().create_task(rig.role.freeze())
    await turns()
    assert not freeze.done()
    rig.lower.gate.open()
    await freeze
    assert [seq for _, _, seq, _ in rig.replies] == [3], "executed ones are answered, the other is not"
    assert rig.lower.names(rig.base) == [b"file"]
    after = Rig(rig.lower, EPOCH + 1)
    after.ship(A, 2, Op.UNLINK, *rig.base, b"file", *NO_FID, epoch=EPOCH + 1)
    assert (await after.reply(Op.UNLINK))[0] == 0
    await after.role.freeze()


async def test_what_the_home_before_died_in_is_executed_once(rig: Rig) -> None:
    """Nothing is handed over but the volume."""
    file = await rig.make(A, 1, b"file")
    rig.ship(A, 2, Op.WRITE, *file, 0, WriteFlag.APPEND, b"one", ack=1)
    assert (await rig.reply(Op.WRITE))[2] == [0, 3]
    rig.ship(A, 3, Op.UNLINK, *rig.base, b"file", *file, ack=1)
    wanted = await rig.reply(Op.UNLINK)
    after = Rig(rig.lower, EPOCH + 1)
    after.ship(A, 3, Op.UNLINK, *rig.base, b"file", *file, ack=1, epoch=EPOCH + 1)
    assert await after.reply(Op.UNLINK) == (0, [], wanted[2])
    after.ship(A, 2, Op.WRITE, *file, 0, WriteFlag.APPEND, b"one", ack=1, epoch=EPOCH + 1)
    assert (await after.reply(Op.WRITE))[2] == [0, 3]
    await after.role.freeze()


async def test_a_stable_write_is_not_repeated_by_the_next_home(rig: Rig) -> None:
    """Another node may have written over it since."""
    file = await rig.make(A, 1, b"file")
    rig.ship(A, 2, Op.WRITE, *file, 0, WriteFlag.STABLE, b"older", ack=1)
    await rig.reply(Op.WRITE)
    rig.ship(B, 1, Op.WRITE, *file, 0, WriteFlag.STABLE, b"newer")
    await rig.reply(Op.WRITE)
    after = Rig(rig.lower, EPOCH + 1)
    after.ship(A, 2, Op.WRITE, *file, 0, WriteFlag.STABLE, b"older", ack=1, epoch=EPOCH + 1)
    assert (await after.reply(Op.WRITE))[2] == [0, 5]
    assert os.pread(rig.lower.file_fd(file), 10, 0) == b"newer"
    await after.role.freeze()


@pytest.mark.parametrize("op", [Op.COPY, Op.FALLOCATE])
async def test_data_is_overwritten_when_the_next_home_would_know_of_it(rig: Rig, op: Op) -> None:
    source, target = await rig.make(A, 1, b"source"), await rig.make(A, 2, b"target")
    for seq, file in ((3, source), (5, target)):
        rig.ship(A, seq, Op.WRITE, *file, 0, 0, b"data of %d" % seq)
        await rig.reply(Op.WRITE)
        rig.ship(A, seq + 1, Op.FSYNC, *file, 0)
        await rig.reply(Op.FSYNC)
    await turns()
    rig.lower.gate.shut()
    if op is Op.COPY:
        rig.ship(A, 7, op, *source, 0, *target, 0, 9, 0)
    else:
        rig.ship(A, 7, op, *target, PUNCH_HOLE | KEEP_SIZE, 0, 4, 0)
    await until(rig.lower.gate.entered.is_set)
    await turns()
    assert os.pread(rig.lower.file_fd(target), 9, 0) == b"data of 5"
    rig.lower.gate.open()
    assert (await rig.reply(op))[0] == 0
    assert os.pread(rig.lower.file_fd(target), 9, 0) == (b"data of 3" if op is Op.COPY else b"\0\0\0\0 of 5")


@pytest.mark.error_logs
async def test_a_force_that_fails_is_answered_by_nobody(rig: Rig) -> None:
    rig.lower.gate.fail = OSError(errno.EIO, "no disk")
    for seq in (1, 2):
        rig.ship(A, seq, Op.MKDIR, *rig.base, b"dir%d" % seq, 0o755)
    rig.ship(B, 1, Op.LOOKUP, *rig.base, b"dir1")
    await until(lambda: rig.failures and not rig.role._tasks)
    assert len(rig.failures) == 1, "told once"
    rig.lower.gate.fail = None
    rig.ship(B, 2, Op.STATFS)
    await turns()
    assert rig.replies == [], "nor what comes later"
    rig.failures.clear()


@pytest.mark.error_logs
@pytest.mark.parametrize("code", [errno.EIO, errno.EBADE])
@pytest.mark.parametrize("fenced", [False, True])
async def test_an_error_of_the_disk_is_an_answer_unless_the_home_was_fenced(
    rig: Rig, code: int, fenced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RESERVATION CONFLICT comes as EBADE, or as EIO of a page: the next home answers."""
    rig.fenced = fenced

    def lookup(*_: Any) -> None:
        raise OSError(code, "from the disk")

    monkeypatch.setattr(rig.lower, "lookup", lookup)
    rig.ship(A, 1, Op.LOOKUP, *rig.base, b"name")
    await until(lambda: rig.failures if fenced else rig.replies)
    await turns()
    if fenced:
        assert not rig.replies and len(rig.failures) == 1
        rig.failures.clear()
    else:
        assert (await rig.reply(Op.LOOKUP))[0] == errno.EIO


@pytest.mark.error_logs
async def test_a_grant_whose_commit_fails_is_not_sent(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.ship(A, 2, Op.WRITE, *file, 0, 0, b"data")
    await rig.reply(Op.WRITE)
    rig.lower.gate.fail = OSError(errno.EIO, "no disk")
    rig.role.on_lock(B, LockReq(9, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(lambda: rig.failures)
    await turns()
    assert rig.of(B) == []
    rig.failures.clear()


async def test_sessions_that_nobody_goes_on_with_are_forgotten(rig: Rig) -> None:
    for node in (A, B):
        await rig.make(node, 1, b"file%d" % node)
    after = Rig(rig.lower, EPOCH + 1)
    assert sorted(after.role.sessions.sessions()) == [A, B]
    after.role.reclaimed(B, B)
    after.role.forget_sessions()
    assert after.role.sessions.sessions() == [B]
    assert len(after.recovered.records) == 1, "its place is free"
    after.role.node_gone(B)
    assert after.role.sessions.sessions() == []
    assert len(after.recovered.records) == 0


# -- grants and commits ------------------------------------------------------------------------------------------


async def test_a_grant_waits_for_the_commit_of_another_s_data(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.ship(A, 2, Op.WRITE, *file, 0, 0, b"data")
    await rig.reply(Op.WRITE)
    rig.lower.gate.shut()
    rig.role.on_lock(B, LockReq(9, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(rig.lower.gate.entered.is_set)
    rig.role.on_lock(A, LockReq(8, file.ino, LockMode.EX, LockFlag.NONE, 0, 0))
    await turns()
    assert rig.of(B) == []
    rig.lower.gate.open()
    await until(lambda: len(rig.of(B)) == 2)
    grant, bast = rig.of(B)
    assert isinstance(grant, LockGrant) and grant.mode is LockMode.PR
    assert bast == LockBast(file.ino, grant.seq, LockMode.EX, LockFlag.NONE), "never before the grant it is about"
    assert grant.seq > first_seq(EPOCH)


async def test_a_grant_that_waited_is_not_sent_over_another_connection(rig: Rig) -> None:
    """The node has named over that what it holds, without this lock: it is taken from it, and it would use it."""
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(A, Opens(file.ino, 0, 1, LockFlag.NONE))  # else the home gets the file back, with a commit
    rig.ship(A, 2, Op.WRITE, *file, 0, 0, b"data")
    await rig.reply(Op.WRITE)
    rig.role.greet(B, 1)
    rig.lower.gate.shut()
    rig.role.on_lock(B, LockReq(9, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(lambda: rig.role.master.mode_of(B, file.ino) == LockMode.PR)
    rig.role.on_lock(A, LockReq(8, file.ino, LockMode.EX, LockFlag.NONE, 0, 0))
    rig.role.greet(B, 1, continues=1)
    rig.role.reclaimed(B)
    rig.lower.gate.open()
    await until(lambda: not rig.role._ordered)
    await turns()
    assert rig.of(B) == []
    assert rig.role.master.mode_of(B, file.ino) == LockMode.NL
    rig.role.on_lock(B, LockReq(9, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(lambda: rig.of(B) or rig.of(A))


async def test_the_writer_itself_waits_for_no_commit(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(A, Opens(file.ino, 0, 1, LockFlag.NONE))  # else the home gets the file back, with a commit
    rig.ship(A, 2, Op.WRITE, *file, 0, 0, b"data")
    await rig.reply(Op.WRITE)
    rig.lower.gate.shut()
    rig.role.on_lock(A, LockReq(9, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(lambda: rig.of(A))
    assert not rig.lower.gate.entered.is_set()


async def test_silence_is_reported(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(B, LockReq(1, file.ino, LockMode.EX, LockFlag.NONE, 0, 0))
    await until(lambda: rig.role.master.mode_of(B, file.ino) == LockMode.EX)
    rig.role.on_lock(A, LockReq(1, file.ino, LockMode.EX, LockFlag.NONE, 0, 0))
    later = 10 * Timeouts.named("fast").bast_ms + 10**12
    rig.role.run(rig.role.master.tick(later))
    assert rig.silent == [B]


# -- nodes -------------------------------------------------------------------------------------------------------


def reclaim(rig: Rig, node: int, *rows: ReclaimEntry) -> None:
    rig.role.reclaim(node, Frame(FrameType.RECLAIM, EPOCH, 0, 0, pack_reclaim(rows)))


async def test_what_was_not_named_again_is_held_no_more(rig: Rig) -> None:
    """A connection was lost, with whatever releases and open counts were on their way in it."""
    locked, opened, kept = [await rig.make(A, n, b"file%d" % n) for n in (1, 2, 3)]
    for file in (locked, kept):
        rig.role.on_lock(B, LockReq(file.ino, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
        await until(lambda file=file: rig.role.master.mode_of(B, file.ino) == LockMode.PR)
    rig.role.on_lock(B, Opens(opened.ino, 1, 0, LockFlag.NONE))
    rig.role.on_lock(B, Opens(kept.ino, 0, 2, LockFlag.NONE))
    rig.ship(A, 4, Op.UNLINK, *rig.base, b"file2", *opened)
    assert (await rig.reply(Op.UNLINK))[2][:2] == [*opened]
    rig.role.greet(B, 1)
    reclaim(rig, B, ReclaimEntry(*kept, LockMode.PR, 0, 2))
    assert rig.role.master.mode_of(B, locked.ino) == LockMode.PR, "not before it has named everything"
    rig.role.reclaimed(B)
    master = rig.role.master
    assert [master.mode_of(B, file.ino) for file in (locked, opened, kept)] == [LockMode.NL, LockMode.NL, LockMode.PR]
    assert (master.opens_of(opened.ino), master.opens_of(kept.ino)) == ({}, {B: (0, 2)})
    await until(lambda: not rig.lower.orphans())
    rig.role.greet(B, 1, continues=1)
    rig.role.reclaimed(B)
    assert master.mode_of(B, kept.ino) == LockMode.NL, "names count for one reclaim"


async def test_what_is_granted_while_a_node_names_what_it_holds_stays(rig: Rig) -> None:
    """It asked before it knew that its connection is a new one, and had named what it holds when it got the answer: it
    uses both locks from then on, and opens the files without a word."""
    before, by_lock, by_reply = [await rig.make(A, n, b"file%d" % n) for n in (1, 2, 3)]
    rig.role.on_lock(B, LockReq(1, before.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(lambda: rig.role.master.mode_of(B, before.ino) == LockMode.PR)
    rig.role.greet(B, 1)
    rig.role.on_lock(B, LockReq(2, by_lock.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    await until(lambda: rig.role.master.mode_of(B, by_lock.ino) == LockMode.PR)
    rig.ship(B, 1, Op.GETATTR, *by_reply)
    assert [grant.ino for grant in (await rig.reply(Op.GETATTR))[1]] == [by_reply.ino]
    rig.role.reclaimed(B)
    master = rig.role.master
    assert [master.mode_of(B, file.ino) for file in (before, by_lock, by_reply)] == [
        LockMode.NL,
        LockMode.PR,
        LockMode.PR,
    ]


async def test_a_new_incarnation_ends_what_the_old_one_held(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.greet(A, 1)
    rig.role.on_lock(A, LockReq(1, file.ino, LockMode.PR, LockFlag.NONE, 0, 0))
    rig.role.on_lock(A, Opens(file.ino, 1, 0, LockFlag.NONE))
    await until(lambda: rig.role.master.mode_of(A, file.ino) == LockMode.PR)
    rig.role.greet(A, 1)
    assert rig.role.master.mode_of(A, file.ino) == LockMode.PR
    assert A in rig.role.sessions.sessions()
    rig.role.greet(A, 2, continues=1)
    assert rig.role.master.mode_of(A, file.ino) == LockMode.PR, "its FUSE layer is the same"
    assert A in rig.role.sessions.sessions()
    rig.role.greet(A, 3, continues=1)
    assert rig.role.master.mode_of(A, file.ino) == LockMode.PR, "one daemon of it died before it knew"
    rig.role.greet(A, 4)
    assert rig.role.master.mode_of(A, file.ino) == LockMode.NL
    assert rig.role.master.opens_of(file.ino) == {}
    assert rig.role.sessions.sessions() == []


async def test_a_node_that_is_gone_holds_up_nobody(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(B, LockReq(1, file.ino, LockMode.EX, LockFlag.NONE, 0, 0))
    await until(lambda: rig.role.master.mode_of(B, file.ino) == LockMode.EX)
    rig.ship(A, 2, Op.GETATTR, *file)
    await turns()
    assert rig.replies == []
    rig.role.node_gone(A)
    rig.ship(3, 1, Op.STATFS)
    async with asyncio.timeout(5):
        await until(lambda: len(rig.replies) == 1)  # to the node that is gone nothing is said
        await rig.role.freeze()


async def test_the_last_close_of_a_node_that_is_gone_frees_the_orphan(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(B, Opens(file.ino, 1, 0, LockFlag.NONE))
    rig.ship(A, 2, Op.UNLINK, *rig.base, b"file", *file)
    await rig.reply(Op.UNLINK)
    assert rig.lower.orphans() == [file]
    rig.role.node_gone(B)
    await until(lambda: not rig.lower.orphans())


async def test_the_last_close_frees_the_orphan(rig: Rig) -> None:
    file = await rig.make(A, 1, b"file")
    rig.role.on_lock(B, Opens(file.ino, 2, 0, LockFlag.NONE))
    rig.ship(A, 2, Op.UNLINK, *rig.base, b"file", *file)
    await rig.reply(Op.UNLINK)
    rig.role.on_lock(B, Opens(file.ino, 1, 0, LockFlag.NONE))
    await turns()
    assert rig.lower.orphans() == [file]
    rig.role.on_lock(B, Opens(file.ino, 0, 0, LockFlag.NONE))
    await until(lambda: not rig.lower.orphans())


# -- figures -----------------------------------------------------------------------------------------------------


async def test_operations_and_basts_are_counted_by_node(rig: Rig) -> None:
    fid = await rig.make(A, 1, b"file")
    rig.role.on_lock(
        B, Opens(fid.ino, 0, 1, LockFlag.NONE)
    )  # else the home gets the file back, for which the data is committed
    for node, seq, size in ((A, 2, 5), (B, 3, 7)):
        rig.ship(node, seq, Op.WRITE, *fid, 0, 0, bytes(size))
        await rig.reply(Op.WRITE)
    rig.ship(B, 4, Op.READ, *fid, 0, 100)
    await rig.reply(Op.READ)
    rig.ship(B, 5, Op.LOOKUP, *rig.base, b"nosuch")
    await rig.reply(Op.LOOKUP)
    first, second = (rig.role.figures.of(node) for node in (A, B))
    named = {row["slot"]: row for row in rig.role.figures.nodes()}
    assert {op: sum(row["counts"]) for op, row in named[A]["operations"].items()} == {"CREATE": 1, "WRITE": 1}
    assert {op: sum(row["counts"]) for op, row in named[B]["operations"].items()} == {
        "WRITE": 1,
        "READ": 1,
        "LOOKUP": 1,
    }
    assert (first.bytes_written, first.bytes_read, second.bytes_written, second.bytes_read) == (5, 0, 7, 7)
    assert {node: row["basts"] for node, row in named.items() if row["basts"]} == {
        node: count for node in (HOME, A, B) if (count := sum(isinstance(record, LockBast) for record in rig.of(node)))
    }
    assert rig.role.service.unstable_files() == {B: 1}
    assert rig.role.totals()["executed"] == 4
    await turns()
    assert rig.role.running == 0


async def test_an_operation_counts_from_its_coming_to_its_answer(rig: Rig) -> None:
    rig.lower.gate.shut()
    rig.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755)
    await until(rig.lower.gate.entered.is_set)
    assert (rig.role.running, rig.role.figures.nodes()[0]["operations"]) == (1, {})
    await asyncio.sleep(0.03)
    rig.lower.gate.open()
    await rig.reply(Op.MKDIR)
    histogram = rig.role.figures.of(A).operations[Op.MKDIR]
    assert histogram is not None
    assert sum(histogram.counts) == 1
    assert histogram.sum_s >= 0.03


async def test_log_forces_are_not_counted_anew_after_a_move_that_was_called_off(rig: Rig) -> None:
    rig.ship(A, 1, Op.MKDIR, *rig.base, b"dir", 0o755)
    await rig.reply(Op.MKDIR)
    before = rig.role.totals()["log_forces"]
    assert before > 0
    rig.role.replace_lower(rig.lower)
    assert rig.role.totals()["log_forces"] == before
