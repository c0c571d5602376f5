"""Reply caches: exactly once, limits, and the file that carries them to the next home."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MediaError, MisuseError, PeerError
from mxfsd.core.sessions import HEADER, Replay, SessionTable, Verdict

NEW, IN_PROGRESS, STALE = Verdict


def filled() -> SessionTable:
    table = SessionTable(99)
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


def test_export_and_load() -> None:
    table = SessionTable(99)
    table.load(filled().export())
    assert table.begin(1, 2, 0) == Replay(b"reply 2")
    assert table.begin(2, 7, 4) == Replay(b"reply 7")
    assert table.begin(2, 4, 0) is STALE
    assert table.begin(2, 5, 4) is NEW
    with pytest.raises(MisuseError):
        table.export()


def test_empty_export() -> None:
    table = SessionTable(99)
    data = table.export()
    assert len(data) == HEADER.size
    table.load(data)
    assert table.sessions() == []


def test_torn_files_are_refused_and_change_nothing() -> None:
    data = filled().export()
    table = filled()
    for size in range(len(data)):
        with pytest.raises(MediaError):
            table.load(data[:size])
    for place in range(len(data)):
        torn = bytearray(data)
        torn[place] ^= 0x40
        with pytest.raises(MediaError):
            table.load(bytes(torn))
    with pytest.raises(MediaError):
        table.load(data + b"\0")
    with pytest.raises(MediaError):
        SessionTable(98).load(data)
    assert table.export() == data


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(MediaError):
        SessionTable(99).load(data)


@given(st.dictionaries(st.integers(0, 2**64 - 1), st.dictionaries(st.integers(1, 2**64 - 1), st.binary(), max_size=4)))
def test_round_trip(sessions: dict[int, dict[int, bytes]]) -> None:
    table = SessionTable(3)
    for session, replies in sessions.items():
        for seq, reply in replies.items():
            assert table.begin(session, seq, 0) is NEW
            table.done(session, seq, reply)
    other = SessionTable(3)
    other.load(table.export())
    assert other.export() == table.export()
    for session, replies in sessions.items():
        for seq, reply in replies.items():
            assert other.begin(session, seq, 0) == Replay(reply)
