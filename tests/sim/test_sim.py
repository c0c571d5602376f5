"""The invariants hold in thousands of seeded runs; broken on purpose, the core is caught by the same runs."""

from collections.abc import Callable
from typing import Any

import pytest
from simcheck import Broken
from simulator import Mutants, simulate

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfsd.core.dlm import Effect, LockMaster
from mxfsd.core.lockcache import LockCache
from mxfsd.core.lockeffects import CacheEffect, Grant, Invalidate, Opens, SendRelease
from mxfsd.core.lockrecords import Record, Waiter
from mxfsd.core.membership import LeaseEnded, Membership, MembershipEffect
from mxfsd.core.sessions import Replay, SessionTable, Verdict

SHARDS = 24
SEEDS_PER_SHARD = 100


@pytest.mark.parametrize("shard", range(SHARDS))
def test_invariants_hold(shard: int) -> None:
    seen = [simulate(seed) for seed in range(shard * SEEDS_PER_SHARD, (shard + 1) * SEEDS_PER_SHARD)]
    # A run that does nothing proves nothing.
    assert sum(world.check.reads for world in seen) > 20 * SEEDS_PER_SHARD
    assert sum(world.check.writes for world in seen) > 10 * SEEDS_PER_SHARD
    assert sum(world.moves for world in seen) > 5
    assert sum(world.deaths for world in seen) > 1
    assert sum(world.losses for world in seen) > 5
    assert sum(world.unlinks for world in seen) > 5
    assert len({world.linger_ms for world in seen}) == 2


def test_a_seed_is_one_story() -> None:
    first, second = simulate(42), simulate(42)
    assert (first.steps, first.now, first.store) == (second.steps, second.now, second.store)


class IgnoresGrants(LockCache):
    def on_grant(self, *args: Any) -> list[CacheEffect]:
        return []


class IgnoresBasts(LockCache):
    def on_bast(self, *args: Any) -> list[CacheEffect]:
        return []


class ReleasesWithoutInvalidating(LockCache):
    """Tells the master at once; the kernel keeps what it cached."""

    def on_bast(
        self, now_ms: int, ino: int, seq: int, mode: LockMode, flags: LockFlag = LockFlag.NONE
    ) -> list[CacheEffect]:
        out = super().on_bast(now_ms, ino, seq, mode, flags)
        if any(isinstance(effect, Invalidate) for effect in out):
            out = [effect for effect in out if not isinstance(effect, Invalidate)]
            out += super().invalidated(now_ms, ino)
        return out


class ReleasesBeforeInvalidating(LockCache):
    """Does invalidate, but tells the master first."""

    def on_bast(
        self, now_ms: int, ino: int, seq: int, mode: LockMode, flags: LockFlag = LockFlag.NONE
    ) -> list[CacheEffect]:
        out = super().on_bast(now_ms, ino, seq, mode, flags)
        if any(isinstance(effect, Invalidate) for effect in out):
            out.insert(0, SendRelease(ino, seq, LockMode.NL, self._opens_of(ino)))
        return out


class ForgetsPins(LockCache):
    def pin(self, ino: int, data: bool = False) -> None:
        pass

    def unpin(self, now_ms: int, ino: int, data: bool = False) -> list[CacheEffect]:
        return []


class AdoptsLateGrants(LockCache):
    def _known(self, ino: int) -> int:
        return 0


class KeepsWithoutWriter(LockCache):
    """Says that it keeps PW, whoever asks."""

    def _target(self, ino: int, held: LockMode, wanted: LockMode, flags: LockFlag) -> LockMode:
        return held


class IgnoresConflicts(LockMaster):
    @staticmethod
    def _blocked(rec: Record, waiter: Waiter) -> bool:
        return False


class IgnoresOperations(LockMaster):
    @staticmethod
    def _blocked(rec: Record, waiter: Waiter) -> bool:
        ops, rec.ops = rec.ops, None
        try:
            return LockMaster._blocked(rec, waiter)
        finally:
            rec.ops = ops


