"""The lock cache of a FUSE layer: asking, giving up, pins, orders of messages, change of home."""

from errno import EAGAIN

import pytest

from mxfs_proto.errors import MisuseError
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfsd.core.lockcache import FORGET_BATCH, GIVEN_BACK_KEPT, LockCache, State
from mxfsd.core.lockeffects import CacheEffect, Invalidate, Later, SendCancel, SendRelease, SendRequest, Wake

NL, CR, CW, PR, PW, EX = LockMode
NONE = LockFlag.NONE
OPEN, ALT, MAY_KEEP = LockFlag.OPEN, LockFlag.ALT_UNCACHED, LockFlag.MAY_KEEP
OTHERS = LockFlag.OTHER_OPEN | LockFlag.OTHER_WRITER


class Host:
    """What the cache asks about its node."""

    def __init__(self) -> None:
        self.opens = (0, 0)
        self.writer = False

    def cache(self, implicit: bool = False, min_hold_ms: int = 10) -> LockCache:
        return LockCache(
            implicit,
            opens_of=lambda ino: self.opens,
            has_cached_writer=lambda ino: self.writer,
            min_hold_ms=min_hold_ms,
            lock_wait_ms=1000,
        )


def held(mode: LockMode, seq: int = 5) -> LockCache:
    cache = Host().cache()
    assert cache.adopt(0, 7, mode, seq) == []
    return cache


def test_asks_once_and_wakes() -> None:
    cache = Host().cache()
    assert cache.mode(7) is NL
    req, effects = cache.want(0, 7, EX)
    assert effects == [SendRequest(req, 7, EX, NONE, None)]
    assert cache.want(1, 7, PR) == (req, [])
    other, effects = cache.want(1, 7, PR, ALT)
    assert other != req
    assert effects == [SendRequest(other, 7, PR, ALT, None)]
    both = cache.on_grant(2, req, 7, EX, 5)
    assert both == [Wake(req, EX, NONE, 7), Wake(other, EX, NONE, 7)], "the one covers the other"
    assert cache.pending == 0
    assert cache.on_grant(2, other, 7, EX, 6) == [], "its own grant comes all the same"
    assert (cache.mode(7), cache.seq(7), cache.pending) == (EX, 6, 0)
    third, effects = cache.want(3, 7, PW)
    assert effects == [Wake(third, EX, NONE, 7)]
    fourth, _ = cache.want(4, 8, PR)
    assert cache.on_deny(4, fourth, 8, EAGAIN) == [Wake(fourth, NL, NONE, 8, EAGAIN)]


def test_opens_are_never_joined_and_carry_counts() -> None:
    host = Host()
    cache = host.cache()
    host.opens = (1, 0)
    first, effects = cache.want(0, 7, PR, OPEN, (1, 0))
    assert effects == [SendRequest(first, 7, PR, OPEN, (1, 0))]
    host.opens = (2, 0)
    second, effects = cache.want(0, 7, PR, OPEN, (2, 0))
    assert second != first
    with pytest.raises(MisuseError):
        cache.want(0, 7, PR, OPEN)
    assert cache.resend(5) == [SendRequest(r, 7, PR, OPEN, (2, 0)) for r in (first, second)]


def test_bast_revokes_invalidates_then_releases() -> None:
    host = Host()
    cache = host.cache()
    cache.adopt(0, 7, EX, 5)
    assert cache.on_bast(1, 7, 5, PR) == [Invalidate(7, PR)]
    assert (cache.mode(7), cache.data_mode(7), cache.state(7)) == (NL, EX, State.INVALIDATING)
    req, effects = cache.want(2, 7, EX)
    assert effects == []  # held back until the release is sent
    host.opens = (2, 1)
    assert cache.invalidated(3, 7) == [SendRelease(7, 5, PR, (2, 1)), SendRequest(req, 7, EX, NONE, None)]
    assert (cache.mode(7), cache.state(7)) == (PR, State.HELD)
    assert cache.on_bast(4, 7, 5, PR) == [SendRelease(7, 5, PR, (2, 1))]  # compatible: its answer was lost


@pytest.mark.parametrize(
    ("mode", "wanted", "flags", "writer", "target"),
    [
        (EX, EX, NONE, True, NL),
        (EX, PR, NONE, False, PR),
        (EX, PR, MAY_KEEP, False, PR),
        (EX, PR, MAY_KEEP, True, PW),
        (EX, PR, NONE, True, NL),
        (EX, CR, MAY_KEEP, True, PW),
        (EX, CR, NONE, False, PR),
        (EX, CW, NONE, False, NL),
        (PW, PR, NONE, False, PR),
        (PW, EX, MAY_KEEP, True, PW),
        (PR, CW, MAY_KEEP, True, NL),
        (PR, EX, NONE, False, NL),
        (CR, PW, NONE, False, CR),
    ],
)
def test_what_is_kept(mode: LockMode, wanted: LockMode, flags: LockFlag, writer: bool, target: LockMode) -> None:
    host = Host()
    host.writer = writer
    cache = host.cache()
    cache.adopt(0, 7, mode, 5)
    effects = cache.on_bast(1, 7, 5, wanted, flags)
    if target is mode:
        assert effects == [SendRelease(7, 5, mode, (0, 0))]
    else:
        assert effects == [Invalidate(7, target)]
        assert cache.invalidated(2, 7) == [SendRelease(7, 5, target, (0, 0))]
        assert cache.mode(7) is target


