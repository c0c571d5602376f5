"""What the operations of the failover simulator do to the lower XFS, and how their happening is told afterwards."""

from stat import S_IFREG
from typing import Any

from failover_disk import CELLS, Mount

from mxfs_proto.modes import LockMode
from mxfs_proto.ops import NO_FID, Attr, Fid, Op, Request
from mxfsd.core.outcomes import Before, Intent, Now, Step, settle

EX, PR = LockMode.EX, LockMode.PR
DIR = 1
"""The one directory's inode."""
NAMES = ("a", "b", "c")
ONCE = ("create", "unlink", "rename", "truncate", "append")
"""Operations with intent and outcome. A write that is durable before its reply needs the outcome alone."""


def locks_of(op: tuple[Any, ...]) -> list[tuple[int, LockMode]]:
    """Return the operation locks that an operation needs."""
    match op[0]:
        case "create" | "unlink" | "rename":
            return [(DIR, EX)]
        case "lookup":
            return [(DIR, PR)]
        case "truncate":
            return [(op[1], EX)]
        case "append" | "write" | "reap":
            return [(op[1], EX)]
        case "read":
            return [(op[1], PR)]
    return []


def entry(mount: Mount, name: str) -> tuple[int, int]:
    """Return (inode or 0, operation that made it so) of a name."""
    found: tuple[int, int] = mount.meta.get(("n", name), (0, 0))
    return found


def before_of(mount: Mount, op: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what has to be known to tell afterwards whether the operation happened."""
    match op:
        case ("create" | "unlink", name, *_):
            return (entry(mount, name)[0],)
        case ("rename", old, new):
            return (entry(mount, old)[0], entry(mount, new)[0])
        case (_, ino, *_):
            return (mount.exists(ino), mount.size(ino))
    raise AssertionError(op)


def judged(mount: Mount, op: tuple[Any, ...], before: tuple[Any, ...]) -> Step:
    """Ask the real code what became of an operation with this intent and no outcome."""

    def attr(ino: int) -> Attr | None:
        return Attr(ino, 1, S_IFREG, 1, 0, 0, 0, 0, 0, 0, 0, 0) if ino else None

    def fid(ino: int) -> Fid:
        return Fid(ino, 1) if ino else NO_FID

    values: list[Any] = []
    match op:
        case ("create", name, *_):
            return settle(Intent(Before(), Request(Op.CREATE, 0, 0, 0, 0, values)), Now(attr(entry(mount, name)[0])))
        case ("unlink", name):
            intent = Intent(Before(fid(before[0])), Request(Op.UNLINK, 0, 0, 0, 0, values))
            return settle(intent, Now(attr(entry(mount, name)[0])))
        case ("rename", old, new):
            intent = Intent(Before(fid(before[0]), fid(before[1])), Request(Op.RENAME, 0, 0, 0, 0, values))
            return settle(intent, Now(attr(entry(mount, old)[0]), attr(entry(mount, new)[0])))
        case ("truncate", *_):
            return settle(Intent(Before(), Request(Op.SETATTR, 0, 0, 0, 0, values)), Now())
        case ("append", *_):
            return settle(Intent(Before(number=before[1]), Request(Op.WRITE, 0, 0, 0, 0, values)), Now())
    raise AssertionError(op)


def taken_back(mount: Mount, op: tuple[Any, ...], before: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    """Return the transaction that takes an append back: the size before is the truth."""
    ino, size = op[1], before[1]
    if not mount.exists(ino) or mount.size(ino) <= size:
        return ()
    version = mount.world.engine.serial()
    holes = [("h", ino, index) for index in range(size, CELLS)]
    changes = [(hole, (version, mount.meta.get(hole, (0, 0))[1])) for hole in holes]
    return ((("s", ino), size), *changes, (("did", number), None))


def changes_of(mount: Mount, op: tuple[Any, ...], number: int, is_open: Any) -> tuple[Any, ...]:
    """Return the transaction that an operation makes; nothing where it fails."""

    def drop(ino: int) -> list[tuple[Any, Any]]:
        if is_open(ino):
            return [(("o", ino), True)]
        return [(("i", ino), None), (("s", ino), None)]

    match op:
        case ("create", name, ino):
            if not entry(mount, name)[0]:
                return ((("n", name), (ino, number)), (("i", ino), True), (("s", ino), 0))
        case ("unlink", name):
            ino = entry(mount, name)[0]
            if ino:
                return ((("n", name), (0, number)), *drop(ino))
        case ("rename", old, new):
            ino, victim = entry(mount, old)[0], entry(mount, new)[0]
            if ino:
                return ((("n", old), (0, number)), (("n", new), (ino, number)), *(drop(victim) if victim else ()))
        case ("truncate", ino, size):
            if mount.exists(ino) and size < mount.size(ino):
                return mount.cut(ino, size, number)
    return ()


def registers_of(changes: tuple[Any, ...]) -> list[Any]:
    """Return the registers that a transaction changes."""
    registers: list[Any] = []
    for key, _value in changes:
        if key[0] == "n":
            registers.append(key)
        elif key[0] == "h":
            registers.append((key[1], key[2]))
    return registers


def reply_of(mount: Mount, op: tuple[Any, ...], before: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what is answered, from the state after the operation (or after the mount that settled it)."""
    match op:
        case ("create", name, _ino):
            return ("exists" if before[0] else "done", *entry(mount, name))
        case ("unlink", name):
            return ("done" if before[0] else "absent", *entry(mount, name))
        case ("rename", old, _new):
            return ("done" if before[0] else "absent", *entry(mount, old))
        case ("truncate", _ino, size):
            return ("gone",) if not before[0] else ("done" if size < before[1] else "same",)
        case ("append", _ino):
            return ("gone",) if not before[0] else (("done", before[1]) if before[1] < CELLS else ("full",))
    raise AssertionError(op)


def seen(mount: Mount, op: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a read or a lookup shows."""
    if op[0] == "lookup":
        return tuple((name, *entry(mount, name)) for name in NAMES)
    if not mount.exists(op[1]):
        return ("gone",)
    return ("data", *(mount.cell(op[1], index) for index in range(CELLS)))
