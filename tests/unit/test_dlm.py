"""The lock master: matrix, queues, conversions, opens, operations, reclaim, time."""

import itertools
from errno import EAGAIN, EBUSY, ECANCELED, ENOTCONN
from types import SimpleNamespace

import pytest

from mxfs_proto.errors import MisuseError
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfsd.core.dlm import LINGER_BATCH, PASS_LIMIT, Effect, LockMaster
from mxfsd.core.lockeffects import Bast, BastSilent, Deny, Grant, OpDenied, OpGranted, WaitLong
from mxfsd.core.lockmodes import JOIN, MEET

NL, CR, CW, PR, PW, EX = LockMode
TIMES = SimpleNamespace(lock_wait_ms=3000, bast_ms=1000, min_hold_ms=1)
NONE = (0, 0)
MAY_KEEP, OPEN, ALT = LockFlag.MAY_KEEP, LockFlag.OPEN, LockFlag.ALT_UNCACHED
OTHER_OPEN, OTHER_WRITER = LockFlag.OTHER_OPEN, LockFlag.OTHER_WRITER

# Rows: held, columns: wanted, NL CR CW PR PW EX; <linux/dlmconstants.h> and the VMS matrix.
MATRIX = ["111111", "111110", "111000", "110100", "110000", "100000"]


def master(home: int | None = None) -> LockMaster:
    return LockMaster(home, TIMES)


def kinds(effects: list[Effect]) -> list[type]:
    return [type(effect) for effect in effects]


def grant(effects: list[Effect]) -> Grant:
    (only,) = effects
    assert isinstance(only, Grant)
    return only


def bast(effects: list[Effect]) -> Bast:
    (only,) = effects
    assert isinstance(only, Bast)
    return only


@pytest.mark.parametrize(("held", "wanted"), list(itertools.product([CR, CW, PR, PW, EX], repeat=2)))
def test_matrix(held: LockMode, wanted: LockMode) -> None:
    dlm = master()
    grant(dlm.request(0, 1, 1, 7, held))
    effects = dlm.request(0, 2, 1, 7, wanted, LockFlag.NOQUEUE)
    if MATRIX[held][wanted] == "1":
        assert grant(effects).mode is wanted
    else:
        assert effects == [Deny(2, 1, 7, EAGAIN)]
        assert kinds(dlm.request(0, 2, 2, 7, wanted)) == [Bast]
    dlm = master()
    assert kinds(dlm.op_request(0, 1, 1, 7, held)) == [OpGranted]
    assert kinds(dlm.op_request(0, 1, 2, 7, wanted)) == ([OpGranted] if MATRIX[held][wanted] == "1" else [])


def test_join_and_meet_are_those_of_the_order() -> None:
    assert JOIN[PR][CW] is PW
    assert MEET[PR][CW] is CR
    for a, b in itertools.product(LockMode, LockMode):
        assert JOIN[a][b] is JOIN[b][a]
        assert MEET[a][JOIN[a][b]] is a


def test_request_for_nl_is_misuse() -> None:
    with pytest.raises(MisuseError):
        master().request(0, 1, 1, 7, NL)


def test_bast_answer_grants_in_order_and_sequences_rise() -> None:
    dlm = master()
    first = grant(dlm.request(0, 1, 1, 7, EX))
    assert bast(dlm.request(1, 2, 5, 7, PR)) == Bast(1, 7, first.seq, PR, LockFlag.NONE)
    assert dlm.request(2, 3, 9, 7, EX) == []
    assert dlm.request(2, 2, 6, 7, PR) == []
    effects = dlm.release(3, 1, 7, first.seq, PR, NONE)
    second = effects[0]
    assert isinstance(second, Grant)
    assert (second.node, second.req_id, second.mode) == (2, 5, PR)
    assert second.seq > first.seq
    # The EX came before node 2's second request, and calls back both readers.
    assert [(e.node, e.mode) for e in effects[1:] if isinstance(e, Bast)] == [(1, EX), (2, EX)]
    assert dlm.release(4, 1, 7, first.seq, NL, NONE) == []
    third = dlm.release(5, 2, 7, second.seq, NL, NONE)
    assert isinstance(third[0], Grant)
    assert (third[0].node, third[0].mode) == (3, EX)
    assert bast(third[1:]) == Bast(3, 7, third[0].seq, PR, LockFlag.NONE)


