"""What applications do on a node of the failover simulator, and what their FUSE layer does for them."""

from typing import Any

from failover_disk import CELLS
from failover_engine import Steps
from failover_ops import DIR, NAMES, before_of, changes_of, entry, registers_of, reply_of
from simcheck import Broken

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, covers

NL, CR, CW, PR, PW, EX = LockMode


class Applications:
    """The part of a FUSE layer (``failover_client.Fuse``) that serves its applications."""

    # -- applications ------------------------------------------------------------------------------------------

    def application(self, thread: int) -> Steps:
        """One thread that does things at random until the world has had enough."""
        world, rng = self.world, self.world.engine.rng
        files: list[int] = []
        acts = (self.stat, self.create, self.unlink, self.rename, self.open_file)
        on_file = (self.read, self.read, self.write, self.write, self.append, self.truncate, self.fsync, self.close)
        while world.engine.now < world.busy_ms:
            yield rng.choice((5, 20, 60, 150))
            if files and rng.random() < 0.7:
                act = rng.choice(on_file)
                self.busy[thread] = act.__name__
                yield from act(files, rng.choice(files))
            elif len(files) < 3 or rng.random() < 0.5:
                named = rng.choices(acts, (3, 2, 1, 1, 4))[0]
                self.busy[thread] = named.__name__
                yield from named(files, rng.choice(NAMES))
            self.busy.pop(thread, None)
        for ino in list(files):
            self.busy[thread] = "last read"
            yield from self.read(files, ino)
            yield from self.close(files, ino)
        self.busy[thread] = "last stat"
        yield from self.stat(files, NAMES[0])
        self.busy.pop(thread, None)

    def cached(self, ino: int) -> bool:
        """Whether the kernel has a copy that may be shown; not while a change of ours is under way."""
        return not self.home_here and ino in self.kernel and not self.changing[ino] and covers(self.cache.mode(ino), PR)

    def names(self) -> Steps:
        """Return {name: (inode, operation)} of the directory, from the cache where that is allowed."""
        while True:
            if self.trusts() and self.cached(DIR):
                return self.kernel[DIR]
            if self.home_here:
                while self.home_here and not covers(self.cache.mode(DIR), PR):
                    yield self.want(DIR, PR)
                home = self.node.home
                if not self.home_here or home is None or not home.may_act():
                    yield 10
                    continue
                return {name: entry(home.mount, name) for name in NAMES}
            change = self.changes[DIR]
            reply, grants = yield self.ship(0, ("lookup",))
            found = {name: (ino, op) for name, ino, op in reply}
            fresh = any(grant == self.cache.seq(DIR) for ino, _, grant in grants if ino == DIR)
            if fresh and covers(self.cache.mode(DIR), PR) and change == self.changes[DIR]:
                self.kernel[DIR] = found
            return found

    def stat(self, files: list[int], name: str) -> Steps:
        floors = self.world.ledger.begin([("n", each) for each in NAMES])
        found = yield from self.names()
        self.world.ledger.saw(self, floors, {("n", each): op for each, (_, op) in found.items()})

    def change(self, *op: Any) -> Steps:
        """Run an operation that changes something, here or at the home. Return (number, reply, durable)."""
        number = self.world.new_op()
        yield from ()
        targets = (DIR,) if op[0] in ("create", "unlink", "rename") else (op[1],)
        while self.home_here:
            home = self.node.home
            if home is None or not home.may_act():
                yield 10
                continue
            if not all(covers(self.cache.mode(ino), EX) for ino in targets):
                yield self.want(next(ino for ino in targets if not covers(self.cache.mode(ino), EX)), EX)
                continue
            victim = entry(home.mount, op[-1 if op[0] == "rename" else 1])[0] if DIR in targets else 0
            if victim and not covers(self.cache.mode(victim), EX) and op[0] != "create":
                yield self.want(victim, EX)
                continue
            return number, self.here(home, number, op), False
        for ino in targets:
            self.changes[ino] += 1
            self.changing[ino] += 1
        reply, _ = yield self.ship(number, op)
        for ino in targets:
            self.changes[ino] += 1
            self.changing[ino] -= 1
            self.kernel.pop(ino, None)
        return number, reply, True

    def here(self, home: Any, number: int, op: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run an operation on the lower mount of this node."""
        mount, ledger = home.mount, self.world.ledger
        self.world.engine.note(f"n{self.number}", f"runs {op} here ({number})")
        before = before_of(mount, op)
        changes = changes_of(mount, op, number, home.is_open)
        if changes:
            mount.txn(*changes, (("did", number), True))
            ledger.executed(number, registers_of(changes), self.serial)
        if op[0] == "append" and before[0] and before[1] < CELLS:
            mount.write(op[1], before[1], number, self.serial)
            ledger.executed(number, [(op[1], before[1])], self.serial)
        return reply_of(mount, op, before)

    def create(self, files: list[int], name: str) -> Steps:
        yield from self.change_name("create", name, self.world.new_ino())

    def unlink(self, files: list[int], name: str) -> Steps:
        yield from self.change_name("unlink", name)

    def rename(self, files: list[int], name: str) -> Steps:
        other = self.world.engine.rng.choice([each for each in NAMES if each != name])
        yield from self.change_name("rename", name, other)

    def change_name(self, *op: Any) -> Steps:
        ledger = self.world.ledger
        register = ("n", op[1])
        floors = ledger.begin([register])
        number, reply, durable = yield from self.change(*op)
        if reply[0] == "done":
            registers = [register] + ([("n", op[2])] if op[0] == "rename" else [])
            ledger.done(self, number, registers, durable, once=True)
        else:
            ledger.saw(self, floors, {register: reply[2]})

    def open_file(self, files: list[int], name: str) -> Steps:
        found = yield from self.names()
        ino = found[name][0]
        if not ino:
            return
        self.counts[ino] += 1
        if not self.home_here and not (self.trusts() and self.cache.may_open(ino, False)):
            yield self.want(ino, PR, LockFlag.OPEN, self.opens_of(ino))
        if self.gone(ino, (yield from self.data(ino))):
            yield from self.close(files, ino)
        else:
            files.append(ino)

    def close(self, files: list[int], ino: int) -> Steps:
        if ino in files:
            files.remove(ino)
        self.counts[ino] -= 1
        self.send("opens", ino, self.opens_of(ino))
        yield 0

    def gone(self, ino: int, reply: tuple[Any, ...]) -> bool:
        return reply[0] == "gone"

    def must_exist(self, ino: int, reply: tuple[Any, ...]) -> None:
        if reply[0] == "gone" and ino not in self.excused:
            raise Broken(f"node {self.number} has inode {ino} open, and it is gone")

    def data(self, ino: int) -> Steps:
        """Return ("data", operations by cell) or ("gone",)."""
        while True:
            if self.trusts() and self.cached(ino):
                return self.kernel[ino]
            if self.home_here:
                while self.home_here and not covers(self.cache.mode(ino), PR):
                    yield self.want(ino, PR)
                home = self.node.home
                if not self.home_here or home is None or not home.may_act():
                    yield 10
                    continue
                mount = home.mount
                if not mount.exists(ino):
                    return ("gone",)
                return ("data", *(mount.cell(ino, index) for index in range(CELLS)))
            change = self.changes[ino]
            reply, grants = yield self.ship(0, ("read", ino))
            fresh = any(grant == self.cache.seq(ino) for at, _, grant in grants if at == ino)
            if fresh and covers(self.cache.mode(ino), PR) and change == self.changes[ino]:
                self.kernel[ino] = reply
            return reply

    def read(self, files: list[int], ino: int) -> Steps:
        floors = self.world.ledger.begin([(ino, index) for index in range(CELLS)])
        reply = yield from self.data(ino)
        self.must_exist(ino, reply)
        if reply[0] == "data":
            self.world.ledger.saw(self, floors, {(ino, index): op for index, op in enumerate(reply[1:])})

    def exclusive(self, ino: int, work: Steps) -> Steps:
        """Run this with the inode locked, as the kernel does for whatever changes a file."""
        while ino in self.writing:
            yield 2
        self.writing.add(ino)
        yield from work
        self.writing.discard(ino)

    def write(self, files: list[int], ino: int) -> Steps:
        yield from self.exclusive(ino, self.write_cell(ino))

    def append(self, files: list[int], ino: int) -> Steps:
        yield from self.exclusive(ino, self.append_cell(ino))

    def truncate(self, files: list[int], ino: int) -> Steps:
        yield from self.exclusive(ino, self.cut(ino))

    def write_cell(self, ino: int) -> Steps:
        """Write a cell: under EX, to be kept until it is committed, or without, durable when it is answered."""
        rng, ledger = self.world.engine.rng, self.world.ledger
        index, number = rng.randrange(CELLS), self.world.new_op()
        cached = rng.random() < 0.7
        while self.home_here or (cached and not covers(self.cache.data_mode(ino), PW)):
            home = self.node.home
            if self.home_here and (home is None or not home.may_act()):
                yield 10
            elif not covers(self.cache.mode(ino), EX):
                yield self.want(ino, EX)
            elif self.home_here and home is not None:
                if home.mount.exists(ino):
                    home.mount.write(ino, index, number, self.serial)
                    ledger.executed(number, [(ino, index)], self.serial)
                    ledger.done(self, number, [(ino, index)], False)
                return
        pin = self.pin(ino) if covers(self.cache.data_mode(ino), PW) else None
        if pin is None:
            # It will not be kept, and what is would undo it.
            yield from self.before_setattr(ino)
        self.changes[ino] += 1
        self.changing[ino] += 1
        (reply, *_), _ = yield self.ship(number, ("write", ino, index, pin is None))
        self.changes[ino] += 1
        self.changing[ino] -= 1
        self.kernel.pop(ino, None)
        self.must_exist(ino, (reply,))
        if reply != "gone":
            if reply == "unstable":
                self.keep(ino, index, number)
            ledger.done(self, number, [(ino, index)], reply == "stable")
            if reply == "unstable" and (self.home_here or not covers(self.cache.data_mode(ino), PW)):
                yield from self.commit(ino)
        if pin is not None:
            self.unpin(*pin)

    def append_cell(self, ino: int) -> Steps:
        yield from self.before_setattr(ino)
        number, reply, durable = yield from self.change("append", ino)
        self.must_exist(ino, reply)
        if reply[0] == "done":
            self.world.ledger.done(self, number, [(ino, reply[1])], durable, once=True)

    def cut(self, ino: int) -> Steps:
        yield from self.before_setattr(ino)
        size = self.world.engine.rng.randrange(CELLS)
        number, reply, durable = yield from self.change("truncate", ino, size)
        self.must_exist(ino, reply)
        if reply[0] == "done":
            registers = [(ino, index) for index in range(size, CELLS)]
            self.world.ledger.done(self, number, registers, durable, once=True)

    def before_setattr(self, ino: int) -> Steps:
        """What is kept would undo the change when it is sent again: it is committed before."""
        if self.keeps(ino) and self.rules.commit_before_change and not self.home_here:
            yield from self.commit(ino)

    def fsync(self, files: list[int], ino: int) -> Steps:
        ledger = self.world.ledger
        if self.home_here and self.node.home is not None:
            promised = ledger.owned(self, ino)
            home = self.node.home
            if (yield from home.mount.fsync(ino)):
                ledger.synced(self, promised)
        else:
            promised = yield from self.commit(ino)
            ledger.synced(self, promised)
