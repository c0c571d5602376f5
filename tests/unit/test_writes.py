"""Shipped WRITEs: kept until durable, committed before what a replay would undo, written again after a crash."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writekit import FH, FID, Rig, put

from mxfs_fuse import writes
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid, Op, Valid, WriteFlag
from mxfsd.core.unstable import PIECE_COST

NL, CR, PR, PW, EX = LockMode.NL, LockMode.CR, LockMode.PR, LockMode.PW, LockMode.EX


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    made.locks.close()


# -- replay ----------------------------------------------------------------------------------------------------------


async def test_what_was_answered_is_written_again_first(rig: Rig) -> None:
    await rig.write(0, b"first")
    await rig.write(5, b"second")
    await rig.run()
    read = rig.start(rig.io._pread(rig.io.handles[FH], 0, 100))
    rig.home.names  # noqa: B018 (forget what was executed)
    await asyncio.sleep(0)
    rig.crash()
    await rig.until(lambda: rig.home.queue)
    assert [asked.request.op for asked in rig.home.queue] == [Op.WRITES], "the READ has to wait for the answer"
    rig.home.execute()
    assert bytes(rig.home.cache) == b"firstsecond"
    await rig.run()
    assert await read == b"firstsecond"
    assert rig.home.names == ["WRITES", "READ"]


async def test_unanswered_writes_keep_their_place(rig: Rig) -> None:
    """One that the old home never answered is older than those that it did: it is written before them."""
    await rig.write(0, b"A" * 20_000)
    await rig.write(0, b"B" * 20_000)
    await rig.write(0, b"C" * 20_000)
    for _ in range(3):
        rig.home.execute()
    first, second, third = rig.home.replies
    rig.home.replies.clear()
    rig.state.link.on_reply(second)
    await rig.run()
    rig.crash()
    await rig.run()
    assert bytes(rig.home.cache) == b"C" * 20_000
    assert rig.node.behind == 0
    assert rig.home.names[3:] == ["WRITE"] * 3, "and not once more behind that"
    await rig.do(rig.io.flush(FH))
    del first, third


async def test_a_batch_keeps_its_place_before_a_large_write(rig: Rig) -> None:
    await rig.write(0, b"first")
    await rig.write(0, b"batched")
    await rig.write(0, b"L" * 20_000)
    rig.crash()
    await rig.run()
    assert bytes(rig.home.cache) == b"L" * 20_000


async def test_small_writes_gather_while_nothing_is_under_way(rig: Rig) -> None:
    await rig.write(0, b"first")
    await rig.write(10, b"a")
    rig.step()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not rig.home.queue, "the first is answered, and the batch has time to grow"
    await rig.write(11, b"b")
    await rig.until(lambda: rig.home.queue)
    (asked,) = rig.home.queue
    assert asked.request.op is Op.WRITES
    await rig.run()
    assert bytes(rig.home.cache) == b"first" + bytes(5) + b"ab"
    assert rig.node.behind == 0


async def test_who_needs_the_home_to_have_the_data_does_not_wait_for_more(rig: Rig) -> None:
    await rig.write(0, b"first")
    await rig.write(10, b"a")
    rig.step()
    await asyncio.sleep(0)
    flush = rig.start(rig.io.flush(FH))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert rig.home.queue
    await rig.run()
    await flush


@pytest.mark.parametrize("other", [False, True])
async def test_a_flush_ends_while_another_thread_goes_on_writing(rig: Rig, other: bool) -> None:
    """It waits for what came before it, and not for a moment at which nothing is under way: there may be none."""
    await rig.write(0, b"first")
    await rig.write(10, b"batched")
    flush = rig.start(rig.io.flush(FH))
    for number in range(20):
        await rig.write(20 + number, b"x" * (20_000 if other else 10))
        for _ in range(3):
            await asyncio.sleep(0)
        if flush.done():
            break
        rig.step()
    else:
        pytest.fail("it waits for what was written after it")
    assert rig.home.cache[:17] == b"first" + bytes(5) + b"batched"
    assert rig.node.behind
    await flush


async def test_a_writer_that_waits_gets_the_answer_of_the_replay(rig: Rig) -> None:
    rig.grant(PW)  # nothing is answered ahead
    task = rig.start(rig.io.write(FH, 3, b"data"))
    await rig.until(lambda: rig.home.queue)
    rig.crash()
    await rig.run()
    assert await task == 4
    assert bytes(rig.home.cache) == b"\0\0\0data"


async def test_the_same_home_is_asked_again_and_nothing_is_replayed(rig: Rig) -> None:
    """It may have executed what it did not answer: its reply cache says so."""
    await rig.write(0, b"one")
    await rig.run()
    await rig.write(0, b"two")
    asked = list(rig.home.queue)
    rig.home.execute()
    rig.home.replies.clear()
    rig.home.names  # noqa: B018
    rig.resume()
    assert list(rig.home.queue) == asked
    await rig.run()
    assert rig.home.names == []
    assert bytes(rig.home.cache) == b"two"


async def test_a_home_that_dies_during_the_replay(rig: Rig) -> None:
    other = Fid(90, 1)
    rig.known(other)
    await rig.write(0, b"data" * 10_000)
    await rig.run()
    rig.crash()
    await rig.until(lambda: rig.home.queue)
    rig.home.execute()
    rig.crash()
    fsync = rig.start(rig.io.fsync(rig.io.handles[FH]))
    await rig.run()
    await fsync
    assert bytes(rig.home.disk) == b"data" * 10_000


async def test_the_same_home_again_during_the_replay(rig: Rig) -> None:
    await rig.write(0, b"data")
    await rig.run()
    rig.crash()
    await rig.until(lambda: rig.home.queue)
    rig.home.queue.clear()
    rig.resume()
    await rig.run()
    assert bytes(rig.home.cache) == b"data"
    assert await rig.do(rig.io._pread(rig.io.handles[FH], 0, 9)) == b"data"


async def test_a_replay_that_is_over_while_the_home_changes_again_opens_nothing(rig: Rig) -> None:
    await rig.write(0, b"data")
    await rig.run()
    rig.crash()
    await rig.until(lambda: rig.home.queue)
    rig.home.execute()
    rig.freeze()
    rig.state.link.on_reply(rig.home.replies.popleft())
    read = rig.start(rig.io._pread(rig.io.handles[FH], 0, 9))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not rig.home.queue
    rig.resume()
    await rig.run()
    assert await read == b"data"


@pytest.mark.error_logs
@pytest.mark.parametrize(("code", "told"), [(errno.ESTALE, 0), (errno.ENOSPC, errno.ENOSPC), (errno.EIO, errno.EIO)])
async def test_what_cannot_be_written_again(rig: Rig, code: int, told: int) -> None:
    await rig.write(0, b"data")
    await rig.run()
    rig.home.error = {Op.WRITE: code}
    rig.crash()
    await rig.run()
    assert not rig.writes.dirty(rig.node)
    rig.home.error = {}
    if told:
        with pytest.raises(OSError, check=lambda exc: exc.errno == told):
            await rig.do(rig.io.fsync(rig.io.handles[FH]))
    await rig.do(rig.io.fsync(rig.io.handles[FH]))


async def test_becoming_the_home(rig: Rig, tmp_path: Path) -> None:
    """What is kept goes to the lower mount before anything is served; one that nobody answered too."""

    class Lower:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)

        def file_fd(self, fid: Fid) -> int:
            assert fid == FID
            return self.fd

    await rig.write(0, b"one")
    await rig.run()
    await rig.write(0, b"two")
    await rig.write(1, b"three")
    rig.state.lower = Lower()  # type: ignore[assignment]
    rig.crash()
    assert os.pread(Lower.fd, 100, 0) == b"two"
    for _ in range(5):
        await asyncio.sleep(0)
        rig.writes._send_batches()
    rig.state.lower = None
    await rig.run()
    assert not rig.state.unstable.holds(FID) or bytes(rig.home.cache) == b"\0three"
    assert FID.ino in rig.state._dirty
    os.close(Lower.fd)


# -- commits ---------------------------------------------------------------------------------------------------------


async def test_fsync_covers_what_was_confirmed_before(rig: Rig) -> None:
    await rig.write(0, b"A" * 20_000)
    await rig.do(rig.io.fsync(rig.io.handles[FH]))
    assert rig.home.names == ["WRITE", "FSYNC"]
    assert not rig.writes.dirty(rig.node)
    assert rig.state.unstable.total == 0
    rig.crash()
    await rig.run()
    assert rig.home.names == [], "nothing to be written again"


async def test_a_write_during_fsync_is_kept(rig: Rig) -> None:
    await rig.write(0, b"A" * 20_000)
    await rig.run()
    fsync = rig.start(rig.io.fsync(rig.io.handles[FH]))
    await rig.until(lambda: rig.home.queue)
    rig.home.execute()
    await rig.io.write(FH, 0, b"B" * 20_000)
    await rig.run()
    await fsync
    rig.crash()
    await rig.run()
    assert bytes(rig.home.cache) == b"B" * 20_000


@pytest.mark.parametrize("lost", [PR, NL])
async def test_a_lock_is_given_up_after_a_commit(rig: Rig, lost: LockMode) -> None:
    await rig.write(0, b"data")
    rig.bast(CR if lost is NL else PR)
    for _ in range(20):
        await asyncio.sleep(0)
    assert rig.releases == []
    rig.records.clear()
    while not rig.releases:
        await asyncio.sleep(0)
        assert not rig.releases
        rig.step()
        if bytes(rig.home.disk) != b"data":
            assert not rig.releases
        else:
            await rig.run()
            await rig.until(lambda: rig.releases)
    assert not rig.writes.dirty(rig.node)


async def test_the_one_writer_keeps_its_data(rig: Rig) -> None:
    rig.node.cached_writers = 1
    await rig.write(0, b"data")
    await rig.run()
    rig.bast(CR, LockFlag.MAY_KEEP)
    await rig.until(lambda: rig.releases)
    assert rig.releases == [PW]
    assert rig.writes.dirty(rig.node)
    assert "FSYNC" not in rig.home.names


async def test_a_lock_that_is_kept_as_pw_waits_for_the_replay(rig: Rig) -> None:
    """Others read beside PW: not before this node has written again what they are to see."""
    rig.node.cached_writers = 1
    await rig.write(0, b"data")
    await rig.run()
    assert rig.crash() == {FID.ino: EX}
    rig.records.clear()
    rig.bast(CR, LockFlag.MAY_KEEP)
    for _ in range(20):
        await asyncio.sleep(0)
    assert rig.releases == []
    await rig.run()
    await rig.until(lambda: rig.releases)
    assert (rig.releases, bytes(rig.home.cache)) == ([PW], b"data")


async def test_a_forgotten_inode_keeps_its_lock_until_the_commit(rig: Rig) -> None:
    await rig.write(0, b"data")
    rig.node.opens_w = 0
    rig.state.forget(rig.node)
    assert rig.locks.mode(FID.ino) == EX
    await rig.run()
    await rig.until(lambda: FID.ino not in rig.state.nodes)
    assert bytes(rig.home.disk) == b"data"
    assert rig.locks.mode(FID.ino) == NL


@pytest.mark.parametrize(
    "change",
    [
        lambda rig: rig.operations._setattr(rig.node, (Valid.SIZE, 0, 0, 0, 1, 0, 0)),
        lambda rig: rig.operations._setattr(rig.node, (Valid.MTIME, 0, 0, 0, 0, 0, 5)),
        lambda rig: rig.operations.setxattr(FID.ino, b"user.a", b"b", None),
        lambda rig: rig.operations.removexattr(FID.ino, b"user.a", None),
    ],
)
async def test_attributes_change_after_a_commit(rig: Rig, change: Callable[[Rig], Any]) -> None:
    await rig.write(0, b"data")
    await rig.do(change(rig))
    assert rig.home.names[:2] == ["WRITE", "FSYNC"]
    rig.crash()
    await rig.run()
    assert rig.home.names == []


@pytest.mark.error_logs
async def test_a_failed_commit_is_told_once(rig: Rig) -> None:
    await rig.write(0, b"data")
    await rig.run()
    rig.home.error = {Op.FSYNC: errno.EIO}
    rig.bast()
    await rig.run()
    await rig.until(lambda: rig.releases)
    rig.home.error = {}
    with pytest.raises(OSError, check=lambda exc: exc.errno == errno.EIO):
        await rig.do(rig.io.flush(FH))
    await rig.do(rig.io.flush(FH))


def is_full(error: OSError) -> bool:
    return error.errno == errno.ENOSPC


async def fails_behind(rig: Rig) -> None:
    """A WRITE is answered, and then the home has no room for it."""
    rig.home.error = {Op.WRITE: errno.ENOSPC}
    assert await rig.write(0, b"A" * 20_000) == 20_000
    await rig.run()
    rig.home.error = {}


async def test_what_a_write_is_told_the_fsync_is_told_too(rig: Rig) -> None:
    """The kernel sends a large write(2) in parts. Where the second one fails it says how long the first one was, and
    nothing of the error; then the program writes the rest."""
    await fails_behind(rig)
    with pytest.raises(OSError, check=is_full):
        await rig.write(20_000, b"B" * 100)
    assert await rig.write(20_000, b"B" * 100) == 100
    await rig.run()
    with pytest.raises(OSError, check=is_full):
        await rig.do(rig.io.flush(FH))
    with pytest.raises(OSError, check=is_full):
        await rig.do(rig.io.fsync(rig.io.handles[FH]))
    await rig.do(rig.io.fsync(rig.io.handles[FH]))
    await rig.do(rig.io.flush(FH))


async def test_after_an_fsync_that_was_told_nobody_is_told_again(rig: Rig) -> None:
    await fails_behind(rig)
    with pytest.raises(OSError, check=is_full):
        await rig.do(rig.io.fsync(rig.io.handles[FH]))
    assert await rig.write(0, b"C") == 1
    await rig.do(rig.io.flush(FH))


async def test_a_close_of_a_copy_takes_nothing_from_those_who_go_on(rig: Rig) -> None:
    await fails_behind(rig)
    with pytest.raises(OSError, check=is_full):
        await rig.do(rig.io.flush(FH))  # a child that exits
    with pytest.raises(OSError, check=is_full):
        await rig.do(rig.io.fsync(rig.io.handles[FH]))


async def test_each_descriptor_is_told(rig: Rig) -> None:
    """And one that is opened later, where nobody had been told before that."""
    other = rig.io.handles[FH + 1] = rig.handle(os.O_RDWR)
    await fails_behind(rig)
    late = rig.io.handles[FH + 2] = rig.handle(os.O_RDWR)
    for handle in (rig.io.handles[FH], other, late):
        with pytest.raises(OSError, check=is_full):
            await rig.do(rig.io.fsync(handle))
    await rig.do(rig.io.fsync(rig.handle(os.O_RDWR)))
    await fails_behind(rig)
    for handle in (rig.io.handles[FH], other, late):
        with pytest.raises(OSError, check=is_full):
            await rig.do(rig.io.fsync(handle))


async def test_old_data_is_committed_in_the_background(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000]
    monkeypatch.setattr(writes, "now_ms", lambda: clock[0])
    await rig.write(0, b"data")
    await rig.run()
    clock[0] += writes._COMMIT_AGE_MS - 1
    rig.writes._tick()
    await rig.run()
    assert rig.writes.dirty(rig.node)
    clock[0] += 1
    rig.writes._tick()
    await rig.run()
    assert not rig.writes.dirty(rig.node)
    assert bytes(rig.home.disk) == b"data"


async def test_many_files_are_committed_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [rig.known(Fid(number, 1)) for number in range(200, 240)]
    for node in nodes:
        await rig.io.write(node.fid.ino, 0, b"x")  # type: ignore[arg-type]
    await rig.run()
    rig.home.names  # noqa: B018
    monkeypatch.setattr(writes, "_COMMIT_AGE_MS", -1)
    rig.writes._tick()
    await rig.run()
    assert rig.home.names == ["SYNC"]
    assert rig.state.unstable.total == 0


async def test_everything_is_committed_at_the_end(rig: Rig) -> None:
    await rig.write(0, b"A" * 20_000)
    await rig.write(0, b"batched")
    await rig.do(rig.writes.commit_all())
    assert bytes(rig.home.disk[:10]) == b"batchedAAA"
    assert rig.state.unstable.total == 0


async def test_writers_wait_where_too_much_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 100_000
    monkeypatch.setattr(writes, "_COMMIT_BYTES", 3 * (size + PIECE_COST))
    monkeypatch.setattr(writes, "_FULL_BYTES", 6 * (size + PIECE_COST))
    for number in range(6):
        await rig.io.write(FH, number * size, b"x" * size)
    assert rig.home.log == []
    waiting = rig.start(rig.io.write(FH, 6 * size, b"y" * size))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    await rig.run()
    assert await waiting == size
    await rig.run()
    assert "FSYNC" in rig.home.names
    assert rig.state.unstable.total < 3 * (size + PIECE_COST), "the background commits went on"


# -- without a lock --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [PR, NL])
async def test_without_a_lock_for_writing_each_write_is_stable(rig: Rig, mode: LockMode) -> None:
    rig.lapse()
    if mode is PR:
        rig.grant(PR)
    await rig.write(0, b"data")
    assert rig.home.log == [("WRITE", [0, WriteFlag.STABLE, b"data"])]
    assert not rig.writes.dirty(rig.node)


async def test_o_sync_is_stable(rig: Rig) -> None:
    rig.io.handles[FH] = rig.handle(os.O_WRONLY | os.O_SYNC)
    await rig.write(0, b"data")
    assert rig.home.log == [("WRITE", [0, WriteFlag.STABLE, b"data"])]


async def test_a_stable_write_follows_a_commit(rig: Rig) -> None:
    """Else a replay would put the older data over it."""
    await rig.write(0, b"older")
    rig.io.handles[2] = rig.handle(os.O_WRONLY | os.O_DSYNC)
    await rig.write(0, b"newer", fh=2)
    assert rig.home.names == ["WRITE", "FSYNC", "WRITE"]
    rig.crash()
    await rig.run()
    assert bytes(rig.home.cache) == b"newer"


# -- appending -------------------------------------------------------------------------------------------------------


async def test_appends_under_ex_are_writes_to_a_place(rig: Rig) -> None:
    put(rig.home.cache, 0, b"before")
    rig.io.handles[FH] = rig.handle(os.O_WRONLY | os.O_APPEND)
    await rig.write(999, b"one")
    await rig.write(999, b"two")
    await rig.run()
    assert rig.home.log == [("GETATTR", []), ("WRITE", [6, 0, b"one"]), ("WRITE", [9, 0, b"two"])]
    await rig.truncate(2)
    await rig.write(999, b"three")
    await rig.run()
    assert bytes(rig.home.cache) == b"bethree"


async def test_a_write_moves_the_end(rig: Rig) -> None:
    rig.io.handles[2] = rig.handle(os.O_WRONLY | os.O_APPEND)
    await rig.write(0, b"a", fh=2)
    await rig.write(10, b"b")
    await rig.write(0, b"c", fh=2)
    await rig.run()
    assert bytes(rig.home.cache) == b"a" + bytes(9) + b"bc"


async def test_without_ex_the_home_places_an_append(rig: Rig) -> None:
    put(rig.home.cache, 0, b"before")
    rig.io.handles[FH] = rig.handle(os.O_WRONLY | os.O_APPEND)
    rig.grant(PW)
    await rig.write(0, b"one")
    assert rig.home.log == [("WRITE", [0, WriteFlag.APPEND | WriteFlag.STABLE, b"one"])]


async def test_another_lock_means_that_the_end_may_have_moved(rig: Rig) -> None:
    rig.io.handles[FH] = rig.handle(os.O_WRONLY | os.O_APPEND)
    await rig.write(0, b"mine")
    rig.bast()
    await rig.run()
    await rig.until(lambda: rig.releases)
    put(rig.home.cache, 4, b"theirs")
    rig.grant(EX)
    await rig.write(0, b"mine")
    await rig.run()
    assert bytes(rig.home.cache) == b"minetheirsmine"


# -- without a lease -------------------------------------------------------------------------------------------------


async def test_after_a_lapse_the_file_is_claimed_and_written_again(rig: Rig) -> None:
    await rig.write(0, b"data")
    await rig.run()
    rig.lapse()
    assert rig.crash() == {FID.ino: EX}
    await rig.run()
    assert bytes(rig.home.cache) == b"data"
    assert rig.locks.mode(FID.ino) == EX


@pytest.mark.error_logs
async def test_a_file_that_another_node_has_got_is_left_alone(rig: Rig) -> None:
    await rig.write(0, b"answered")
    await rig.run()
    await rig.write(0, b"A" * 20_000)
    await rig.write(0, b"batched")
    rig.lapse()
    rig.home.names  # noqa: B018
    rig.crash(deny=True)
    await rig.run()
    assert rig.home.names == []
    assert (rig.node.behind, rig.writes._behind_bytes, rig.state.unstable.total) == (0, 0, 0)
    with pytest.raises(OSError, check=lambda exc: exc.errno == errno.EIO):
        await rig.do(rig.io.flush(FH))
    await rig.do(rig.io.flush(FH))


async def test_after_a_lapse_a_bast_is_answered_behind_the_commit(rig: Rig) -> None:
    await rig.write(0, b"data")
    rig.lapse()
    rig.bast()
    for _ in range(20):
        await asyncio.sleep(0)
    assert rig.releases == []
    await rig.run()
    await rig.until(lambda: rig.releases)
    assert bytes(rig.home.disk) == b"data"


# -- any order -------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 30), st.integers(1, 9)),
        st.tuples(st.just("write"), st.integers(0, 30), st.just(20_000)),
        st.tuples(st.just("append"), st.integers(0, 1), st.integers(1, 9)),
        st.tuples(st.sampled_from(["fsync", "crash", "reconnect", "handover", "lapse"]), st.just(0), st.just(0)),
        st.tuples(st.just("truncate"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("home"), st.integers(1, 4), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_any_order_of_writes_and_crashes(steps: list[tuple[str, int, int]]) -> None:
    asyncio.run(_any_order(steps))


async def _any_order(steps: list[tuple[str, int, int]]) -> None:
    """One application, one operation after the other. The home works when a step says so, or when it is waited for."""
    rig = Rig()
    rig.io.handles[2] = rig.handle(os.O_WRONLY | os.O_APPEND)
    expected = bytearray()
    marks = iter(range(1, 1 << 20))
    try:
        for name, number, size in steps:
            data = bytes([next(marks) % 255 + 1]) * size
            if name == "write":
                await rig.write(number, data)
                put(expected, number, data)
            elif name == "append":
                await rig.write(0, data, fh=2)
                put(expected, len(expected), data)
            elif name == "fsync":
                await rig.do(rig.io.fsync(rig.io.handles[FH]))
                assert bytes(rig.home.disk) == bytes(expected)
            elif name == "truncate":
                await rig.truncate(number)
                expected.extend(bytes(max(0, number - len(expected))))
                del expected[number:]
            elif name == "home":
                for _ in range(number):
                    await asyncio.sleep(0)
                    if rig.home.queue:
                        rig.home.execute()
                    if number % 2 and rig.home.replies:
                        rig.state.link.on_reply(rig.home.replies.popleft())
            elif name == "crash":
                rig.crash()
            elif name == "reconnect":
                rig.home.queue.clear()
                rig.home.replies.clear()
                rig.resume()
            elif name == "lapse":
                rig.lapse()
            elif name == "handover":  # to another node, which changes the file, and back
                rig.records.clear()
                rig.bast()
                async with asyncio.timeout(10):
                    while not rig.releases:
                        await asyncio.sleep(0)
                        rig.step()
                assert bytes(rig.home.disk) == bytes(rig.home.cache) == bytes(expected)
                put(expected, 3, b"!")
                put(rig.home.cache, 3, b"!")
                put(rig.home.disk, 3, b"!")
                rig.grant(EX)
        await rig.run()
        assert await rig.do(rig.io._pread(rig.io.handles[FH], 0, 1 << 20)) == bytes(expected)
        await rig.do(rig.io.flush(FH))
    finally:
        rig.locks.close()
