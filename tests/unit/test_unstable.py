"""Data kept until it is durable: order, tickets, totals, replay."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError
from mxfs_proto.ops import MAX_DATA, PIECE_BYTES, Fid
from mxfsd.core.unstable import PIECE_COST, Sent, UnstableData, chunks

FILE, OTHER = Fid(7, 1), Fid(8, 1)


def data(entries: list[Sent]) -> list[tuple[int, bytes]]:
    return [piece for entry in entries for piece in entry.pieces]


def test_a_commit_covers_what_was_answered_before_it_began() -> None:
    kept = UnstableData()
    first = kept.sent(0, FILE, 0, [(0, b"a")])
    assert kept.ticket(FILE) == 0, "not answered"
    kept.answered(first, 1)
    ticket = kept.ticket(FILE)
    second = kept.sent(1, FILE, 0, [(1, b"b")])
    kept.answered(second, 1)
    kept.committed(FILE, ticket)
    assert data(kept.entries(FILE)) == [(1, b"b")]
    kept.committed(FILE, kept.ticket(FILE))
    assert not kept.holds(FILE)
    assert kept.total == 0


def test_what_follows_an_unanswered_write_is_kept_with_it() -> None:
    """Else the unanswered one would be written over it in a replay."""
    kept = UnstableData()
    first = kept.sent(0, FILE, 0, [(0, b"old")])
    second = kept.sent(0, FILE, 0, [(0, b"new")])
    kept.answered(second, 3)
    assert kept.ticket(FILE) == 0
    kept.answered(first, 3)
    assert kept.ticket(FILE) == second.serial


def test_a_short_write_keeps_what_was_written() -> None:
    kept = UnstableData()
    entry = kept.sent(0, FILE, 0, [(0, b"aaaa"), (10, b"bbbb"), (20, b"cccc")])
    kept.answered(entry, 6)
    assert data(kept.entries(FILE)) == [(0, b"aaaa"), (10, b"bb")]
    assert kept.total == 6 + 2 * PIECE_COST


def test_a_failed_write_is_not_kept() -> None:
    kept = UnstableData()
    first = kept.sent(0, FILE, 0, [(0, b"a")])
    second = kept.sent(0, FILE, 0, [(1, b"b")])
    kept.answered(second, 1)
    kept.failed(first)
    assert data(kept.entries(FILE)) == [(1, b"b")]
    assert kept.ticket(FILE) == second.serial


def test_what_was_dropped_is_answered_in_vain() -> None:
    kept = UnstableData()
    first = kept.sent(0, FILE, 0, [(0, b"a")])
    second = kept.sent(0, FILE, 0, [(0, b"b")])
    kept.answered(first, 1)
    assert kept.drop(FILE) == [second]
    later = kept.sent(0, FILE, 0, [(0, b"c")])
    kept.answered(second, 0)
    kept.failed(second)
    assert kept.entries(FILE) == [later]
    assert kept.total == later.cost


def test_misuse_changes_nothing() -> None:
    kept = UnstableData()
    entry = kept.sent(0, FILE, 0, [(0, b"a")])
    with pytest.raises(MisuseError, match="not answered"):
        kept.committed(FILE, entry.serial)
    kept.answered(entry, 1)
    with pytest.raises(MisuseError, match="twice"):
        kept.answered(entry, 1)
    assert data(kept.entries(FILE)) == [(0, b"a")]


def test_age_counts_from_the_first_write_kept() -> None:
    kept = UnstableData()
    for at, fid in ((0, FILE), (50, OTHER), (60, FILE)):
        kept.answered(kept.sent(at, fid, 0, [(0, b"a")]), 1)
    assert kept.due(99, 100) == []
    assert kept.due(100, 100) == [FILE]
    kept.committed(FILE, 1)
    assert kept.due(150, 100) == [OTHER]
    assert list(kept.files()) == [FILE, OTHER]


SIZES = st.lists(
    st.tuples(st.sampled_from([0, 2]), st.booleans(), st.lists(st.integers(0, 600_000), min_size=1, max_size=2)),
    max_size=12,
)


@given(SIZES)
def test_a_replay_is_divided_into_requests(sizes: list[tuple[int, bool, list[int]]]) -> None:
    kept = UnstableData()
    for flags, answered, lengths in sizes:
        if PIECE_BYTES * 2 + sum(lengths) > MAX_DATA:
            lengths = lengths[:1]
        entry = kept.sent(0, FILE, flags, [(0, b"x" * length) for length in lengths])
        if answered:
            kept.answered(entry, entry.size)
    entries = kept.entries(FILE)
    divided = list(chunks(entries))
    assert [entry for chunk in divided for entry in chunk] == entries, "in order, each once"
    for chunk in divided:
        assert len({entry.flags for entry in chunk}) == 1
        assert len(chunk) == 1 or all(entry.answered for entry in chunk)
        size = sum(entry.size + PIECE_BYTES * len(entry.pieces) for entry in chunk)
        assert len(chunk) == 1 or size <= MAX_DATA
    for before, after in zip(divided, divided[1:], strict=False):
        size = sum(e.size + PIECE_BYTES * len(e.pieces) for e in [*before, after[0]])
        apart = before[-1].flags != after[0].flags or not before[-1].answered or not after[0].answered
        assert apart or size > MAX_DATA, "as few requests as possible"


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    steps = st.tuples(
        st.sampled_from(["write", "write", "answer", "commit", "end", "crash"]),
        st.integers(0, 12),
        st.binary(min_size=1, max_size=4),
    )
    return draw(st.lists(steps, max_size=40))


@given(histories())
def test_after_any_history_a_replay_restores_what_was_answered(history: list[tuple[str, int, bytes]]) -> None:
    """The home is two arrays, page cache and disk. It executes in the order of sending and answers in any order."""
    kept = UnstableData()
    cache, disk, expected = bytearray(20), bytearray(20), bytearray(20)
    open_: list[Sent] = []
    commits: list[tuple[int, bytearray]] = []

    def put(target: bytearray, offset: int, piece: bytes) -> None:
        target[offset : offset + len(piece)] = piece

    def write(number: int, piece: bytes) -> None:
        open_.append(kept.sent(0, FILE, 0, [(number, piece)]))
        put(cache, number, piece)
        put(expected, number, piece)

    def answer(number: int, _piece: bytes) -> None:
        if open_:
            entry = open_.pop(number % len(open_))
            kept.answered(entry, entry.size)

    def commit(_number: int, _piece: bytes) -> None:
        commits.append((kept.ticket(FILE), bytearray(cache)))

    def end(_number: int, _piece: bytes) -> None:
        if commits:
            ticket, disk[:] = commits.pop(0)
            kept.committed(FILE, ticket)

    def crash(_number: int, _piece: bytes) -> None:
        commits.clear()
        cache[:] = disk
        for offset, piece in data(kept.entries(FILE)):
            put(cache, offset, piece)
        assert cache == expected

    steps: dict[str, Callable[[int, bytes], None]] = {
        "write": write,
        "answer": answer,
        "commit": commit,
        "end": end,
        "crash": crash,
    }
    for name, number, piece in [*history, ("crash", 0, b"")]:
        steps[name](number, piece)
    assert kept.total == sum(entry.cost for entry in kept.entries(FILE))
