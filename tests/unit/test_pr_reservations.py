"""The rules of a fence against a disk in memory: lost answers, dead paths, crossings, restarts of the target."""

from collections.abc import Callable

import pytest
from faketarget import ATTENTION_RESET, FakeTarget, FakeTransport
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import (
    CheckCondition,
    DamagedReservation,
    ForeignReservation,
    NotOffered,
    PathFailure,
    Preempted,
    ReservationConflict,
    ReservationError,
    ReservationLost,
    StaleRegistration,
    Unconfirmed,
)
from mxfsd.pr.reservations import Reservations, Standing
from mxfsd.pr.scsi import ATTENTION_TRIES, Busy, ScsiNexus
from mxfsd.pr.sense import Sense, SenseKey
from mxfsd.pr.spc import MAX_KEY, Held, Keys, ReservationData, read16, write16

A, B, C = 0xA, 0xB, 0xC
DATA = b"x" * 512
HARDWARE = Sense(SenseKey.HARDWARE_ERROR, 0x44, 0)


class Node:
    """Reservations of one node with the transports beneath."""

    def __init__(self, target: FakeTarget, name: str, paths: int = 1) -> None:
        self.target = target
        self.transports = [target.transport(f"{name}{number}") for number in range(paths)]
        self.nexuses = [ScsiNexus(path, sleep=lambda _seconds: None) for path in self.transports]
        self.pr = Reservations("disk", self.nexuses)

    @property
    def wire(self) -> FakeTransport:
        return self.transports[0]

    def write(self, block: int = 0, data: bytes = DATA) -> None:
        self.nexuses[0].run(write16(block, 1), data)

    def read(self, block: int = 0) -> bytes:
        return self.nexuses[0].run(read16(block, 1), alloc_in=512)

    def join(self, key: int) -> "Node":
        self.pr.register(key)
        self.pr.reserve()
        return self


def cluster(target: FakeTarget) -> tuple[Node, Node]:
    return Node(target, "a").join(A), Node(target, "b").join(B)


KINDS = [FakeTarget, lambda: FakeTarget(abort=False, aptpl=False, full=False, dangles=True)]


@pytest.fixture(params=KINDS, ids=["whole", "like-tgt"])
def target(request: pytest.FixtureRequest) -> FakeTarget:
    made: FakeTarget = request.param()
    return made


# --- joining ---


def test_two_nodes_join_and_a_third_is_shut_out(target: FakeTarget) -> None:
    a, b = cluster(target)
    a.write()
    target.land()
    assert b.read() == DATA
    stranger = Node(target, "c")
    for refused in (stranger.write, stranger.read):
        with pytest.raises(ReservationConflict):
            refused()
    assert a.pr.check() is b.pr.check() is Standing.OK


def test_aptpl_is_asked_for_and_given_up_where_refused() -> None:
    whole, poor = FakeTarget(), FakeTarget(aptpl=False)
    assert Node(whole, "a").join(A).pr.aptpl
    assert whole.keep
    assert not Node(poor, "a").join(A).pr.aptpl
    assert poor.registered == {"a0": A}


@pytest.mark.parametrize("lost", [1, 2])
def test_register_again_after_lost_answers(target: FakeTarget, lost: int) -> None:
    node = Node(target, "a")
    node.wire.lose = lost
    node.join(A)
    assert target.registered == {"a0": A}
    node.pr.register(A)


def test_register_on_every_path_or_on_none(target: FakeTarget) -> None:
    node = Node(target, "a", paths=3)
    node.transports[2].dead = True
    with pytest.raises(PathFailure):
        node.pr.register(A)
    assert target.registered == {}
    node.transports[2].dead = False
    node.join(A)
    assert target.registered == {"a0": A, "a1": A, "a2": A}
    node.pr.unregister()
    assert target.registered == {}
    assert target.type == 0


def test_an_earlier_incarnation_is_replaced_only_on_demand(target: FakeTarget) -> None:
    Node(target, "a").join(C)
    again = Node(target, "a")
    with pytest.raises(StaleRegistration, match="mxfs pr disk"):
        again.pr.register(A)
    assert target.registered == {"a0": C}
    again.pr.register(A, replace=True)
    assert target.registered == {"a0": A}