def test_stale_release_changes_nothing_but_opens_and_is_asked_again() -> None:
    dlm = master()
    old = grant(dlm.request(0, 1, 1, 7, PR))
    new = grant(dlm.request(0, 1, 2, 7, PR))
    assert new.seq > old.seq
    dlm.request(1, 2, 1, 7, EX)
    effects = dlm.release(2, 1, 7, old.seq, NL, (2, 0))
    assert bast(effects).seq == new.seq
    assert dlm.holders(7) == {1: PR}
    assert dlm.opens_of(7) == {1: (2, 0)}


def test_release_under_one_sequence_never_raises_the_mode() -> None:
    dlm = master()
    held = grant(dlm.request(0, 1, 1, 7, EX))
    dlm.request(0, 2, 1, 7, PR)
    dlm.release(0, 1, 7, held.seq, PR, NONE)
    dlm.release(0, 1, 7, held.seq, EX, NONE)
    assert dlm.mode_of(1, 7) is PR


def test_two_converters_do_not_deadlock() -> None:
    dlm = master()
    a = grant(dlm.request(0, 1, 1, 7, PR))
    b = grant(dlm.request(0, 2, 1, 7, PR))
    assert bast(dlm.request(1, 1, 2, 7, EX)) == Bast(2, 7, b.seq, EX, LockFlag.NONE)
    assert dlm.request(1, 2, 2, 7, EX) == []
    effects = dlm.release(2, 2, 7, b.seq, NL, NONE)
    got = effects[0]
    assert isinstance(got, Grant)
    assert (got.node, got.req_id, got.mode) == (1, 2, EX)
    assert got.seq > a.seq
    assert bast(effects[1:]).node == 1
    last = dlm.release(3, 1, 7, got.seq, NL, NONE)
    assert grant(last).node == 2


def test_conversion_adds_to_what_is_held() -> None:
    dlm = master()
    dlm.request(0, 1, 1, 7, PR)
    assert grant(dlm.request(0, 1, 2, 7, CW)).mode is PW


def test_conversions_pass_others_but_not_for_ever() -> None:
    dlm = master()
    reader = 50
    dlm.request(0, reader, 1, 7, PR)
    converters = range(1, PASS_LIMIT + 3)
    for node in converters:
        dlm.request(0, node, 1, 7, PR)
    dlm.op_request(0, 60, 999, 7, CW)  # the first waiter
    dlm.request(0, 99, 1, 7, EX)
    for node in converters:
        dlm.request(0, node, 2, 7, EX)
    (view,) = dlm.snapshot(5)
    order = [waiter.node for waiter in view.waiters]
    assert order == [*converters[:PASS_LIMIT], 60, 99, *converters[PASS_LIMIT:]]


def test_home_holds_everything_implicitly_and_gets_it_back() -> None:
    dlm = master(home=1)
    assert dlm.holders(7) == {1: EX}
    assert len(dlm) == 0
    called = bast(dlm.request(0, 2, 1, 7, PR))
    assert (called.node, called.mode) == (1, PR)
    got = grant(dlm.release(1, 1, 7, called.seq, PR, NONE))
    assert dlm.holders(7) == {1: PR, 2: PR}
    back = grant(dlm.release(2, 2, 7, got.seq, NL, NONE))
    assert (back.node, back.mode, back.flags) == (1, EX, LockFlag.UNASKED)
    assert len(dlm) == 0
    again = bast(dlm.request(3, 2, 2, 7, PR))
    assert again.seq > back.seq  # no answer to an older BAST can be taken for one to this
    assert dlm.release(4, 1, 7, called.seq, NL, NONE) == [Bast(1, 7, again.seq, PR, LockFlag.NONE)]
    assert dlm.mode_of(1, 7) is EX