class HonoursStaleReleases(LockMaster):
    def release(self, now_ms: int, node: int, ino: int, seq: int, mode: LockMode, opens: Opens) -> list[Effect]:
        rec = self._records.get(ino)
        hold = rec.hold_of(node) if rec is not None else None
        return super().release(now_ms, node, ino, hold.seq if hold is not None else seq, mode, opens)


class IgnoresOpens(LockMaster):
    @staticmethod
    def _others(rec: Record, node: int) -> int:
        return 0


class LosesAGrant(LockMaster):
    """Every twentieth grant is noted but not sent; asked again, the master repeats it, so this must be borne."""

    lost = 0

    def request(self, *args: Any, **more: Any) -> list[Effect]:
        out = super().request(*args, **more)
        self.lost += 1
        if self.lost % 20 == 0:
            out = [e for e in out if not (isinstance(e, Grant) and e.req_id and e.req_id < 1 << 63)]
        return out


class ForgetsToWake(LockMaster):
    def op_release(self, now_ms: int, op_id: int, ino: int) -> list[Effect]:
        return [e for e in super().op_release(now_ms, op_id, ino) if not isinstance(e, Grant)]


class ExecutesTwice(SessionTable):
    """Does not answer a repeated operation from its replies."""

    def begin(self, session: int, seq: int, ack: int) -> Any:
        verdict = super().begin(session, seq, ack)
        return Verdict.NEW if isinstance(verdict, Replay) else verdict

    def _again(self, session: int, seq: int) -> bool:
        return session in self._sessions and self._sessions[session].replies.get(seq) is not None

    def done(self, session: int, seq: int, reply: bytes, *, repeatable: bool = False) -> None:
        if not self._again(session, seq):
            super().done(session, seq, reply, repeatable=repeatable)

    def abandon(self, session: int, seq: int) -> None:
        if not self._again(session, seq):
            super().abandon(session, seq)


class EvictsUnderLease(Membership):
    """Drops a node's locks as soon as it is suspected."""

    def tick(self, now_ms: int) -> list[MembershipEffect]:
        out = super().tick(now_ms)
        for node, member in self._members.items():
            if self.state(node).name in ("ACTIVE", "SUSPECT") and now_ms - member.contact_ms > 40:
                out.append(LeaseEnded(node, member.incarnation))
        return out


@pytest.mark.parametrize(
    "mutants",
    [
        Mutants(cache=IgnoresGrants),
        Mutants(cache=IgnoresBasts),
        Mutants(cache=ReleasesWithoutInvalidating),
        Mutants(cache=ReleasesBeforeInvalidating),
        Mutants(cache=ForgetsPins),
        Mutants(cache=AdoptsLateGrants),
        Mutants(cache=KeepsWithoutWriter),
        Mutants(master=IgnoresConflicts),
        Mutants(master=IgnoresOperations),
        Mutants(master=HonoursStaleReleases),
        Mutants(master=IgnoresOpens),
        Mutants(master=ForgetsToWake),
        Mutants(sessions=ExecutesTwice),
        Mutants(membership=EvictsUnderLease),
    ],
    ids=lambda m: next(v.__name__ for v in vars_of(m) if v.__module__ == __name__),
)
def test_what_is_broken_is_caught(mutants: Mutants) -> None:
    for seed in range(500):
        try:
            simulate(seed, mutants)
        except Broken as exc:
            assert "--seed" in str(exc)
            assert isinstance(exc.__cause__, Broken), f"not a checker but the code itself found it: {exc}"
            print(f"caught at {exc}")
            return
    pytest.fail("500 seeds did not catch it")


def vars_of(mutants: Mutants) -> list[Callable[..., Any]]:
    return [mutants.master, mutants.cache, mutants.sessions, mutants.membership]


def test_lost_grants_are_asked_for_again() -> None:
    for seed in range(30):
        simulate(seed, Mutants(master=LosesAGrant))
