"""What ``reservations`` needs of one path to the disk (one I_T nexus, in SCSI's words), whatever carries it."""

from typing import Protocol, Self

from mxfsd.pr.spc import Capabilities, FullStatus, Held, Keys


class Nexus(Protocol):
    """One path. Every method blocks, at most for the path's timeout and a few retries.

    Raises ReservationConflict, PathFailure (outcome unknown), CheckCondition, NotOffered, BadReply.
    """

    name: str

    def register(self, key: int, new_key: int, *, aptpl: bool) -> None:
        """Change the registration from *key* (0: none) to *new_key* (0: none)."""
        ...

    def register_ignoring(self, new_key: int, *, aptpl: bool) -> None:
        """Register *new_key*, whatever key this path is registered with."""
        ...

    def reserve(self, key: int) -> None:
        """Take the reservation, exclusive access for all registrants."""
        ...

    def preempt(self, key: int, victim: int, *, abort: bool) -> None:
        """Remove the victim's registrations; *abort*: and end its commands. CheckCondition or NotOffered: cannot."""
        ...

    def clear(self, key: int) -> None:
        """Remove the reservation and all registrations."""
        ...

    def read_keys(self) -> Keys:
        """Return every registered key, complete."""
        ...

    def read_reservation(self) -> Held | None:
        """Return the reservation, or None if there is none."""
        ...

    def full_status(self) -> FullStatus | None:
        """Return who is registered, or None where the target does not say."""
        ...

    def capabilities(self) -> Capabilities | None:
        """Return what the target can do, or None where it does not say."""
        ...

    def lun_reset(self) -> None:
        """End every command on the disk, of all initiators."""
        ...

    def spare(self) -> Self | None:
        """Open one more path of this host to the same disk, which is not registered; None where that cannot be."""
        ...

    def close(self) -> None:
        """Let go of the device; registrations stay."""
        ...
