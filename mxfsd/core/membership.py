"""Who takes part in a volume, as its home sees it (pure; DESIGN: suspect, declare dead, end of the lease, evict).

Fed with what the slots on the disk show (``on_slots``), with signs of life over the network (``on_contact``,
``on_connected``) and with time (``tick``); all times are the caller's monotonic milliseconds. What comes out:

* Suspect, Trusted: no contact for lease_ms; contact again.
* DeclareDead: the node is to be fenced. Its slot did not move for node_dead_ms, it said itself that it failed, its
  slot is another's, or it cannot be reached for node_dead_ms although its slot moves. A node whose slot says that its
  daemon starts again has twice as long: it has dropped its caches, and to put it out costs its programs their data.
* LeaseEnded: lease_ms passed since its last contact, and it was fenced where fences are asked for. Only now may what
  it held be granted to others. A new incarnation of the same node joins after that, not before.
* Freeze, Thaw: this node's own slot does not move either: the disk is away, perhaps for everybody. Nobody is declared
  dead for a counter that stands still meanwhile.
* StepDown: most of the other nodes cannot be reached but their slots move. Then this node is the one cut off.

The lease of a node runs from the moment at which it *sent* the renewal that the home answered; the home counts from
when it *received* it, which is later, so the home never ends a lease that its holder still trusts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from mxfs_proto.errors import MisuseError
from mxfs_proto.ondisk import SlotState


class MemberState(Enum):
    """A node, as the home sees it."""

    ABSENT = auto()
    JOINING = auto()
    """Connected; an older incarnation of it has still to be evicted."""
    ACTIVE = auto()
    SUSPECT = auto()
    DEAD = auto()
    """To be fenced; its lease may still run."""
    LEFT = auto()
    EVICTED = auto()


_NEXT: dict[MemberState, frozenset[MemberState]] = {
    MemberState.ABSENT: frozenset({MemberState.JOINING}),
    MemberState.JOINING: frozenset({MemberState.ACTIVE, MemberState.ABSENT}),
    MemberState.ACTIVE: frozenset({MemberState.SUSPECT, MemberState.DEAD, MemberState.LEFT}),
    MemberState.SUSPECT: frozenset({MemberState.ACTIVE, MemberState.DEAD, MemberState.LEFT}),
    MemberState.DEAD: frozenset({MemberState.EVICTED}),
    MemberState.LEFT: frozenset({MemberState.JOINING}),
    MemberState.EVICTED: frozenset({MemberState.JOINING}),
}

_PRESENT = frozenset({MemberState.ACTIVE, MemberState.SUSPECT})


class Reason(Enum):
    """Why a node is declared dead."""

    SILENT_SLOT = "its heartbeat stopped"
    LAST_GASP = "it reported that it failed"
    REPLACED = "a new incarnation of it came"
    LATE = "it did not say what it holds"
    UNREACHABLE = "it cannot be reached"
    OPERATOR = "an operator said so"


class SlotSays(Enum):
    """What the state field of a slot means for membership."""

    FREE = auto()
    CLAIMED = auto()
    RESTARTING = auto()
    """The next daemon is on its way."""
    LEFT = auto()
    FAILED = auto()


_SAYS = {
    SlotState.FREE: SlotSays.FREE,
    SlotState.LEFT: SlotSays.LEFT,
    SlotState.FAILED: SlotSays.FAILED,
    SlotState.RESTARTING: SlotSays.RESTARTING,
}


def says(state: SlotState) -> SlotSays:
    """Return what a slot's state means; any but these is a node whose counter counts."""
    return _SAYS.get(state, SlotSays.CLAIMED)


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot, as read from the disk. *age_ms*: for how long its counter has not moved."""

    node: int
    incarnation: int
    says: SlotSays
    age_ms: int


@dataclass(frozen=True, slots=True)
class Joined:
    """The node takes part: nothing of an older incarnation is left."""

    node: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Refused:
    """This incarnation was declared dead or has left: it must drop everything and join as a new one."""

    node: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """No contact for lease_ms."""

    node: int


@dataclass(frozen=True, slots=True)
class Trusted:
    """A suspect node is in contact again."""

    node: int


@dataclass(frozen=True, slots=True)
class Left:
    """The node said good-bye: it holds nothing any more."""

    node: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class DeclareDead:
    """Fence the node, then call fenced()."""

    node: int
    incarnation: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Nothing that the node cached can be seen any more: drop its locks and its session."""

    node: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Freeze:
    """The disk is away: serve nobody, fence nobody."""


