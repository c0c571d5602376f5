"""What can go wrong with reservations; all are IoFailure (or MisuseError) of the project's families."""

import errno

from mxfs_proto.errors import IoFailure, PeerError
from mxfsd.pr.keys import key_text
from mxfsd.pr.sense import Sense


class ReservationError(IoFailure):
    """A command about reservations failed."""


class CheckCondition(ReservationError):
    """The target refused or failed a command and says why in ``sense``."""

    def __init__(self, message: str, sense: Sense) -> None:
        super().__init__(f"{message}: {sense}")
        self.sense = sense


class ReservationConflict(ReservationError):
    """RESERVATION CONFLICT: who asked is not registered with the key it gave (or not at all)."""

    errno = errno.EBADE


class NotOffered(ReservationError):
    """The target or the kernel does not have this command."""

    errno = errno.EOPNOTSUPP


class PathFailure(ReservationError):
    """No answer, or none from the target: timed out, path down, busy. The command may have been executed or not."""

    errno = errno.ENOLINK


class BadReply(PeerError):
    """The target's data contradicts the standard."""


class Preempted(ReservationError):
    """Our own key is gone: another node has fenced us. Stop; never register again under this incarnation."""

    errno = errno.ESTALE

    def __init__(self, device: str, key: int) -> None:
        super().__init__(f"{device}: our reservation key {key_text(key)} is gone: another node has fenced this one")


class StaleRegistration(ReservationError):
    """This host is registered with another key: that of an earlier incarnation, or somebody else's."""

    errno = errno.EBUSY


class ReservationLost(ReservationError):
    """There is no reservation of ours on the disk: the target has restarted, or nobody has made it yet."""

    errno = errno.ENOTCONN


class ForeignReservation(ReservationError):
    """The disk has a reservation of another type, which is not ours."""

    errno = errno.EBUSY


class DamagedReservation(ReservationError):
    """The target shows a reservation of a type that does not exist, and it cannot be put right from here."""

    errno = errno.EBADE


class Unconfirmed(ReservationError):
    """A fence could not be confirmed. The victim must be taken for alive."""
