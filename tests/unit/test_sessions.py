"""Reply caches: exactly once, limits, and what goes on to the next home."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError, PeerError
from mxfsd.core.sessions import Replay, SessionTable, Verdict

NEW, IN_PROGRESS, STALE = Verdict


def filled() -> SessionTable:
    table = SessionTable()
    for session, seq, ack in [(1, 1, 0), (1, 2, 0), (2, 7, 4)]:
        assert table.begin(session, seq, ack) is NEW
        table.done(session, seq, b"reply %d" % seq)
    return table


def test_executed_once() -> None:
    table = SessionTable()
    assert table.begin(5, 1, 0) is NEW
    assert table.begin(5, 1, 0) is IN_PROGRESS
    table.done(5, 1, b"one")
    assert table.begin(5, 1, 0) == Replay(b"one")
    assert table.begin(5, 3, 0) is NEW  # numbers overtake each other
    assert table.begin(5, 2, 1) is NEW
    assert table.begin(5, 1, 0) is STALE
    assert table.begin(6, 1, 0) is NEW


def test_abandoned_and_repeatable_operations_are_new_again() -> None:
    table = SessionTable()
    table.begin(5, 1, 0)
    table.abandon(5, 1)
    assert table.begin(5, 1, 0) is NEW
    table.done(5, 1, b"data", repeatable=True)
    assert table.begin(5, 1, 0) is NEW
    assert table.begin(5, 2, 1) is NEW  # the reply came before this repetition
    table.done(5, 1, b"data", repeatable=True)
    table.abandon(5, 1)
    assert table.begin(5, 1, 0) is STALE


@pytest.mark.parametrize(("seq", "ack"), [(0, 0), (1, 1), (1, 2), (1, -1), (1 << 64, 0)])
def test_numbers_that_make_no_sense(seq: int, ack: int) -> None:
    table = SessionTable()
    with pytest.raises(PeerError):
        table.begin(5, seq, ack)
    assert table.sessions() == []


def test_limits() -> None:
    table = SessionTable(max_replies=2, max_bytes=10)
    table.begin(5, 1, 0)
    table.begin(5, 2, 0)
    with pytest.raises(PeerError):
        table.begin(5, 3, 0)
    assert table.begin(5, 2, 0) is IN_PROGRESS
    table.done(5, 1, b"x" * 11)
    table.done(5, 2, b"")
    with pytest.raises(PeerError):
        table.begin(5, 3, 0)
    assert table.begin(5, 3, 1) is NEW  # the acknowledgement makes room
    assert table.begin(5, 4, 2) is NEW


def test_misuse() -> None:
    table = filled()
    with pytest.raises(MisuseError):
        table.done(1, 1, b"again")
    with pytest.raises(MisuseError):
        table.abandon(1, 3)
    assert table.begin(1, 1, 0) == Replay(b"reply 1")
    table.drop(1)
    table.done(1, 1, b"late")
    table.abandon(1, 2)
    assert table.sessions() == [2]


def test_restored_replies_answer() -> None:
    table = SessionTable()
    for row in filled().kept():
        table.restore(*row)
    assert table.begin(1, 2, 0) == Replay(b"reply 2")
    assert table.begin(2, 7, 4) == Replay(b"reply 7")
    assert table.begin(2, 4, 0) is STALE
    assert table.begin(2, 5, 4) is NEW
    assert (2, 5, b"") not in table.kept(), "an operation under way has no reply"
    with pytest.raises(MisuseError):
        table.restore(2, 7, b"another")
    with pytest.raises(MisuseError):
        table.restore(2, 4, b"acknowledged")
    assert sorted(table.kept()) == sorted(filled().kept())


def test_what_need_not_be_kept_is_said() -> None:
    """Where a reply stands on the volume its place can be used again."""
    table = filled()
    gone: list[tuple[int, int]] = []
    table.on_forget = lambda session, seq: gone.append((session, seq))
    table.begin(1, 3, 1)
    assert gone == [(1, 1)]
    table.begin(2, 8, 7)
    table.drop(1)
    assert gone == [(1, 1), (2, 7), (1, 2), (1, 3)]
    table.done(1, 3, b"nobody wants it")
    assert gone[4:] == [(1, 3)]
    assert table.kept() == []


@given(st.dictionaries(st.integers(0, 2**64 - 1), st.dictionaries(st.integers(1, 2**64 - 1), st.binary(), max_size=4)))
def test_round_trip(sessions: dict[int, dict[int, bytes]]) -> None:
    table = SessionTable()
    for session, replies in sessions.items():
        for seq, reply in replies.items():
            assert table.begin(session, seq, 0) is NEW
            table.done(session, seq, reply)
    other = SessionTable()
    for row in table.kept():
        other.restore(*row)
    assert other.kept() == table.kept()
    for session, replies in sessions.items():
        for seq, reply in replies.items():
            assert other.begin(session, seq, 0) == Replay(reply)
