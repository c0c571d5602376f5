"""Clients of a home that dies: random operations on a real XFS, crashes at any step, and a model to compare with.

Each client has names and objects of its own, in shared directories, and one operation under way. So the state that a
client must find is known exactly, whatever the others do: that of the model before, or after, its operation.
"""

import asyncio
import errno
import fcntl
import os
import random
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from homekit import turns, until

from mxfs_proto.frames import Frame, FrameType
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import NO_FID, Fid, Op, OpFlag, Valid, WriteFlag, pack_request, pack_writes, unpack_reply
from mxfs_proto.records import LockBast, LockRecord, LockRelease, Opens
from mxfsd.core.sessions import SessionTable
from mxfsd.core.timeouts import Timeouts
from mxfsd.homerole import HomeRole
from mxfsd.io import libc
from mxfsd.io.lower import Lower
from mxfsd.io.ranges import ERASES, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from mxfsd.settling import recover_sessions

HOME, HOLDER = 1, 9
VOLUME = 5
_GOINGDOWN, _NO_LOG_FLUSH = 0x8004587D, struct.pack("=I", 2)
LONG = b"n" * 180
BIG = bytes(range(256)) * 8
"""A value above what an intent holds."""


class Plan:
    """When the log is forced by chance, and when the machine dies: counted in steps (before or after a change)."""

    def __init__(self, flush_at: int, crash_at: int) -> None:
        self.flush_at = flush_at
        self.crash_at = crash_at
        self.steps = 0
        self.crashed = threading.Event()
        self._lock = threading.Lock()

    def step(self, lower: Lower) -> None:
        with self._lock:
            self.steps += 1
            if self.steps == self.flush_at and not self.crashed.is_set():
                libc.syncfs(lower.mount_fd)
            if self.steps == self.crash_at:
                fcntl.ioctl(lower.mount_fd, _GOINGDOWN, _NO_LOG_FLUSH)
                self.crashed.set()


class SteppedLower(Lower):
    """A lower mount with a step before and behind each change and each force."""

    plan = Plan(0, 0)

    def setattr(self, fid: Fid, valid: int, *values: int) -> Any:  # type: ignore[override]
        """Its parts one by one, with a step in between."""
        self.plan.step(self)
        for bit in (Valid.SIZE, Valid.MODE):
            if valid & bit and valid & ~bit:
                super().setattr(fid, bit, *values)
                self.plan.step(self)
                valid &= ~bit
        attr = super().setattr(fid, valid, *values)
        self.plan.step(self)
        return attr


def _stepped(name: str) -> Any:
    inner = getattr(Lower, name)

    def call(self: SteppedLower, *args: Any) -> Any:
        self.plan.step(self)
        result = inner(self, *args)
        self.plan.step(self)
        return result

    return call


CHANGES = (
    "create",
    "mknod",
    "mkdir",
    "symlink",
    "link",
    "unlink",
    "rmdir",
    "rename",
    "setxattr",
    "removexattr",
    "sync",
)
for _name in CHANGES:
    setattr(SteppedLower, _name, _stepped(_name))


@dataclass
class Obj:
    """An object of the model."""

    kind: int
    mode: int = 0o644
    data: bytes = b""
    links: int = 1
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    fid: Fid = NO_FID


Tree = dict[tuple[int, bytes], Obj]


def copy_tree(tree: Tree) -> Tree:
    """A copy in which names of one object still share one."""
    seen: dict[int, Obj] = {}
    return {key: seen.setdefault(id(obj), replace(obj, xattrs=dict(obj.xattrs))) for key, obj in tree.items()}


@dataclass
class Call:
    """An operation under way."""

    seq: int
    op: Op
    values: list[Any]
    after: Tree
    """The model behind it."""
    check: Callable[[int, list[Any]], None]
    """Looks at the reply: (errno, values)."""
    kept: Obj | None = None