@dataclass(frozen=True, slots=True)
class Thaw:
    """The disk is back."""


@dataclass(frozen=True, slots=True)
class StepDown:
    """This node is the one cut off: give the home lease up."""


MembershipEffect = Joined | Refused | Suspect | Trusted | Left | DeclareDead | LeaseEnded | Freeze | Thaw | StepDown


class MembershipTimeouts(Protocol):
    """The deadlines membership needs, in milliseconds."""

    @property
    def lease_ms(self) -> int:
        """Length of a cached lock's lease."""

    @property
    def node_dead_ms(self) -> int:
        """A counter unmoved, or a node unreachable, for this long."""


class _Member:
    __slots__ = (
        "contact_ms",
        "fenced",
        "first",
        "incarnation",
        "next_incarnation",
        "restarting",
        "slot_age_ms",
        "state",
    )

    def __init__(self, now_ms: int) -> None:
        self.state = MemberState.ABSENT
        self.incarnation = 0
        self.first = 0
        """The oldest incarnation that this one continues: a daemon may die before its FUSE layer knows of it."""
        self.next_incarnation = 0
        self.contact_ms = now_ms
        self.fenced = False
        self.slot_age_ms = 0
        self.restarting = False
        """Its daemon was started again, as its slot says, and has not connected yet."""


