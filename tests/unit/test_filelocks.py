"""The table of file locks: POSIX ranges against a map of bytes, flock, waiting, deadlocks; how locks travel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.filelocks import (
    LAST,
    READ,
    UNLOCK,
    WRITE,
    Held,
    check,
    inode_of,
    is_resource,
    pack_held,
    pack_tables,
    resource_of,
    unpack_held,
    unpack_tables,
)
from mxfsd.core.filelocks import LockTables, Verdict, Wake, replaced, weakens

SPAN = 12
INO = 7


def lock(owner: int, kind: int, start: int = 0, end: int = LAST, flock: bool = False) -> Held:
    return Held(owner, start, end, 100 + owner, kind, flock)


def steps(nodes: int = 3, inos: int = 2) -> st.SearchStrategy[list[tuple[int, int, int, int, int, int]]]:
    """(inode, node, owner, type, start, end) each."""
    step = st.tuples(
        st.integers(1, inos),
        st.integers(1, nodes),
        st.integers(1, 2),
        st.sampled_from([READ, WRITE, UNLOCK]),
        st.integers(0, SPAN - 1),
        st.integers(0, SPAN - 1),
    )
    return st.lists(step, max_size=60)


@given(steps())
def test_ranges_are_those_of_a_map_of_bytes(calls: list[tuple[int, int, int, int, int, int]]) -> None:
    tables = LockTables()
    model: dict[tuple[int, int, int], list[int]] = {}
    for ino, node, owner, kind, a, b in calls:
        start, end = min(a, b), max(a, b)
        mine = model.setdefault((ino, node, owner), [UNLOCK] * SPAN)
        conflicts = [
            at
            for other, row in model.items()
            if other[0] == ino and other[1:] != (node, owner)
            for at in range(start, end + 1)
            if row[at] != UNLOCK and WRITE in (row[at], kind)
        ]
        expected = Verdict.BUSY if conflicts and kind != UNLOCK else Verdict.GRANTED
        tested = tables.test(ino, node, lock(owner, kind, start, end))
        assert (tested is None) == (expected is Verdict.GRANTED)
        assert tables.request(ino, node, lock(owner, kind, start, end)) is expected
        if expected is Verdict.GRANTED:
            mine[start : end + 1] = [kind] * (end + 1 - start)
    for (ino, node, owner), row in model.items():
        ranges = tables.owned(ino, node, owner, False)
        found = [UNLOCK] * SPAN
        for held in ranges:
            found[held.start : held.end + 1] = [held.type] * (held.end + 1 - held.start)
        assert found == row
        for before, after in zip(ranges, ranges[1:], strict=False):
            assert before.end < after.start
            assert before.type != after.type or before.end + 1 < after.start, "neighbours of one type are one"
    held = {(view.ino, view.node) for view in tables.view()}
    assert held == {key[:2] for key, row in model.items() if any(kind != UNLOCK for kind in row)}


@given(steps(inos=1))
def test_what_a_node_exports_another_table_takes_whole(calls: list[tuple[int, int, int, int, int, int]]) -> None:
    tables, copy = LockTables(), LockTables()
    for ino, node, owner, kind, a, b in calls:
        tables.request(ino, node, lock(owner, kind, min(a, b), max(a, b)))
    for node in (1, 2, 3):
        copy.adopt(1, node, [lock(9, READ)])  # replaced by what follows
        assert copy.adopt(1, node, tables.locks_of(1, node))
    assert sorted(map(str, copy.view())) == sorted(map(str, tables.view()))
    for node in (1, 2, 3):
        tables.drop_node(node)
    assert tables.inodes() == [] and tables.take_wakes() == []


def test_weakens() -> None:
    have = [lock(1, READ, 0, 4), lock(1, WRITE, 5, 9)]
    assert weakens(have, lock(1, UNLOCK)) and weakens(have, lock(1, READ, 2, 9))
    assert not weakens(have, lock(1, READ, 2, 10)) and not weakens(have, lock(1, WRITE, 5, 9))
    assert replaced(have, lock(1, READ, 5, 9)) == [lock(1, READ, 0, 9)]


def test_flock_and_ranges_do_not_meet() -> None:
    tables = LockTables()
    assert tables.request(INO, 1, lock(1, WRITE)) is Verdict.GRANTED
    assert tables.request(INO, 2, lock(2, WRITE, flock=True)) is Verdict.GRANTED
    assert tables.request(INO, 1, lock(1, WRITE, flock=True)) is Verdict.BUSY


def test_a_flock_that_cannot_be_changed_is_gone() -> None:
    tables = LockTables()
    for node in (1, 2):
        assert tables.request(INO, node, lock(1, READ, flock=True)) is Verdict.GRANTED
    assert tables.request(INO, 1, lock(1, WRITE, flock=True)) is Verdict.BUSY
    assert tables.owned(INO, 1, 1, True) == []
    assert tables.request(INO, 2, lock(1, WRITE, flock=True)) is Verdict.GRANTED


def test_waiters_are_woken_in_their_order() -> None:
    tables = LockTables()
    tables.request(INO, 1, lock(1, WRITE))
    assert tables.request(INO, 2, lock(2, WRITE), wait_id=5) is Verdict.WAITING
    assert tables.request(INO, 3, lock(3, WRITE), wait_id=6) is Verdict.WAITING
    assert tables.take_wakes() == []
    tables.request(INO, 1, lock(1, UNLOCK))
    assert tables.take_wakes() == [Wake(2, INO, 5)]
    assert tables.request(INO, 2, lock(2, WRITE), wait_id=5) is Verdict.GRANTED
    tables.cancel(INO, 3, 6)
    tables.request(INO, 2, lock(2, UNLOCK))
    assert tables.take_wakes() == [] and tables.inodes() == []


def test_a_waiter_is_woken_when_a_node_is_gone() -> None:
    tables = LockTables()
    tables.request(INO, 1, lock(1, WRITE))
    tables.request(INO, 2, lock(2, READ), wait_id=5)
    assert tables.drop_node(1) == [INO]
    assert tables.take_wakes() == [Wake(2, INO, 5)]


def test_readers_do_not_starve_a_writer() -> None:
    tables = LockTables()
    tables.request(INO, 1, lock(1, READ))
    tables.request(INO, 2, lock(2, WRITE), wait_id=5)
    assert tables.request(INO, 3, lock(3, READ), wait_id=6) is Verdict.WAITING
    assert tables.request(INO, 3, lock(4, READ)) is Verdict.GRANTED, "who does not wait takes what is free"


def test_deadlock_over_inodes_and_nodes() -> None:
    tables = LockTables()
    for node in (1, 2, 3):
        assert tables.request(node, node, lock(node, WRITE)) is Verdict.GRANTED
    assert tables.request(2, 1, lock(1, WRITE), wait_id=1) is Verdict.WAITING
    assert tables.request(3, 2, lock(2, WRITE), wait_id=1) is Verdict.WAITING
    assert tables.request(1, 3, lock(3, READ), wait_id=1) is Verdict.DEADLOCK
    tables.request(3, 3, lock(3, UNLOCK))
    assert tables.take_wakes() == [Wake(2, 3, 1)]


def test_flocks_wait_for_ever() -> None:
    """As on Linux: nobody looks for deadlocks of flock."""
    tables = LockTables()
    for node in (1, 2):
        tables.request(node, node, lock(node, WRITE, flock=True))
    assert tables.request(2, 1, lock(1, WRITE, flock=True), wait_id=1) is Verdict.WAITING
    assert tables.request(1, 2, lock(2, WRITE, flock=True), wait_id=1) is Verdict.WAITING


def test_a_node_may_have_so_many_and_no_more() -> None:
    tables = LockTables(max_locks=4)
    for at in range(3):
        assert tables.request(INO, 1, lock(1, READ, 4 * at, 4 * at + 2)) is Verdict.GRANTED
    assert tables.request(INO, 1, lock(1, READ, 40, 41)) is Verdict.FULL
    assert tables.request(INO, 2, lock(1, READ, 40, 41)) is Verdict.GRANTED
    assert tables.request(INO, 1, lock(1, UNLOCK)) is Verdict.GRANTED
    assert tables.request(INO, 1, lock(1, READ, 40, 41)) is Verdict.GRANTED


def test_a_conflicting_claim_is_refused_whole() -> None:
    tables = LockTables()
    tables.request(INO, 1, lock(1, WRITE, 5, 9))
    assert not tables.adopt(INO, 2, [lock(1, READ, 0, 3), lock(2, READ, 9, 9)])
    assert tables.nodes_of(INO) == {1}


# -- on the wire ----------------------------------------------------------------------------------------------------

helds = st.builds(
    lambda owner, a, b, pid, kind, flock: Held(owner, min(a, b), max(a, b), pid, kind, flock),
    st.integers(0, 2**64 - 1),
    st.integers(0, LAST),
    st.integers(0, LAST),
    st.integers(0, 2**32 - 1),
    st.sampled_from([READ, WRITE]),
    st.booleans(),
)
tables_of = st.lists(st.tuples(st.integers(0, 2**63 - 1), st.lists(helds, max_size=4)), max_size=5)


@given(tables_of, st.integers(140, 400))
def test_tables_travel_whole(tables: list[tuple[int, list[Held]]], limit: int) -> None:
    payloads = pack_tables(tables, limit)
    assert all(len(payload) <= limit for payload in payloads)
    assert [row for payload in payloads for row in unpack_tables(payload)] == tables
    for payload in payloads:
        for size in range(len(payload)):
            try:
                assert len(unpack_tables(payload[:size])) < len(unpack_tables(payload))
            except PeerError:
                pass


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for unpack in (unpack_held, unpack_tables):
        try:
            unpack(data)  # type: ignore[operator]
        except PeerError:
            pass


def test_what_makes_no_sense_is_refused() -> None:
    for bad in (lock(1, 3), lock(1, READ, 5, 4), lock(1, READ, 0, LAST + 1), lock(1, READ, -1, 4)):
        with pytest.raises(PeerError):
            check(bad)
    with pytest.raises(PeerError):
        unpack_held(pack_held([lock(1, UNLOCK)]))
    with pytest.raises(MisuseError):
        pack_held([lock(1 << 64, READ)])
    with pytest.raises(MisuseError):
        pack_tables([(1, [lock(1, READ)] * 10)], 100)


def test_resources() -> None:
    assert is_resource(resource_of(INO)) and not is_resource(INO) and inode_of(resource_of(INO)) == INO