def test_bad_keys_change_nothing(target: FakeTarget) -> None:
    a, _ = cluster(target)
    before = dict(target.registered)
    for key in (0, -1, MAX_KEY + 1):
        with pytest.raises(MisuseError):
            Node(target, "c").pr.register(key)
        with pytest.raises(MisuseError):
            a.pr.preempt(key)
    with pytest.raises(MisuseError):
        a.pr.preempt(A)
    with pytest.raises(MisuseError):
        a.pr.register(C)
    for act in (lambda pr: pr.reserve(), lambda pr: pr.preempt(B), lambda pr: pr.check()):
        with pytest.raises(MisuseError, match="not registered"):
            act(Node(target, "d").pr)
    assert target.registered == before


def test_reservation_of_another_type_is_left_alone(target: FakeTarget) -> None:
    node = Node(target, "a")
    node.pr.register(A)
    target.type = 5
    with pytest.raises(ForeignReservation, match="type 5"):
        node.pr.reserve()
    assert target.type == 5
    assert node.pr.check() is Standing.LOST


def test_reserve_when_the_answer_is_lost(target: FakeTarget) -> None:
    node = Node(target, "a")
    node.pr.register(A)
    node.wire.lose = 1
    node.pr.reserve()
    assert node.wire.log.count("RESERVE") == 1
    assert target.type == 8


def test_what_else_the_target_says_to_register_is_reported() -> None:
    node = Node(FakeTarget(), "a")

    def broken(what: str) -> None:
        node.wire.hook = lambda _what: None
        raise CheckCondition("x", HARDWARE)

    node.wire.hook = broken
    with pytest.raises(CheckCondition, match="HARDWARE ERROR"):
        node.pr.register(A)


# --- leaving ---


def test_leaving_keeps_the_reservation_for_the_others(target: FakeTarget) -> None:
    a, b = cluster(target)
    a.pr.unregister()
    a.pr.unregister()
    assert b.pr.check() is Standing.OK
    b.write()
    with pytest.raises(ReservationConflict):
        a.write()
    with pytest.raises(MisuseError):
        a.pr.register(A)


def test_unregister_when_the_answer_is_lost(target: FakeTarget) -> None:
    a, _ = cluster(target)
    a.wire.lose = 2
    a.pr.unregister()
    assert target.registered == {"b0": B}


def test_unregister_tells_when_it_failed(target: FakeTarget) -> None:
    node = Node(target, "a", paths=2).join(A)
    node.transports[1].dead = True
    with pytest.raises(PathFailure):
        node.pr.unregister()
    assert target.registered == {"a1": A}
    node.transports[1].dead = False
    node.pr.unregister()
    assert target.registered == {}


# --- fencing ---


def fenced(target: FakeTarget, victim: Node) -> None:
    before = dict(target.blocks)
    target.land()
    assert target.blocks == before, "a write of the victim landed after the fence"
    for refused in (victim.write, victim.read):
        with pytest.raises(ReservationConflict):
            refused()


def test_a_fence(target: FakeTarget) -> None:
    a, b = cluster(target)
    b.write()
    a.pr.preempt(B)
    fenced(target, b)
    assert target.blocks == {}
    assert target.registered == {"a0": A}
    assert target.resets == (0 if target.abort else 1)
    a.pr.preempt(B)
    assert a.pr.check() is Standing.OK


def test_every_path_of_the_victim_is_fenced(target: FakeTarget) -> None:
    a, b = Node(target, "a", paths=2).join(A), Node(target, "b", paths=2).join(B)
    a.transports[0].dead = True
    a.pr.preempt(B)
    assert target.registered == {"a0": A, "a1": A}
    fenced(target, b)


def test_a_path_that_the_target_has_forgotten_is_passed_over(target: FakeTarget) -> None:
    a, b = Node(target, "a", paths=2).join(A), Node(target, "b").join(B)
    del target.registered["a0"]
    a.pr.preempt(B)
    fenced(target, b)
    c = Node(target, "c").join(C)
    del target.registered["a1"]
    target.registered["elsewhere"] = A
    with pytest.raises(PathFailure, match="refuses our key on this path"):
        a.pr.preempt(C)
    assert c.pr.check() is Standing.OK


