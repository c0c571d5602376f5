"""Tables of file locks: POSIX byte ranges and flock, who holds what and who waits (pure; docs/architecture.md).

The home has one for all nodes. Each FUSE layer has one for its own locks. An owner is (node, owner, flock); locks of
the two kinds do not meet, as on Linux.

* A POSIX lock replaces what its owner had in the range, in one step (an upgrade is atomic); neighbours of one type
  are one. A flock is one lock of its owner; another type drops the first, then asks (flock(2)).
* **Waiting.** request() with a wait id leaves a waiter, first come first served; when it may be served the waiter gets
  a *wake* and asks again with the same id. So a wake is a hint that may be lost or come twice: nothing is held before
  the question that is answered GRANTED. One that does not wait takes what is free, whoever waits.
* **Patience.** A waiter that only others who wait keep away gives way to them PATIENCE questions long, then is
  served. Without that, fairness could close a cycle that no lock closes, which nobody would see.
* **Deadlock** is looked for when a POSIX waiter asks, each time: owners that wait for owners, over all inodes.

Errors: none. What cannot be is answered by a Verdict.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple, TypeAlias

from mxfs_proto.filelocks import LAST, MAX_LOCKS, READ, UNLOCK, WRITE, Held

Who: TypeAlias = tuple[int, int, bool]
"""Node, owner, flock."""

MAX_WAITS = 16_384
"""Waiters of one node."""
PATIENCE = 2


class Verdict(Enum):
    """The answer to a request."""

    GRANTED = "granted"
    WAITING = "waiting"
    BUSY = "busy"
    """Somebody has what conflicts, and the request does not wait."""
    DEADLOCK = "deadlock"
    FULL = "full"
    """The node has too many locks or waiters."""


class Wake(NamedTuple):
    """Tell a waiter to ask again."""

    node: int
    ino: int
    wait_id: int


class LockView(NamedTuple):
    """One lock as ``mxfs locks`` shows it; *waiting*: it is wanted, not held."""

    ino: int
    node: int
    held: Held
    waiting: bool


class _Wait:
    __slots__ = ("asked", "held", "node", "offered", "wait_id", "who")

    def __init__(self, node: int, wait_id: int, held: Held) -> None:
        self.node = node
        self.wait_id = wait_id
        self.held = held
        self.who: Who = (node, held.owner, held.flock)
        self.asked = 0
        self.offered = False


class _Table:
    """The locks of one inode: ranges of each owner in order, and who waits, in order."""

    __slots__ = ("held", "waits")

    def __init__(self) -> None:
        self.held: dict[Who, list[Held]] = {}
        self.waits: list[_Wait] = []

    def blockers(self, who: Who, lock: Held) -> Iterator[tuple[Who, Held]]:
        """Yield what others hold that conflicts."""
        flock = who[2]
        for other, ranges in self.held.items():
            if other == who or other[2] != flock:
                continue
            for held in ranges:
                if _conflict(held, lock):
                    yield other, held

    def wait_of(self, node: int, wait_id: int) -> _Wait | None:
        for wait in self.waits:
            if wait.wait_id == wait_id and wait.node == node:
                return wait
        return None

    def behind(self, wait: _Wait | None, who: Who, lock: Held) -> bool:
        """Whether somebody who came before waits for what conflicts."""
        for other in self.waits:
            if other is wait:
                return False
            if other.who != who and other.who[2] == who[2] and _conflict(other.held, lock):
                return True
        return False


def _conflict(a: Held, b: Held) -> bool:
    return a.start <= b.end and b.start <= a.end and (a.type == WRITE or b.type == WRITE)


def replaced(ranges: list[Held], lock: Held) -> list[Held]:
    """Return the ranges of an owner, in order, after *lock* (UNLOCK: a hole) has replaced what was in its range."""
    out: list[Held] = []
    start, end = lock.start, lock.end
    for held in ranges:
        if held.end < start or held.start > end:
            out.append(held)
            continue
        if held.start < start:
            out.append(held._replace(end=start - 1))
        if held.end > end:
            out.append(held._replace(start=end + 1))
    if lock.type == UNLOCK:
        return out
    rest = []
    for held in out:
        if held.type == lock.type and held.end + 1 >= lock.start and held.start <= lock.end + 1:
            lock = lock._replace(start=min(held.start, lock.start), end=max(held.end, lock.end))
        else:
            rest.append(held)
    rest.append(lock)
    rest.sort(key=lambda held: held.start)
    return rest


class LockTables:
    """The file locks of a volume."""

    def __init__(self, max_locks: int = MAX_LOCKS) -> None:
        """Make an empty one, in which a node may have *max_locks* ranges."""
        self._max_locks = max_locks
        self._tables: dict[int, _Table] = {}
        self._waits_of: dict[Who, list[tuple[int, _Wait]]] = {}
        self._counts: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._wakes: list[Wake] = []

    # -- requests --------------------------------------------------------------------------------------------------

    def request(self, ino: int, node: int, lock: Held, wait_id: int = 0) -> Verdict:
        """Lock or unlock. *wait_id*, not 0 and unique on its node: wait, or ask again on behalf of that waiter."""
        who = (node, lock.owner, lock.flock)
        table = self._tables.get(ino)
        if lock.type == UNLOCK:
            if table is not None and who in table.held:
                if self._counts[node] >= self._max_locks and len(replaced(table.held[who], lock)) > len(
                    table.held[who]
                ):
                    return Verdict.FULL  # a hole makes two of one
                self._put(ino, table, who, lock)
                self._wake(ino, table)
                self._tidy(ino, table)
            return Verdict.GRANTED
        if table is None:
            table = self._tables[ino] = _Table()
        verdict = self._ask(ino, table, who, lock, wait_id)
        self._tidy(ino, table)
        return verdict

    def _ask(self, ino: int, table: _Table, who: Who, lock: Held, wait_id: int) -> Verdict:
        node = who[0]
        wait = table.wait_of(node, wait_id) if wait_id else None
        if lock.flock:
            own = table.held.get(who)
            if own is not None and own[0].type != lock.type:
                self._put(ino, table, who, lock._replace(type=UNLOCK))
                self._wake(ino, table)
        blocked = next(table.blockers(who, lock), None) is not None
        waits = not blocked and wait_id and table.behind(wait, who, lock)
        if waits and wait is not None and wait.asked >= PATIENCE:
            waits = False
        if not blocked and not waits:
            if self._counts.get(node, 0) + 2 > self._max_locks:
                return Verdict.FULL
            self._put(ino, table, who, lock)
            if wait is not None:
                self._unwait(ino, table, wait)
            self._wake(ino, table)  # what it had before may have been stronger
            return Verdict.GRANTED
        if not wait_id:
            return Verdict.BUSY
        if blocked and not lock.flock and self._closes_cycle(ino, who, lock):
            if wait is not None:
                self._unwait(ino, table, wait)
                self._wake(ino, table)
            return Verdict.DEADLOCK
        if wait is None:
            if self._waiting.get(node, 0) >= MAX_WAITS:
                return Verdict.FULL
            wait = _Wait(node, wait_id, lock)
            table.waits.append(wait)
            self._waits_of.setdefault(who, []).append((ino, wait))
            self._waiting[node] = self._waiting.get(node, 0) + 1
        wait.asked = 0 if blocked else wait.asked + 1
        wait.offered = False
        return Verdict.WAITING

    def put(self, ino: int, node: int, lock: Held) -> None:
        """Note what the home has decided."""
        table = self._tables.get(ino)
        if table is None:
            table = self._tables[ino] = _Table()
        self._put(ino, table, (node, lock.owner, lock.flock), lock)
        self._wake(ino, table)
        self._tidy(ino, table)

    def is_full(self, node: int) -> bool:
        """Return whether a node may have no more."""
        return self._counts.get(node, 0) + 2 > self._max_locks

    def test(self, ino: int, node: int, lock: Held) -> tuple[int, Held] | None:
        """Return (node, lock) of the first that is in the way of *lock*, None where it would be granted."""
        table = self._tables.get(ino)
        if table is None or lock.type == UNLOCK:
            return None
        found = min(
            ((held.start, who, held) for who, held in table.blockers((node, lock.owner, lock.flock), lock)),
            default=None,
        )
        return None if found is None else (found[1][0], found[2])

    def cancel(self, ino: int, node: int, wait_id: int) -> None:
        """Nobody waits under this id any more. A lock that was granted stays."""
        table = self._tables.get(ino)
        wait = table.wait_of(node, wait_id) if table is not None else None
        if table is not None and wait is not None:
            self._unwait(ino, table, wait)
            self._wake(ino, table)
            self._tidy(ino, table)

    def adopt(self, ino: int, node: int, locks: Iterable[Held]) -> bool:
        """Replace what *node* holds of *ino*. False where others hold what conflicts: then the node has nothing."""
        table = self._tables.get(ino)
        if table is None:
            table = self._tables[ino] = _Table()
        for who in [who for who in table.held if who[0] == node]:
            self._put(ino, table, who, _everything(who[1], who[2]))
        locks = list(locks)
        fits = all(next(table.blockers((node, lock.owner, lock.flock), lock), None) is None for lock in locks)
        for lock in locks if fits else ():
            self._put(ino, table, (node, lock.owner, lock.flock), lock)
        self._wake(ino, table)
        self._tidy(ino, table)
        return fits

    def drop(self, ino: int, node: int) -> None:
        """*node* holds nothing of *ino* any more, and does not wait for it."""
        table = self._tables.get(ino)
        if table is None:
            return
        for wait in [wait for wait in table.waits if wait.node == node]:
            self._unwait(ino, table, wait)
        self.adopt(ino, node, ())

    def drop_node(self, node: int) -> list[int]:
        """A node is gone, with all that it holds and waits for. Return the inodes."""
        inos = self.inodes_of(node)
        for ino in inos:
            self.drop(ino, node)
        self._counts.pop(node, None)
        self._waiting.pop(node, None)
        return inos

    def take_wakes(self) -> list[Wake]:
        """Return who has to be told to ask again, once."""
        wakes, self._wakes = self._wakes, []
        return wakes

    # -- views -----------------------------------------------------------------------------------------------------

    def nodes_of(self, ino: int) -> set[int]:
        """Return the nodes that hold locks of *ino*, or wait for some."""
        table = self._tables.get(ino)
        if table is None:
            return set()
        return {who[0] for who in table.held} | {wait.node for wait in table.waits}

    def waited_for(self, ino: int) -> bool:
        """Return whether anybody waits for a lock of *ino*."""
        table = self._tables.get(ino)
        return table is not None and bool(table.waits)

    def inodes_of(self, node: int) -> list[int]:
        """Return the inodes of which a node holds locks, or waits for some."""
        return [ino for ino in self._tables if node in self.nodes_of(ino)]

    def inodes(self) -> list[int]:
        """Return the inodes of which anybody holds locks, or waits for some."""
        return list(self._tables)

    def locks_of(self, ino: int, node: int) -> list[Held]:
        """Return what a node holds of *ino*."""
        table = self._tables.get(ino)
        if table is None:
            return []
        return [held for who, ranges in table.held.items() if who[0] == node for held in ranges]

    def owned(self, ino: int, node: int, owner: int, flock: bool) -> list[Held]:
        """Return what one owner holds of *ino*, in order."""
        table = self._tables.get(ino)
        return [] if table is None else list(table.held.get((node, owner, flock), ()))

    def view(self) -> Iterator[LockView]:
        """Yield every lock and every waiter."""
        for ino, table in self._tables.items():
            for who, ranges in table.held.items():
                for held in ranges:
                    yield LockView(ino, who[0], held, False)
            for wait in table.waits:
                yield LockView(ino, wait.node, wait.held, True)

    # -- the machine -----------------------------------------------------------------------------------------------

    def _put(self, ino: int, table: _Table, who: Who, lock: Held) -> None:
        before = table.held.get(who, [])
        after = replaced(before, lock)
        if after:
            table.held[who] = after
        else:
            table.held.pop(who, None)
        self._counts[who[0]] = self._counts.get(who[0], 0) + len(after) - len(before)

    def _unwait(self, ino: int, table: _Table, wait: _Wait) -> None:
        table.waits.remove(wait)
        mine = self._waits_of[wait.who]
        mine.remove((ino, wait))
        if not mine:
            del self._waits_of[wait.who]
        self._waiting[wait.node] -= 1

    def _tidy(self, ino: int, table: _Table) -> None:
        if not table.held and not table.waits:
            self._tables.pop(ino, None)

    def _wake(self, ino: int, table: _Table) -> None:
        """Have those ask again who may be served now, in their order."""
        for wait in table.waits:
            if wait.offered or next(table.blockers(wait.who, wait.held), None) is not None:
                continue
            if not table.behind(wait, wait.who, wait.held):
                wait.offered = True
                self._wakes.append(Wake(wait.node, ino, wait.wait_id))

    def _closes_cycle(self, ino: int, who: Who, lock: Held) -> bool:
        """Whether somebody whom *who* would wait for waits, perhaps through others, for *who*."""
        seen: set[Who] = set()
        todo = [other for other, _held in self._tables[ino].blockers(who, lock)]
        while todo:
            other = todo.pop()
            if other == who:
                return True
            if other in seen:
                continue
            seen.add(other)
            for waited_ino, wait in self._waits_of.get(other, ()):
                todo += [next_ for next_, _held in self._tables[waited_ino].blockers(other, wait.held)]
        return False


def _everything(owner: int, flock: bool) -> Held:
    return Held(owner, 0, LAST, 0, UNLOCK, flock)


def weakens(ranges: list[Held], lock: Held) -> bool:
    """Whether *lock* only takes away from what its owner has: an unlock, or a READ lock of what it has all."""
    if lock.type == UNLOCK:
        return True
    if lock.type != READ:
        return False
    at = lock.start
    for held in ranges:
        if held.start > at:
            return False
        if held.end >= at:
            at = held.end + 1
        if at > lock.end:
            return True
    return False