def test_uses_are_waited_for() -> None:
    cache = held(EX)
    cache.pin(7)
    cache.pin(7)
    assert cache.on_bast(1, 7, 5, EX) == []
    assert (cache.mode(7), cache.state(7)) == (NL, State.DRAINING)
    assert cache.unpin(2, 7) == []
    assert cache.unpin(3, 7) == [Invalidate(7, NL)]
    with pytest.raises(MisuseError):
        cache.unpin(4, 7)


def test_data_upcalls_make_invalidation_run_again() -> None:
    cache = held(PR)
    cache.pin(7, data=True)
    assert cache.on_bast(1, 7, 5, EX) == [Invalidate(7, NL)]
    assert cache.unpin(2, 7, data=True) == []
    assert cache.invalidated(3, 7) == [Invalidate(7, NL)]  # one was answered during the pass
    cache.pin(7, data=True)
    assert cache.invalidated(4, 7) == []  # one is not answered yet
    assert cache.unpin(5, 7, data=True) == [Invalidate(7, NL)]
    assert cache.invalidated(6, 7, again=True) == [Invalidate(7, NL)]
    assert cache.invalidated(7, 7) == [SendRelease(7, 5, NL, (0, 0))]


def test_minimum_hold() -> None:
    cache = Host().cache()
    req, _ = cache.want(0, 7, EX)
    cache.on_grant(100, req, 7, EX, 5)
    assert cache.on_bast(101, 7, 5, EX) == [Later(7, 110)]
    assert (cache.mode(7), cache.state(7)) == (EX, State.DEFERRED)
    assert cache.tick(109) == []
    assert cache.tick(110) == [Invalidate(7, NL)]


def test_stronger_bast_during_a_revocation_goes_further() -> None:
    cache = held(EX)
    assert cache.on_bast(1, 7, 5, PR) == [Invalidate(7, PR)]
    assert cache.on_bast(2, 7, 5, EX) == [SendRelease(7, 5, EX, (0, 0))]  # a sign of life
    assert cache.invalidated(3, 7) == [Invalidate(7, NL)]
    assert cache.invalidated(4, 7) == [SendRelease(7, 5, NL, (0, 0))]


def test_bast_that_overtook_its_grant() -> None:
    cache = Host().cache()
    assert cache.on_bast(0, 7, 9, EX) == [SendRelease(7, 9, NL, (0, 0))]
    assert cache.adopt(1, 7, PR, 9) == []
    assert cache.mode(7) is NL
    cache.adopt(2, 7, PR, 8)
    assert cache.mode(7) is NL
    cache.adopt(3, 7, PR, 10)
    assert cache.mode(7) is PR
    assert cache.on_bast(4, 7, 9, EX) == []  # old news


def test_bast_for_a_newer_grant_takes_what_is_held_too() -> None:
    cache = held(PR)
    assert cache.on_bast(1, 7, 9, EX) == [Invalidate(7, NL)]
    assert cache.adopt(2, 7, EX, 9) == []
    assert cache.mode(7) is NL
    assert cache.invalidated(3, 7) == [SendRelease(7, 9, NL, (0, 0))]


def test_newer_grant_ends_a_revocation() -> None:
    cache = held(PR)
    cache.pin(7)
    assert cache.on_bast(1, 7, 5, EX) == []
    req, effects = cache.want(1, 7, EX)
    assert effects == []
    # The waiter behind the BAST was cancelled, and the lock granted anew: what was held back must be sent.
    assert cache.adopt(2, 7, PR, 6) == [SendRequest(req, 7, EX, NONE, None)]
    assert cache.mode(7) is PR
    assert cache.unpin(3, 7) == []


def test_newer_grant_lets_a_pass_end() -> None:
    cache = held(PR)
    assert cache.on_bast(1, 7, 5, EX) == [Invalidate(7, NL)]
    cache.adopt(2, 7, PR, 6)
    assert cache.on_bast(3, 7, 6, EX) == [SendRelease(7, 6, PR, (0, 0))]
    assert cache.invalidated(4, 7) == [Invalidate(7, NL)]  # one pass at a time
    assert cache.invalidated(5, 7) == [SendRelease(7, 6, NL, (0, 0))]


