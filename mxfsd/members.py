"""The home's view of the nodes: runs the pure membership, and puts out those that it declares dead.

A node is put out in this order: fenced and confirmed; its slot taken from it, durably, so that it sees so itself and a
later home knows; its lease over. Only then is what it held given to others.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from mxfs_proto.errors import MxfsError
from mxfs_proto.ondisk import SlotState
from mxfsd.core.membership import (
    DeclareDead,
    Freeze,
    LeaseEnded,
    Left,
    Membership,
    MembershipEffect,
    Reason,
    Refused,
    SlotReport,
    StepDown,
    Suspect,
    Thaw,
    Trusted,
    says,
)
from mxfsd.core.takeover import Verdict, Victim
from mxfsd.core.timeouts import Timeouts
from mxfsd.fencing import Fencing
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import BeatReport, SlotView
from mxfsd.io.lockspace import Lockspace

log = structlog.get_logger(__name__)

_RETRY_S = 0.25


class Members:
    """The members of the volume while this node is the home.

    *on_out* is called when a node is out for good (slot, incarnation, how), *on_step_down* when this node is the one
    that is cut off. *spawn* runs a coroutine in the background.
    """

    def __init__(
        self,
        slot: int,
        timeouts: Timeouts,
        device: str,
        fencing: Fencing,
        on_out: Callable[[int, int, str], None],
        on_step_down: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
    ) -> None:
        self._slot = slot
        self._timeouts = timeouts
        self._device = device
        self._fencing = fencing
        self._on_out = on_out
        self._on_step_down = on_step_down
        self._spawn = spawn
        self._membership = Membership(slot, timeouts, must_fence=True)
        self._views: dict[int, SlotView] = {}
        self._closed = False
        self.fenced = 0

    def close(self) -> None:
        """This node is the home no more: nobody is put out by it."""
        self._closed = True

    def expect(self, slot: int, incarnation: int) -> None:
        """A member from before this node became the home."""
        self._membership.expect(now_ms(), slot, incarnation)

    def present(self) -> list[int]:
        """The nodes that take part, silent ones too."""
        return self._membership.present()

    def heard_ms(self, slot: int) -> int:
        """When the node was last heard, 0: never."""
        return self._membership.contact_ms(slot)

    # -- news ------------------------------------------------------------------------------------------------------

    def connected(self, slot: int, incarnation: int, continues: int) -> str | None:
        """A node greets. Return why it may not take part ('' : not yet), or None when it may."""
        self._run(self._membership.on_connected(now_ms(), slot, incarnation, continues))
        if self._membership.incarnation(slot) == incarnation and slot in self._membership.present():
            return None
        if continues or self._membership.incarnation(slot) == incarnation:
            return f"slot {slot}, incarnation {continues or incarnation} was put out of the volume: mount again there"
        return ""

    def contact(self, slot: int, incarnation: int) -> bool:
        """A node was heard; False where it takes part no more."""
        effects = self._membership.on_contact(now_ms(), slot, incarnation)
        self._run(effects)
        return not any(isinstance(effect, Refused) for effect in effects)

    def left(self, slot: int, incarnation: int) -> None:
        """A node said good-bye."""
        self._run(self._membership.on_left(now_ms(), slot, incarnation))

    def late(self, slot: int) -> None:
        """The grace period is over and a node has not said what it holds, though it may be heard."""
        self._run(self._membership.put_out(slot, Reason.LATE))

    def evict(self, slot: int, incarnation: int) -> None:
        """An operator has this incarnation of a node put out; nothing where it takes no part (any more)."""
        if self._membership.incarnation(slot) == incarnation:
            self._run(self._membership.put_out(slot, Reason.OPERATOR))

    def report(self, report: BeatReport) -> None:
        """The slots were read."""
        self._views = dict(report.slots)
        self._run(
            self._membership.on_slots(
                now_ms(),
                [
                    SlotReport(view.slot, view.incarnation, says(view.state), view.age_ms)
                    for view in report.slots.values()
                ],
            )
        )

    def disk(self, failed: bool) -> None:
        """The lockspace does not answer, or does again."""
        self._run(self._membership.on_disk(now_ms(), failed))

    def tick(self) -> None:
        """Let time pass."""
        self._run(self._membership.tick(now_ms()))

    # -- what follows ----------------------------------------------------------------------------------------------

    def _run(self, effects: list[MembershipEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Suspect):
                log.warning("a node is silent", peer=effect.node)
            elif isinstance(effect, Trusted):
                log.info("a silent node is heard again", peer=effect.node)
            elif isinstance(effect, DeclareDead):
                log.warning("a node is put out", peer=effect.node, reason=effect.reason.value)
                self._spawn(self._put_out(effect))
            elif isinstance(effect, LeaseEnded):
                self._on_out(effect.node, effect.incarnation, "evicted")
            elif isinstance(effect, Left):
                self._on_out(effect.node, effect.incarnation, "left")
            elif isinstance(effect, Freeze):
                log.error("the disk does not answer: nobody is put out meanwhile")
            elif isinstance(effect, Thaw):
                log.warning("the disk answers again")
            elif isinstance(effect, StepDown):
                self._on_step_down()

    async def _put_out(self, dead: DeclareDead) -> None:
        """Fence a node, take its slot from it, and say so; again and again until it is done.

        Where a living node has only given up a claim of that slot, the slot alone is taken.
        """
        view = self._views.get(dead.node)
        ours = view is not None and view.incarnation == dead.incarnation
        key = view.pr_key if view is not None and ours else 0
        # The agent by deadlines waits for nothing here: a node that is not the home never writes to the volume.
        victim = Victim(dead.node, dead.incarnation, key, Verdict.FAILED if not ours else Verdict.SILENT)
        began = now_ms()
        given_up = False
        while not self._closed:
            try:
                given_up = view is not None and ours and self._given_up(view)
                if not given_up:
                    await asyncio.to_thread(self._fencing.fence, victim)
                await asyncio.to_thread(self._take_slot, dead)
                break
            except MxfsError as exc:
                log.error("a dead node could not be fenced yet", peer=dead.node, reason=str(exc))
                await asyncio.sleep(_RETRY_S)
        if self._closed:
            return
        if given_up:
            log.info("the slot of a claim that was given up is free", peer=dead.node)
        else:
            self.fenced += 1
            log.warning("node fenced", peer=dead.node, agent=self._fencing.name, ms=now_ms() - began)
        self._run(self._membership.fenced(now_ms(), dead.node))

    def _given_up(self, claim: SlotView) -> bool:
        """Whether a slot that is declared dead is only a claim that came too late, by a node with another slot.

        *claim*: the slot as it was then. What covers it later says nothing of the node that is to be fenced.
        Nobody ever acted in such a slot, and the registration in its record is the one of the node that lives.
        """
        return claim.state is SlotState.CLAIMING and any(
            view.slot != claim.slot
            and (view.uuid, view.pr_key) == (claim.uuid, claim.pr_key)
            and view.state in (SlotState.CLAIMING, SlotState.JOINING, SlotState.ACTIVE)
            and view.age_ms < self._timeouts.node_dead_ms
            for view in self._views.values()
        )

    def _take_slot(self, dead: DeclareDead) -> None:
        """Free the slot of a fenced node, unless a later incarnation has it already."""
        if dead.reason is Reason.REPLACED:
            return  # it has been taken
        lockspace = Lockspace.open(self._device, check_xfs=False)
        try:
            record = lockspace.read_slots()[dead.node - 1]
            if record is None or record.incarnation != dead.incarnation or record.state is SlotState.FREE:
                return
            lockspace.clear_slot(record, self._timeouts)
        finally:
            lockspace.close()
