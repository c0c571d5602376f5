"""The FUSE layer's link to the home: unanswered operations are sent again, and each ends once."""

import asyncio
import errno
from typing import Any

import pytest

from mxfs_fuse.link import OperationError, OperationLink
from mxfs_proto.errors import PeerError
from mxfs_proto.frames import Frame, FrameType
from mxfs_proto.ops import Grant, Op, OpFlag, Request, pack_error, pack_reply, unpack_request


class Wire:
    """Stands for the connection to the daemon: keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int, Request]] = []

    def send(self, kind: FrameType, parts: list[bytes], *, epoch: int, session: int, seq: int) -> None:
        assert kind is FrameType.OP_REQ
        self.sent.append((epoch, session, seq, unpack_request(b"".join(parts))))

    def take(self) -> list[tuple[int, int]]:
        """(epoch, sequence) of what was sent since the last call."""
        sent, self.sent = self.sent, []
        return [(epoch, seq) for epoch, _session, seq, _request in sent]


class Setup:
    def __init__(self) -> None:
        self.adopted: list[list[Grant]] = []
        self.link = OperationLink(self.adopted.append)
        self.wire = Wire()
        self.link.attach(self.wire)  # type: ignore[arg-type]

    def ship(self, op: Op = Op.REAP, values: Any = (1, 2), want_lock: bool = False) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self.link.ship(op, 10, 20, values, want_lock))

    def reply(self, seq: int, epoch: int, parts: list[bytes] | None = None, session: int | None = None) -> None:
        payload = b"".join(pack_reply(Op.REAP, [], []) if parts is None else parts)
        self.link.on_reply(
            Frame(FrameType.OP_REPLY, epoch, self.link.session if session is None else session, seq, payload)
        )


@pytest.fixture
def setup() -> Setup:
    return Setup()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_nothing_is_sent_before_there_is_a_home(setup: Setup) -> None:
    tasks = [setup.ship(), setup.ship()]
    await settle()
    assert setup.wire.take() == []
    setup.link.resume(3)
    assert setup.wire.take() == [(3, 1), (3, 2)]
    setup.reply(1, 3)
    setup.reply(2, 3)
    assert [await task for task in tasks] == [([], []), ([], [])]


async def test_unanswered_operations_go_to_the_next_home_with_their_sequence(setup: Setup) -> None:
    setup.link.resume(3)
    tasks = [setup.ship() for _ in range(3)]
    await settle()
    before = [(session, seq, request) for _epoch, session, seq, request in setup.wire.sent]
    setup.wire.take()
    setup.reply(2, 3)
    setup.link.suspend()
    late = setup.ship()
    await settle()
    assert setup.wire.take() == [], "kept back while the home changes"
    setup.link.resume(4)
    again = [(session, seq, request) for _epoch, session, seq, request in setup.wire.sent]
    assert again[:2] == [before[0], before[2]], "the same session, sequence and bytes"
    assert setup.wire.take() == [(4, 1), (4, 3), (4, 4)], "in the order of the first sending"
    for seq in (1, 3, 4):
        setup.reply(seq, 4)
    await asyncio.gather(*tasks, late)
    assert setup.link.pending == 0


async def test_a_new_connection_is_used_from_then_on(setup: Setup) -> None:
    setup.link.resume(3)
    task = setup.ship()
    await settle()
    setup.link.suspend()
    old, setup.wire = setup.wire, Wire()
    old.take()
    setup.link.attach(setup.wire)  # type: ignore[arg-type]
    setup.link.resume(3)
    assert (old.take(), setup.wire.take()) == ([], [(3, 1)])
    setup.reply(1, 3)
    await task


async def test_replies_of_another_epoch_or_session_count_for_nothing(setup: Setup) -> None:
    setup.link.resume(3)
    task = setup.ship()
    await settle()
    setup.link.suspend()
    setup.link.resume(4)
    parts = pack_reply(Op.REAP, [Grant(1, 5, 9)], [])
    setup.reply(1, 3, parts)
    setup.reply(1, 5, parts)
    setup.reply(1, 4, parts, session=setup.link.session + 1)
    setup.reply(2, 4, parts)
    await settle()
    assert (task.done(), setup.adopted, setup.link.pending) == (False, [], 1)
    setup.reply(1, 4, parts)
    assert await task == ([Grant(1, 5, 9)], [])
    setup.reply(1, 4, parts)
    assert setup.adopted == [[Grant(1, 5, 9)]], "a repeated reply gives no lock again"


async def test_ack_is_the_highest_sequence_below_which_all_are_settled(setup: Setup) -> None:
    setup.link.resume(3)
    acks = []

    async def ship() -> asyncio.Task[Any]:
        task = setup.ship()
        await settle()
        acks.append(setup.wire.sent[-1][3].ack)
        return task

    one, two = await ship(), await ship()
    setup.reply(2, 3)
    three = await ship()
    setup.reply(1, 3)
    four = await ship()
    setup.reply(3, 3)
    setup.reply(4, 3)
    five = await ship()
    assert acks == [0, 0, 0, 2, 4]
    setup.reply(5, 3)
    await asyncio.gather(one, two, three, four, five)


async def test_an_operation_given_up_is_still_not_acknowledged(setup: Setup) -> None:
    """Its caller is gone, but it may be executed yet: a repetition must find its reply."""
    setup.link.resume(3)
    task = setup.ship()
    await settle()
    task.cancel()
    await settle()
    other = setup.ship()
    await settle()
    assert setup.wire.sent[-1][3].ack == 0
    setup.link.resume(4)
    assert (4, 1) in setup.wire.take()
    setup.reply(1, 4, pack_reply(Op.REAP, [Grant(7, 3, 1)], []))
    assert setup.adopted == [[Grant(7, 3, 1)]], "the home counts that lock as held"
    setup.reply(2, 4)
    await other


async def test_grants_are_adopted_before_the_caller_goes_on(setup: Setup) -> None:
    setup.link.resume(3)
    task = setup.ship(want_lock=True)
    await settle()
    assert setup.wire.sent[-1][3].flags == OpFlag.WANT_LOCK
    assert setup.wire.sent[-1][3][2:4] == (10, 20)
    setup.reply(1, 3, pack_error(errno.ENOENT, [Grant(1, 3, 4)]))
    assert setup.adopted == [[Grant(1, 3, 4)]]
    with pytest.raises(OperationError) as caught:
        await task
    assert (caught.value.errno, caught.value.grants) == (errno.ENOENT, [Grant(1, 3, 4)])


async def test_a_reply_that_makes_no_sense_settles_nothing(setup: Setup) -> None:
    setup.link.resume(3)
    task = setup.ship()
    await settle()
    with pytest.raises(PeerError):
        setup.reply(1, 3, [b"\0"])
    assert setup.link.pending == 1
    setup.reply(1, 3)
    await task


async def test_put_out_of_the_volume(setup: Setup) -> None:
    setup.link.resume(3)
    tasks = [setup.ship(), setup.ship()]
    await settle()
    setup.link.fail_all(errno.ENOTCONN)
    for task in tasks:
        with pytest.raises(OSError) as caught:
            await task
        assert caught.value.errno == errno.ENOTCONN
    assert setup.link.pending == 0


def test_sessions_differ() -> None:
    sessions = {OperationLink(lambda grants: None).session for _ in range(50)}
    assert len(sessions) == 50
    assert all(0 < session < 2**63 for session in sessions)
