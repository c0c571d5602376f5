"""A fence on a real target: who is shut out, what is confirmed, what survives. Nothing here is simulated."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prkit import TestDisk, TgtDisk
from tgt import Tgt

from mxfsd.pr.errors import (
    CheckCondition,
    PathFailure,
    Preempted,
    ReservationConflict,
    ReservationLost,
    StaleRegistration,
)
from mxfsd.pr.keys import make_key
from mxfsd.pr.probe import open_reservations
from mxfsd.pr.reservations import Reservations, Standing
from mxfsd.pr.scsi import ScsiNexus
from mxfsd.pr.sense import SenseKey
from mxfsd.pr.spc import OutAction, PrOut, PrType, read16, write16

pytestmark = pytest.mark.needs("tgt")

A, B, C = make_key(1, 0xAAAA), make_key(2, 0xBBBB), make_key(3, 0xCCCC)
BLOCK = 512


@dataclass
class Node:
    """One initiator with its reservations."""

    nexus: ScsiNexus
    pr: Reservations

    def write(self, block: int, text: bytes) -> None:
        self.nexus.run(write16(block, 1), text.ljust(BLOCK, b"\0"))

    def read(self, block: int) -> bytes:
        return self.nexus.run(read16(block, 1), alloc_in=BLOCK).rstrip(b"\0")

    def join(self, key: int) -> "Node":
        self.pr.register(key)
        self.pr.reserve()
        return self


def node(disk: TestDisk, name: str) -> Node:
    nexus = disk.nexus(name)
    return Node(nexus, Reservations(name, [nexus]))


@pytest.fixture
def ab(disk: TestDisk) -> tuple[Node, Node]:
    return node(disk, "a").join(A), node(disk, "b").join(B)


def refused(victim: Node) -> None:
    with pytest.raises(ReservationConflict):
        victim.write(1, b"fenced")
    with pytest.raises(ReservationConflict):
        victim.read(1)


def test_nodes_share_the_disk_and_a_stranger_neither_reads_nor_writes(disk: TestDisk, ab: tuple[Node, Node]) -> None:
    a, b = ab
    a.write(1, b"from a")
    assert b.read(1) == b"from a"
    held = a.pr.read_reservation()
    assert held is not None
    assert held.type == PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS
    assert sorted(b.pr.read_keys().keys) == [A, B]
    refused(node(disk, "c"))
    assert a.pr.check() is b.pr.check() is Standing.OK


def test_a_fenced_node_is_shut_out_at_once(ab: tuple[Node, Node]) -> None:
    a, b = ab
    b.write(1, b"before")
    a.pr.preempt(B)
    refused(b)
    assert a.read(1) == b"before"
    assert a.pr.read_keys().keys == (A,)
    assert a.pr.check() is Standing.OK
    assert b.pr.check() is Standing.PREEMPTED
    with pytest.raises(Preempted):
        b.pr.register(B)
    refused(b)


def test_preempting_again_is_success(disk: TestDisk, ab: tuple[Node, Node]) -> None:
    a, b = ab
    c = node(disk, "c").join(C)
    a.pr.preempt(B)
    a.pr.preempt(B)
    c.pr.preempt(B)
    refused(b)
    assert sorted(c.pr.read_keys().keys) == [A, C]


def test_a_preempt_whose_reset_never_came_is_finished_by_the_next(disk: TestDisk, ab: tuple[Node, Node]) -> None:
    a, b = ab
    c = node(disk, "c").join(C)
    a.nexus.preempt(A, B, abort=False)
    c.pr.preempt(B)
    refused(b)


def test_leaving_in_order(ab: tuple[Node, Node]) -> None:
    """The one who made the reservation leaves: with type 8 it stays for the other, and shuts out him who left."""
    a, b = ab
    a.pr.unregister()
    assert b.pr.check() is Standing.OK
    b.write(1, b"b goes on")
    refused(a)
    b.pr.unregister()
    assert b.pr.read_reservation() is None
    assert b.pr.read_keys().keys == ()


def test_the_host_is_still_registered_from_before(disk: TestDisk, ab: tuple[Node, Node]) -> None:
    a, _ = ab
    again = Reservations("disk", [disk.nexus("a")])
    with pytest.raises(StaleRegistration):
        again.register(C)
    assert a.pr.check() is Standing.OK
    again.register(C, replace=True)
    assert sorted(again.read_keys().keys) == [B, C]


def test_clear(disk: TestDisk, ab: tuple[Node, Node]) -> None:
    node(disk, "c").pr.clear(C)
    assert ab[0].pr.check() is Standing.LOST
    assert ab[1].pr.read_keys().keys == ()


def test_wrong_keys_are_refused_by_the_target(ab: tuple[Node, Node]) -> None:
    a, b = ab
    for command in (
        PrOut(OutAction.PREEMPT, B, A, 8),
        PrOut(OutAction.PREEMPT, C, B, 8),
        PrOut(OutAction.CLEAR, B),
        PrOut(OutAction.REGISTER, B, C),
    ):
        with pytest.raises(ReservationConflict):
            a.nexus.run(*command.encode())
    assert a.pr.check() is b.pr.check() is Standing.OK


# --- a node that writes as fast as it can while it is fenced ---


class Writer(threading.Thread):
    """Writes numbers to one block, each after the answer to the one before, until it is refused."""

    def __init__(self, victim: Node) -> None:
        super().__init__(daemon=True)
        self.victim = victim
        self.acknowledged = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while True:
                self.victim.write(7, b"%d" % (self.acknowledged + 1))
                self.acknowledged += 1
        except Exception as error:  # noqa: BLE001  the test looks at it
            self.error = error


@contextlib.contextmanager
def writing(victim: Node) -> Iterator[Writer]:
    writer = Writer(victim)
    writer.start()
    deadline = time.monotonic() + 20
    while writer.acknowledged < 5 and writer.error is None and time.monotonic() < deadline:
        time.sleep(0.001)
    yield writer
    writer.join(20)
    assert not writer.is_alive()


@pytest.mark.parametrize("_time", range(3))
def test_nothing_lands_after_the_fence(disk: TestDisk, _time: int) -> None:
    a, b = node(disk, "a").join(A), node(disk, "b").join(B)
    with writing(b) as writer:
        a.pr.preempt(B)
        at_the_fence = a.read(7)
        for _ in range(50):
            assert a.read(7) == at_the_fence
    assert isinstance(writer.error, ReservationConflict)
    assert a.read(7) == at_the_fence
    # What was acknowledged is there; one more may have landed whose answer the reset took away.
    assert int(at_the_fence) - writer.acknowledged in (0, 1)


# --- the target restarts (tgtd keeps nothing) ---


def test_restart_of_the_target(tgt_disk: TgtDisk) -> None:
    a, b = node(tgt_disk, "a").join(A), node(tgt_disk, "b").join(B)
    assert not a.pr.aptpl
    tgt_disk.tgt.restart()
    assert a.pr.check() is Standing.LOST
    with pytest.raises(ReservationLost):
        a.pr.preempt(B)
    a.pr.reestablish(lambda: True)
    assert b.pr.check() is Standing.LOST
    refused(b)
    b.pr.reestablish(lambda: b.read(1) == b"")
    assert a.pr.check() is b.pr.check() is Standing.OK
    b.write(1, b"b is back")
    a.pr.preempt(B)
    refused(b)


def test_a_node_fenced_before_the_restart_stays_out(tgt_disk: TgtDisk) -> None:
    a, b = node(tgt_disk, "a").join(A), node(tgt_disk, "b").join(B)
    a.pr.preempt(B)
    tgt_disk.tgt.restart()
    a.pr.reestablish(lambda: True)
    # b slept through it all. It cannot tell by the keys; its slot, which a has taken from it, does.
    assert b.pr.check() is Standing.LOST
    with pytest.raises(Preempted):
        b.pr.reestablish(lambda: False)
    refused(b)
    assert a.pr.read_keys().keys == (A,)


def test_no_answer_is_no_verdict(tgt_disk: TgtDisk) -> None:
    a = node(tgt_disk, "a").join(A)
    tgt_disk.tgt.kill()
    for _ in range(2):
        with pytest.raises(PathFailure):
            a.pr.check()
        with pytest.raises(PathFailure):
            a.pr.preempt(B)
    tgt_disk.tgt.start()
    assert a.pr.check() is Standing.LOST


def test_a_stopped_target_runs_into_the_time_limit(tgt: Tgt) -> None:
    session = tgt.initiator("a", timeout_ms=300)
    pr = Reservations("disk", [ScsiNexus(session)])
    pr.register(A)
    with tgt.stopped():
        began = time.monotonic()
        with pytest.raises(PathFailure, match="no answer within 300 ms"):
            pr.read_keys()
        assert time.monotonic() - began < 5
    assert pr.read_keys().keys == (A,)


# --- what tgtd is like ---


def test_facts_of_tgtd_that_the_code_relies_on(tgt_disk: TgtDisk) -> None:
    a, b = node(tgt_disk, "a").join(A), node(tgt_disk, "b").join(B)
    with pytest.raises(CheckCondition, match=r"PREEMPT AND ABORT: ILLEGAL REQUEST 5/2400 \(invalid field in CDB\)"):
        a.nexus.preempt(A, B, abort=True)
    assert b.pr.check() is Standing.OK
    capabilities = a.pr.capabilities()
    assert capabilities is not None
    assert not capabilities.aptpl_capable
    assert capabilities.types is not None
    assert PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS in capabilities.types
    assert a.pr.full_status() is None
    with pytest.raises(CheckCondition) as caught:
        tgt_disk.tgt.initiator("other").compare_and_write(9, bytes(BLOCK), b"x" * BLOCK)
    assert caught.value.sense.key is SenseKey.ILLEGAL_REQUEST


def test_tgtd_forgets_a_registration_when_its_session_ends(tgt_disk: TgtDisk) -> None:
    """Its key stays in the list: only I/O shows it. Such a node is shut out, which is the safe side."""
    a = node(tgt_disk, "a").join(A)
    a.nexus.close()
    assert a.pr.read_keys().keys == (A,)
    refused(a)


def test_two_sessions_of_one_initiator_name_are_two_nexuses(tgt: Tgt) -> None:
    """``mxfs pr`` on the host of a node must not end that node's session."""
    sessions = [tgt.initiator("same") for _ in range(2)]
    # tgtd does not mind the same ISID twice; other targets end the first session then.
    assert sessions[0]._isid != sessions[1]._isid
    first, second = map(ScsiNexus, sessions)
    a = Reservations("disk", [first])
    a.register(A)
    a.reserve()
    assert first.run(read16(0, 1), alloc_in=BLOCK) == bytes(BLOCK)
    with pytest.raises(ReservationConflict):
        second.run(read16(0, 1), alloc_in=BLOCK)
    assert first.run(read16(0, 1), alloc_in=BLOCK) == bytes(BLOCK)


# --- finding it ---


def test_probing(tgt: Tgt) -> None:
    found = open_reservations(tgt.url, initiator="iqn.2026-11.net.mxfs.test:p", timeout_ms=5000)
    assert found.transport == "iscsi"
    assert found.reservations is not None
    found.reservations.register(A)
    found.reservations.reserve()
    found.reservations.unregister()
    found.reservations.close()
    found.reservations.close()


def test_probing_what_is_not_there(tgt: Tgt) -> None:
    for url in (tgt.url.replace("reservations", "nosuch"), tgt.url.replace(f":{tgt.port}", ":1")):
        with pytest.raises(PathFailure, match="connecting"):
            open_reservations(url, timeout_ms=5000)


def test_plain_block_access(tgt: Tgt) -> None:
    session = tgt.initiator("a")
    session.write(4, b"x" * BLOCK + b"y" * BLOCK)
    assert session.read(4, 2) == b"x" * BLOCK + b"y" * BLOCK
    assert tgt.image.read_bytes()[4 * BLOCK : 6 * BLOCK] == b"x" * BLOCK + b"y" * BLOCK
    with pytest.raises(Exception, match="no whole blocks"):
        session.write(4, b"x")