def test_home_asks_for_what_it_has_implicitly() -> None:
    dlm = master(home=1)
    assert grant(dlm.request(0, 1, 1, 7, PR, OPEN, (1, 0))).mode is EX
    assert len(dlm) == 0


def test_record_stays_while_another_node_has_the_file_open() -> None:
    dlm = master(home=1)
    called = bast(dlm.request(0, 2, 1, 7, PR, OPEN, (1, 0)))
    got = grant(dlm.release(1, 1, 7, called.seq, PR, NONE))
    assert dlm.release(2, 2, 7, got.seq, NL, (1, 0)) == []
    assert len(dlm) == 1
    assert grant(dlm.opens_update(3, 2, 7, NONE)).mode is EX
    assert len(dlm) == 0


def test_linger_keeps_the_home_called_back_for_a_while() -> None:
    dlm = LockMaster(1, TIMES, linger_ms=50)
    called = bast(dlm.op_request(0, 2, 1, 7, EX))
    assert dlm.release(1, 1, 7, called.seq, NL, NONE) == [OpGranted(1, 2, 7)]
    assert dlm.op_release(2, 1, 7) == []
    assert dlm.op_request(3, 2, 2, 7, EX) == [OpGranted(2, 2, 7)]
    assert dlm.op_release(4, 2, 7) == []
    assert dlm.tick(40) == []
    assert grant(dlm.tick(60)).flags is LockFlag.UNASKED
    assert len(dlm) == 0


def test_the_home_that_asks_meanwhile_has_everything_at_once() -> None:
    dlm = LockMaster(1, TIMES, linger_ms=50)
    called = bast(dlm.op_request(0, 2, 1, 7, EX))
    dlm.release(1, 1, 7, called.seq, NL, NONE)
    dlm.op_release(2, 1, 7)
    assert grant(dlm.request(3, 1, 5, 7, PR)).mode is EX
    assert len(dlm) == 0 and dlm.tick(100) == []


def test_what_lingers_goes_back_in_batches() -> None:
    dlm = LockMaster(1, TIMES, linger_ms=50)
    count = LINGER_BATCH + 3
    for ino in range(7, 7 + count):
        called = bast(dlm.op_request(0, 2, ino, ino, EX))
        dlm.release(1, 1, ino, called.seq, NL, NONE)
        dlm.op_release(2, ino, ino)
    assert len(dlm.tick(60)) == LINGER_BATCH and len(dlm) == 3
    assert len(dlm.tick(61)) == 3 and len(dlm) == 0


def test_noqueue_denies_without_bast() -> None:
    dlm = master(home=1)
    assert dlm.request(0, 2, 1, 7, CR, LockFlag.NOQUEUE) == [Deny(2, 1, 7, EAGAIN)]
    assert len(dlm) == 0


def test_alt_waits_for_the_answer_and_goes_uncached_only_when_kept() -> None:
    dlm = master()
    held = grant(dlm.request(0, 1, 1, 7, EX))
    assert bast(dlm.request(1, 2, 1, 7, PR, ALT)).flags == MAY_KEEP
    got = grant(dlm.release(2, 1, 7, held.seq, PW, (0, 1)))
    assert (got.node, got.mode, got.seq, got.flags) == (2, NL, 0, OTHER_OPEN | OTHER_WRITER)
    assert dlm.holders(7) == {1: PW}
    assert bast(dlm.request(3, 3, 1, 7, PR, ALT)).flags == MAY_KEEP
    assert grant(dlm.release(4, 1, 7, held.seq, PR, (0, 1))).mode is PR


def test_without_alt_the_holder_may_not_keep() -> None:
    dlm = master()
    held = grant(dlm.request(0, 1, 1, 7, EX))
    assert bast(dlm.request(1, 2, 1, 7, PR)).flags == LockFlag.NONE
    assert dlm.release(2, 1, 7, held.seq, PW, (0, 1)) == []
    assert grant(dlm.release(3, 1, 7, held.seq, PR, (0, 1))).mode is PR