def test_invalidated_without_a_pass_is_misuse_and_changes_nothing() -> None:
    cache = held(EX)
    with pytest.raises(MisuseError):
        cache.invalidated(1, 7)
    cache.pin(7)
    cache.on_bast(1, 7, 5, EX)
    with pytest.raises(MisuseError):
        cache.invalidated(2, 7)
    assert cache.state(7) is State.DRAINING
    assert cache.unpin(3, 7) == [Invalidate(7, NL)]


def test_home_holds_all_implicitly() -> None:
    host = Host()
    cache = host.cache(implicit=True)
    assert (cache.mode(7), cache.seq(7), len(cache)) == (EX, 0, 0)
    assert cache.may_open(7, writable=True)
    assert cache.on_bast(0, 7, 3, PR) == [Invalidate(7, PR)]
    assert cache.invalidated(1, 7) == [SendRelease(7, 3, PR, (0, 0))]
    assert cache.forget(2, 7) == []
    assert cache.mode(7) is PR
    cache.on_bast(3, 7, 3, EX)
    cache.invalidated(4, 7)
    assert (cache.mode(7), len(cache)) == (NL, 1)  # without an entry it would be EX
    cache.on_grant(5, 0, 7, EX, 9, LockFlag.UNASKED)
    assert (cache.mode(7), len(cache)) == (EX, 0)
    req, _ = cache.want(6, 8, EX, OPEN, (0, 1))
    cache.on_grant(6, req, 8, EX, 11)
    assert len(cache) == 1
    cache.tick(100)
    assert (cache.mode(8), len(cache)) == (EX, 0)


def test_who_may_open_without_asking() -> None:
    cache = Host().cache()
    assert not cache.may_open(7, writable=False)
    cache.adopt(0, 7, PR, 1)
    assert cache.may_open(7, writable=False)
    assert not cache.may_open(7, writable=True)
    cache.on_grant(0, 0, 7, EX, 2, OTHERS)
    assert not cache.may_open(7, writable=True)
    cache.adopt(0, 7, EX, 3)  # says nothing about others
    assert not cache.may_open(7, writable=True)
    assert cache.flags(7) == OTHERS
    cache.on_grant(0, 0, 7, EX, 4, LockFlag.RECLAIM)  # the others may not have reclaimed yet
    assert not cache.may_open(7, writable=True)
    cache.adopt(0, 7, EX, 5, NONE)
    assert cache.may_open(7, writable=True)


def test_uncached_grant_leaves_the_lock_and_notes_the_others() -> None:
    cache = held(PR)
    req, _ = cache.want(0, 7, EX, OPEN, (0, 1))
    assert cache.on_grant(1, req, 7, NL, 0, OTHERS) == [Wake(req, NL, OTHERS, 7)]
    assert cache.mode(7) is PR
    assert not cache.may_open(7, writable=False)


def test_forgotten_locks_are_given_back_together() -> None:
    cache = held(PR)
    assert cache.forget(1, 7) == []
    assert cache.mode(7) is NL
    assert cache.tick(2) == [SendRelease(7, 5, NL, (0, 0))]
    effects: list[CacheEffect] = []
    for ino in range(100, 100 + FORGET_BATCH):
        cache.adopt(3, ino, PR, ino)
        effects += cache.forget(3, ino)
    assert len(effects) == FORGET_BATCH
    cache.adopt(4, 9, PR, 50)
    cache.pin(9)
    assert cache.forget(5, 9) == []
    assert cache.mode(9) is PR


def test_late_grants_stay_dead_when_their_traces_are_dropped() -> None:
    cache = Host().cache()
    for ino in range(1, GIVEN_BACK_KEPT + 50):
        cache.on_bast(0, ino, 1000 + ino, EX)
    cache.adopt(1, 1, PR, 1001)
    assert cache.mode(1) is NL
    cache.adopt(1, 1, PR, 10**6)
    assert cache.mode(1) is PR


def test_asks_again_after_the_lock_wait() -> None:
    cache = Host().cache()
    req, effects = cache.want(0, 7, EX)
    assert cache.tick(999) == []
    assert cache.tick(1000) == effects
    assert cache.cancel(1001, req) == [SendCancel(req, 7)]
    assert cache.cancel(1001, req) == []
    assert cache.tick(9000) == []


def test_denied_reclaim_drops_the_lock() -> None:
    cache = held(PR)
    assert cache.on_deny(1, 0, 7, 16) == [Invalidate(7, NL)]


