"""What reads of the lockspace show over time: which counters move, on the observer's own clock (pure)."""

from dataclasses import dataclass

from mxfs_proto.ondisk import LeaseRecord, SlotRecord


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one read of the lockspace showed; None stands for a record that could not be decoded."""

    began_ms: int
    ended_ms: int
    lease: LeaseRecord | None
    slots: tuple[SlotRecord | None, ...]

    def slot(self, number: int) -> SlotRecord | None:
        """Return the record of slot *number* (from 1)."""
        return self.slots[number - 1]


class Watch:
    """Since when has each counter not moved, on the observer's clock.

    Key 0 is the lease, 1.. are the slots. An unreadable record is "unchanged": a write in progress looks like that.
    The age is counted from the end of the first read that showed the present value to the start of the last read, so
    it is never too long. If the observer itself had a gap in its reads, or a read that hung, the disk may have been
    away for everybody, and all ages start anew, so that an outage does not make everyone dead at once.
    """

    def __init__(self, gap_ms: int) -> None:
        self._gap_ms = gap_ms
        self._last: Snapshot | None = None
        self._since: dict[int, int] = {}
        self._token: dict[int, tuple[object, ...]] = {}
        self._beats: dict[int, int] = {}

    def observe(self, snap: Snapshot) -> None:
        """Take note of one read; reads come in the order of time."""
        if self._last is not None and snap.ended_ms - self._last.ended_ms > self._gap_ms:
            self._since = dict.fromkeys(self._since, snap.ended_ms)
        self._last = snap
        lease = snap.lease
        self._note(0, None if lease is None else (lease.epoch, lease.sequence, lease.nonce), snap)
        for number, slot in enumerate(snap.slots, 1):
            token = None
            if slot is not None:
                token = (slot.node_uuid, slot.incarnation, slot.nonce, slot.state, slot.counter)
            self._note(number, token, snap)

    def _note(self, key: int, token: tuple[object, ...] | None, snap: Snapshot) -> None:
        known = self._token.get(key)
        if known is not None and (token is None or token == known):
            return
        if known is not None and token is not None and known[:3] == token[:3]:
            self._beats[key] = self._beats.get(key, 0) + 1
        else:
            self._beats.pop(key, None)
        self._token[key] = token if token is not None else ()
        self._since[key] = snap.ended_ms

    def age_ms(self, key: int) -> int:
        """Return for how long the record has been seen unmoved; 0 if it was never read."""
        if self._last is None or key not in self._since:
            return 0
        return max(0, self._last.began_ms - self._since[key])

    def due_ms(self, key: int, limit_ms: int) -> int | None:
        """Return when a read must begin to find that the record did not move for *limit_ms*; None: never read."""
        since = self._since.get(key)
        return None if since is None else since + limit_ms

    def beats(self, slot: int) -> int:
        """Return how often the slot was seen to move under its present claim."""
        return self._beats.get(slot, 0)
