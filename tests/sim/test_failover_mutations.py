"""Every step of a takeover, and every rule that safety rests on, is taken away once: the seeded runs must find it."""

from typing import Any

import pytest
from failover import Rules, simulate
from failover_faults import between_change_and_outcome, breaking_connections, frozen_home, only
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
