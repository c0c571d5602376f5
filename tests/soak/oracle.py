"""What the volume must hold, kept outside of it: version counters, and the forms that versions have on the volume.

A **cell** is something that one worker alone changes, step by step: a block of a file, the place of a name, the end of
the lines it appended. Version 0 is "never made". The worker counts ``begun`` up before it asks for a change and
``acked`` after the answer; ``synced`` is what was acknowledged before an fsync that succeeded began. All that lies in a
file that is mapped by everybody who needs it and stays when its writer is killed. A **generation** is one life of the
load on one node, from the start of its processes to a kill or stop; its name is ``n2g7`` for the seventh life of n2.

The rules, for whoever looks at a cell (`Window`):
* never more than was begun;
* of a generation that lives, never less than what was acknowledged before one began to look;
* of one that was killed, never less than what was synced or what another node has read. Names that a client was told of
  are on the disk: for these ``acked`` still holds after a kill.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

BLOCK = 4096
FILES, BLOCKS, STATICS, SLOTS = 4, 8, 4, 6
STATIC_AT = FILES * BLOCKS
NAMES_AT = STATIC_AT + STATICS
LINES_AT = NAMES_AT + SLOTS
CELLS = LINES_AT + 1
STAGES = 5
LINE = 64

_BEGUN, _ACKED, _SYNCED, _SEEN = range(4)
_NODES = 4
_STRIDE = 8
_HEADER = 64
_THREADS_AT, _PER_THREAD = 8, 4
_MAGIC = 0x4D584653
_HEAD = struct.Struct("<IIII")


class Wrong(Exception):
    """The volume shows what it must not; the text says what and where."""


class Life(IntEnum):
    """A generation: *DYING* while something is done to its node that it may or may not survive."""

    LIVE = 0
    DYING = 1
    ENDED = 2
    REMOVED = 3


class Table:
    """The counters of one generation: mapped memory over *path*, made where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = 4 * (_HEADER + CELLS * _STRIDE)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("I")

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()

    @property
    def life(self) -> Life:
        """Whether the generation lives."""
        return Life(self._words[0])

    @life.setter
    def life(self, value: Life) -> None:
        self._words[0] = value

    @property
    def names_kept(self) -> bool:
        """Of one that has ended: whether all its acknowledged names must be there."""
        return self._words[1] == 1

    @property
    def data_kept(self) -> bool:
        """Of one that has ended: whether all its acknowledged data must be there."""
        return self._words[2] == 1

    def end(self, *, names_kept: bool, data_kept: bool) -> None:
        """The generation is over: say what must have stayed of it."""
        self._words[1], self._words[2] = int(names_kept), int(data_kept)
        self.life = Life.ENDED

    def _get(self, cell: int, field: int) -> int:
        return self._words[_HEADER + cell * _STRIDE + field]

    def _set(self, cell: int, field: int, value: int) -> None:
        self._words[_HEADER + cell * _STRIDE + field] = value

    def begun(self, cell: int) -> int:
        """The newest version that was asked for."""
        return self._get(cell, _BEGUN)

    def acked(self, cell: int) -> int:
        """The newest version that was answered."""
        return self._get(cell, _ACKED)

    def synced(self, cell: int) -> int:
        """The newest version that an fsync has covered."""
        return self._get(cell, _SYNCED)

    def begin(self, cell: int) -> int:
        """Return the next version, which is about to be asked for."""
        version = self.begun(cell) + 1
        self._set(cell, _BEGUN, version)
        return version

    def ack(self, cell: int) -> None:
        """What was begun has been answered."""
        self._set(cell, _ACKED, self.begun(cell))

    def answered(self, cells: Iterable[int]) -> dict[int, int]:
        """What is acknowledged of *cells*; for ``sync`` when the fsync that begins now has succeeded."""
        return {cell: self.acked(cell) for cell in cells}

    def sync(self, answered: dict[int, int]) -> None:
        """An fsync has succeeded; *answered* was taken before it began."""
        for cell, version in answered.items():
            self._set(cell, _SYNCED, version)

    def seen(self, cell: int) -> int:
        """The newest version that another node has read."""
        return max(self._get(cell, _SEEN + node) for node in range(_NODES))

    def see(self, cell: int, node: int, version: int) -> None:
        """Node number *node* (one reader each) has read a version."""
        at = _SEEN + node
        self._set(cell, at, max(version, self._get(cell, at)))

    def settle(self, cell: int, version: int) -> None:
        """The generation is over and this is what has become of the cell: from now on nothing else will do."""
        for field in (_BEGUN, _ACKED, _SYNCED):
            self._set(cell, field, version)

    # -- the threads of the load: how they get on ------------------------------------------------------------------

    def started(self, thread: int, now_ms: int) -> None:
        """A thread begins an operation."""
        self._words[_THREADS_AT + thread * _PER_THREAD] = now_ms

    def done(self, thread: int, began_ms: int) -> None:
        """A thread's operation has been answered."""
        at = _THREADS_AT + thread * _PER_THREAD
        self._words[at] = 0
        self._words[at + 1] += 1
        self._words[at + 2] = began_ms

    def waiting_since(self, thread: int) -> int:
        """When the operation under way began (ms), 0: there is none."""
        return self._words[_THREADS_AT + thread * _PER_THREAD]

    def count(self, thread: int) -> int:
        """How many operations a thread has done."""
        return self._words[_THREADS_AT + thread * _PER_THREAD + 1]

    def last_began(self, thread: int) -> int:
        """When the last operation that was answered had begun (ms)."""
        return self._words[_THREADS_AT + thread * _PER_THREAD + 2]


