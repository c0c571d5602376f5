"""Holds a volume for one program that writes to its XFS, as a home does: with a slot, the lease, and a registration.

``xfs_repair`` may take long, and a node that mounts meanwhile would destroy the volume. While a ``Hold`` is held no
other node can become the home. What it promises ends as a home's promise does: a margin before the lease ends without
a renewal, the program must have been killed (``fence_at_ms``).
"""

import os
import socket
import threading
from dataclasses import replace
from types import TracebackType
from typing import Self

import structlog

from mxfs_proto.errors import IoFailure, MxfsError
from mxfs_proto.ondisk import NAME_BYTES, UUID_BYTES, LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd import fencing
from mxfsd.core.keeper import Keeper, LeaseLost, SlotLost, Stalled
from mxfsd.core.lease import GONE, Evidence, Joiner, WriteLease
from mxfsd.core.takeover import Verdict, Victim
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot, Watch
from mxfsd.io.clock import now_ms
from mxfsd.io.lockspace import Lockspace
from mxfsd.options import MountOptions

log = structlog.get_logger(__name__)


def recorded_timeouts(snap: Snapshot) -> Timeouts:
    """Return the set that the volume's nodes run, from the slot that was claimed last; else the default one."""
    slots = [slot for slot in snap.slots if slot is not None and slot.node_dead_ms]
    if not slots:
        return Timeouts.named("default")
    last = max(slots, key=lambda slot: (slot.epoch_seen, slot.incarnation))
    for name in ("fast", "default", "patient"):
        known = Timeouts.named(name)
        if (known.heartbeat_ms, known.lease_ms, known.node_dead_ms) == (
            last.heartbeat_ms,
            last.lease_ms,
            last.node_dead_ms,
        ):
            return known
    return Timeouts.derive(heartbeat_ms=last.heartbeat_ms, lease_ms=last.lease_ms, node_dead_ms=last.node_dead_ms)