def test_a_read_at_the_home_leaves_the_writer_its_cache() -> None:
    dlm = master()
    held = grant(dlm.request(0, 1, 1, 7, EX))
    assert bast(dlm.op_request(1, 2, 1, 7, CR)) == Bast(1, 7, held.seq, CR, MAY_KEEP)
    assert dlm.release(2, 1, 7, held.seq, PW, (0, 1)) == [OpGranted(1, 2, 7)]


@pytest.mark.parametrize(
    ("first", "second", "cached", "flags"),
    [
        (PR, PR, True, OTHER_OPEN),
        (PR, EX, False, OTHER_OPEN),
        (EX, PR, False, OTHER_OPEN | OTHER_WRITER),
        (EX, EX, False, OTHER_OPEN | OTHER_WRITER),
    ],
)
def test_opens(first: LockMode, second: LockMode, cached: bool, flags: LockFlag) -> None:
    dlm = master()
    one, two = ((1, 0) if mode is PR else (0, 1) for mode in (first, second))
    a = grant(dlm.request(0, 1, 1, 7, first, OPEN, one))
    assert a.mode is first
    effects = dlm.request(1, 2, 1, 7, second, OPEN, two)
    if kinds(effects) == [Bast]:
        effects = dlm.release(2, 1, 7, a.seq, PW if first is EX else NL, one)
    b = grant(effects)
    assert b.mode is (second if cached else NL)
    assert b.flags == flags
    assert dlm.opens_of(7) == {1: one, 2: two}


def test_counts_learned_from_the_answer_decide() -> None:
    dlm = master()
    a = grant(dlm.request(0, 1, 1, 7, EX))
    assert kinds(dlm.request(1, 2, 1, 7, EX, OPEN, (0, 1))) == [Bast]
    got = grant(dlm.release(2, 1, 7, a.seq, NL, (3, 0)))  # it opened it thrice without a message
    assert (got.mode, got.flags) == (NL, OTHER_OPEN)
    dlm.opens_update(3, 1, 7, NONE)
    assert grant(dlm.request(4, 2, 2, 7, EX, OPEN, (0, 2))).mode is EX


def test_newer_counts_replace_those_of_a_queued_open() -> None:
    dlm = master()
    a = grant(dlm.request(0, 1, 1, 7, EX))
    dlm.request(1, 2, 1, 7, PR, OPEN, (1, 0))
    dlm.opens_update(2, 2, 7, (2, 0))
    dlm.release(3, 1, 7, a.seq, PR, NONE)
    assert dlm.opens_of(7) == {2: (2, 0)}


def test_a_grant_for_a_reply_never_hides_opens_of_others() -> None:
    dlm = master()
    dlm.request(0, 2, 1, 7, PR, OPEN, (1, 0))
    a = grant(dlm.request(0, 2, 2, 7, PR))
    dlm.request(0, 1, 1, 7, EX)
    dlm.release(0, 2, 7, a.seq, NL, (1, 0))
    assert dlm.mode_of(1, 7) is EX
    assert grant(dlm.request(1, 1, 2, 7, PR, ALT)).mode is NL  # the whole would be EX
    dlm.op_request(2, 1, 1, 7, EX)
    assert dlm.grant_with_op(2, 1, 7, PR) == (NL, 0)


def test_operations_conflict_with_others_but_not_with_their_own_node() -> None:
    dlm = master()
    grant(dlm.request(0, 1, 1, 7, PR))
    b = grant(dlm.request(0, 2, 1, 7, PR))
    assert bast(dlm.op_request(1, 1, 10, 7, EX)).node == 2
    assert dlm.op_request(1, 3, 11, 7, PR) == []  # first come, first served
    # Node 2 may need this read to end before it can give up what covers it.
    assert dlm.op_request(1, 2, 12, 7, PR) == [OpGranted(12, 2, 7)]
    assert dlm.release(2, 2, 7, b.seq, NL, NONE) == []
    assert dlm.op_release(3, 12, 7) == [OpGranted(10, 1, 7)]
    assert dlm.holders(7) == {1: PR}
    assert dlm.op_release(4, 10, 7) == [OpGranted(11, 3, 7)]