@dataclass(frozen=True, slots=True)
class Window:
    """Taken before one looks at a cell; ``judge`` afterwards."""

    acked: int
    synced: int
    seen: int

    @classmethod
    def open(cls, table: Table, cell: int) -> "Window":
        """Begin to look."""
        return cls(table.acked(cell), table.synced(cell), table.seen(cell))

    def low(self, table: Table, cell: int) -> int:
        """The oldest version that may be found."""
        kept = table.names_kept if NAMES_AT <= cell < LINES_AT else table.data_kept
        life = table.life
        if life is Life.LIVE or (life is Life.ENDED and kept):
            return max(self.acked, self.seen)
        return max(self.synced, self.seen)

    def judge(self, table: Table, cell: int, version: int, what: str) -> None:
        """Say whether *version* may be found. Raises Wrong."""
        high, low = table.begun(cell), self.low(table, cell)
        if not low <= version <= high and table.life is not Life.REMOVED:
            fields = f"acknowledged {self.acked}, synced {self.synced}, seen {self.seen}, {table.life.name.lower()}"
            raise Wrong(f"{what}: version {version}, but {low} to {high} are possible ({fields})")


# -- forms -----------------------------------------------------------------------------------------------------------


def block(generation: str, cell: int, version: int) -> bytes:
    """Return the 4096 bytes of one version of a block; its last four are a CRC of the others."""
    head = _HEAD.pack(_MAGIC, zlib.crc32(generation.encode()), cell, version)
    body = (head * (BLOCK // len(head)))[: BLOCK - 4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def version_of(data: bytes, generation: str, cell: int, what: str) -> int:
    """Return the version that a block shows; 0 where it was never written. Raises Wrong."""
    if not data or not any(data):
        return 0
    if len(data) != BLOCK:
        raise Wrong(f"{what}: {len(data)} bytes of a block of {BLOCK}")
    magic, who, where, version = _HEAD.unpack_from(data)
    if magic != _MAGIC or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise Wrong(f"{what}: neither zeros nor a whole block: {data[:24].hex()}...{data[-8:].hex()}")
    if (who, where) != (zlib.crc32(generation.encode()), cell):
        raise Wrong(f"{what}: the block of another file: cell {where} instead of {cell}, writer {who:08x}")
    return int(version)


def line(generation: str, number: int) -> bytes:
    """Return the 64 bytes that a generation appends as its line *number*."""
    text = f"{generation}:{number:08d}".ljust(LINE - 10, ".")
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def parse_lines(data: bytes, what: str) -> list[tuple[str, int]]:
    """Return (generation, number) of each line. Raises Wrong for anything that nobody has written so."""
    if len(data) % LINE:
        raise Wrong(f"{what}: {len(data)} bytes are no whole lines of {LINE}")
    found = []
    for at in range(0, len(data), LINE):
        raw = data[at : at + LINE]
        generation, colon, rest = raw.partition(b":")
        if not colon or not rest[:8].isdigit() or line(generation.decode("ascii", "replace"), int(rest[:8])) != raw:
            raise Wrong(f"{what}: no line at {at}: {raw!r}")
        found.append((generation.decode(), int(rest[:8])))
    return found


def names_of(generation: str, slot: int, version: int) -> frozenset[str]:
    """Return the names that a slot has at a version, below the generation's folder (``names/``) or ``shared/``.

    A cycle: made, moved to the folder that all nodes share, linked back, unlinked there, unlinked here.
    """
    cycle, stage = divmod(version, STAGES)
    made, moved, linked = names_in_cycle(generation, slot, cycle)
    return frozenset(((), (made,), (moved,), (moved, linked), (linked,))[stage])


def names_in_cycle(generation: str, slot: int, cycle: int) -> tuple[str, str, str]:
    """Return the three names that a slot uses in a cycle."""
    return (
        f"names/s{slot}.c{cycle}.made",
        f"shared/{generation}.s{slot}.c{cycle}",
        f"names/s{slot}.c{cycle}.linked",
    )


def version_by_names(generation: str, slot: int, found: frozenset[str], low: int, high: int, what: str) -> int:
    """Return the version in low..high that has just these names. Raises Wrong where there is none."""
    for version in range(high, low - 1, -1):
        if names_of(generation, slot, version) == found:
            return version
    wanted = [sorted(names_of(generation, slot, version)) for version in range(low, min(high, low + 5) + 1)]
    raise Wrong(f"{what}: {sorted(found)}, but versions {low} to {high} are possible: {wanted}")


def check_lines(found: list[int], low: int, high: int, what: str) -> None:
    """Check one generation's line numbers, in the order they stand in the logs: each once, in order, none lost."""
    if found != list(range(1, len(found) + 1)):
        at = next(index for index, number in enumerate(found) if number != index + 1)
        kind = "twice or out of order" if found[at] <= at else "one is missing before it"
        raise Wrong(f"{what}: line {found[at]} is the {at + 1}th: {kind}")
    if not low <= len(found) <= high:
        raise Wrong(f"{what}: {len(found)} lines, but {low} to {high} are possible")
