"""Becoming the home: reads who holds the lease, and carries out what the pure takeover (``core/takeover.py``) orders.

Used for the first mount of a volume, for a planned move and for the death of a home alike: the steps are the same, only
that nobody has to be fenced where the lease was let go.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from mxfs_proto.errors import MxfsError
from mxfs_proto.ondisk import LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd.core.lease import GONE, Evidence, HeldLease
from mxfsd.core.takeover import (
    AwaitReclaims,
    ClaimLease,
    Effect,
    Fence,
    Mount,
    Serve,
    Settle,
    Takeover,
    TakeoverState,
    Verdict,
    Victim,
)
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import BeatReport
from mxfsd.io.lockspace import ClaimRefused

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon

log = structlog.get_logger(__name__)

_RECENT = frozenset({SlotState.CLAIMING, SlotState.JOINING, SlotState.ACTIVE, SlotState.RESTARTING})
"""States of slots whose node may hold locks of the home before. A daemon that was started again claims its slot."""


def judge(
    lease: LeaseRecord, owner: SlotRecord | None, me: SlotRecord, report: BeatReport | None, dead_ms: int
) -> tuple[Verdict, Victim | None]:
    """Return what is known of the owner of the lease, and whom to fence. *owner*: its slot as it was just read."""
    if lease.state is LeaseState.FREE or (lease.state is LeaseState.MOVING and lease.target_slot == me.slot):
        return Verdict.NONE, None
    if lease.state is LeaseState.MOVING:
        # Whoever wrote that has unmounted. The claim itself knows when the target has had its time.
        return Verdict.NONE, None
    same = owner is not None and (owner.node_uuid, owner.incarnation) == (lease.owner_uuid, lease.incarnation)
    if same and owner is not None and owner.slot == me.slot and owner.incarnation == me.incarnation:
        return Verdict.NONE, None  # a claim of ours that was given up
    if owner is not None and same:
        key = owner.pr_key
        if owner.state in GONE:
            return Verdict.FAILED, Victim(lease.owner_slot, lease.incarnation, key, Verdict.FAILED)
    elif owner is not None and owner.node_uuid == lease.owner_uuid:
        # It has started anew: its registration was replaced by that of the new incarnation.
        return Verdict.FAILED, Victim(lease.owner_slot, lease.incarnation, 0, Verdict.FAILED)
    else:
        key = 0
        last = report.slots.get(lease.owner_slot) if report is not None else None
        if owner is None and last is not None and last.incarnation == lease.incarnation:
            key = last.pr_key  # it cannot be read just now: what it said when it could
    view = report.lease if report is not None else None
    slot = report.slots.get(lease.owner_slot) if report is not None else None
    if view is None or (view.epoch, view.owner_slot, view.sequence) != (lease.epoch, lease.owner_slot, lease.sequence):
        return Verdict.ALIVE, None
    stranger = owner is not None and not same  # its counter tells nothing of the owner of the lease
    if view.age_ms < dead_ms or (not stranger and (slot is None or slot.age_ms < dead_ms)):
        return Verdict.ALIVE, None
    return Verdict.SILENT, Victim(lease.owner_slot, lease.incarnation, key, Verdict.SILENT)


class Succession:
    """This node's way to the home and back; one for the life of the daemon."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon
        self._machine = Takeover()
        self._held: HeldLease | None = None
        self._wait_ms = 0
        self._members: set[int] | None = None
        self._victim: Victim | None = None
        self._fence_work: tuple[Victim, asyncio.Future[None]] | None = None
        self._grace_until_ms = 0
        self.began_ms = 0
        """When the last takeover began: the home was declared dead, or its lease was found free."""
        self.took_ms = 0
        """How long the last takeover of this node took until it served, 0: there was none."""
        self.takeovers = {"free": 0, "fenced": 0}
        """How often it did: where the lease had been let go, and where its owner had to be fenced."""

    @property
    def awaited(self) -> frozenset[int]:
        """The nodes whose reclaims are missing."""
        return self._machine.awaited

    def heard(self) -> None:
        """Another home answers."""
        self._machine.heard()

    def gave_up(self) -> None:
        """This node is the home no more."""
        self._machine.gave_up()

    async def attempt(self, *, wait_ms: int = 0, members: set[int] | None = None) -> bool:
        """Become the home where nobody is, or where the home is dead. True: this node is the home from now on.

        *wait_ms*: how long to go on when the lease is about to be let go (a planned move). *members*: who takes part,
        where that is known. Raises MxfsError when this node has the lease but cannot be the home.
        """
        daemon = self._daemon
        machine = self._machine
        assert daemon.held is not None
        machine.suspect()
        if machine.state is not TakeoverState.SUSPECT:
            return False
        snap = await asyncio.to_thread(daemon.lockspace.snapshot)
        if snap.lease is None:
            return False
        report = daemon.heartbeat.report if daemon.heartbeat is not None else None
        owner = snap.slot(snap.lease.owner_slot) if snap.lease.owner_slot else None
        dead_ms = daemon.timeouts.node_dead_ms
        verdict, victim = judge(snap.lease, owner, daemon.held.record, report, dead_ms)
        self._wait_ms = wait_ms
        if snap.lease.state is LeaseState.HELD and snap.lease.owner_slot == daemon.slot:
            # A claim of our own that was given up: nobody is home, and its time has to pass.
            times = daemon.timeouts
            self._wait_ms = max(wait_ms, times.lease_ms + times.claim_wait_ms + 2 * times.heartbeat_ms)
        self._members = members
        self._victim = victim
        self.began_ms = now_ms()
        effects = machine.judged(verdict, victim)
        return bool(effects) and await self._run(effects)

    async def _run(self, effects: list[Effect]) -> bool:
        """Carry the steps out, each after the one before, until the home awaits reclaims or serves."""
        while effects:
            effect = effects.pop(0)
            if isinstance(effect, Fence):
                effects = await self._fence(effect.victim)
            elif isinstance(effect, ClaimLease):
                effects = await self._claim(effect.victim)
            elif isinstance(effect, Mount):
                assert self._held is not None
                await self._daemon.mount_as_home(self._held)
                log.info("lower mounted", ms=now_ms() - self.began_ms)
                effects = self._machine.mounted()
            elif isinstance(effect, Settle):
                # Read now, since the last report may be older than the last word of a daemon that starts again; and
                # before anybody can connect: who reclaims before it is awaited would be awaited for ever.
                slots = await asyncio.to_thread(self._daemon.lockspace.read_slots)
                await self._daemon.settle_operations()
                log.info("operations settled", ms=now_ms() - self.began_ms)
                effects = self._machine.settled(self._who(slots))
            elif isinstance(effect, AwaitReclaims):
                self._grace_until_ms = now_ms() + self._daemon.timeouts.grace_ms
                self._daemon.await_reclaims(effect.nodes)
            elif isinstance(effect, Serve):
                self._serve()
        return self._machine.state in (TakeoverState.GRACE, TakeoverState.SERVING)

    async def _fence(self, victim: Victim) -> list[Effect]:
        log.warning("fencing the home", peer=victim.slot, verdict=victim.verdict.name, agent=self._daemon.fencing.name)
        if self._fence_work is None or self._fence_work[0] != victim or self._fence_work[1].done():
            work = asyncio.ensure_future(asyncio.to_thread(self._daemon.fencing.fence, victim))
            self._fence_work = (victim, work)
        try:
            # A command that the kernel does not end keeps its thread: it is waited for again, not sent again.
            await asyncio.wait_for(asyncio.shield(self._fence_work[1]), self._daemon.timeouts.node_dead_ms / 1000)
        except TimeoutError:
            log.error("the fence does not come to an end: the home counts as alive", peer=victim.slot)
            self._machine.fence_failed()
            return []
        except MxfsError as exc:
            log.error("the home could not be fenced", peer=victim.slot, reason=str(exc))
            self._machine.fence_failed()
            return []
        log.warning("home fenced", peer=victim.slot, ms=now_ms() - self.began_ms)
        return self._machine.fenced(victim)

    async def _claim(self, victim: Victim | None) -> list[Effect]:
        daemon = self._daemon
        assert daemon.held is not None
        report = daemon.heartbeat.report if daemon.heartbeat is not None else None
        evidence: Evidence | None = None
        if victim is not None and victim.verdict is Verdict.SILENT and report is not None:
            evidence = report.evidence()
        try:
            held = await asyncio.to_thread(
                daemon.lockspace.claim_lease,
                daemon.held.record,
                daemon.timeouts,
                wait_ms=self._wait_ms,
                evidence=evidence,
            )
        except ClaimRefused as exc:
            log.debug("the lease is not to be had", reason=str(exc))
            self._machine.refused()
            return []
        except MxfsError as exc:
            log.warning("the lease could not be claimed", reason=str(exc))
            self._machine.refused()
            return []
        self._held = held
        log.info("lease claimed", epoch=held.record.epoch, ms=now_ms() - self.began_ms)
        return self._machine.claimed(held.record.epoch)

    def _who(self, found: Sequence[SlotRecord | None]) -> set[int]:
        """The nodes to hear before serving: those named, or all that may hold something.

        The one just fenced only where its FUSE layer lives, and goes on with its next daemon: it has files open that
        have no name any more, and what it holds must not be given away meanwhile.
        """
        daemon = self._daemon
        victim = self._victim
        report = daemon.heartbeat.report if daemon.heartbeat is not None else None
        known = report.slots if report is not None else {}
        # A record that cannot be read just now says what it said last.
        latest = [slot or known.get(number) for number, slot in enumerate(found, 1)]
        slots = [slot for slot in latest if slot is not None]
        recent = {slot.slot: slot.incarnation for slot in slots if slot.state in _RECENT}
        gone = {daemon.slot}
        for slot in slots:
            old = victim is not None and (slot.slot, slot.incarnation) == (victim.slot, victim.incarnation)
            if old and slot.state is not SlotState.RESTARTING:
                gone.add(slot.slot)
        named = self._members if self._members is not None else set(recent)
        members = {number: recent[number] for number in named - gone if number in recent}
        assert daemon.members is not None
        for number, incarnation in members.items():
            daemon.members.expect(number, incarnation)
        fuse = daemon.fuse
        own = {daemon.slot} if fuse is not None and (fuse.attached.is_set() or fuse.continues) else set()
        return set(members) | own

    # -- while the home awaits reclaims ----------------------------------------------------------------------------

    def reclaimed(self, slot: int) -> None:
        """*slot* has named everything that it holds."""
        self._later(self._machine.reclaimed(slot))

    def out(self, slot: int) -> None:
        """*slot* left, or was put out."""
        self._later(self._machine.out(slot))

    def tick(self) -> None:
        """Let time pass: who has not said what it holds when the grace period is over is put out."""
        daemon = self._daemon
        if self._machine.state is not TakeoverState.GRACE or now_ms() < self._grace_until_ms:
            return
        for slot in sorted(self.awaited):
            if slot == daemon.slot:
                daemon.fail("our own FUSE layer did not say what it holds within the grace period")
            elif daemon.members is not None and slot in daemon.peers:
                # Whoever is not heard is the membership's business: it may be this node that is cut off.
                daemon.members.late(slot)

    def _later(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Serve):
                self._serve()

    def _serve(self) -> None:
        self.took_ms = now_ms() - self.began_ms
        self.takeovers["free" if self._victim is None else "fenced"] += 1
        self._daemon.serve()
