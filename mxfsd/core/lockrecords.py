"""What the lock master keeps of a resource, and the views of it that ``mxfs locks`` prints (pure)."""

from dataclasses import dataclass
from typing import Protocol

from mxfs_proto.modes import LockMode
from mxfsd.core.lockeffects import Opens


class LockTimeouts(Protocol):
    """The deadlines the locks need, in milliseconds (``mxfsd.core.timeouts.Timeouts`` has them)."""

    @property
    def lock_wait_ms(self) -> int:
        """A wait is reported, and a request asked again, after this long."""

    @property
    def bast_ms(self) -> int:
        """A holder that gives no sign for this long after a BAST is reported."""

    @property
    def min_hold_ms(self) -> int:
        """A granted lock is kept at least this long."""


class Hold:
    """The cached lock of one node."""

    __slots__ = ("at_ms", "mode", "node", "seq")

    def __init__(self, node: int, mode: LockMode, seq: int, at_ms: int) -> None:
        self.node = node
        self.mode = mode
        self.seq = seq
        self.at_ms = at_ms


class Waiter:
    """A queued request (op_id 0) or operation (req_id 0)."""

    __slots__ = ("at_ms", "flags", "log_ms", "mode", "node", "op_id", "opens", "passed", "req_id")

    def __init__(
        self, node: int, req_id: int, op_id: int, mode: LockMode, flags: int, opens: Opens | None, at_ms: int
    ) -> None:
        self.node = node
        self.req_id = req_id
        self.op_id = op_id
        self.mode = mode
        self.flags = flags
        self.opens = opens
        self.at_ms = at_ms
        self.log_ms = at_ms
        self.passed = 0


class Sent:
    """A BAST on behalf of the first waiter. ``kept``: the holder answered that it keeps PW, as it was allowed to."""

    __slots__ = ("flags", "kept", "mode", "sent_ms", "seq", "sign_ms")

    def __init__(self, seq: int, mode: LockMode, flags: int, now_ms: int) -> None:
        self.seq = seq
        self.mode = mode
        self.flags = flags
        self.sent_ms = now_ms
        self.sign_ms = now_ms
        self.kept = False


class Record:
    """What the master knows of one resource. Absent from ``held`` = NL; None stands for an empty container.

    There are very many, with one or two locks each: a tuple takes the least memory for these.
    """

    __slots__ = ("basts", "held", "ino", "opens", "ops", "queue")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.held: tuple[Hold, ...] = ()
        self.opens: dict[int, Opens] | None = None
        self.ops: dict[int, tuple[int, LockMode]] | None = None
        self.queue: list[Waiter] | None = None
        self.basts: dict[int, Sent] | None = None

    def hold_of(self, node: int) -> Hold | None:
        """Return the node's lock, None where it has none."""
        for hold in self.held:
            if hold.node == node:
                return hold
        return None

    def put(self, hold: Hold) -> None:
        """Add the lock of a node that has none."""
        self.held += (hold,)

    def pop(self, node: int) -> Hold | None:
        """Remove the node's lock and return it, None where it has none."""
        gone = self.hold_of(node)
        if gone is not None:
            self.held = tuple(hold for hold in self.held if hold is not gone)
        return gone


@dataclass(frozen=True, slots=True)
class HolderView:
    """One holder as ``mxfs locks`` shows it; op_id is 0 for a cached lock."""

    node: int
    mode: LockMode
    seq: int
    age_ms: int
    op_id: int = 0


@dataclass(frozen=True, slots=True)
class WaiterView:
    """One waiter as ``mxfs locks`` shows it; op_id is 0 for a request of a cached lock."""

    node: int
    mode: LockMode
    age_ms: int
    op_id: int = 0


@dataclass(frozen=True, slots=True)
class ResourceView:
    """One resource as ``mxfs locks`` shows it."""

    ino: int
    holders: tuple[HolderView, ...]
    waiters: tuple[WaiterView, ...]
    opens: tuple[tuple[int, Opens], ...]
