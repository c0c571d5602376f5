"""Exactly once: which shipped operations of which session were executed, and what they were answered (pure).

A session is one incarnation of a client. It numbers its operations from 1; several may be under way, so numbers may
come in any order. Each request carries *ack*: the client has the replies of all numbers up to it and never asks for
them again. A reply is kept until then. Those that must outlive the home are on the volume too
(:mod:`mxfsd.core.outcomes`), from where the next home restores them.

Errors: MisuseError for our own wrong calls, PeerError (EPROTO) for a client that breaks the rules or its limits.
Nothing is changed then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from mxfs_proto.errors import MisuseError, PeerError

MAX_REPLIES = 4096
"""So many operations of a session may be under way or unacknowledged."""
MAX_BYTES = 64 << 20
"""So many bytes of unacknowledged replies a session may have."""
_U64 = 1 << 64


class Verdict(Enum):
    """What to do with a request for which no reply is kept."""

    NEW = "new"
    """Execute it, then call done() or abandon()."""
    IN_PROGRESS = "in progress"
    """It is being executed: its reply will be sent when it is done."""
    STALE = "stale"
    """The client said it has the reply: nothing is to be done."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The operation was executed: send this reply again."""

    reply: bytes


class _Session:
    __slots__ = ("acked", "replies", "size")

    def __init__(self) -> None:
        self.acked = 0
        self.replies: dict[int, bytes | None] = {}
        self.size = 0


class SessionTable:
    """The reply caches of all sessions of a volume."""

    def __init__(self, *, max_replies: int = MAX_REPLIES, max_bytes: int = MAX_BYTES) -> None:
        """Make an empty table."""
        self.on_forget: Callable[[int, int], None] = lambda _session, _seq: None
        """Called with (session, number) of each reply that need not be kept any more."""
        self._max_replies = max_replies
        self._max_bytes = max_bytes
        self._sessions: dict[int, _Session] = {}

    def begin(self, session: int, seq: int, ack: int) -> Verdict | Replay:
        """A request arrived. Raises PeerError for numbers that make no sense, or when a limit is exceeded.

        An operation that runs while its number is acknowledged is a late repetition of a repeatable one.
        """
        if not (0 <= ack < seq < _U64 and 0 <= session < _U64):
            raise PeerError(f"session {session:#x}: operation {seq} with ack {ack}")
        table = self._sessions.get(session)
        if table is None:
            table = _Session()
        trimmed = [number for number in table.replies if number <= ack] if ack > table.acked else []
        if seq > table.acked and seq not in table.replies:
            size = table.size - sum(len(table.replies[number] or b"") for number in trimmed)
            if len(table.replies) - len(trimmed) >= self._max_replies or size > self._max_bytes:
                raise PeerError(f"session {session:#x}: too many replies without ack")
        self._sessions[session] = table
        table.acked = max(table.acked, ack)
        for number in trimmed:
            table.size -= len(table.replies.pop(number) or b"")
            self.on_forget(session, number)
        if seq <= table.acked:
            return Verdict.STALE
        if seq in table.replies:
            reply = table.replies[seq]
            return Verdict.IN_PROGRESS if reply is None else Replay(reply)
        table.replies[seq] = None
        return Verdict.NEW

    def done(self, session: int, seq: int, reply: bytes, *, repeatable: bool = False) -> None:
        """The operation was executed. *repeatable*: doing it again does no harm, so its reply is not kept.

        A session dropped or a number acknowledged meanwhile is no error. Raises MisuseError where the operation was
        not begun.
        """
        table = self._sessions.get(session)
        if table is None or seq <= table.acked:
            self.on_forget(session, seq)
            return
        if table.replies.get(seq, b"") is not None:
            raise MisuseError(f"session {session:#x}: operation {seq} is not under way")
        if repeatable:
            del table.replies[seq]
        else:
            table.replies[seq] = reply
            table.size += len(reply)

    def abandon(self, session: int, seq: int) -> None:
        """The operation was not executed and changed nothing; the client may send it again. Errors as for done()."""
        table = self._sessions.get(session)
        if table is None or seq <= table.acked:
            return
        if table.replies.get(seq, b"") is not None:
            raise MisuseError(f"session {session:#x}: operation {seq} is not under way")
        del table.replies[seq]

    def drop(self, session: int) -> None:
        """Forget a session: its client is gone for good."""
        table = self._sessions.pop(session, None)
        for seq in table.replies if table is not None else ():
            self.on_forget(session, seq)

    def sessions(self) -> list[int]:
        """Return the sessions known."""
        return list(self._sessions)

    def kept(self) -> list[tuple[int, int, bytes]]:
        """Return every reply kept: (session, number, reply)."""
        return [
            (session, seq, reply)
            for session, table in self._sessions.items()
            for seq, reply in table.replies.items()
            if reply is not None
        ]

    def restore(self, session: int, seq: int, reply: bytes) -> None:
        """Take over a reply that a home before kept. Raises MisuseError where the number is known already."""
        table = self._sessions.setdefault(session, _Session())
        if seq in table.replies or seq <= table.acked:
            raise MisuseError(f"session {session:#x}: operation {seq} has a reply already")
        table.replies[seq] = reply
        table.size += len(reply)
