"""tgtd loses track of the reservation when the registrant that holds it is preempted: what the rules make of that."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from prkit import TgtDisk
from tgt import Tgt

from mxfsd.pr import reservations
from mxfsd.pr.errors import (
    DamagedReservation,
    Preempted,
    ReservationConflict,
    ReservationLost,
)
from mxfsd.pr.keys import make_key
from mxfsd.pr.reservations import Reservations, Standing
from mxfsd.pr.scsi import ScsiNexus
from mxfsd.pr.spc import read16, write16

pytestmark = pytest.mark.needs("tgt")

BLOCK = 512
LONG = "x" * 16  # with the rest of the name 42 characters: as much as tgtd needs for a registration


class Node:
    """One initiator: a session and a key for each of its lives."""

    def __init__(self, tgt: Tgt, number: int, name: str) -> None:
        self._tgt = tgt
        self._number = number
        self._name = name
        self._lives = 0
        self.renew()

    def renew(self) -> None:
        """Begin a life: log in, not registered."""
        self._lives += 1
        self.key = make_key(self._number, self._lives)
        self.session = self._tgt.initiator(self._name)
        self.nexus = ScsiNexus(self.session)
        self.pr = Reservations(self._name, [self.nexus])

    def join(self) -> None:
        self.pr.register(self.key)
        self.pr.reserve()

    def end(self, *, logout: bool) -> None:
        """The process ends; a dead host's session does not log out."""
        if logout:
            self.session.close()

    def passes(self) -> bool:
        """Whether the disk lets it write, and read."""
        self.pr.read_keys()  # logs in again where the target has restarted
        passed = []
        for cdb, data_out, alloc_in in ((write16(1, 1), bytes(BLOCK), 0), (read16(1, 1), b"", BLOCK)):
            try:
                self.nexus.run(cdb, data_out, alloc_in)
                passed.append(True)
            except ReservationConflict:
                passed.append(False)
        assert passed in ([True, True], [False, False])
        return passed[0]


def look(observer: Node) -> tuple[int, int]:
    held = observer.pr.read_reservation()
    assert held is not None
    return held.type, held.key


def damage(node: Node, victim: Node) -> None:
    """Preempt as a fencer without the cure would, so that the next registration is taken for the reservation."""
    node.nexus.preempt(node.key, victim.key, abort=False)


@pytest.fixture
def three(tgt: Tgt) -> tuple[Node, Node, Node]:
    nodes = tuple(Node(tgt, number, name) for number, name in enumerate("abc", 1))
    for node in nodes:
        node.join()
    a, b, c = nodes
    return a, b, c


def excludes(tgt: Tgt, *nodes: Node) -> None:
    """The reservation is there as it must be: these nodes pass, are registered, and nobody else does."""
    assert look(nodes[0]) == (8, 0)
    assert set(nodes[0].pr.read_keys().keys) >= {node.key for node in nodes}
    for node in nodes:
        assert node.pr.check() is Standing.OK
        assert node.passes()
    assert not Node(tgt, 60, "stranger").passes()