class Hold:
    """A context: inside it the volume is this program's alone. Raises MxfsError where it is not to be had."""

    def __init__(self, device: str, what: str, pr_device: str | None = None) -> None:
        """*what* names the program to others, such as ``fsck``; *pr_device* is as the mount option ``prdev=``."""
        self.device = device
        self.slot = 0
        self.epoch = 0
        self.lost = ""
        """Why the volume is not held any more."""
        self._what = what
        self._pr_device = pr_device
        self._end = threading.Event()

    def __enter__(self) -> Self:
        """Register, claim slot and lease (fencing a dead home first), begin to beat."""
        # First of all: a reservation of others shuts out who reads before.
        self._agent = fencing.choose(self.device, MountOptions(node=self._what, pr_device=self._pr_device))
        try:
            self._lockspace = Lockspace.open(self.device)
            try:
                self._claim()
            except BaseException:
                self._lockspace.close()
                raise
        except BaseException:
            fencing.leave(self._agent)
            raise
        self._thread = threading.Thread(target=self._beat_on, name="hold")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back; the program has ended. Others may mount from then on."""
        self._end.set()
        self._thread.join()
        try:
            if not self.lost and not self._keeper.overdue(now_ms()):
                self._give_back()
        except MxfsError:
            if error is None:
                raise  # else that error counts: the next home takes over from this hold as from any dead one
        finally:
            self._lockspace.close()
            fencing.leave(self._agent)

    @property
    def fence_at_ms(self) -> int:
        """When (``now_ms``) the program must be dead unless a renewal comes before."""
        return self._fence_at_ms

    # -- the claims ------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        space = self._lockspace
        self._timeouts = recorded_timeouts(space.snapshot())
        name = f"{self._what} on {socket.gethostname()}".encode()[:NAME_BYTES].decode(errors="ignore")
        # A uuid of its own: this is not the node of this host, which may have a slot, and its incarnations.
        joiner = Joiner(os.urandom(UUID_BYTES), name, pr_key=self._agent.key)
        # Before the claims: what is claimed has to be renewed soon.
        victim, evidence = self._dead_home()
        held = space.claim_slot(joiner, self._timeouts)
        self.slot = held.record.slot
        try:
            if victim is not None:
                self._agent.fence(victim)
            lease = space.claim_lease(held.record, self._timeouts, evidence=evidence)
            self.epoch = lease.record.epoch
            self._keeper = Keeper(held, self._timeouts)
            self._keeper.set_state(SlotState.ACTIVE)
            lost = self._keeper.hold(lease, now_ms())
            if lost is not None:
                raise IoFailure(f"the disk is too slow to hold the volume: {lost.reason}")
            self._fence_at_ms = self._keeper.fence_at_ms or 0
            self._beat()
            if self.lost:
                raise IoFailure(f"the volume is not to be had: {self.lost}")
        except BaseException:
            space.release_slot(held.record, SlotState.FREE)
            raise

    def _dead_home(self) -> tuple[Victim | None, Evidence | None]:
        """Return the home to be fenced and the proof of its death, if the lease names one. Raises IoFailure."""
        snap = self._lockspace.snapshot()
        lease = snap.lease
        if lease is None:
            raise IoFailure("no copy of the home lease can be read, so nobody can hold the volume")
        if lease.state is LeaseState.FREE:
            return None, None
        owner = snap.slot(lease.owner_slot)
        same = owner is not None and (owner.node_uuid, owner.incarnation) == (lease.owner_uuid, lease.incarnation)
        if owner is None or not same or lease.state is LeaseState.MOVING:
            raise IoFailure(
                f"the home in slot {lease.owner_slot} ended and left no word of it: mount the volume on one node, "
                "which takes over, unmount it, then try again"
            )
        if owner.pr_key and not self._agent.key:
            raise IoFailure(
                f"the home {owner.name!r} died with a registration at the disk, which this host cannot take away "
                f"({self._agent.warning}): say where the reservations are (--prdev), or mount the volume on one node, "
                "unmount it, then try again"
            )
        if owner.state in GONE:
            return Victim(owner.slot, owner.incarnation, owner.pr_key, Verdict.FAILED), None
        self._await_silence(lease, owner)
        victim = Victim(owner.slot, owner.incarnation, owner.pr_key, Verdict.SILENT)
        return victim, Evidence(owner.slot, owner.incarnation, owner.counter, lease.sequence)

    def _await_silence(self, lease: LeaseRecord, owner: SlotRecord) -> None:
        """Watch the home's slot and lease for node_dead_ms. Raises IoFailure if one moves."""
        watch = Watch(self._timeouts.lease_ms)
        while min(watch.age_ms(0), watch.age_ms(owner.slot)) < self._timeouts.node_dead_ms:
            snap = self._lockspace.snapshot()
            watch.observe(snap)
            if (snap.lease is not None and snap.lease != lease) or snap.slot(owner.slot) not in (owner, None):
                raise IoFailure(f"in use by the home {owner.name!r} (slot {owner.slot}): unmount it there first")
            self._lockspace.sleep(self._timeouts.heartbeat_ms / 4000)

    # -- the beats -------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        while not self._end.wait(self._timeouts.heartbeat_ms / 1000) and not self.lost:
            try:
                self._beat()
            except MxfsError as error:
                # The next beat may do better; ``fence_at_ms`` says how long that may go on.
                log.warning("a heartbeat of the hold failed", reason=str(error))

    def _beat(self) -> None:
        keeper = self._keeper
        snap = self._lockspace.snapshot()
        duties = list(keeper.on_read(snap))
        while duties:
            duty = duties.pop(0)
            if isinstance(duty, SlotLost | LeaseLost):
                self.lost = duty.reason
                return
            if isinstance(duty, Stalled):
                self.lost = f"nothing was written for {duty.ms} ms"
                return
            if keeper.overdue(now_ms()):
                self.lost = "the lease was not renewed in time"
                return
            if isinstance(duty, WriteLease):
                self._lockspace.write_lease(duty.record)
            else:
                self._lockspace.write_slot(duty.record)
            result = keeper.on_written(duty, snap.began_ms, now_ms())
            if result is not None:
                duties.insert(0, result)
        self._fence_at_ms = keeper.fence_at_ms or 0
        if not keeper.lease:
            self.lost = "the lease is gone"

    def _give_back(self) -> None:
        until_ms = self._keeper.lease_until_ms or 0
        lease = self._keeper.let_go()
        if lease is None:
            return
        self._lockspace.give_lease(lease, until_ms, 0, self._timeouts)
        found = self._lockspace.snapshot().slot(self.slot)
        if found is not None and found.same_claim(self._keeper.record):
            last = replace(self._keeper.last(SlotState.FREE), pr_key=0, addresses=())
            self._lockspace.write_slot(last)
        self._lockspace.disk.sync()