def test_a_home_that_drops_all_does_not_take_what_it_gave_away_for_its_own() -> None:
    """Where it has no entry it holds EX implicitly."""
    cache = LockCache(True)
    effects = cache.on_bast(0, 7, 5, PR)
    assert effects == [Invalidate(7, PR)]
    assert cache.invalidated(0, 7) == [SendRelease(7, 5, PR, (0, 0))]
    assert (cache.mode(7), cache.mode(8)) == (PR, EX)
    assert cache.drop_all() == [7]
    assert (cache.mode(7), cache.mode(8)) == (NL, EX)


def test_who_waits_for_what_is_kept_is_woken_and_asks_nobody() -> None:
    """Seen: a WRITE asked for PW while EX went down to PW. The master had another node's operation before it, which
    waited for that PW; the invalidation waited for the WRITE's folio."""
    host = Host()
    host.writer = True
    cache = host.cache()
    cache.adopt(0, 7, EX, 5)
    assert cache.on_bast(1, 7, 5, PR, MAY_KEEP) == [Invalidate(7, PW)]
    req, effects = cache.want(2, 7, PW)
    opening, _ = cache.want(2, 7, EX, OPEN, (0, 2))
    assert effects == []
    assert cache.invalidated(3, 7) == [
        SendRelease(7, 5, PW, (0, 0)),
        Wake(req, PW, NONE, 7),
        SendRequest(opening, 7, EX, OPEN, (0, 2)),
    ]


def test_a_lock_that_comes_with_a_reply_wakes_who_asked_for_it() -> None:
    cache = Host().cache()
    req, _ = cache.want(0, 7, PR)
    assert cache.adopt(1, 7, PW, 5) == [Wake(req, PW, NONE, 7)]


def test_drop_all() -> None:
    cache = held(PR)
    cache.adopt(0, 8, EX, 6)
    req, _ = cache.want(0, 9, PR)
    cache.on_bast(1, 8, 6, EX)
    behind, effects = cache.want(1, 8, EX)
    assert effects == []
    assert sorted(cache.drop_all()) == [7, 8]
    assert (cache.mode(7), cache.data_mode(8), cache.pending) == (NL, NL, 2)
    assert cache.invalidated(2, 8) == []
    assert [e.req_id for e in cache.tick(3) if isinstance(e, SendRequest)] == [behind]
    assert {e.req_id for e in cache.resend(4) if isinstance(e, SendRequest)} == {req, behind}
    cache.adopt(5, 7, PR, 5)
    assert cache.mode(7) is NL


def test_change_of_home() -> None:
    cache = held(PR)
    cache.adopt(0, 8, EX, 6)
    cache.on_bast(0, 8, 6, PR)
    assert list(cache.held()) == [(7, PR, 5, (0, 0)), (8, EX, 6, (0, 0))]
    cache.new_epoch(1000)
    cache.adopt(1, 9, PR, 999)  # in a reply that the new home repeats from the old one's cache
    assert cache.mode(9) is NL
    assert cache.mode(7) is PR
    cache.on_grant(2, 0, 8, EX, 1000, LockFlag.RECLAIM)
    assert cache.mode(8) is EX
    cache.set_implicit(True, [7, 8, 20])
    assert (cache.mode(7), cache.mode(8), cache.mode(20), cache.mode(21)) == (PR, EX, NL, EX)
    cache.drop_all()
    cache.set_implicit(False)
    assert (cache.mode(7), cache.mode(20), cache.mode(21), len(cache)) == (NL, NL, NL, 0)


def handed_over(cache: LockCache, now_ms: int, seq: int, *modes: LockMode) -> list[LockMode]:
    """A BAST for each mode, one after the other, each obeyed at once; what is kept after each."""
    kept = []
    for mode in modes:
        effects = cache.on_bast(now_ms, 7, seq, mode)
        for effect in effects:
            if isinstance(effect, Invalidate):
                cache.invalidated(now_ms, 7)
        kept.append(cache.mode(7))
    return kept


def test_a_lock_that_is_handed_to_and_fro_goes_all_the_way_at_once() -> None:
    """The other node looks first (PR) and opens for writing then (EX): the second time one BAST is enough."""
    cache = LockCache(False)
    cache.adopt(1000, 7, EX, 10)
    assert handed_over(cache, 1000, 10, PR, EX) == [PR, NL]
    cache.adopt(1010, 7, EX, 11)
    assert handed_over(cache, 1020, 11, PR) == [NL]
    cache.adopt(1030, 7, EX, 12)
    assert handed_over(cache, 2100, 12, PR) == [PR], "after a second it is tried anew"


def test_a_lock_that_is_read_elsewhere_stays_for_reading() -> None:
    cache = LockCache(False)
    cache.adopt(1000, 7, EX, 10)
    assert handed_over(cache, 1000, 10, PR) == [PR]
    assert handed_over(cache, 1100, 10, EX) == [NL]  # much later: no pattern
    cache.adopt(1110, 7, EX, 11)
    assert handed_over(cache, 1120, 11, PR) == [PR]
