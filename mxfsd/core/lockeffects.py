"""What the lock master and the lock caches want done: frozen effects that one executor performs in order.

Effects of the master (``mxfsd/core/dlm.py``) name a node; those of a cache (``mxfsd/core/lockcache.py``) are about
the node the cache lives on. Modes are LockMode, flags LockFlag, times milliseconds of the caller's monotonic clock.
"""

from dataclasses import dataclass

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode

Opens = tuple[int, int]  # descriptors open for reading, for writing (absolute counts of one node)

NO_FLAGS = LockFlag.NONE


@dataclass(frozen=True, slots=True)
class Grant:
    """Tell *node* that it holds *mode* (its whole lock, not an addition) under *seq*.

    Mode NL is an uncached grant: the node's lock is what it was, and *seq* is 0. *req_id* is 0 when no request of
    the node is being answered (flags UNASKED or RECLAIM).
    """

    node: int
    req_id: int
    ino: int
    mode: LockMode
    seq: int
    flags: LockFlag


@dataclass(frozen=True, slots=True)
class Deny:
    """Tell *node* that its request ends without a lock: EAGAIN (NOQUEUE), ECANCELED, or EBUSY for a reclaim."""

    node: int
    req_id: int
    ino: int
    errno: int


@dataclass(frozen=True, slots=True)
class Bast:
    """Tell *node* that its lock *seq* is in the way of a waiter that wants *mode*."""

    node: int
    ino: int
    seq: int
    mode: LockMode
    flags: LockFlag


@dataclass(frozen=True, slots=True)
class OpGranted:
    """The shipped operation *op_id* of *node* may run on *ino*."""

    op_id: int
    node: int
    ino: int


@dataclass(frozen=True, slots=True)
class OpDenied:
    """The queued operation *op_id* will never be granted *ino* (its node is gone)."""

    op_id: int
    node: int
    ino: int
    errno: int


@dataclass(frozen=True, slots=True)
class BastSilent:
    """*node* gave no sign about its lock on *ino* for bast_ms, though the BAST was repeated."""

    node: int
    ino: int


@dataclass(frozen=True, slots=True)
class WaitLong:
    """A request or operation of *node* has waited *waited_ms* for *ino*: to be logged, never an error."""

    node: int
    ino: int
    waited_ms: int


MasterEffect = Grant | Deny | Bast | OpGranted | OpDenied | BastSilent | WaitLong


@dataclass(frozen=True, slots=True)
class SendRequest:
    """Send LOCK_REQ to the master. The same *req_id* sent twice is one request."""

    req_id: int
    ino: int
    mode: LockMode
    flags: LockFlag
    opens: Opens | None


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Send LOCK_RELEASE: this node now holds *mode* of lock *seq*, and has *opens* descriptors.

    A release that names the mode the master already knows is a sign of life, sent when a BAST is repeated.
    """

    ino: int
    seq: int
    mode: LockMode
    opens: Opens


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Tell the master that nobody waits for *req_id* any more."""

    req_id: int
    ino: int


@dataclass(frozen=True, slots=True)
class Wake:
    """End the wait for *req_id*; errno 0 and mode NL: uncached.

    For an OPEN, *mode* decides whether the descriptor is cached, whatever happened since. All other waiters must look
    at mode() again: the lock may have been called back meanwhile, and is then asked for again.
    """

    req_id: int
    mode: LockMode
    flags: LockFlag
    ino: int
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Invalidate:
    """Make the kernel drop what *target* does not let it cache, write back what must be, then call invalidated()."""

    ino: int
    target: LockMode


@dataclass(frozen=True, slots=True)
class Later:
    """Call tick() at *at_ms*: a BAST for *ino* waits for the minimum hold time."""

    ino: int
    at_ms: int


CacheEffect = SendRequest | SendRelease | SendCancel | Wake | Invalidate | Later
