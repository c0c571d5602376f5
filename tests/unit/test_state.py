"""What the operations of one mount share: what is known under a lock, and for how long."""

import pytest

from mxfs_fuse.nodes import Node
from mxfs_fuse.state import State
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid, Grant
from mxfs_proto.records import LockBast, Record

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