def test_the_one_who_preempted_died_before_the_reset() -> None:
    """A plain PREEMPT leaves queued writes: the next node resets though it finds the key gone."""
    target = FakeTarget(abort=False)
    a, b = cluster(target)
    c = Node(target, "c").join(C)
    b.write()
    a.nexuses[0].preempt(A, B, abort=False)
    c.pr.preempt(B)
    assert target.resets == 1
    fenced(target, b)
    assert target.blocks == {}


def test_without_any_way_to_abort_the_fence_is_not_confirmed() -> None:
    target = FakeTarget(abort=False, reset=False)
    a, b = cluster(target)
    for _ in range(2):
        with pytest.raises(Unconfirmed, match="cannot be aborted"):
            a.pr.preempt(B)
    assert target.registered == {"a0": A}


def test_a_target_that_lies_is_not_believed(target: FakeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = cluster(target)
    monkeypatch.setattr(FakeTarget, "_preempt", lambda *_: 0)
    with pytest.raises(Unconfirmed, match="still registered"):
        a.pr.preempt(B)


def test_a_reset_that_does_not_happen_fails_the_fence() -> None:
    target = FakeTarget(abort=False)
    a, b = cluster(target)

    def broken(what: str) -> None:
        if what == "LOGICAL UNIT RESET":
            raise PathFailure("timed out")

    a.wire.hook = broken
    with pytest.raises(PathFailure):
        a.pr.preempt(B)
    a.wire.hook = lambda _what: None
    b.target.resets = 0
    a.pr.preempt(B)
    assert target.resets == 1


def test_fencing_each_other_leaves_one(target: FakeTarget) -> None:
    """The victim preempts between our look at the keys and our PREEMPT."""
    a, b = cluster(target)

    def faster(what: str) -> None:
        if what.startswith("PREEMPT"):
            a.wire.hook = lambda _what: None
            b.pr.preempt(A)

    a.wire.hook = faster
    with pytest.raises(Preempted):
        a.pr.preempt(B)
    assert target.registered == {"b0": B}
    assert b.pr.check() is Standing.OK


def test_a_fence_needs_the_reservation(target: FakeTarget) -> None:
    a, b = cluster(target)
    target.type = 0
    with pytest.raises(ReservationLost):
        a.pr.preempt(B)
    assert "b0" in target.registered
    a.pr.reserve()

    def vanish(what: str) -> None:
        if what == "PREEMPT AND ABORT":
            target.type = 0

    a.wire.hook = vanish
    with pytest.raises(ReservationLost):
        a.pr.preempt(B)
    b.write()


def test_any_other_refusal_of_the_target_is_reported(target: FakeTarget) -> None:
    a, _ = cluster(target)

    def broken(what: str) -> None:
        if "PREEMPT" in what:
            raise CheckCondition("x", HARDWARE)

    a.wire.hook = broken
    with pytest.raises(CheckCondition, match="HARDWARE ERROR"):
        a.pr.preempt(B)


# --- being fenced ---


CHANGES: list[Callable[[Node], object]] = [
    lambda node: node.pr.register(B),
    lambda node: node.pr.register(C, replace=True),
    lambda node: node.pr.reserve(),
    lambda node: node.pr.preempt(A),
    lambda node: node.pr.unregister(),
    lambda node: node.pr.check(),
    lambda node: node.pr.reestablish(lambda: True),
    lambda node: node.pr.clear(B),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_fenced_node_never_registers_again(target: FakeTarget, change: Callable[[Node], object]) -> None:
    a, b = cluster(target)
    a.pr.preempt(B)
    assert b.pr.check() is Standing.PREEMPTED
    with pytest.raises(Preempted):
        change(b)
    target.restart()
    with pytest.raises(Preempted):
        change(b)
    assert B not in target.registered.values()


@pytest.mark.parametrize("change", [0, 2, 3, 6])
def test_a_fenced_node_notices_by_itself(target: FakeTarget, change: int) -> None:
    a, b = cluster(target)
    a.pr.preempt(B)
    with pytest.raises(Preempted):
        CHANGES[change](b)
    assert target.registered == {"a0": A}


def test_a_victim_that_comes_back_is_seen(target: FakeTarget) -> None:
    a, b = cluster(target)
    a.pr.preempt(B)
    b.nexuses[0].register(0, B, aptpl=False)
    assert a.pr.check() is Standing.OK
    assert a.pr.returned == {B}
    a.pr.preempt(B)
    a.pr.check()
    assert a.pr.returned == frozenset()


# --- the target restarts ---


def test_restart_without_aptpl_is_seen_and_repaired() -> None:
    target = FakeTarget(aptpl=False)
    a, b = cluster(target)
    target.restart()
    assert a.pr.check() is Standing.LOST
    with pytest.raises(ReservationLost):
        a.pr.preempt(B)
    a.pr.reestablish(lambda: True)
    assert a.pr.check() is Standing.OK
    # The generation that went back tells b that it was not fenced.
    assert b.pr.check() is Standing.LOST
    b.pr.reestablish(lambda: b.read() is not None)
    assert a.pr.check() is b.pr.check() is Standing.OK
    assert target.registered == {"a0": A, "b0": B}
    a.pr.preempt(B)
    assert b.pr.check() is Standing.PREEMPTED


def test_restart_with_aptpl_goes_unnoticed() -> None:
    target = FakeTarget()
    a, b = cluster(target)
    target.restart()
    assert a.pr.check() is b.pr.check() is Standing.OK
    a.pr.preempt(B)
    assert b.pr.check() is Standing.PREEMPTED


def test_who_leaves_or_fails_to_join_does_not_make_the_disk_forget_the_others() -> None:
    """The APTPL bit of the last REGISTER holds for all, and to unregister is one too (SPC-4 5.13.5)."""
    target = FakeTarget()
    a, b = cluster(target)
    b.pr.unregister()
    target.restart()
    assert target.registered == {"a0": A}
    assert a.pr.check() is Standing.OK
    two_paths = Node(target, "c", paths=2)
    two_paths.transports[1].dead = True
    with pytest.raises(PathFailure):
        two_paths.join(B)
    target.restart()
    assert target.registered == {"a0": A}
    assert a.pr.check() is Standing.OK


def test_reestablish_asks_whether_we_were_fenced_before(target: FakeTarget) -> None:
    a, b = cluster(target)
    target.keep = False
    target.restart()
    a.pr.reestablish(lambda: True)

    seen = []

    def looked() -> bool:
        seen.append(b.read())
        return False

    with pytest.raises(Preempted):
        b.pr.reestablish(looked)
    assert seen
    assert target.registered == {"a0": A}
    with pytest.raises(Preempted):
        b.pr.reestablish(lambda: True)


def test_reestablish_takes_back_the_key_when_the_disk_cannot_be_read(target: FakeTarget) -> None:
    a, _ = cluster(target)
    target.keep = False
    target.restart()

    def unreadable() -> bool:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        a.pr.reestablish(unreadable)
    assert target.registered == {}
    with pytest.raises(Preempted):
        a.pr.reestablish(lambda: True)


def test_only_the_reservation_is_missing(target: FakeTarget) -> None:
    a, b = cluster(target)
    target.type = 0
    assert a.pr.check() is Standing.LOST
    a.pr.reestablish(lambda: True)
    assert a.pr.check() is b.pr.check() is Standing.OK
    b.pr.reestablish(lambda: False)  # nothing to do: not asked


# --- reading, clearing ---


def test_reading_needs_no_registration(target: FakeTarget) -> None:
    cluster(target)
    reader = Node(target, "c")
    assert reader.pr.read_keys().keys == (A, B)
    held = reader.pr.read_reservation()
    assert held is not None
    assert held.ours
    status, capabilities = reader.pr.full_status(), reader.pr.capabilities()
    assert capabilities is not None
    assert capabilities.aptpl_capable is target.aptpl
    if target.full:
        assert status is not None
        assert [(r.key, r.holder, r.initiator) for r in status.registrants] == [
            (A, True, "iqn.test:a0"),
            (B, True, "iqn.test:b0"),
        ]
    else:
        assert status is None
    reader.pr.close()
    assert reader.wire.closed


def test_a_dead_path_is_not_asked_first_again(target: FakeTarget) -> None:
    """It would cost its time limit at each renewal."""
    node = Node(target, "a", paths=2).join(A)
    asked: list[str] = []

    def dead(what: str) -> None:
        asked.append(what)
        raise PathFailure("no connection")

    node.wire.hook = dead
    for _ in range(3):
        assert node.pr.check() is Standing.OK
    assert len(asked) == 1


def test_clear_says_when_somebody_is_back(target: FakeTarget) -> None:
    a, _ = cluster(target)
    c = Node(target, "c")

    def back(what: str) -> None:
        if what == "READ KEYS":
            target.registered["a0"] = A

    c.wire.hook = back
    with pytest.raises(ReservationError, match="registered again"):
        c.pr.clear(C)
    assert a.pr.check() is Standing.LOST


def test_clear(target: FakeTarget) -> None:
    a, b = cluster(target)
    Node(target, "c").pr.clear(C)
    assert (target.registered, target.type) == ({}, 0)
    assert a.pr.check() is b.pr.check() is Standing.LOST
    d = Node(target, "d").join(C)
    d.pr.clear(C)
    assert target.registered == {}


def test_more_keys_than_the_first_answer_holds() -> None:
    target = FakeTarget()
    node = Node(target, "a").join(A)
    target.registered |= {f"n{number}": 1000 + number for number in range(3000)}
    assert set(node.pr.read_keys().keys) == {A, *range(1000, 4000)}
    assert node.pr.check() is Standing.OK


# --- single commands ---


def test_unit_attentions_are_passed_over_up_to_a_limit() -> None:
    target = FakeTarget()
    node = Node(target, "a").join(A)
    for _ in range(ATTENTION_TRIES - 1):
        target.attentions["a0"].append(ATTENTION_RESET)
    assert node.pr.check() is Standing.OK
    for _ in range(ATTENTION_TRIES):
        target.attentions["a0"].append(ATTENTION_RESET)
    with pytest.raises(CheckCondition, match="UNIT ATTENTION 6/2900"):
        node.pr.check()


def test_a_busy_target_is_asked_again() -> None:
    target = FakeTarget()
    pauses: list[float] = []
    wire = target.transport("a")
    nexus = ScsiNexus(wire, sleep=pauses.append)
    left = [3]

    def busy(_what: str) -> None:
        if left[0]:
            left[0] -= 1
            raise Busy("busy")

    wire.hook = busy
    assert nexus.read_keys() == Keys(0, ())
    assert len(pauses) == 3
    left[0] = 100
    with pytest.raises(Busy):
        nexus.read_keys()
    assert len(pauses) < 10


def test_an_answer_that_keeps_growing() -> None:
    """Whoever cannot read all keys must not go on with some of them."""

    class Growing(FakeTransport):
        def execute(self, cdb: bytes, data_out: bytes, alloc_in: int) -> bytes:
            return bytes(4) + (alloc_in + 8).to_bytes(4) + bytes(alloc_in - 8)

    with pytest.raises(Exception, match=r"grows|said to follow"):
        ScsiNexus(Growing(FakeTarget(), "a")).read_keys()


def test_an_unknown_refusal_of_a_report_is_not_hidden() -> None:
    target = FakeTarget()
    wire = target.transport("a")

    def fail(_what: str) -> None:
        raise CheckCondition("x", HARDWARE)

    wire.hook = fail
    nexus = ScsiNexus(wire)
    for ask in (nexus.full_status, nexus.capabilities):
        with pytest.raises(CheckCondition):
            ask()


# --- anything in any order ---

steps = st.lists(
    st.tuples(
        st.sampled_from(["register", "reserve", "preempt", "unregister", "check", "write", "land", "lose", "die"]),
        st.integers(0, 2),
        st.integers(0, 2),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps, st.booleans())
def test_no_write_lands_after_a_confirmed_fence(script: list[tuple[str, int, int]], abort: bool) -> None:
    """Three nodes do anything, with lost answers and dead paths; each fence that is confirmed holds for ever after."""
    target = FakeTarget(abort=abort)
    nodes = [Node(target, name, paths=2) for name in "abc"]
    keys = (A, B, C)
    out: set[int] = set()
    for count, (what, who, whom) in enumerate(script):
        node = nodes[who]
        try:
            if what == "register":
                node.pr.register(keys[who])
            elif what == "reserve":
                node.pr.reserve()
            elif what == "preempt":
                joined = keys[whom] in target.registered.values()
                node.pr.preempt(keys[whom])
                assert keys[whom] not in target.registered.values()
                assert target.type == 8
                if joined:
                    out.add(whom)
            elif what == "unregister":
                node.pr.unregister()
            elif what == "check":
                node.pr.check()
            elif what == "write":
                node.write(who, count.to_bytes(2) * 256)
                assert who not in out or target.type == 0, "a fenced node's write was taken"
            elif what == "land":
                before = dict(target.blocks)
                target.land()
                for fenced_one in out if target.type else ():
                    assert target.blocks.get(fenced_one) == before.get(fenced_one), "a fenced write landed"
            elif what == "lose":
                node.wire.lose = whom
            else:
                node.transports[1].dead = not node.transports[1].dead
        except (MisuseError, PathFailure, Preempted, ReservationConflict, ReservationLost, StaleRegistration):
            continue
        except (Unconfirmed, NotOffered) as error:
            raise AssertionError("this target can always abort") from error
        if target.type == 0:
            out.clear()  # everyone has left: whoever comes next begins anew
        for number in out:
            assert keys[number] not in target.registered.values()


# --- a target that loses track of its reservation ---


def tgt_like(spare: bool = True) -> FakeTarget:
    return FakeTarget(abort=False, aptpl=False, full=False, dangles=spare)


def damaged(target: FakeTarget, key: int) -> None:
    """Show the reservation as one of type 0 that *key* holds."""
    target.damaged = key


def test_repairing_its_own_keeps_every_path_registered() -> None:
    target = tgt_like()
    b, a = Node(target, "b").join(B), Node(target, "a", paths=3).join(A)
    damaged(target, A)
    assert a.pr.check() is b.pr.check() is Standing.LOST
    a.pr.reestablish(lambda: True)
    assert target.registered == {"a0": A, "a1": A, "a2": A, "b0": B}
    assert a.pr.check() is b.pr.check() is Standing.OK


def test_a_repair_under_way_is_no_loss() -> None:
    target = tgt_like()
    a, b = cluster(target)
    damaged(target, A)
    pauses: list[float] = []

    def repair(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            a.pr.reestablish(lambda: True)

    b.pr = Reservations("disk", b.nexuses, sleep=repair)
    b.pr.register(B)
    assert b.pr.check() is Standing.OK
    assert len(pauses) == 3


def test_a_fencer_whose_further_key_is_taken_for_the_reservation_takes_it_over() -> None:
    """Another node preempts the same victim while this one gets ready: then that key is the next registration."""
    target = tgt_like()
    a, b = cluster(target)
    c = Node(target, "c").join(C)
    c.nexuses[0].preempt(C, A, abort=False)
    b.pr.preempt(A)
    assert (target.type, target.damaged, target.holder) == (8, 0, "b0")
    assert target.registered == {"b0": B, "c0": C}


def test_a_further_key_on_which_the_reservation_hangs_stays() -> None:
    """Nothing comes through any more before it is taken over: to take the key back would end the reservation."""
    target = tgt_like()
    a, b = cluster(target)
    b.nexuses[0].preempt(B, A, abort=False)

    def cut(what: str) -> None:
        if what == "PREEMPT" and target.damaged:
            raise PathFailure("no connection")

    b.wire.hook = cut
    with pytest.raises(PathFailure):
        b.pr.preempt(A)
    assert target.damaged in target.registered.values()
    assert target.type == 8
    assert not target.allowed("a0")


def test_no_spare_path_and_a_key_that_nobody_has() -> None:
    target = tgt_like(spare=False)
    a, b = cluster(target)
    damaged(target, C)
    with pytest.raises(DamagedReservation, match="type 0 whose holder 0x000000000000000c is not registered"):
        a.pr.reestablish(lambda: True)
    assert target.registered == {"a0": A, "b0": B}
    target.dangles = True
    a.pr.reestablish(lambda: True)
    assert target.registered == {"a0": A, "b0": B}
    assert a.pr.check() is b.pr.check() is Standing.OK


def test_a_reservation_of_no_type_and_no_key_removes_nobody() -> None:
    target = tgt_like()
    a, b = cluster(target)

    class Blank(FakeTransport):
        def _read(self, action: int) -> bytes:
            if action == 1:
                return ReservationData(1, Held(1, 0, 10)).encode()
            return super()._read(action)

    a.nexuses[0].transport = Blank(target, "a0")
    assert a.pr.check() is Standing.LOST
    with pytest.raises(DamagedReservation):
        a.pr.reestablish(lambda: True)
    assert target.registered == {"a0": A, "b0": B}
