"""The soak's oracle: what it lets pass and what not. A soak that cannot fail would be worth nothing."""

from pathlib import Path

import pytest

from tests.soak import oracle
from tests.soak.events import WEIGHTS, Chooser
from tests.soak.oracle import BLOCK, LINE, NAMES_AT, Life, Table, Window, Wrong
from tests.soak.watch import PutOut, spurious


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "table")


def make(table: Table, cell: int, begun: int, acked: int, synced: int) -> None:
    for version in range(1, begun + 1):
        table.begin(cell)
        if version == acked:
            table.ack(cell)
    table.sync({cell: synced})


def possible(table: Table, cell: int, window: Window) -> list[int]:
    """The versions that are let pass."""
    found = []
    for version in range(10):
        try:
            window.judge(table, cell, version, "it")
        except Wrong:
            continue
        found.append(version)
    return found


def test_a_live_generation_shows_what_it_was_told(table: Table) -> None:
    make(table, 0, 5, 4, 2)
    assert possible(table, 0, Window.open(table, 0)) == [4, 5]


def test_what_is_acknowledged_while_one_looks_may_be_missed(table: Table) -> None:
    make(table, 0, 4, 4, 2)
    window = Window.open(table, 0)
    table.begin(0)
    table.ack(0)
    assert possible(table, 0, window) == [4, 5]


@pytest.mark.parametrize("life", [Life.DYING, Life.ENDED])
def test_a_killed_one_keeps_what_was_synced(table: Table, life: Life) -> None:
    make(table, 0, 5, 4, 2)
    table.life = life
    assert possible(table, 0, Window.open(table, 0)) == [2, 3, 4, 5]


def test_what_another_node_has_read_stays(table: Table) -> None:
    make(table, 0, 5, 4, 2)
    table.see(0, 3, 4)
    table.see(0, 3, 3)  # another read, that was slower
    table.life = Life.ENDED
    assert possible(table, 0, Window.open(table, 0)) == [4, 5]


def test_names_of_a_killed_client_stay(table: Table) -> None:
    make(table, NAMES_AT, 5, 4, 0)
    make(table, 0, 5, 4, 0)
    table.end(names_kept=True, data_kept=False)
    assert possible(table, NAMES_AT, Window.open(table, NAMES_AT)) == [4, 5]
    assert possible(table, 0, Window.open(table, 0)) == [0, 1, 2, 3, 4, 5]


def test_what_was_found_once_is_found_again(table: Table) -> None:
    make(table, 0, 5, 4, 2)
    table.end(names_kept=False, data_kept=False)
    table.settle(0, 3)
    assert possible(table, 0, Window.open(table, 0)) == [3]


def test_counters_are_seen_through_another_mapping(table: Table) -> None:
    other = Table(table.path)
    make(other, 7, 3, 2, 1)
    assert (table.begun(7), table.acked(7), table.synced(7)) == (3, 2, 1)


def test_blocks() -> None:
    data = oracle.block("n1g1", 5, 7)
    assert len(data) == BLOCK
    assert oracle.version_of(data, "n1g1", 5, "it") == 7
    assert oracle.version_of(bytes(BLOCK), "n1g1", 5, "it") == 0
    assert oracle.version_of(b"", "n1g1", 5, "it") == 0


@pytest.mark.parametrize(
    "data",
    [
        oracle.block("n1g1", 5, 7)[:-1],
        oracle.block("n1g1", 6, 7),
        oracle.block("n2g1", 5, 7),
        oracle.block("n1g1", 5, 7)[:2048] + oracle.block("n1g1", 5, 8)[2048:],
        oracle.block("n1g1", 5, 7)[:4000] + bytes(96),
        bytes(BLOCK - 1) + b"x",
    ],
)
def test_blocks_that_nobody_wrote_so(data: bytes) -> None:
    with pytest.raises(Wrong):
        oracle.version_of(data, "n1g1", 5, "it")


def test_lines() -> None:
    data = oracle.line("n1g1", 1) + oracle.line("n2g14", 33)
    assert oracle.parse_lines(data, "log") == [("n1g1", 1), ("n2g14", 33)]
    for broken in (data[:-1], data[1:] + b"x", data.replace(b"33", b"34"), data[:LINE] + bytes(LINE)):
        with pytest.raises(Wrong):
            oracle.parse_lines(broken, "log")


@pytest.mark.parametrize("numbers", [[1, 1], [2], [1, 3], [2, 1], [1, 2, 2], [1], [1, 2, 3, 4, 5]])
def test_lines_lost_or_twice(numbers: list[int]) -> None:
    oracle.check_lines([1, 2, 3], 2, 4, "it")
    with pytest.raises(Wrong):
        oracle.check_lines(numbers, 2, 4, "it")


def test_names_tell_the_version() -> None:
    for version in range(1, 30):
        if version % oracle.STAGES:
            found = oracle.names_of("n1g1", 2, version)
            assert oracle.version_by_names("n1g1", 2, found, 0, 40, "it") == version
            with pytest.raises(Wrong):
                oracle.version_by_names("n1g1", 2, found, version + 1, 40, "it")
    assert oracle.version_by_names("n1g1", 2, frozenset(), 3, 7, "it") == 5
    both = oracle.names_of("n1g1", 2, 1) | oracle.names_of("n1g1", 2, 2)
    with pytest.raises(Wrong):
        oracle.version_by_names("n1g1", 2, both, 0, 40, "it")


def test_a_seed_gives_the_same_events() -> None:
    first, second, other = ([chooser.next() for _ in range(50)] for chooser in (Chooser(1), Chooser(1), Chooser(2)))
    assert first == second != other
    assert set(first[: len(WEIGHTS)]) == set(WEIGHTS)


def test_only_a_fencing_during_its_events_is_excused() -> None:
    excused = [("n1", 10.0, 20.0)]
    assert not spurious(PutOut(15.0, "n2", 1, "silent"), "n1", excused)
    assert spurious(PutOut(25.0, "n2", 1, "silent"), "n1", excused)
    assert spurious(PutOut(15.0, "n2", 3, "silent"), "n3", excused)
