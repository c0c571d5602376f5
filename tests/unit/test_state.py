"""What the operations of one mount share: what is known under a lock, and for how long."""

import asyncio

import pytest

from mxfs_fuse.nodes import Node
from mxfs_fuse.state import State
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid, Grant
from mxfs_proto.records import LockBast, LockRelease, Record

ROOT = Fid(128, 1)
DIRECTORY = Fid(200, 7)


@pytest.fixture
async def state() -> State:
    return State(ROOT, 1000, False, _nowhere)


def _nowhere(_record: Record) -> None:
    pass


def adopt(state: State, seq: int, mode: LockMode = LockMode.PR) -> None:
    state.link._on_grants([Grant(DIRECTORY.ino, int(mode), seq)])


def knows_names(state: State, node: Node) -> bool:
    return node.names is not None and node.names_seq == state.locks.seq(DIRECTORY.ino) and state.may_read(node.fid.ino)


def with_names(state: State) -> Node:
    node = state.known(DIRECTORY)
    adopt(state, 10)
    node.names, node.names_seq, node.names_whole = {b"a": None}, 10, True
    return node


async def test_names_stay_known_when_an_operation_brings_the_lock_that_is_held_anew(state: State) -> None:
    node = with_names(state)
    adopt(state, 11)
    assert knows_names(state, node) and node.names_whole


async def test_names_of_a_lock_that_was_lost_are_not_known_under_the_next_one(state: State) -> None:
    node = with_names(state)
    state.locks.cache.drop_all()
    adopt(state, 11)
    assert state.may_read(DIRECTORY.ino) and not knows_names(state, node)


async def test_names_of_a_lock_that_is_called_back_are_not_known_under_the_next_one(state: State) -> None:
    node = with_names(state)
    state.locks.on_record(LockBast(DIRECTORY.ino, 10, LockMode.EX, state.locks.cache.flags(DIRECTORY.ino)))
    adopt(state, 11)
    assert not knows_names(state, node)


async def test_a_grant_that_comes_too_late_makes_nothing_known(state: State) -> None:
    node = with_names(state)
    state.locks.on_record(LockBast(DIRECTORY.ino, 12, LockMode.EX, state.locks.cache.flags(DIRECTORY.ino)))
    adopt(state, 11)
    assert not knows_names(state, node)


# -- what the next home is told ----------------------------------------------------------------------------------------


def with_lock(state: State, ino: int, mode: LockMode, *, known: bool = True) -> None:
    if known:
        state.known(Fid(ino, 1)).nlookup = 1
    state.link._on_grants([Grant(ino, int(mode), 10 + ino)])


@pytest.mark.parametrize("home", [False, True])
async def test_what_is_not_named_to_the_next_home_is_held_no_more(state: State, home: bool) -> None:
    """Else a file that gets its number is opened under it, and the home, which knows of no lock, frees it."""
    cache = state.locks.cache
    cache.set_implicit(home)
    with_lock(state, 300, LockMode.PR)
    with_lock(state, 301, LockMode.PR, known=False)
    with_lock(state, 302, LockMode.EX, known=False)
    rows = {row.ino: row.mode for row in state.held_rows()}
    cache.set_implicit(False)
    assert (rows.get(300), rows.get(301), rows.get(302)) == (LockMode.PR, None, None)
    assert [cache.mode(ino) for ino in (300, 301, 302)] == [LockMode.PR, LockMode.NL, LockMode.NL]
    assert not cache.may_open(301, False)


async def test_no_more_is_held_than_is_named(state: State) -> None:
    cache = state.locks.cache
    with_lock(state, 300, LockMode.EX)
    with_lock(state, 301, LockMode.EX)
    state.known(Fid(301, 1)).cached_writers = 1
    state.known(Fid(302, 1)).behind = 1
    with_lock(state, 302, LockMode.PR)
    rows = {row.ino: row.mode for row in state.held_rows()}
    assert [rows[ino] for ino in (300, 301, 302)] == [LockMode.PR, LockMode.EX, LockMode.EX]
    assert [cache.mode(ino) for ino in (300, 301, 302)] == [LockMode.PR, LockMode.EX, LockMode.PR]


async def test_a_lock_goes_back_although_its_inode_is_forgotten_while_it_is_lowered() -> None:
    sent: list[Record] = []
    state = State(ROOT, 1000, False, sent.append)
    state.gate = None
    with_lock(state, 300, LockMode.EX)
    node = state.nodes[300]
    state.locks.on_record(LockBast(300, 310, LockMode.PR, state.locks.cache.flags(300)))
    node.nlookup = 0
    state.forget(node)
    while state.locks._tasks:
        await asyncio.wait(state.locks._tasks)
    state.locks.tick()
    assert [(record.mode, record.ino) for record in sent if isinstance(record, LockRelease)] == [
        (LockMode.PR, 300),
        (LockMode.NL, 300),
    ]
    assert len(state.locks.cache) == 0