def test_grant_with_op_delays_nobody() -> None:
    dlm = master()
    assert kinds(dlm.op_request(0, 1, 1, 7, PR)) == [OpGranted]
    mode, seq = dlm.grant_with_op(0, 1, 7, PR)
    assert mode is PR
    assert dlm.grant_with_op(0, 1, 7, PR)[1] > seq
    assert dlm.grant_with_op(0, 1, 8, PR) == (NL, 0)
    assert kinds(dlm.op_request(0, 2, 2, 7, EX)) == [Bast]
    assert dlm.grant_with_op(0, 1, 7, PR) == (NL, 0)


def in_turn(dlm: LockMaster, keeps: LockMode = NL, *, called_back: bool = True) -> LockMode:
    """Node 1 has written under EX and goes down to *keeps*; return what an operation of node 2 that reads is given."""
    seq = grant(dlm.request(0, 1, 1, 7, EX)).seq
    if called_back:
        assert bast(dlm.op_request(1, 2, 2, 7, PR)).node == 1
    dlm.release(2, 1, 7, seq, keeps, (0, 0))
    if not called_back:
        dlm.op_request(1, 2, 2, 7, PR)
    mode, _ = dlm.grant_with_op(3, 2, 7, PR)
    dlm.op_release(4, 2, 7)
    return mode


def test_who_reads_what_a_writer_gave_up_altogether_is_the_next_writer() -> None:
    assert in_turn(master()) is EX
    assert in_turn(master(), called_back=False) is PR, "nobody called for it"
    assert in_turn(master(), keeps=PR) is PR


def test_but_not_the_one_who_reads_after_that() -> None:
    dlm = master()
    in_turn(dlm)
    assert bast(dlm.op_request(5, 3, 3, 7, PR)).node == 2
    dlm.release(6, 2, 7, dlm.seq_of(2, 7), PR, (0, 0))
    assert dlm.grant_with_op(7, 3, 7, PR)[0] is PR


def test_nor_what_a_writer_gave_back_by_itself() -> None:
    dlm = LockMaster(1, TIMES, linger_ms=100)
    dlm.op_request(0, 2, 1, 7, EX)
    dlm.release(1, 1, 7, dlm.seq_of(1, 7), NL, (0, 0))
    assert dlm.grant_with_op(2, 2, 7, EX)[0] is EX
    dlm.op_release(3, 1, 7)
    dlm.release(4, 2, 7, dlm.seq_of(2, 7), NL, (0, 0))
    assert kinds(dlm.op_request(5, 3, 2, 7, PR)) == [OpGranted]
    assert dlm.grant_with_op(6, 3, 7, PR)[0] is PR


def test_nor_where_somebody_waits_to_read_too() -> None:
    dlm = master()
    seq = grant(dlm.request(0, 1, 1, 7, EX)).seq
    dlm.op_request(1, 2, 2, 7, EX)
    dlm.release(2, 1, 7, seq, NL, (0, 0))
    dlm.op_request(3, 3, 3, 7, PR)
    assert dlm.grant_with_op(4, 2, 7, PR)[0] is PR


@pytest.mark.parametrize("beside", ["open", "operation", "waiter", "reader"])
def test_nor_where_somebody_else_uses_it(beside: str) -> None:
    dlm = master()
    seq = grant(dlm.request(0, 1, 1, 7, EX)).seq
    dlm.op_request(1, 2, 2, 7, PR)
    if beside == "open":
        dlm.opens_update(1, 3, 7, (1, 0))
    elif beside == "operation":
        dlm.op_request(1, 3, 3, 7, PR)
    elif beside == "reader":
        dlm.request(1, 3, 3, 7, PR)
    dlm.release(2, 1, 7, seq, NL, (0, 0))
    if beside == "waiter":
        dlm.op_request(2, 3, 3, 7, EX)
    assert dlm.grant_with_op(3, 2, 7, PR)[0] is (NL if beside == "waiter" else PR)