class Membership:
    """The members of a volume; run by its home."""

    def __init__(self, me: int, timeouts: MembershipTimeouts, *, must_fence: bool = False) -> None:
        """Make a membership of the home *me* alone.

        *must_fence*: LeaseEnded waits for fenced(). Not needed as long as only the home writes the disk.
        """
        self._me = me
        self._lease_ms = timeouts.lease_ms
        self._dead_ms = timeouts.node_dead_ms
        self._must_fence = must_fence
        self._members: dict[int, _Member] = {}
        self._frozen = False
        self._own_age_ms = 0
        self._disk_failed = False

    @property
    def frozen(self) -> bool:
        """Whether the disk is away."""
        return self._frozen

    def state(self, node: int) -> MemberState:
        """Return the state of *node*."""
        member = self._members.get(node)
        return MemberState.ABSENT if member is None else member.state

    def incarnation(self, node: int) -> int:
        """Return the incarnation of *node* that takes or took part, 0 if none did."""
        member = self._members.get(node)
        return 0 if member is None else member.incarnation

    def contact_ms(self, node: int) -> int:
        """Return when *node* was last in contact, 0 where it never was: its lease ends lease_ms after that."""
        member = self._members.get(node)
        return 0 if member is None else member.contact_ms

    def present(self) -> list[int]:
        """Return the nodes that are active or suspect."""
        return [node for node, member in self._members.items() if member.state in _PRESENT]

    def expect(self, now_ms: int, node: int, incarnation: int) -> None:
        """A new home starts with the members of the last one; their leases run from now on, at the latest."""
        member = self._members[node] = _Member(now_ms)
        member.incarnation = incarnation
        member.first = 0  # the last home knew
        member.state = MemberState.ACTIVE

    # -- events ----------------------------------------------------------------------------------------------------

    def on_connected(self, now_ms: int, node: int, incarnation: int, continues: int = 0) -> list[MembershipEffect]:
        """A node whose identity was checked connected. Raises MisuseError for this node itself.

        *continues*: the incarnation whose FUSE layer it still has (its daemon was restarted). While that one was not
        declared dead, the new incarnation takes its place, with all that it holds; afterwards it is refused.
        """
        if node == self._me or incarnation <= 0:
            raise MisuseError(f"node {node} incarnation {incarnation} connected to node {self._me}")
        out: list[MembershipEffect] = []
        member = self._members.setdefault(node, _Member(now_ms))
        if incarnation < max(member.incarnation, member.next_incarnation):
            return [Refused(node, incarnation)]
        if incarnation == member.incarnation:
            if member.state not in _PRESENT:
                return [Refused(node, incarnation)]
            return self.on_contact(now_ms, node, incarnation)
        if continues:
            # What a home does not know of was put out before it, or by an earlier one.
            if not member.first <= continues <= member.incarnation or member.state not in _PRESENT:
                return [Refused(node, incarnation)]
            member.incarnation = member.next_incarnation = incarnation
            member.slot_age_ms = 0
            member.restarting = False
            return self.on_contact(now_ms, node, incarnation)
        member.next_incarnation = incarnation
        if member.state in _PRESENT:
            self._declare_dead(node, member, Reason.REPLACED, out)
        elif member.state is not MemberState.DEAD:
            if member.state is not MemberState.JOINING:
                self._move(node, member, MemberState.JOINING)
            self._join(now_ms, node, member, out)
        self._end_leases(now_ms, out)
        return out

    def on_contact(self, now_ms: int, node: int, incarnation: int) -> list[MembershipEffect]:
        """A message of this incarnation arrived: its lease runs anew."""
        member = self._members.get(node)
        if member is None or incarnation != member.incarnation or member.state not in _PRESENT:
            return [Refused(node, incarnation)]
        member.contact_ms = now_ms
        if member.state is MemberState.SUSPECT:
            self._move(node, member, MemberState.ACTIVE)
            return [Trusted(node)]
        return []

    def on_left(self, now_ms: int, node: int, incarnation: int) -> list[MembershipEffect]:
        """A node left in order: it has dropped all its caches before it said so."""
        member = self._members.get(node)
        if member is None or incarnation != member.incarnation or member.state not in _PRESENT:
            return []
        self._move(node, member, MemberState.LEFT)
        return [Left(node, incarnation)]

    def put_out(self, node: int, reason: Reason) -> list[MembershipEffect]:
        """Declare a member dead, heard or not; nothing where it is none (any more)."""
        member = self._members.get(node)
        out: list[MembershipEffect] = []
        if member is not None and member.state in _PRESENT:
            self._declare_dead(node, member, reason, out)
        return out

    def on_slots(self, now_ms: int, reports: Iterable[SlotReport]) -> list[MembershipEffect]:
        """The slots were read. This node's own slot must be among them."""
        gasps = []
        for report in reports:
            if report.node == self._me:
                self._own_age_ms = report.age_ms
                continue
            member = self._members.get(report.node)
            if member is None or member.state not in _PRESENT:
                continue
            if report.incarnation == member.incarnation and report.says in (SlotSays.CLAIMED, SlotSays.RESTARTING):
                member.slot_age_ms = report.age_ms
                member.restarting = report.says is SlotSays.RESTARTING
            elif report.incarnation == member.incarnation and report.says is SlotSays.FAILED:
                gasps.append((report.node, member, Reason.LAST_GASP))
            elif report.incarnation > member.incarnation:
                # Its daemon was started anew. Perhaps with the FUSE layer it had: it will say so when it connects.
                member.slot_age_ms = now_ms - member.contact_ms
                member.restarting = True
        out: list[MembershipEffect] = []
        for node, gasping, reason in gasps:
            self._declare_dead(node, gasping, reason, out)
        self._check_disk(out)
        return out + self.tick(now_ms)

    def on_disk(self, now_ms: int, failed: bool) -> list[MembershipEffect]:
        """This node's own reads or writes of the lockspace fail, or work again."""
        out: list[MembershipEffect] = []
        self._disk_failed = failed
        if not failed:
            self._own_age_ms = 0
            for member in self._members.values():
                member.slot_age_ms = 0
        self._check_disk(out)
        return out

    def fenced(self, now_ms: int, node: int) -> list[MembershipEffect]:
        """The fence of a node that was declared dead is confirmed."""
        member = self._members.get(node)
        if member is None or member.state is not MemberState.DEAD:
            raise MisuseError(f"node {node} was fenced without having been declared dead")
        member.fenced = True
        out: list[MembershipEffect] = []
        self._end_leases(now_ms, out)
        return out

    def tick(self, now_ms: int) -> list[MembershipEffect]:
        """Let time pass."""
        out: list[MembershipEffect] = []
        cut_off = self._cut_off(now_ms)
        if cut_off and not self._frozen:
            out.append(StepDown())
        for node, member in self._members.items():
            silent_ms = now_ms - member.contact_ms
            if member.state is MemberState.ACTIVE and silent_ms >= self._lease_ms:
                self._move(node, member, MemberState.SUSPECT)
                out.append(Suspect(node))
            if member.state is MemberState.SUSPECT and not self._frozen:
                dead_ms = 2 * self._dead_ms if member.restarting else self._dead_ms
                if member.slot_age_ms >= dead_ms:
                    self._declare_dead(node, member, Reason.SILENT_SLOT, out)
                elif silent_ms >= dead_ms and not cut_off:
                    self._declare_dead(node, member, Reason.UNREACHABLE, out)
        self._end_leases(now_ms, out)
        return out

    # -- the machine -----------------------------------------------------------------------------------------------

    @staticmethod
    def _move(node: int, member: _Member, state: MemberState) -> None:
        if state not in _NEXT[member.state]:
            raise MisuseError(f"node {node} cannot go from {member.state.name} to {state.name}")
        member.state = state

    def _join(self, now_ms: int, node: int, member: _Member, out: list[MembershipEffect]) -> None:
        self._move(node, member, MemberState.ACTIVE)
        member.incarnation = member.next_incarnation
        member.first = member.incarnation
        member.contact_ms = now_ms
        member.slot_age_ms = 0
        member.restarting = False
        member.fenced = False
        out.append(Joined(node, member.incarnation))

    def _declare_dead(self, node: int, member: _Member, reason: Reason, out: list[MembershipEffect]) -> None:
        self._move(node, member, MemberState.DEAD)
        out.append(DeclareDead(node, member.incarnation, reason))

    def _end_leases(self, now_ms: int, out: list[MembershipEffect]) -> None:
        for node, member in self._members.items():
            if member.state is not MemberState.DEAD or now_ms - member.contact_ms < self._lease_ms:
                continue
            if self._must_fence and not member.fenced:
                continue
            self._move(node, member, MemberState.EVICTED)
            out.append(LeaseEnded(node, member.incarnation))
            if member.next_incarnation > member.incarnation:
                self._move(node, member, MemberState.JOINING)
                self._join(now_ms, node, member, out)

    def _cut_off(self, now_ms: int) -> bool:
        """Return whether most of at least two others are out of reach while their slots move, one for node_dead_ms.

        They need not all have been for so long: else they would be put out one by one, each of them a minority.
        """
        present = [member for member in self._members.values() if member.state in _PRESENT]
        silent_ms = [now_ms - member.contact_ms for member in present if member.slot_age_ms < self._lease_ms]
        lost = [silence for silence in silent_ms if silence >= self._lease_ms]
        return len(present) >= 2 and 2 * len(lost) > len(present) and max(lost) >= self._dead_ms

    def _check_disk(self, out: list[MembershipEffect]) -> None:
        away = self._disk_failed or self._own_age_ms >= self._lease_ms
        if away and not self._frozen:
            self._frozen = True
            out.append(Freeze())
        elif not away and self._frozen:
            self._frozen = False
            for member in self._members.values():
                member.slot_age_ms = 0  # they could not write either: their time starts anew
            out.append(Thaw())