class Client:
    """One node and its session."""

    def __init__(self, node: int, dirs: list[Fid], rng: random.Random) -> None:
        self.node = node
        self.session = 0x100000 + node + rng.randrange(1 << 40) * 0x1000000
        self.dirs = dirs
        self.rng = rng
        self.tree: Tree = {}
        self.seq = 0
        self.call: Call | None = None
        self.history: list[str] = []
        self.open: dict[Fid, bool] = {}
        """Objects that HOLDER has open, and whether they lost their last name."""
        self.names = [b"%d-%d" % (node, n) for n in range(5)] + [b"%d-" % node + LONG]

    # -- choosing what to do ---------------------------------------------------------------------------------------

    def _pick(self, used: bool, kinds: tuple[int, ...] = ()) -> tuple[int, bytes] | None:
        keys = [
            (d, name)
            for d in range(len(self.dirs))
            for name in self.names
            if ((d, name) in self.tree) == used and (not kinds or self.tree[d, name].kind in kinds)
        ]
        return self.rng.choice(keys) if keys else None

    def choose(self) -> Call:
        """Prepare the next operation, and the model behind it."""
        while True:
            kind = self.rng.choice(
                ["make"] * 4 + ["unlink"] * 2 + ["rename"] * 4 + ["link", "setattr", "setattr", "xattr", "unxattr"]
                + ["append"] * 3 + ["allocate", "copy"]
            )  # fmt: skip
            made = getattr(self, "_do_" + kind)(copy_tree(self.tree))
            if made is not None:
                self.seq += 1
                self.call = made
                made.seq = self.seq
                self.history.append(f"{self.seq} {made.op.name} {[str(v)[:40] for v in made.values]}")
                return made

    def _at(self, key: tuple[int, bytes]) -> list[Any]:
        return [*self.dirs[key[0]], key[1]]

    def _do_make(self, tree: Tree) -> Call | None:
        key = self._pick(False)
        if key is None:
            return None
        obj = Obj(0)

        def check(code: int, values: list[Any]) -> None:
            assert code == 0, f"{os.strerror(code)}: done before?"
            obj.fid = Fid(values[-2].ino, values[-2].gen)

        op = self.rng.choice((Op.CREATE, Op.CREATE, Op.MKDIR, Op.SYMLINK, Op.MKNOD))
        values = self._at(key)
        obj.kind = {Op.CREATE: stat.S_IFREG, Op.MKDIR: stat.S_IFDIR, Op.SYMLINK: stat.S_IFLNK}.get(op, stat.S_IFIFO)
        if op is Op.CREATE:
            values += [0o640, os.O_EXCL]
            obj.mode = 0o640
        elif op is Op.MKDIR:
            values += [0o750]
            obj.mode, obj.links = 0o750, 2
        elif op is Op.SYMLINK:
            values += [b"target of %d" % self.seq]
            obj.mode, obj.data = 0o777, b"target of %d" % self.seq
        else:
            values += [stat.S_IFIFO | 0o600, 0]
            obj.mode = 0o600
        tree[key] = obj
        return Call(0, op, values, tree, check)

    def _lose(self, obj: Obj) -> tuple[list[int], Obj | None]:
        """What a reply says of an object that loses a name; the object where it is kept."""
        obj.links -= 1
        if obj.kind != stat.S_IFDIR and obj.links == 0 and obj.fid in self.open:
            return [*obj.fid], obj
        return [*NO_FID], None

    def _do_unlink(self, tree: Tree) -> Call | None:
        key = self._pick(True)
        if key is None:
            return None
        obj = tree.pop(key)
        if obj.kind == stat.S_IFDIR:
            return Call(0, Op.RMDIR, self._at(key), tree, _expect([], 1))
        links = obj.links
        said, kept = self._lose(obj)
        return Call(0, Op.UNLINK, [*self._at(key), *obj.fid], tree, _expect([*said, obj.fid.ino, links], 1), kept)

    def _do_rename(self, tree: Tree) -> Call | None:
        old = self._pick(True)
        new = self._pick(self.rng.random() < 0.6)
        if old is None or new is None or old == new:
            return None
        source, target = tree[old], tree.get(new)
        flags = self.rng.choice((0, 0, 1, 2))
        if target is not None and flags == 1:
            return None
        if target is None and flags == 2:
            return None
        lost = (target.fid.ino, target.links) if target is not None else (0, 0)
        said, kept = [*NO_FID], None
        if flags == 2:
            assert target is not None
            tree[old], tree[new] = target, source
        elif target is not source:
            if target is not None:
                if (target.kind == stat.S_IFDIR) != (source.kind == stat.S_IFDIR):
                    return None
                said, kept = self._lose(target)
            tree[new] = tree.pop(old)
        promised = target.fid if target is not None else NO_FID
        values = [*self._at(old), *self._at(new), flags, *promised]
        return Call(0, Op.RENAME, values, tree, _expect([*said, source.fid.ino, *lost], 2, 1), kept)

    def _do_link(self, tree: Tree) -> Call | None:
        old, new = self._pick(True, (stat.S_IFREG, stat.S_IFIFO)), self._pick(False)
        if old is None or new is None:
            return None
        obj = tree[new] = tree[old]
        obj.links += 1

        def check(code: int, values: list[Any]) -> None:
            assert (code, values[0].nlink) == (0, obj.links)

        return Call(0, Op.LINK, [*obj.fid, *self._at(new)], tree, check)

    def _file(self, tree: Tree) -> Obj | None:
        key = self._pick(True, (stat.S_IFREG,))
        return tree[key] if key is not None else None

    def _do_setattr(self, tree: Tree) -> Call | None:
        obj = self._file(tree)
        if obj is None:
            return None
        valid = self.rng.choice((Valid.MODE, Valid.SIZE, Valid.MODE | Valid.SIZE))
        mode, size = self.rng.choice((0o600, 0o640, 0o644)), self.rng.choice((0, 5, 100))
        if valid & Valid.MODE:
            obj.mode = mode
        if valid & Valid.SIZE:
            obj.data = obj.data[:size].ljust(size, b"\0")

        def check(code: int, values: list[Any]) -> None:
            assert (code, stat.S_IMODE(values[0].mode), values[0].size) == (0, obj.mode, len(obj.data))

        return Call(0, Op.SETATTR, [*obj.fid, valid, mode, 0, 0, size, 0, 0], tree, check)

    def _do_xattr(self, tree: Tree) -> Call | None:
        obj = self._file(tree)
        if obj is None:
            return None
        name, value = self.rng.choice((b"user.a", b"user.b")), self.rng.choice((b"1", b"22", BIG))
        flags = 0 if name in obj.xattrs else self.rng.choice((0, os.XATTR_CREATE))
        obj.xattrs[name] = value
        return Call(0, Op.SETXATTR, [*obj.fid, name, value, flags], tree, _expect([]))

    def _do_unxattr(self, tree: Tree) -> Call | None:
        obj = self._file(tree)
        if obj is None or not obj.xattrs:
            return None
        name = self.rng.choice(list(obj.xattrs))
        del obj.xattrs[name]
        return Call(0, Op.REMOVEXATTR, [*obj.fid, name], tree, _expect([]))

    def _do_append(self, tree: Tree) -> Call | None:
        obj = self._file(tree)
        if obj is None:
            return None
        data = b"<%d>" % self.seq * self.rng.choice((1, 5, 3000))
        place = len(obj.data)
        obj.data += data
        if self.rng.random() < 0.5:
            return Call(0, Op.WRITE, [*obj.fid, 0, WriteFlag.APPEND, data], tree, _expect([place, len(data)]))
        pieces = pack_writes([(0, data[:2]), (0, data[2:])])
        return Call(0, Op.WRITES, [*obj.fid, WriteFlag.APPEND, pieces], tree, _expect([len(data)]))

    def _do_allocate(self, tree: Tree) -> Call | None:
        obj = self._file(tree)
        if obj is None:
            return None
        mode = self.rng.choice((0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE))
        start, length = self.rng.choice((0, 3, 4096)), self.rng.choice((2, 4096, 9000))
        end = start + length
        if not mode & KEEP_SIZE:
            obj.data = obj.data.ljust(end, b"\0")
        if mode & ERASES:
            gone = max(0, min(end, len(obj.data)) - start)
            obj.data = obj.data[:start] + bytes(gone) + obj.data[start + gone :]
        return Call(0, Op.FALLOCATE, [*obj.fid, mode, start, length, 0], tree, _expect([]))

    def _do_copy(self, tree: Tree) -> Call | None:
        source, target = self._file(tree), self._file(tree)
        if source is None or target is None or source.fid == target.fid:
            return None
        start, place, length = self.rng.choice((0, 2)), self.rng.choice((0, 1, 4096)), self.rng.choice((3, 10_000))
        piece = source.data[start : start + length]
        if piece:
            data = target.data.ljust(place, b"\0")
            target.data = data[:place] + piece + data[place + len(piece) :]
        values = [*source.fid, start, *target.fid, place, length, 0]
        return Call(0, Op.COPY, values, tree, _expect([len(piece)]))

    def past(self) -> str:
        """What happened last, for a failure's message."""
        return "\n".join(self.history[-20:]) + "\n"

    # -- ends ------------------------------------------------------------------------------------------------------

    def answered(self, payload: bytes) -> None:
        """The reply came."""
        call = self.call
        assert call is not None
        code, _grants, values = unpack_reply(call.op, payload)
        try:
            call.check(code, values)
        except AssertionError as exc:
            raise AssertionError(f"{self.past()}{call.values[:8]}: {code} {values}: {exc}") from None
        if call.kept is not None:
            self.open[call.kept.fid] = True
        self.history.append(f"{call.seq} answered")
        self.tree = call.after
        self.call = None

    def ship(self, role: HomeRole) -> None:
        """Send the operation under way (again)."""
        call = self.call
        assert call is not None
        payload = b"".join(pack_request(call.op, OpFlag.WANT_LOCK, 0, 0, call.seq - 1, call.values))
        role.on_operation(self.node, Frame(FrameType.OP_REQ, role.epoch, self.session, call.seq, payload))

    def agrees(self, lower: Lower, tree: Tree) -> str:
        """Compare the disk with *tree*: what differs, or nothing."""
        for d, parent in enumerate(self.dirs):
            there = {name for name in lower.names(parent) if name.startswith(b"%d-" % self.node)}
            meant = {name for at, name in tree if at == d}
            if there != meant:
                return f"directory {d} has {sorted(there)}, not {sorted(meant)}"
        for (d, name), obj in tree.items():
            attr = lower.lookup(self.dirs[d], name)
            fid = Fid(attr.ino, attr.gen)
            what = (stat.S_IFMT(attr.mode), stat.S_IMODE(attr.mode), attr.nlink)
            if what != (obj.kind, obj.mode, obj.links) or obj.fid not in (fid, NO_FID):
                return f"{name!r} is {what} {fid}, not {obj.kind, obj.mode, obj.links, obj.fid}"
            if obj.kind == stat.S_IFREG:
                fd = lower.open(fid, os.O_RDONLY)
                data = os.pread(fd, 1 << 20, 0)
                os.close(fd)
                if data != obj.data:
                    return f"{name!r} has {len(data)} bytes {data[:40]!r}, not {len(obj.data)} {obj.data[:40]!r}"
                xattrs = {key: lower.getxattr(fid, key) for key in lower.listxattr(fid)}
                if xattrs != obj.xattrs:
                    return f"{name!r} has {list(xattrs)}, not {list(obj.xattrs)}"
            elif obj.kind == stat.S_IFLNK and lower.readlink(fid) != obj.data:
                return f"{name!r} points to {lower.readlink(fid)!r}"
        return ""


