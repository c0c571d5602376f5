"""The shared disk of the failover simulator: lockspace, persistent reservations, and an XFS with an ordered log.

Every command takes time and takes effect at one moment in it. What is under way when its host dies may still take
effect, up to ``io_timeout_ms`` after it began. With reservations a host whose key is not registered is refused, and
preempting a key aborts what its host has under way.

The lower XFS: transactions change memory at once and become durable in their order; data pages become durable in any
order, and the size that shows them is logged after that. A cell of a file holds the number of the operation that wrote
it, or that cut it off; each change has a version, the greater of what is found on the disk is the newer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from failover_engine import Proc
from simcheck import Broken
from simnode import Future

from mxfs_proto.errors import MediaError
from mxfs_proto.ondisk import LeaseRecord, SlotRecord
from mxfsd.core.watch import Snapshot

if TYPE_CHECKING:
    from failover import World

CELLS = 4
"""Cells of a file."""
VOLUME = bytes(range(16))
Txn = tuple[tuple[Any, Any], ...]


@dataclass(eq=False)
class Host:
    """A machine, as the disk sees it."""

    number: int
    key: int = 0
    away: bool = False
    hangs: bool = False
    """While the disk is away, a read that begins ends when it is back (as I/O without a time limit does), not in an
    error."""
    slow: int = 0
    alive: bool = True


@dataclass(eq=False)
class Command:
    """A write under way."""

    host: Host
    key: int
    land: Callable[[bool], None]
    done: Callable[[bool], None]
    lower: bool
    began_ms: int
    ended: bool = False


class Disk:
    """The device that all hosts share."""

    def __init__(self, world: "World", slots: int) -> None:
        self.world = world
        self.leases: list[LeaseRecord | None] = [LeaseRecord(), LeaseRecord(1)]
        self.slots: list[SlotRecord | None] = [SlotRecord(n) for n in range(1, slots + 1)]
        self.pr = world.agent == "pr"
        self.keys: dict[int, int] = {}
        self.reserved = False
        self.generation = 0
        self.under_way: list[Command] = []
        self.fenced: set[int] = set()
        self.flaky = 0.0
        self.tears = 0

    # -- commands ----------------------------------------------------------------------------------------------

    def latency(self, host: Host) -> int:
        rng = self.world.engine.rng
        base = rng.randint(1, 4)
        return base + (rng.randrange(host.slow) if host.slow else 0)

    def refuses(self, key: int) -> bool:
        return self.pr and self.reserved and key not in self.keys

    def write(
        self,
        host: Host,
        land: Callable[[bool], None],
        done: Callable[[bool], None],
        proc: Proc | None,
        lower: bool = False,
    ) -> None:
        """Start a write: *land(torn)* when it takes effect, *done(ok)* in *proc* when it returns."""
        engine, limit = self.world.engine, self.world.timeouts.io_timeout_ms
        command = Command(host, host.key, land, done, lower, engine.now)
        self.under_way.append(command)
        length = min(self.latency(host), limit - 1)
        if engine.rng.random() < self.world.late * (1.0 if lower else 0.1):
            length = engine.rng.randrange(limit // 2, limit)
        engine.at(engine.rng.randint(0, length), self._land, command)
        life = proc.life if proc is not None else 0

        def returned() -> None:
            self._return(command, proc, life)

        engine.at(length, returned)

    def _land(self, command: Command) -> None:
        if command.ended:
            return
        host = command.host
        torn = False
        if not host.alive:
            fate = self.world.engine.rng.random()
            if fate < 0.4:
                return
            torn = fate < 0.6
        if host.away:
            command.ended = True
            return
        if self.refuses(command.key):
            command.ended = True
            return
        command.land(torn)
        command.land = _landed

    def _return(self, command: Command, proc: Proc | None, life: int) -> None:
        if command in self.under_way:
            self.under_way.remove(command)
        ok = command.land is _landed
        command.ended = True
        if proc is None:
            command.done(ok)
        elif proc.alive and proc.life == life:
            wait = max(0, proc.paused_until - self.world.engine.now)
            if command.host.away and not ok:
                wait = max(wait, self.world.timeouts.io_timeout_ms - (self.world.engine.now - command.began_ms))
            self.world.engine.at(wait, command.done, ok, proc=proc)

    def idle_lower(self, host: Host) -> bool:
        """Return whether no write of the host's lower XFS is under way."""
        return not any(command.lower and command.host is host for command in self.under_way)

    # -- lockspace ---------------------------------------------------------------------------------------------

    def lease(self) -> LeaseRecord | None:
        return max((r for r in self.leases if r is not None), key=lambda r: r.order, default=None)

    def read(self, host: Host, proc: Proc, clock: Callable[[], int], then: Callable[[Snapshot | None], None]) -> None:
        """Read the lockspace: lease and slots at different moments of the read; None when the disk is away."""
        engine, length = self.world.engine, self.latency(host)
        began = clock()
        seen: list[Any] = [None, None]
        first, second = sorted((engine.rng.randint(0, length), engine.rng.randint(0, length)))
        swap = engine.rng.random() < 0.5

        def sample(lease: bool) -> None:
            if lease:
                seen[0] = self.lease()
            else:
                seen[1] = tuple(self.slots)

        def ended() -> None:
            if host.away and host.hangs:
                engine.at(10, ended, proc=proc)
                return
            if host.hangs and clock() - began > length:
                sample(True)
                sample(False)
            if host.away or self.refuses(host.key) or seen[1] is None:
                engine.at(self.world.timeouts.heartbeat_ms // 2, then, None, proc=proc)
            else:
                then(Snapshot(began, clock(), seen[0], seen[1]))

        engine.at(first, sample, swap)
        engine.at(second, sample, not swap)
        engine.at(length, ended, proc=proc)

    def put(self, host: Host, proc: Proc, record: SlotRecord | LeaseRecord, done: Callable[[bool], None]) -> None:
        """Write a record of the lockspace."""

        def land(torn: bool) -> None:
            self.place(record, torn)

        self.write(host, land, done, proc)

    def place(self, record: SlotRecord | LeaseRecord, torn: bool = False) -> None:
        if isinstance(record, LeaseRecord):
            index = record.sequence % 2
            self.leases[index] = self.spoilt(self.leases[index], record) if torn else record
        else:
            index = record.slot - 1
            self.slots[index] = self.spoilt(self.slots[index], record) if torn else record

    def spoilt(self, old: Any, new: Any) -> Any:
        """Return what a torn write of *new* over *old* decodes to, by the real codec; never anything wrong."""
        raw = new.encode(VOLUME)
        before = old.encode(VOLUME) if old is not None else bytes(len(raw))
        cut = self.world.engine.rng.choice((16, 512, 64, 100))
        return self.decoded(raw[:cut] + before[cut:], old, new)

    def flip(self, lease: bool, index: int) -> None:
        """Flip a bit of a record on the disk."""
        records: list[Any] = self.leases if lease else self.slots
        record = records[index]
        if record is not None:
            raw = bytearray(record.encode(VOLUME))
            at = self.world.engine.rng.choice((0, 8, 20, 40, 60, 100, 300, 4000))
            raw[at] ^= 1 << self.world.engine.rng.randrange(8)
            records[index] = self.decoded(bytes(raw), record)
            self.tears += 1

    @staticmethod
    def decoded(raw: bytes, *good: Any) -> Any:
        kind = next(record for record in good if record is not None)
        try:
            if isinstance(kind, SlotRecord):
                found: Any = SlotRecord.decode(raw, VOLUME, kind.slot)
            else:
                found = LeaseRecord.decode(raw, VOLUME)
        except MediaError:
            return None
        if found not in good:
            raise Broken(f"a damaged record was taken for good: {found}")
        return found

    # -- reservations ------------------------------------------------------------------------------------------

    def register(self, host: Host, key: int) -> None:
        """REGISTER AND IGNORE EXISTING KEY, then RESERVE (type 8) where nobody has."""
        self.keys.pop(host.key, None)
        host.key = key
        self.generation += 1
        self.keys[key] = host.number
        self.reserved = True

    def preempt(self, by: Host, key: int) -> bool:
        """PREEMPT AND ABORT *key*; return whether the command went through."""
        if by.away or by.key not in self.keys or self.world.engine.rng.random() < self.flaky:
            return False
        self.generation += 1
        self.keys.pop(key, None)
        for command in self.under_way:
            if command.key == key:
                command.ended = True
        return True

    def restart_target(self) -> None:
        """The target starts anew and has forgotten its registrations (no APTPL)."""
        self.keys.clear()
        self.reserved = False
        self.generation = 0


def _landed(torn: bool) -> None:
    """Marks a command that took effect."""


class Volume:
    """What is on the disk outside the lockspace."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.meta: dict[Any, Any] = {}
        self.data: dict[tuple[int, int], tuple[int, int]] = {}
        self.generation = 0

    def by(self, mount: "Mount") -> None:
        """Check that this mount may write: no other one was made since, and its host is not fenced."""
        if mount.generation != self.generation:
            raise Broken(f"a write of node {mount.host.number}'s old mount reached the disk after another node mounted")
        if mount.fence in self.world.disk.fenced:
            raise Broken(f"a write of node {mount.host.number} reached the disk after its fence was confirmed")


class Mount:
    """The lower XFS as one host has it mounted."""

    def __init__(self, world: "World", host: Host, fence: int) -> None:
        self.world = world
        self.host = host
        self.fence = fence
        self.volume = volume = world.volume
        volume.generation += 1
        self.generation = volume.generation
        self.meta = dict(volume.meta)
        self.cells: dict[tuple[int, int], tuple[int, int]] = {}
        self.dirty: dict[tuple[int, int], tuple[int, int]] = {}
        self.sizes: dict[int, int] = {}
        self.writer: dict[int, int] = {}
        self.appended: dict[tuple[int, int], int] = {}
        self.pending: list[Txn] = []
        self.lsn = self.durable_lsn = 0
        self.down = False
        self.logging = False
        self.waiters: list[tuple[int, Future]] = []

    # -- name space --------------------------------------------------------------------------------------------

    def txn(self, *changes: tuple[Any, Any]) -> None:
        """Commit one transaction to the log in memory; a value of None deletes."""
        for key, value in changes:
            if value is None:
                self.meta.pop(key, None)
            else:
                self.meta[key] = value
        self.pending.append(changes)
        self.lsn += 1

    def exists(self, ino: int) -> bool:
        return ("i", ino) in self.meta

    def size(self, ino: int) -> int:
        found = self.sizes.get(ino)
        return int(self.meta.get(("s", ino), 0)) if found is None else found

    def cell(self, ino: int, index: int) -> int:
        """Return the operation whose value the cell shows."""
        hole = self.meta.get(("h", ino, index), (0, 0))
        if index >= self.size(ino):
            return int(hole[1])
        data = self.cells.get((ino, index)) or self.volume.data.get((ino, index), (0, 0))
        return int(max(data, hole)[1])

    def write(self, ino: int, index: int, op: int, writer: int) -> None:
        """Write a cell; nothing of it is durable."""
        value = (self.world.engine.serial(), op)
        self.cells[ino, index] = self.dirty[ino, index] = value
        self.sizes[ino] = max(self.size(ino), index + 1)
        self.writer[ino] = writer

    def cut(self, ino: int, size: int, op: int) -> Txn:
        """Return the changes of a transaction that truncates."""
        version = self.world.engine.serial()
        changes: list[tuple[Any, Any]] = [(("s", ino), size)]
        for index in range(size, CELLS):
            self.dirty.pop((ino, index), None)
            changes.append((("h", ino, index), (version, op)))
        self.sizes.pop(ino, None)
        return tuple(changes)

    # -- durability --------------------------------------------------------------------------------------------

    def force(self) -> Future:
        """Make all transactions up to now durable; the future says whether that worked."""
        future = Future()
        if self.down:
            future.set(False)
        elif self.durable_lsn >= self.lsn:
            future.set(True)
        else:
            self.waiters.append((self.lsn, future))
            self._log(len(self.pending))
        return future

    def _log(self, count: int) -> None:
        """Write the first *count* pending transactions."""
        if self.logging or self.down or not count:
            return
        self.logging = True
        part = self.pending[:count]

        def land(torn: bool) -> None:
            self.volume.by(self)
            # A host that dies while it writes its log leaves the checkpoints that were complete.
            kept = part[: self.world.engine.rng.randint(0, len(part))] if torn else part
            for changes in kept:
                for key, value in changes:
                    if value is None:
                        self.volume.meta.pop(key, None)
                    else:
                        self.volume.meta[key] = value

        def done(ok: bool) -> None:
            self.logging = False
            if self.down:
                return
            if not ok:
                self.fail("log write failed")
                return
            del self.pending[:count]
            self.durable_lsn += count
            ready = [future for lsn, future in self.waiters if lsn <= self.durable_lsn]
            self.waiters = [(lsn, future) for lsn, future in self.waiters if lsn > self.durable_lsn]
            for future in ready:
                future.set(True)
            if self.waiters:
                self._log(len(self.pending))

        self.world.disk.write(self.host, land, done, self.world.nodes[self.host.number].kernel, lower=True)

    def flush(self, ino: int, count: int | None = None) -> Future:
        """Write dirty pages of a file, then log its size."""
        future = Future()
        part = {key: value for key, value in self.dirty.items() if key[0] == ino}
        if count is not None:
            part = dict(list(part.items())[:count])
        if self.down or not part:
            future.set(not self.down)
            return future

        def land(torn: bool) -> None:
            self.volume.by(self)
            for key, value in part.items():
                if torn and self.world.engine.rng.random() < 0.5:
                    continue
                self.volume.data[key] = max(value, self.volume.data.get(key, (0, 0)))

        def returned(ok: bool) -> None:
            if self.down:
                future.set(False)
                return
            if not ok:
                self.fail("data write failed")
                future.set(False)
                return
            for key, value in part.items():
                if self.dirty.get(key) == value:
                    del self.dirty[key]
            reached = max(index for _, index in part) + 1
            if self.exists(ino) and self.meta.get(("s", ino), 0) < min(reached, self.size(ino)):
                done = [(("did", self.appended.pop(key)), True) for key in part if key in self.appended]
                self.txn((("s", ino), min(reached, self.size(ino))), *done)
            if not any(key[0] == ino for key in self.dirty):
                self.sizes.pop(ino, None)
                self.writer.pop(ino, None)
            future.set(True)

        self.world.disk.write(self.host, land, returned, self.world.nodes[self.host.number].kernel, lower=True)
        return future

    def fsync(self, ino: int) -> Any:
        """Make a file's data and everything before durable (a task's part); return whether that worked."""
        if not (yield self.flush(ino)):
            return False
        return (yield self.force())

    def background(self) -> None:
        """The kernel writes something back by itself."""
        rng = self.world.engine.rng
        if self.down:
            return
        if rng.random() < 0.5:
            self._log(rng.randint(0, len(self.pending)))
        if self.dirty and rng.random() < 0.5:
            self.flush(rng.choice([ino for ino, _ in self.dirty]), rng.randint(1, CELLS))

    def fail(self, why: str) -> None:
        """XFS does not survive an I/O error."""
        self.shut_down(why)
        node = self.world.nodes[self.host.number]
        node.local_loss()
        self.world.engine.at(5, node.lower_failed, self, proc=node.heart)

    def shut_down(self, why: str) -> None:
        """GOINGDOWN without a log flush, or an error that XFS does not survive: nothing more is written."""
        if self.down:
            return
        self.down = True
        self.world.engine.note(f"n{self.host.number}", f"lower shut down: {why}")
        for _, future in self.waiters:
            future.set(False)
        self.waiters = []
