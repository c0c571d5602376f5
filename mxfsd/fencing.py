"""How a dead node is kept from the disk: by persistent reservations where the disk has them, else by deadlines.

An agent says of a victim that it is fenced, or raises. ``docs/fencing.md`` has the reasons and the limits of both.
"""

import os
import socket
import threading
from collections.abc import Callable
from typing import Protocol

import structlog

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError
from mxfsd.admission import unused
from mxfsd.core.takeover import Verdict, Victim
from mxfsd.options import MountOptions
from mxfsd.pr.errors import ReservationError
from mxfsd.pr.keys import PREFIX, RANDOM_BITS, key_text
from mxfsd.pr.probe import open_reservations
from mxfsd.pr.reservations import Reservations, Standing

_INITIATOR = "iqn.2026-11.net.mxfs"

log = structlog.get_logger(__name__)


class Fencing(Protocol):
    """What keeps dead nodes from the disk. Methods block: call them from threads."""

    name: str
    warning: str
    """What the operator has to know, or ''."""
    key: int
    """This incarnation's registration key for its slot record; 0: none."""

    def fence(self, victim: Victim) -> None:
        """Return when the victim cannot write any more, and that is confirmed. Raises IoFailure: it may live."""

    def check(self) -> Standing:
        """Look whether this node is still let in; to be asked at each renewal. Raises IoFailure."""

    def reestablish(self, still_ours: Callable[[], bool]) -> None:
        """After LOST: let ourselves in again, unless we were fenced. Raises IoFailure."""

    def leave(self) -> None:
        """A clean end: take our registration back. Raises IoFailure."""

    def close(self) -> None:
        """Let go of the device and leave everything as it is."""


class LeaseFencing:
    """No help from the disk: every node stops by itself in time, and others wait for that.

    A home shuts its lower XFS down when it could not renew its lease, at the latest lease_ms after its last good beat;
    its counters are declared dead after node_dead_ms, which is at least lease_ms and the longest I/O (Timeouts). So a
    victim that is SILENT has stopped, if its heartbeat process ran at all; one that FAILED said so itself.
    """

    name = "lease"
    key = 0

    def __init__(self, reason: str) -> None:
        self.warning = (
            f"fencing by deadlines only ({reason}): safe as long as every node's heartbeat process can run; a disk "
            "with persistent reservations, or a hardware watchdog (watchdog=), makes it safe without that"
        )

    def fence(self, victim: Victim) -> None:
        """See Fencing."""
        if victim.verdict not in (Verdict.SILENT, Verdict.FAILED):
            raise IoFailure(f"slot {victim.slot} is not known to have stopped")

    def check(self) -> Standing:
        """See Fencing."""
        return Standing.OK

    def reestablish(self, still_ours: Callable[[], bool]) -> None:
        """See Fencing."""

    def leave(self) -> None:
        """See Fencing."""

    def close(self) -> None:
        """See Fencing."""


class PrFencing:
    """SCSI persistent reservations (SPC-4), type 8; see ``mxfsd/pr``."""

    name = "pr"
    warning = ""

    def __init__(self, reservations: Reservations, transport: str) -> None:
        self._reservations = reservations
        self.transport = transport
        self.key = _new_key()
        # The guard looks while a takeover or the membership fences, and the paths take one command at a time.
        self._turn = threading.RLock()

    def join(self, *, replace: bool) -> None:
        """Register this incarnation's key and see to the reservation. Raises ReservationError.

        *replace*: nothing of an earlier incarnation on this host can have I/O under way.
        """
        self._reservations.register(self.key, replace=replace)
        self._reservations.reserve()

    def fence(self, victim: Victim) -> None:
        """See Fencing."""
        if victim.pr_key:
            with self._turn:
                self._reservations.preempt(victim.pr_key)
        elif victim.verdict is not Verdict.FAILED:
            raise IoFailure(
                f"slot {victim.slot} has no registration key and cannot be fenced: was it mounted with fencing=lease?"
            )

    def check(self) -> Standing:
        """See Fencing. Keys that were fenced and are registered again (the target had restarted) are fenced again."""
        with self._turn:
            standing = self._reservations.check()
            if standing is Standing.OK:
                for key in self._reservations.returned:
                    log.warning("a fenced registration has come back", key=key_text(key))
                    self._reservations.preempt(key)
            return standing

    def reestablish(self, still_ours: Callable[[], bool]) -> None:
        """See Fencing."""
        with self._turn:
            self._reservations.reestablish(still_ours)

    def leave(self) -> None:
        """See Fencing."""
        with self._turn:
            self._reservations.unregister()

    def close(self) -> None:
        """See Fencing."""
        self._reservations.close()


def _new_key() -> int:
    """A key for this incarnation. Its slot is not known yet (0): the lockspace can be read only after registering."""
    return PREFIX << 48 | int.from_bytes(os.urandom(RANDOM_BITS // 8), "big") or 1


def choose(device: str, options: MountOptions) -> Fencing:
    """Return the agent for the device, joined: the reservation shuts out who reads before that.

    Raises MisuseError where ``fencing=pr`` was asked for and the disk has none, ReservationError.
    """
    if options.fencing == "lease":
        if options.pr_device is not None:
            raise MisuseError("prdev= has no use with fencing=lease: leave one of them out")
        return LeaseFencing("fencing=lease")
    # At a target on the network each node is an initiator of its own name.
    initiator = f"{_INITIATOR}:{options.node or socket.gethostname()}"
    probe = open_reservations(options.pr_device or device, initiator=initiator)
    if probe.reservations is None:
        if options.fencing == "pr":
            raise MisuseError(
                f"fencing=pr: {probe.reason}; mount with fencing=lease, or on a disk with persistent reservations"
            )
        return LeaseFencing(probe.reason)
    agent = PrFencing(probe.reservations, probe.transport)
    try:
        agent.join(replace=unused(device))
    except BaseException:
        agent.close()
        raise
    log.info("registered", transport=probe.transport, key=key_text(agent.key))
    return agent


def leave(agent: Fencing) -> None:
    """End in good order; what fails is logged: the next incarnation, or whoever fences us, makes up for it."""
    try:
        agent.leave()
    except (MxfsError, ReservationError) as exc:
        log.warning("the registration could not be taken back", reason=str(exc))
    agent.close()
