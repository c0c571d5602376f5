"""Data that this node wrote and that the home has not made durable yet: kept to be sent again (pure).

The home answers a WRITE when the data is in its page cache. Should the home die then, the data is gone; so whoever
wrote it keeps it until a commit (FSYNC) that began after the answer has ended, and sends it again to the next home.

For each file the WRITEs stand in the order in which they were sent, the unanswered ones too. That order is kept in
everything: a commit lets go of a beginning of it that was answered before the commit began, and a replay sends the rest
from the first to the last. So what is written again always ends with what was written last, also where WRITEs overlap
and were answered out of order.

Errors: MisuseError for calls that contradict the state; nothing is changed then.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from mxfs_proto.errors import MisuseError
from mxfs_proto.ops import MAX_DATA, PIECE_BYTES, Fid

Pieces: TypeAlias = Sequence[tuple[int, bytes]]
"""Offset and data, in the order of writing."""

PIECE_COST = 256
"""Bytes that a piece counts for besides its data, about what it takes in memory: many small ones are bounded too."""


class Sent:
    """One WRITE or WRITES, as it was sent."""

    __slots__ = ("answered", "at_ms", "cost", "fid", "flags", "pieces", "serial", "size")

    def __init__(self, serial: int, fid: Fid, flags: int, pieces: Pieces, at_ms: int) -> None:
        self.serial = serial
        self.fid = fid
        self.flags = flags
        """WriteFlag."""
        self.pieces = pieces
        self.at_ms = at_ms
        self.size = sum(len(data) for _, data in pieces)
        """Bytes of data."""
        self.cost = self.size + PIECE_COST * len(pieces)
        self.answered = False


class UnstableData:
    """All that this node has written and that is not known to be durable."""

    def __init__(self) -> None:
        self._files: dict[Fid, deque[Sent]] = {}
        self._serial = 0
        self.total = 0
        """Bytes kept, PIECE_COST included."""

    # -- writing ---------------------------------------------------------------------------------------------------

    def sent(self, now_ms: int, fid: Fid, flags: int, pieces: Pieces) -> Sent:
        """A WRITE goes out. Call this in the order of sending."""
        self._serial += 1
        entry = Sent(self._serial, fid, flags, pieces, now_ms)
        self._files.setdefault(fid, deque()).append(entry)
        self.total += entry.cost
        return entry

    def answered(self, entry: Sent, written: int) -> None:
        """The home has written the first *written* bytes of it; the rest is not kept. (Dropped meanwhile: nothing.)"""
        if entry.answered:
            raise MisuseError(f"WRITE {entry.serial} was answered twice")
        if written < entry.size:
            self._shorten(entry, written)
        entry.answered = True

    def _shorten(self, entry: Sent, written: int) -> None:
        pieces = []
        for offset, data in entry.pieces:
            if written <= 0:
                break
            pieces.append((offset, data[:written]))
            written -= len(data)
        short = Sent(entry.serial, entry.fid, entry.flags, pieces, entry.at_ms)
        if self._has(entry):
            self.total += short.cost - entry.cost
        entry.pieces, entry.size, entry.cost = short.pieces, short.size, short.cost

    def failed(self, entry: Sent) -> None:
        """It was not executed: its writer is told so."""
        if self._has(entry):
            file = self._files[entry.fid]
            file.remove(entry)
            self.total -= entry.cost
            if not file:
                del self._files[entry.fid]

    def _has(self, entry: Sent) -> bool:
        file = self._files.get(entry.fid)
        return file is not None and bool(file) and file[0].serial <= entry.serial and entry in file

    # -- committing ------------------------------------------------------------------------------------------------

    def ticket(self, fid: Fid) -> int:
        """What a commit that begins now covers; 0: nothing."""
        ticket = 0
        for entry in self._files.get(fid, ()):
            if not entry.answered:
                break
            ticket = entry.serial
        return ticket

    def committed(self, fid: Fid, ticket: int) -> None:
        """A commit has ended (or failed, and its error is told): what its ticket covers is not kept any more."""
        file = self._files.get(fid)
        if file is None:
            return
        while file and file[0].serial <= ticket:
            if not file[0].answered:
                raise MisuseError(f"a commit of {ticket} covers WRITE {file[0].serial}, which is not answered")
            self.total -= file.popleft().cost
        if not file:
            del self._files[fid]

    def drop(self, fid: Fid) -> list[Sent]:
        """Keep nothing of a file: it is gone, or no longer ours. Returns what was not answered."""
        file = self._files.pop(fid, deque())
        self.total -= sum(entry.cost for entry in file)
        return [entry for entry in file if not entry.answered]

    # -- looking ---------------------------------------------------------------------------------------------------

    def holds(self, fid: Fid) -> bool:
        """Whether anything of this file is kept."""
        return fid in self._files

    def files(self) -> Iterator[Fid]:
        """The files of which something is kept; the ones begun first come first."""
        return iter(list(self._files))

    def due(self, now_ms: int, age_ms: int) -> list[Fid]:
        """The files whose first entry was sent *age_ms* ago or earlier."""
        return [fid for fid, file in self._files.items() if file[0].at_ms <= now_ms - age_ms]

    def entries(self, fid: Fid) -> list[Sent]:
        """What is to be sent again of a file, in order."""
        return list(self._files.get(fid, ()))


def chunks(entries: Sequence[Sent]) -> Iterator[list[Sent]]:
    """Divide a replay into requests: neighbours with the same flags go together as far as a WRITES can hold them.

    One that was not answered goes alone: somebody waits for its own result.
    """
    chunk: list[Sent] = []
    room = 0
    for entry in entries:
        need = entry.size + PIECE_BYTES * len(entry.pieces)
        joins = chunk and entry.answered and chunk[-1].answered and entry.flags == chunk[0].flags and need <= room
        if chunk and not joins:
            yield chunk
            chunk, room = [], 0
        room = (room if chunk else MAX_DATA) - need
        chunk.append(entry)
    if chunk:
        yield chunk