def test_what_the_home_gave_up_is_read_only() -> None:
    dlm = master(home=1)
    assert bast(dlm.op_request(1, 2, 2, 7, PR)).node == 1
    dlm.release(2, 1, 7, dlm.seq_of(1, 7), NL, (0, 0))
    assert dlm.grant_with_op(3, 2, 7, PR)[0] is PR


def test_operation_asked_twice() -> None:
    dlm = master()
    dlm.op_request(0, 1, 1, 7, EX)
    assert dlm.op_request(0, 1, 1, 7, PR) == [OpGranted(1, 1, 7)]
    dlm.op_request(0, 1, 2, 8, PR)
    with pytest.raises(MisuseError):
        dlm.op_request(0, 1, 2, 8, EX)
    with pytest.raises(MisuseError):
        dlm.op_request(0, 1, 0, 8, EX)


def test_repeated_request_keeps_its_place_or_is_granted_again() -> None:
    dlm = master()
    a = grant(dlm.request(0, 1, 1, 7, EX))
    assert grant(dlm.request(1, 1, 1, 7, EX)).seq > a.seq  # its grant was lost
    dlm.request(2, 2, 5, 7, PR)
    assert dlm.request(3, 2, 5, 7, PR) == []
    (view,) = dlm.snapshot(3)
    assert len(view.waiters) == 1


def test_cancel() -> None:
    dlm = master()
    a = grant(dlm.request(0, 1, 1, 7, EX))
    dlm.request(0, 2, 1, 7, EX)
    dlm.request(0, 3, 1, 7, EX)
    effects = dlm.cancel(1, 2, 1)
    assert effects[0] == Deny(2, 1, 7, ECANCELED)
    assert dlm.cancel(1, 2, 1) == []
    assert grant(dlm.release(2, 1, 7, a.seq, NL, NONE)).node == 3


def test_node_gone_frees_what_it_held_but_not_what_still_runs() -> None:
    dlm = master()
    grant(dlm.request(0, 1, 1, 7, EX, OPEN, (0, 1)))
    dlm.request(0, 2, 1, 7, EX)
    dlm.op_request(0, 1, 5, 8, EX)
    dlm.op_request(0, 2, 6, 8, EX)
    dlm.op_request(0, 1, 7, 8, EX)
    dlm.request(0, 1, 9, 7, PR)
    effects = dlm.node_gone(1, 1)
    assert Deny(1, 9, 7, ENOTCONN) in effects
    assert OpDenied(7, 1, 8, ENOTCONN) in effects
    granted = [e for e in effects if isinstance(e, Grant)]
    assert [(g.node, g.flags) for g in granted] == [(2, LockFlag.NONE)]
    assert dlm.opens_of(7) == {}
    assert dlm.op_release(2, 5, 8) == [OpGranted(6, 2, 8)]


def test_time_repeats_basts_reports_silence_and_long_waits() -> None:
    dlm = master()
    a = grant(dlm.request(0, 1, 1, 7, EX))
    dlm.request(0, 2, 1, 7, EX)
    assert dlm.tick(400) == []
    assert dlm.tick(500) == [Bast(1, 7, a.seq, EX, LockFlag.NONE)]
    assert dlm.release(900, 1, 7, a.seq, EX, NONE) == []  # a sign of life
    assert BastSilent(1, 7) not in dlm.tick(1800)
    assert BastSilent(1, 7) in dlm.tick(1900)
    assert WaitLong(2, 7, 3000) in dlm.tick(3000)
    assert not [e for e in dlm.tick(3100) if isinstance(e, WaitLong)]
    dlm.release(3200, 1, 7, a.seq, NL, NONE)
    assert dlm.tick(9000) == []
    assert (dlm.basts, dlm.grants, dlm.waits) == (1, 2, 1)