def test_the_fault_of_tgtd(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    """As it is without the rules: the one who joins next is shown as the holder of a reservation of no type.

    Nobody but the registered passes even then, which is what makes it safe to wait a moment for the repair.
    """
    a, b, c = three
    damage(b, a)
    a.renew()
    a.pr.register(a.key)
    assert look(b) == (0, a.key)
    assert a.passes() and b.passes() and c.passes()
    assert not Node(tgt, 60, "stranger").passes()
    assert b.pr.check() is c.pr.check() is Standing.LOST
    with pytest.raises(ReservationLost):
        b.pr.preempt(c.key)
    assert c.passes()


def test_the_one_shown_as_holder_repairs_it(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    a, b, c = three
    damage(b, a)
    a.renew()
    a.join()
    excludes(tgt, a, b, c)


def test_the_others_wait_for_it(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    a, b, c = three
    damage(b, a)
    a.renew()
    a.pr.register(a.key)
    asked = threading.Event()

    def still_ours() -> bool:
        asked.set()
        return True

    helper = threading.Thread(target=b.pr.reestablish, args=(still_ours,))
    helper.start()
    assert asked.wait(20)
    a.pr.reserve()
    helper.join(20)
    assert not helper.is_alive()
    excludes(tgt, a, b, c)


def test_one_that_never_repairs_it_is_put_out(
    tgt: Tgt, three: tuple[Node, Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = three
    monkeypatch.setattr(reservations, "_REPAIR_S", 0.1)
    damage(b, a)
    a.renew()
    a.pr.register(a.key)
    b.pr.reestablish(lambda: True)
    assert not a.passes()
    excludes(tgt, b, c)
    with pytest.raises(Preempted):
        a.pr.reserve()
    a.renew()
    a.join()
    excludes(tgt, a, b, c)


@pytest.mark.parametrize(("letter", "kind"), [("z", 10), ("x", 8), ("u", 5), ("s", 3)])
def test_a_holder_that_is_nobodys_key(tgt: Tgt, three: tuple[Node, Node, Node], letter: str, kind: int) -> None:
    """Whatever tgtd needs memory for may be taken for the reservation: here names of initiators that log in."""
    a, b, c = three
    damage(b, a)
    others = [tgt.initiator(letter * len(LONG)) for _ in range(20)]
    assert look(b)[0] == kind  # the low half of the letter
    assert look(b)[1] not in (0, a.key, b.key, c.key)
    assert b.pr.check() is Standing.LOST
    b.pr.reestablish(lambda: True)
    for session in others:
        session.close()
    excludes(tgt, b, c)


def test_without_a_further_path_such_a_holder_stays(
    tgt: Tgt, three: tuple[Node, Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = three
    damage(b, a)
    others = [tgt.initiator(LONG) for _ in range(20)]
    monkeypatch.setattr(b.session, "spare", lambda: None)
    with pytest.raises(DamagedReservation, match="restart the target"):
        b.pr.reestablish(lambda: True)
    assert others and not Node(tgt, 60, "stranger").passes()


def test_the_fenced_holder_joins_again_and_again(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    a, b, c = three
    for _ in range(3):
        b.pr.preempt(a.key)
        for _ in range(3):
            tgt.initiator(LONG).close()
        assert not a.passes()
        assert a.pr.check() is Standing.PREEMPTED
        excludes(tgt, b, c)
        a.renew()
        a.join()
        excludes(tgt, a, b, c)
        a, b, c = b, c, a


def test_two_fence_the_holder_at_once(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    a, b, c = three
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(fencer.pr.preempt, a.key) for fencer in (b, c)]:
                done.result(20)
        assert not a.passes()
        excludes(tgt, b, c)
        a.renew()
        a.join()
        a, b, c = b, c, a


def test_all_leave_and_one_comes_back(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    a, b, c = three
    b.pr.preempt(a.key)
    b.pr.unregister()
    c.pr.unregister()
    assert c.pr.read_keys().keys == ()
    assert c.pr.read_reservation() is None
    a.renew()
    a.join()
    excludes(tgt, a)
    for node in (b, c):
        assert not node.passes()
        node.renew()
        node.join()
    excludes(tgt, a, b, c)


def test_all_leave_a_damaged_reservation(tgt: Tgt, three: tuple[Node, Node, Node]) -> None:
    """It can outlive its registrants; the first one to join takes it over."""
    a, b, c = three
    damage(b, a)
    others = [tgt.initiator(LONG) for _ in range(20)]
    assert look(b) != (8, 0)
    b.pr.unregister()
    c.pr.unregister()
    for node in (a, b, c):
        node.renew()
        node.join()
    for session in others:
        session.close()
    excludes(tgt, a, b, c)


# --- whatever happens ---


@contextmanager
def told(history: list[str]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note("after: " + ", ".join(history))
        raise


def settle(live: set[Node]) -> None:
    """What every live daemon does by itself: look, and put right what is lost."""
    for node in sorted(live, key=lambda one: one.key):
        standing = node.pr.check()
        assert standing is not Standing.PREEMPTED
        if standing is Standing.LOST:
            node.pr.reestablish(lambda: True)


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(tgt_disk: TgtDisk, seed: int) -> None:
    """Three initiators join, leave, die, fence each other, and the target restarts, in any order.

    After each step, once the live nodes have looked, the reservation is of type 8, they pass, and nobody else does.
    """
    rng = random.Random(seed)
    tgt = tgt_disk.tgt
    nodes = [Node(tgt, number, name + LONG[1:] * (number == 3)) for number, name in enumerate("abc", 1)]
    stranger = Node(tgt, 60, "stranger")
    live: set[Node] = set()
    dead: set[Node] = set()  # no process any more, and not fenced yet
    history: list[str] = []
    with told(history):
        for _ in range(30):
            node = rng.choice(nodes)
            pick = rng.random()
            if pick < 0.08:
                history.append("restart")
                tgt.restart()
            elif node in live and live - {node} and pick < 0.6:
                fencer = rng.choice(sorted(live - {node}, key=lambda one: one.key))
                raw = pick < 0.2
                history.append(f"{fencer.key & 0xFF:x} fences {node.key:x}{' and dies before the end' if raw else ''}")
                if raw:
                    damage(fencer, node)
                    fencer.end(logout=rng.random() < 0.5)
                    live.discard(fencer)
                    dead.add(fencer)
                else:
                    fencer.pr.preempt(node.key)
                live.discard(node)
                assert not node.passes() or not live
            elif node in live and pick < 0.75:
                history.append(f"{node.key:x} leaves")
                node.pr.unregister()
                live.discard(node)
            elif node in live:
                history.append(f"{node.key:x} dies")
                node.end(logout=rng.random() < 0.5)
                live.discard(node)
                dead.add(node)
            else:
                node.renew()
                dead.discard(node)
                history.append(f"{node.key:x} joins")
                node.join()
                live.add(node)
            settle(live)
            for node in live:
                assert look(node) == (8, 0)
                assert node.key in node.pr.read_keys().keys
                assert node.passes()
            for node in set(nodes) - live - dead if live else ():
                assert not node.passes()
            assert not stranger.passes() or not live
