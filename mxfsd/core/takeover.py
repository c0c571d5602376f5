"""How a node becomes the home, in the one order that is safe (pure; DESIGN section 7).

suspect → fence and confirm → lease, epoch + 1 → mount (log replay) → settle → grace for reclaims → serve.

Each step begins only with the news that the one before is done: an event that does not fit the state raises and
changes nothing. What comes out is what to do next; whoever executes it reports with the event that the effect's
docstring names.

A lease that is free, or was given to this node, needs no fence: whoever let it go had unmounted and proved it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from mxfs_proto.errors import MisuseError


class TakeoverState(Enum):
    """Where this node stands."""

    FOLLOWING = auto()
    """Another node is the home, as far as is known."""
    SUSPECT = auto()
    """The home is not heard, or there is none."""
    FENCING = auto()
    TAKING_LEASE = auto()
    MOUNTING = auto()
    SETTLING = auto()
    GRACE = auto()
    SERVING = auto()
    """This node is the home."""


TAKEOVER_NEXT: dict[TakeoverState, frozenset[TakeoverState]] = {
    TakeoverState.FOLLOWING: frozenset({TakeoverState.SUSPECT}),
    TakeoverState.SUSPECT: frozenset({TakeoverState.FOLLOWING, TakeoverState.FENCING, TakeoverState.TAKING_LEASE}),
    TakeoverState.FENCING: frozenset({TakeoverState.TAKING_LEASE, TakeoverState.SUSPECT}),
    TakeoverState.TAKING_LEASE: frozenset({TakeoverState.MOUNTING, TakeoverState.SUSPECT}),
    TakeoverState.MOUNTING: frozenset({TakeoverState.SETTLING}),
    TakeoverState.SETTLING: frozenset({TakeoverState.GRACE}),
    TakeoverState.GRACE: frozenset({TakeoverState.SERVING, TakeoverState.FOLLOWING}),
    TakeoverState.SERVING: frozenset({TakeoverState.FOLLOWING}),
}


class Verdict(Enum):
    """What is known of the owner of the lease."""

    NONE = auto()
    """Nobody holds it, or it was given to this node."""
    ALIVE = auto()
    """Its counters move, or have not stood still for long enough."""
    FAILED = auto()
    """It said itself that it stopped, its lower XFS shut down; or it has started anew since."""
    SILENT = auto()
    """Slot and lease stood still for node_dead_ms."""


@dataclass(frozen=True, slots=True)
class Victim:
    """The home to be fenced. *pr_key* is its registration key on the disk (SPC-4), 0 where it has none."""

    slot: int
    incarnation: int
    pr_key: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Fence:
    """See to it that the victim writes no more, and confirm it. Then fenced() or fence_failed()."""

    victim: Victim


@dataclass(frozen=True, slots=True)
class ClaimLease:
    """Claim the lease, durably. Then claimed() or refused(). *victim*: whose it is; None: nobody's."""

    victim: Victim | None


@dataclass(frozen=True, slots=True)
class Mount:
    """Mount the lower XFS, which replays its log. Then mounted()."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Find out what became of the operations under way when the last home ended. Then settled()."""


@dataclass(frozen=True, slots=True)
class AwaitReclaims:
    """Hear from these nodes what they hold: reclaimed() for each, or out() when it was evicted."""

    nodes: frozenset[int]


@dataclass(frozen=True, slots=True)
class Serve:
    """Grant and run operations from now on."""


Effect = Fence | ClaimLease | Mount | Settle | AwaitReclaims | Serve


class Takeover:
    """One node's way to the home, and back."""

    def __init__(self) -> None:
        self.state = TakeoverState.FOLLOWING
        self._victim: Victim | None = None
        self._awaited: set[int] = set()

    @property
    def awaited(self) -> frozenset[int]:
        """The nodes whose reclaims are missing."""
        return frozenset(self._awaited)

    def suspect(self) -> None:
        """The home is not heard, or there is none; nothing happens where that is known."""
        if self.state is TakeoverState.FOLLOWING:
            self._enter(TakeoverState.SUSPECT)

    def heard(self) -> None:
        """The home answers."""
        if self.state is not TakeoverState.FOLLOWING:
            self._enter(TakeoverState.FOLLOWING)

    def judged(self, verdict: Verdict, victim: Victim | None = None) -> list[Effect]:
        """The lease and its owner's slot were read. *victim* is the owner where the verdict says it is dead."""
        self._in(TakeoverState.SUSPECT)
        if verdict is Verdict.ALIVE:
            return []
        if verdict is Verdict.NONE:
            self._victim = None
            self._enter(TakeoverState.TAKING_LEASE)
            return [ClaimLease(None)]
        if victim is None:
            raise MisuseError(f"takeover: a home that is {verdict.name} has to be named")
        self._victim = victim
        self._enter(TakeoverState.FENCING)
        return [Fence(victim)]

    def fenced(self, victim: Victim) -> list[Effect]:
        """The fence of *victim* is confirmed."""
        self._in(TakeoverState.FENCING)
        if victim != self._victim:
            raise MisuseError(f"takeover: slot {victim.slot} was fenced, not the home")
        self._enter(TakeoverState.TAKING_LEASE)
        return [ClaimLease(victim)]

    def fence_failed(self) -> None:
        """The fence is not confirmed: nothing may be taken."""
        self._in(TakeoverState.FENCING)
        self._enter(TakeoverState.SUSPECT)

    def refused(self) -> None:
        """The lease was not to be had: somebody else takes it, or its owner lives."""
        self._in(TakeoverState.TAKING_LEASE)
        self._enter(TakeoverState.SUSPECT)

    def claimed(self, epoch: int) -> list[Effect]:
        """The lease of *epoch* is ours, and that is durable."""
        self._in(TakeoverState.TAKING_LEASE)
        self._enter(TakeoverState.MOUNTING)
        return [Mount(epoch)]

    def mounted(self) -> list[Effect]:
        """The lower XFS is mounted, its log replayed."""
        self._in(TakeoverState.MOUNTING)
        self._enter(TakeoverState.SETTLING)
        return [Settle()]

    def settled(self, members: Iterable[int]) -> list[Effect]:
        """Every operation of the last home has an outcome. *members*: who may hold something from before."""
        self._in(TakeoverState.SETTLING)
        self._awaited = set(members)
        self._enter(TakeoverState.GRACE)
        return [AwaitReclaims(self.awaited), *self._maybe_serve()]

    def reclaimed(self, node: int) -> list[Effect]:
        """*node* has named everything that it holds."""
        return self._no_longer(node)

    def out(self, node: int) -> list[Effect]:
        """*node* left, or was evicted: fenced, and its lease is over."""
        return self._no_longer(node)

    def gave_up(self) -> None:
        """This node is the home no more."""
        self._in(TakeoverState.GRACE, TakeoverState.SERVING)
        self._awaited.clear()
        self._enter(TakeoverState.FOLLOWING)

    def _no_longer(self, node: int) -> list[Effect]:
        self._awaited.discard(node)
        return self._maybe_serve()

    def _maybe_serve(self) -> list[Effect]:
        if self.state is not TakeoverState.GRACE or self._awaited:
            return []
        self._enter(TakeoverState.SERVING)
        return [Serve()]

    def _in(self, *states: TakeoverState) -> None:
        if self.state not in states:
            raise MisuseError(f"takeover: not to be done in state {self.state.name}")

    def _enter(self, state: TakeoverState) -> None:
        if state not in TAKEOVER_NEXT[self.state]:
            raise MisuseError(f"takeover: {state.name} does not follow {self.state.name}")
        self.state = state