def test_reclaim() -> None:
    dlm = LockMaster(1, TIMES, first_seq=1000)
    got = grant(dlm.reclaim(0, 2, 7, PR, (1, 0)))
    assert (got.seq, got.flags) == (1000, LockFlag.RECLAIM)
    assert dlm.mode_of(1, 7) is NL
    assert grant(dlm.reclaim(0, 1, 7, PR, NONE)).flags == LockFlag.RECLAIM | OTHER_OPEN
    assert dlm.reclaim(0, 3, 7, EX, NONE) == [Deny(3, 0, 7, EBUSY)]
    assert dlm.reclaim(0, 3, 8, NL, (0, 2)) == []
    assert dlm.opens_of(8) == {3: (0, 2)}
    dlm.reclaim(0, 2, 9, EX, NONE)
    assert dlm.recorded() == [7, 8, 9]
    assert dlm.grace_over(1) == []
    assert dlm.mode_of(1, 10) is EX


def test_reclaim_after_a_lost_connection_meets_what_is_served() -> None:
    dlm = master(home=1)
    dlm.grace_over(0)
    assert dlm.reclaim(1, 2, 7, PR, NONE) == [Deny(2, 0, 7, EBUSY)]
    called = bast(dlm.request(2, 2, 1, 7, PR))
    got = grant(dlm.release(3, 1, 7, called.seq, PR, NONE))
    assert bast(dlm.op_request(4, 1, 5, 7, EX)) == Bast(2, 7, got.seq, EX, LockFlag.NONE)
    again = dlm.reclaim(5, 2, 7, PR, (1, 0))  # the BAST was lost with the connection: it is sent for the new lock
    assert isinstance(again[0], Grant)
    assert again[0].flags == LockFlag.RECLAIM
    assert bast(again[1:]).seq == again[0].seq
    assert dlm.release(6, 2, 7, again[0].seq, NL, NONE) == [OpGranted(5, 1, 7)]
    assert dlm.reclaim(7, 2, 7, PR, NONE) == [Deny(2, 0, 7, EBUSY)]
    assert bast(dlm.reclaim(8, 3, 8, NL, (0, 1))).node == 1
    assert dlm.reclaim(9, 3, 8, NL, NONE) == []
    assert dlm.mode_of(1, 9) is EX


def test_the_homes_own_opens_are_reclaimed_too() -> None:
    dlm = master(home=1)
    assert dlm.reclaim(0, 1, 7, NL, (0, 1)) == []
    dlm.reclaim(0, 2, 7, NL, (1, 0))
    dlm.grace_over(1)
    assert dlm.opens_of(7) == {1: (0, 1), 2: (1, 0)}
    assert grant(dlm.request(2, 2, 1, 7, PR, OPEN, (2, 0))).mode is NL


def test_who_has_ex_learns_in_the_end_what_others_have_open() -> None:
    dlm = master(home=1)
    first = grant(dlm.reclaim(0, 1, 7, EX, NONE))
    assert first.flags == LockFlag.RECLAIM
    assert dlm.reclaim(0, 2, 7, NL, (1, 0)) == []  # uncached, beside a writer that kept its lock
    told = grant(dlm.grace_over(1))
    assert (told.node, told.mode, told.flags) == (1, EX, LockFlag.RECLAIM | OTHER_OPEN)
    assert told.seq > first.seq
    assert dlm.seq_of(1, 7) == told.seq


def test_counts_without_open_mean_nothing() -> None:
    dlm = master()
    dlm.request(0, 1, 1, 7, PR, OPEN, (1, 0))
    dlm.request(0, 1, 2, 7, PR, LockFlag.NONE, (0, 0))
    assert dlm.opens_of(7) == {1: (1, 0)}


def test_in_grace_the_home_gets_nothing_implicitly() -> None:
    dlm = master(home=1)
    dlm.reclaim(0, 2, 7, EX, NONE)
    assert dlm.node_gone(1, 2) == []  # others may still reclaim it
    assert dlm.mode_of(1, 7) is NL
    assert grant(dlm.grace_over(2)).mode is EX


