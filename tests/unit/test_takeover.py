"""The way to the home has one order; what does not fit it raises and changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError
from mxfsd.core.takeover import (
    AwaitReclaims,
    ClaimLease,
    Fence,
    Mount,
    Serve,
    Settle,
    Takeover,
    TakeoverState,
    Verdict,
    Victim,
)

DEAD = Victim(3, 7, 0xAB, Verdict.SILENT)


def suspecting() -> Takeover:
    takeover = Takeover()
    takeover.suspect()
    return takeover


def test_a_dead_home_is_fenced_first_and_served_for_last() -> None:
    takeover = suspecting()
    assert takeover.judged(Verdict.SILENT, DEAD) == [Fence(DEAD)]
    assert takeover.fenced(DEAD) == [ClaimLease(DEAD)]
    assert takeover.claimed(9) == [Mount(9)]
    assert takeover.mounted() == [Settle()]
    assert takeover.settled([1, 2]) == [AwaitReclaims(frozenset({1, 2}))]
    assert takeover.reclaimed(2) == []
    assert takeover.out(1) == [Serve()]
    assert takeover.state is TakeoverState.SERVING
    assert takeover.reclaimed(2) == []


def test_a_live_home_is_left_alone() -> None:
    takeover = suspecting()
    assert takeover.judged(Verdict.ALIVE) == []
    takeover.heard()
    assert takeover.state is TakeoverState.FOLLOWING
    takeover.heard()


def test_a_free_lease_needs_no_fence() -> None:
    takeover = suspecting()
    assert takeover.judged(Verdict.NONE) == [ClaimLease(None)]
    takeover.claimed(1)
    takeover.mounted()
    assert takeover.settled([]) == [AwaitReclaims(frozenset()), Serve()]
    takeover.gave_up()
    assert takeover.state is TakeoverState.FOLLOWING


def test_without_a_confirmed_fence_there_is_no_lease() -> None:
    takeover = suspecting()
    takeover.judged(Verdict.FAILED, DEAD)
    with pytest.raises(MisuseError):
        takeover.claimed(2)
    takeover.fence_failed()
    assert takeover.state is TakeoverState.SUSPECT
    with pytest.raises(MisuseError):
        takeover.fenced(DEAD)


def test_without_the_lease_there_is_no_mount_and_the_home_is_judged_anew() -> None:
    takeover = suspecting()
    takeover.judged(Verdict.NONE)
    takeover.refused()
    assert takeover.state is TakeoverState.SUSPECT
    with pytest.raises(MisuseError):
        takeover.mounted()
    assert takeover.judged(Verdict.SILENT, DEAD) == [Fence(DEAD)]


def test_another_one_fenced_does_not_count() -> None:
    takeover = suspecting()
    takeover.judged(Verdict.SILENT, DEAD)
    with pytest.raises(MisuseError):
        takeover.fenced(Victim(3, 8, 0xAB, Verdict.SILENT))
    assert takeover.state is TakeoverState.FENCING


def test_a_dead_home_has_to_be_named() -> None:
    takeover = suspecting()
    with pytest.raises(MisuseError):
        takeover.judged(Verdict.SILENT)
    assert takeover.state is TakeoverState.SUSPECT


EVENTS = (
    lambda t: t.suspect(),
    lambda t: t.heard(),
    lambda t: t.judged(Verdict.SILENT, DEAD),
    lambda t: t.judged(Verdict.NONE),
    lambda t: t.fenced(DEAD),
    lambda t: t.fence_failed(),
    lambda t: t.refused(),
    lambda t: t.claimed(5),
    lambda t: t.mounted(),
    lambda t: t.settled([4]),
    lambda t: t.reclaimed(4),
    lambda t: t.gave_up(),
)
MUST_FOLLOW = {ClaimLease: Fence, Mount: ClaimLease, Settle: Mount, AwaitReclaims: Settle, Serve: AwaitReclaims}


@given(st.lists(st.sampled_from(EVENTS), max_size=60))
def test_no_order_of_events_skips_a_step(events: list) -> None:  # type: ignore[type-arg]
    takeover = Takeover()
    last: object = None
    for event in events:
        before = takeover.state
        try:
            effects = event(takeover)
        except MisuseError:
            assert takeover.state is before
            continue
        for effect in effects or ():
            if isinstance(effect, ClaimLease) and effect.victim is None:
                last = effect  # nobody to fence
                continue
            wanted = MUST_FOLLOW.get(type(effect))
            assert wanted is None or isinstance(last, wanted), (last, effect)
            last = effect
