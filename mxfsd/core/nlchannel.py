"""Exactly-once, in-order delivery of records over a netlink socket that may drop messages (pure).

Each record gets a channel sequence number, from 1. The receiver takes them in order only: a number beyond the next
one is dropped and reported with STATUS_REQ(resend), a number that was seen before is dropped. Acknowledgements are
cumulative and ride on every message; an idle receiver sends them by themselves after `ack_delay_ms` (STATUS_RESP).
The sender keeps what is not acknowledged, has at most `window` records of it on the wire, and goes back to the
first of them when asked to. A sender that hears nothing for `resend_ms` asks with STATUS_REQ where the receiver
is; so a lost last message, and a lost report, are found too.

The owner pulls: `peek`/`advance` for what goes to the socket next, `control`/`control_sent` for the report that is
due. Nothing is lost when a send fails: neither `advance` nor `control_sent` was called, so it comes again.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.records import Control, Record, StatusReq, StatusResp


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """Limits of a channel; both ends may differ."""

    window: int = 1024
    """Records sent and not acknowledged; the rest waits in the sender."""
    ack_every: int = 64
    """Records received after which an acknowledgement does not wait for `ack_delay_ms`."""
    ack_delay_ms: int = 20
    resend_ms: int = 200
    """Silence after which a sender asks, and a receiver with a gap reports it again."""

    def __post_init__(self) -> None:
        if not 0 < self.ack_every < self.window:
            raise MisuseError("a window must hold more records than one acknowledgement waits for")
        if not 0 < self.ack_delay_ms < self.resend_ms:
            raise MisuseError("an acknowledgement must come before the sender asks for it")


class NlChannel:
    """One end of a channel. All times are milliseconds of one monotonic clock of the owner."""

    __slots__ = (
        "_base",
        "_config",
        "_expected",
        "_gap",
        "_gap_told_ms",
        "_heard_ms",
        "_next",
        "_out",
        "_owed",
        "_owed_since_ms",
        "_sent",
        "_want_answer",
        "_want_resend",
        "duplicates",
        "gaps",
        "resends",
    )

    def __init__(self, config: ChannelConfig | None = None) -> None:
        self._config = config or ChannelConfig()
        # Sender: _out[0] has number _base; those below _next are on the wire.
        self._out: deque[Record] = deque()
        self._base = 1
        self._next = 1
        self._sent = 0  # the highest number that ever was on the wire
        self._heard_ms = 0  # when the receiver last moved on, or we began to wait for it
        # Receiver.
        self._expected = 1
        self._owed = 0  # records received and not acknowledged
        self._owed_since_ms = 0
        self._gap = False
        self._gap_told_ms = 0
        # Reports that are due at once.
        self._want_resend = False
        self._want_answer = False
        self.duplicates = 0
        self.gaps = 0
        self.resends = 0

    # -- sending ------------------------------------------------------------------------------------------------

    @property
    def acknowledgement(self) -> int:
        """The number up to which everything was received: the CHANNEL_ACK of each message that is sent."""
        return self._expected - 1

    @property
    def pending(self) -> int:
        """Records submitted and not acknowledged."""
        return len(self._out)

    @property
    def busy(self) -> bool:
        """Whether `tick` must be called: something waits for the peer or is owed to it."""
        return bool(self._out) or self._owed > 0 or self._gap or self._want_answer or self._want_resend

    def submit(self, record: Record) -> None:
        """Queue *record*; it is sent in its turn."""
        self._out.append(record)

    @property
    def next_number(self) -> int:
        """The channel sequence number of the first record of `peek`."""
        return self._next

    def peek(self, limit: int = 1) -> list[Record]:
        """Return up to *limit* records that go on the wire next; none when the window is full."""
        first = self._next - self._base
        count = min(len(self._out), self._config.window) - first
        if count <= 0:
            return []
        if count == 1 or limit == 1:
            return [self._out[first]]
        return list(islice(self._out, first, first + min(count, limit)))

    def advance(self, now_ms: int, count: int = 1) -> None:
        """Say that the first *count* records of `peek` are on the wire, and our acknowledgement with them."""
        if self._next == self._base:
            self._heard_ms = now_ms
        self._next += count
        if self._next > self._sent + 1:
            self._sent = self._next - 1
        self._owed = 0

    def control(self) -> Control | None:
        """Return the report that is due now, or None."""
        if self._want_resend:
            return StatusReq(self._sent, self._expected - 1, True)
        if self._want_answer or self._owed >= self._config.ack_every:
            return StatusResp(self._sent, self._expected - 1)
        return None

    def control_sent(self, report: Control, now_ms: int) -> None:
        """Say that *report*, as `control` or `tick` gave it, is on the wire."""
        self._owed = 0
        self._want_answer = False
        if isinstance(report, StatusReq):
            self._want_resend = False
            self._gap_told_ms = now_ms
            self._heard_ms = now_ms

    # -- receiving ----------------------------------------------------------------------------------------------

    def receive(self, now_ms: int, number: int, ack: int, record: Record) -> Record | None:
        """Take a message; return its record when it is to be delivered now.

        Raises PeerError for an acknowledgement of what was never sent, or a record without a number.
        """
        if ack >= self._base:
            self._acknowledged(now_ms, ack)
        if number == self._expected:
            self._expected = number + 1
            if self._owed == 0:
                self._owed_since_ms = now_ms
            self._owed += 1
            self._gap = False
            return record
        if number == 0:
            self._take_report(now_ms, record)
        elif number < self._expected:
            self.duplicates += 1
            self._want_answer = True  # the sender does not know that we have it
        else:
            self._found_gap(now_ms)
        return None

    def overrun(self) -> None:
        """Say that the socket reported lost messages (ENOBUFS): ask for whatever was lost."""
        self._want_resend = True

    def _take_report(self, now_ms: int, report: Record) -> None:
        if not isinstance(report, StatusReq | StatusResp):
            raise PeerError(f"{type(report).__name__} came without a channel sequence")
        if report.received >= self._base:
            self._acknowledged(now_ms, report.received)
        if isinstance(report, StatusReq):
            self._heard_ms = now_ms
            if report.resend and report.received == self._base - 1 and self._next > self._base:
                self._next = self._base
                self.resends += 1
            if not report.resend:
                self._want_answer = True
        if report.sent >= self._expected:
            self._found_gap(now_ms)

    def _acknowledged(self, now_ms: int, ack: int) -> None:
        if ack > self._sent:
            raise PeerError(f"record {ack} was acknowledged, the last one sent is {self._sent}")
        out = self._out
        for _ in range(ack + 1 - self._base):
            out.popleft()
        self._base = ack + 1
        if self._next < self._base:
            self._next = self._base
        self._heard_ms = now_ms

    def _found_gap(self, now_ms: int) -> None:
        if self._gap and now_ms - self._gap_told_ms < self._config.resend_ms:
            return  # reported; what comes until the resent messages arrive belongs to the same gap
        if not self._gap:
            self.gaps += 1
        self._gap = True
        self._gap_told_ms = now_ms
        self._want_resend = True

    # -- time ---------------------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> Control | None:
        """Return the report that is due by now; call it every `ack_delay_ms` while `busy`."""
        config = self._config
        if self._gap and now_ms - self._gap_told_ms >= config.resend_ms:
            self._want_resend = True
        report = self.control()
        if report is not None:
            return report
        if self._next > self._base and now_ms - self._heard_ms >= config.resend_ms:
            return StatusReq(self._sent, self._expected - 1, False)
        if self._owed and now_ms - self._owed_since_ms >= config.ack_delay_ms:
            return StatusResp(self._sent, self._expected - 1)
        return None
