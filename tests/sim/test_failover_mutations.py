"""Every step of a takeover, and every rule that safety rests on, is taken away once: the seeded runs must find it."""

from typing import Any

import pytest
from failover import Rules, World, simulate
from failover_faults import between_change_and_outcome, breaking_connections, frozen_home, only
from failover_locks import HomeLocks, Locks
from simcheck import Broken

from mxfsd.core.keeper import Keeper
from mxfsd.core.membership import LeaseEnded, Membership, MembershipEffect
from mxfsd.core.takeover import ClaimLease, Effect, Fence, Mount, Takeover, TakeoverState, Verdict, Victim


class LeaseBeforeFence(Takeover):
    """Takes the lease first, and fences then."""

    epoch = 0

    def judged(self, verdict: Verdict, victim: Victim | None = None) -> list[Effect]:
        if victim is None:
            return super().judged(verdict, victim)
        self._victim = victim
        self.state = TakeoverState.TAKING_LEASE
        return [ClaimLease(victim)]

    def claimed(self, epoch: int) -> list[Effect]:
        if self._victim is None:
            return super().claimed(epoch)
        self.epoch = epoch
        self.state = TakeoverState.FENCING
        return [Fence(self._victim)]

    def fenced(self, victim: Victim) -> list[Effect]:
        self._victim = None
        self.state = TakeoverState.MOUNTING
        return [Mount(self.epoch)]


class EndsLeasesEarly(Membership):
    """Drops what a node holds as soon as it is silent for a moment."""

    def tick(self, now_ms: int) -> list[MembershipEffect]:
        out = super().tick(now_ms)
        for node, member in self._members.items():
            if self.state(node).name in ("ACTIVE", "SUSPECT") and now_ms - member.contact_ms > 450:
                out.append(LeaseEnded(node, member.incarnation))
        return out


class TrustsItsLeaseForEver(Keeper):
    """Goes on as home however long ago the lease was renewed."""

    @property
    def lease_until_ms(self) -> int | None:
        return None if self.lease is None else 1 << 60


class KeepsLocksOfTheDead(HomeLocks):
    """Never lets go of what a node that was put out has locked."""

    def node_gone(self, node: int) -> None:
        pass


class DecidesAfterTheLease(Locks):
    """Goes on deciding alone after its lease, and says so: it would have been put out by then."""

    def _decides(self, ino: int, here: Any) -> bool:
        return not here.busy and bool(here.copied) and bool(self.mine.inodes()) or super()._decides(ino, here)


class TellsNothing(Locks):
    """Lets the right to decide go without a word of what it has decided."""

    async def give_up(self, resource: int) -> None:
        pass


def gone_for_good(world: World) -> None:
    """A client loses power, and does not come back."""
    world.faults.append("node 2 is gone")
    world.engine.at(700, world.nodes[2].power_off)


LOCKING: dict[str, Any] = {"lockers": 2}
MUTANTS: list[tuple[str, Rules, dict[str, Any]]] = [
    ("no fence", Rules(fence=False), {"agent": "pr", "faults": frozen_home}),
    ("fence not confirmed", Rules(confirm=False), {"agent": "pr", "faults": frozen_home}),
    (
        "lease before fence",
        Rules(takeover=LeaseBeforeFence),
        {"agent": "pr", "faults": only("pause", "power", "daemon", "flaky")},
    ),
    ("mount before lease", Rules(mount_after_lease=False), {}),
    ("serve before settle", Rules(settle=False), {}),
    ("serve before the grace period ends", Rules(grace=False), {}),
    ("grant before the lease of an evicted node ends", Rules(membership=EndsLeasesEarly), {}),
    ("reply before the log is forced", Rules(force=False), {}),
    (
        "reads show what is not durable",
        Rules(force_reads=False),
        {"late": 0.3, "faults": only("power", "daemon", "heart")},
    ),
    ("no intent", Rules(intent=False), {"faults": between_change_and_outcome}),
    ("no outcome", Rules(outcome=False), {}),
    ("unstable data is not sent again", Rules(replay=False), {}),
    ("no commit before a lock is given up", Rules(commit_on_release=False), {}),
    ("no commit before a truncation", Rules(commit_before_change=False), {}),
    ("last gasp before the lower file system is down", Rules(failed_after_shutdown=False), {"agent": "lease"}),
    ("no self-fence", Rules(self_fence=False, lease_check=False), {"agent": "lease"}),
    ("no end of the lease", Rules(keeper=TrustsItsLeaseForEver), {"agent": "lease"}),
    ("replies of an earlier connection bring grants", Rules(grants_by_link=False), {"faults": only("connection")}),
    ("file locks are not named to the next home", Rules(name_locks=False), LOCKING),
    (
        "file locks of a node that was put out stay",
        Rules(home_locks=KeepsLocksOfTheDead),
        {**LOCKING, "faults": gone_for_good},
    ),
    ("a node decides about file locks without the right to", Rules(locks=DecidesAfterTheLease), LOCKING),
    ("what a node has decided about file locks is not told", Rules(locks=TellsNothing), LOCKING),
    (
        "grants that waited go out over another connection",
        Rules(late_by_link=False),
        {"threads": 4, "faults": breaking_connections},
    ),
]


@pytest.mark.parametrize(("rules", "more"), [each[1:] for each in MUTANTS], ids=[each[0] for each in MUTANTS])
def test_what_is_taken_away_is_missed(rules: Rules, more: dict[str, Any]) -> None:
    for seed in range(3000):
        try:
            simulate(seed, rules, **more)
        except Broken as exc:
            assert "--seed" in str(exc)
            assert isinstance(exc.__cause__, Broken), f"not a checker but the code itself found it: {exc}"
            print(f"caught at {exc}")
            return
    pytest.fail("3000 seeds did not find it")