def _expect(wanted: list[Any], parents: int = 0, between: int = 0) -> Callable[[int, list[Any]], None]:
    """A check for a reply that ends with the attributes of so many directories; *between*: values that may differ."""

    def check(code: int, values: list[Any]) -> None:
        said = values[: len(values) - parents - between]
        assert (code, said) == (0, wanted), f"not {wanted}"
        assert all(stat.S_ISDIR(attr.mode) for attr in values[len(said) + between :])

    return check


class World:
    """A home on a device, its clients, and its deaths."""

    def __init__(self, device: str, seed: int, mutate: Callable[[HomeRole], None] = lambda _role: None) -> None:
        self.device = device
        self.rng = random.Random(seed)
        self.mutate = mutate
        self.epoch = 0
        self.lower = self.mount()
        folder = b"world%d" % self.rng.getrandbits(60)
        self.lower.mkdir(self.lower.root, folder, 0o755, 0, 0)
        top = self.lower.lookup(self.lower.root, folder)
        self.dirs = []
        for n in range(2):
            attr = self.lower.mkdir(Fid(top.ino, top.gen), b"%d" % n, 0o755, 0, 0)
            self.dirs.append(Fid(attr.ino, attr.gen))
        self.lower.syncfs()
        self.clients = [Client(node, self.dirs, self.rng) for node in (2, 3, 4)]
        self.failures: list[str] = []
        self.settled: dict[str, int] = {}

    def mount(self) -> SteppedLower:
        for tries in range(1000):
            try:
                lower = SteppedLower(libc.mount_detached(self.device, False))
                break
            except OSError as exc:  # a force that runs in a thread has a descriptor yet
                if exc.errno != errno.EBUSY or tries == 999:
                    raise
                time.sleep(0.01)
        lower.plan = Plan(0, 0)
        lower.prepare()
        return lower

    def start(self) -> HomeRole:
        """A new home: settle, and check each client's operation against the disk."""
        self.epoch += 1
        sessions = SessionTable()
        recovered = recover_sessions(self.lower, sessions, VOLUME)
        for what in ("executed", "forgotten", "named_again"):
            self.settled[what] = self.settled.get(what, 0) + getattr(recovered, what)
        kept = {(session, seq) for session, seq, _ in sessions.kept()}
        for client in self.clients:
            call = client.call
            done = call is not None and (client.session, call.seq) in kept
            client.history.append(f"home {self.epoch}, {'kept' if done else 'not kept'}")
            differs = client.agrees(self.lower, call.after if call is not None and done else client.tree)
            assert not differs, client.past() + differs
        role = HomeRole(
            HOME, self.epoch, self.lower, Timeouts.named("fast"), sessions, False, self._lock, self._reply, print,
            recovered.records, self.failures.append,
        )  # fmt: skip
        for client in self.clients:
            role.claim_session(client.node, client.session)
            for fid in client.open:
                role.run(role.master.reclaim(0, HOLDER, fid.ino, LockMode.NL, (1, 0)))
        role.forget_sessions()
        role.run(role.master.grace_over(0))
        self.role = role
        write = recovered.records._write

        def stepped(*args: Any) -> None:
            self.lower.plan.step(self.lower)
            write(*args)
            self.lower.plan.step(self.lower)

        recovered.records._write = stepped  # type: ignore[method-assign]
        self.mutate(role)
        return role

    def _lock(self, node: int, record: LockRecord) -> None:
        if isinstance(record, LockBast):
            opens = (0, 0)
            release = LockRelease(record.ino, record.seq, LockMode.NL, *opens)
            asyncio.get_running_loop().call_soon(self.role.on_lock, node, release)

    def _reply(self, node: int, kind: FrameType, parts: list[bytes], session: int, seq: int) -> None:
        client = next(c for c in self.clients if c.node == node)
        assert client.call is not None and (client.session, client.call.seq) == (session, seq)
        client.answered(b"".join(parts))

    async def life(self, crash_at: int, flush_at: int) -> None:
        """Serve until the crash; then the next home stands, everything sent again is answered, and all agrees."""
        role = self.start()
        for client in self.clients:
            if client.call is not None:
                client.ship(role)
        await until(lambda: all(client.call is None for client in self.clients))
        self.check()
        self._open_and_close(role)
        plan = self.lower.plan = Plan(flush_at, crash_at)
        while not plan.crashed.is_set():
            for client in self.clients:
                if client.call is None:
                    client.choose()
                    client.ship(role)
            await until(lambda: plan.crashed.is_set() or any(client.call is None for client in self.clients))
        await until(lambda: role.failed or not role._tasks)
        assert len(self.failures) <= self.epoch, "told once"
        await self._end(role)
        self.lower.close()
        self.lower = self.mount()

    async def _end(self, role: HomeRole) -> None:
        while left := [*role._tasks, *role.service._running]:
            for task in left:  # it waits for a lock of the operation that found the mount dead
                task.cancel()
            await turns()

    def _open_and_close(self, role: HomeRole) -> None:
        """HOLDER opens a file of each client, or closes what it had open (an orphan then goes)."""
        for client in self.clients:
            for fid in list(client.open):
                if self.rng.random() < 0.3:
                    del client.open[fid]
                    role.on_lock(HOLDER, Opens(fid.ino, 0, 0, LockFlag.NONE))
            obj = client._file(client.tree)
            if obj is not None:
                client.open.setdefault(obj.fid, False)
                role.on_lock(HOLDER, Opens(obj.fid.ino, 1, 0, LockFlag.NONE))

    def check(self) -> None:
        for client in self.clients:
            differs = client.agrees(self.lower, client.tree)
            assert not differs, client.past() + differs
            orphans = set(self.lower.orphans())
            for fid, lost in client.open.items():
                assert (fid in orphans) == lost, f"orphan {fid}: {lost}"

    async def close(self) -> None:
        """End what runs, and unmount."""
        await self._end(self.role)
        self.lower.close()