def test_opens_unknown_to_a_new_master_cost_the_home_its_implicit_lock() -> None:
    dlm = master(home=1)
    assert bast(dlm.opens_update(0, 2, 7, (0, 1))).node == 1
    assert dlm.opens_update(0, 2, 8, NONE) == []
    assert dlm.opens_of(7) == {2: (0, 1)}


def test_snapshot_shows_holders_waiters_and_ages() -> None:
    dlm = master()
    dlm.request(1010, 1, 1, 7, EX, OPEN, (0, 1))  # ages of locks held are right to 100 ms
    dlm.op_request(1020, 2, 5, 7, PR)
    (view,) = dlm.snapshot(1030)
    assert [(h.node, h.mode, h.age_ms) for h in view.holders] == [(1, EX, 20)]
    assert [(w.node, w.mode, w.age_ms, w.op_id) for w in view.waiters] == [(2, PR, 10, 5)]
    assert view.opens == ((1, (0, 1)),)


# -- a file that the home's kernel writes by itself ----------------------------------------------------------------


def pinned_master() -> LockMaster:
    """Node 1 is the home, and has given 7 back; its kernel may write it."""
    dlm = master(1)
    called = bast(dlm.op_request(0, 2, 1, 7, CR))
    assert dlm.opens_update(0, 1, 7, (0, 2), pinned=True) == []
    assert dlm.release(0, 1, 7, called.seq, NL, (0, 2)) == [OpGranted(1, 2, 7)]
    assert dlm.pinned(7)
    return dlm


def test_nobody_is_let_cache_what_the_homes_kernel_writes() -> None:
    dlm = pinned_master()
    assert dlm.grant_with_op(0, 2, 7, PR) == (NL, 0)
    assert grant(dlm.request(0, 2, 1, 7, PR, ALT)).mode is NL
    got = grant(dlm.request(0, 2, 2, 7, PR, LockFlag.OPEN | ALT, (1, 0)))
    assert (got.mode, got.flags) == (NL, OTHER_OPEN | OTHER_WRITER)
    assert dlm.op_release(0, 1, 7) == []
    assert grant(dlm.request(0, 3, 1, 7, EX, LockFlag.OPEN | ALT, (0, 1))).mode is NL


def test_what_is_cached_for_its_life_gets_a_lock_for_a_moment() -> None:
    dlm = pinned_master()
    granted, called = dlm.request(0, 2, 1, 7, PR)
    assert isinstance(granted, Grant) and isinstance(called, Bast)
    assert (granted.mode, called.node, called.seq, called.mode) == (PR, 2, granted.seq, EX)
    assert dlm.release(1, 2, 7, granted.seq, NL, (1, 0)) == []
    granted, called = dlm.reclaim(2, 2, 7, PR, (1, 0))
    assert isinstance(granted, Grant) and isinstance(called, Bast)


def test_a_pin_that_comes_late_calls_back_what_is_cached() -> None:
    dlm = master(1)
    called = bast(dlm.request(0, 2, 1, 7, PR))
    got = grant(dlm.release(0, 1, 7, called.seq, PR, (1, 0)))
    late = bast(dlm.opens_update(1, 1, 7, (1, 1), pinned=True))
    assert (late.node, late.seq, late.mode) == (2, got.seq, EX)
    assert dlm.opens_update(2, 1, 7, (1, 1), pinned=True) == [], "only once"


def test_a_pin_ends_by_word_or_when_the_home_is_alone_again() -> None:
    dlm = pinned_master()
    dlm.op_release(0, 1, 7)
    assert not dlm.pinned(7) and 7 not in dlm
    dlm = pinned_master()
    dlm.opens_update(0, 1, 7, (0, 0))
    assert not dlm.pinned(7)
    assert grant(dlm.request(0, 2, 1, 7, PR, ALT)).mode is PR


def test_only_the_home_pins() -> None:
    dlm = master(1)
    bast(dlm.op_request(0, 2, 1, 7, CR))
    dlm.opens_update(0, 2, 7, (0, 1), pinned=True)
    assert not dlm.pinned(7)