class ClientLease:
    """A node's lease on everything it caches, granted by the home with each renewal it answers.

    Once it has lapsed it must be seen to: only after expired() returned True, and everything was dropped, does an
    answer count again. A node without a lease holds nothing: what it does hold when the home changes is reclaimed, or
    dropped first.
    """

    def __init__(self, lease_ms: int, margin_ms: int) -> None:
        """*margin_ms*: how long before its end everything must begin to be dropped."""
        self._lease_ms = lease_ms
        self._margin_ms = margin_ms
        self._until_ms: int | None = None

    def renewed(self, now_ms: int, sent_ms: int) -> bool:
        """The home answered a renewal that was sent at *sent_ms*; return whether it counts."""
        until_ms = sent_ms + self._lease_ms
        if now_ms >= until_ms - self._margin_ms:
            return False
        if self._until_ms is not None and now_ms >= self._until_ms - self._margin_ms:
            return False
        if self._until_ms is None or until_ms > self._until_ms:
            self._until_ms = until_ms
        return True

    def until_ms(self) -> int:
        """Return when caches must have been dropped; 0 without a lease."""
        return 0 if self._until_ms is None else self._until_ms

    def expired(self, now_ms: int) -> bool:
        """Return True once when it is time to drop everything."""
        if self._until_ms is None or now_ms < self._until_ms - self._margin_ms:
            return False
        self._until_ms = None
        return True
