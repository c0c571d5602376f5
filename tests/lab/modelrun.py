"""Random operations made from a seed, run on real folders, and compared with the model; a failing run is shrunk."""

import contextlib
import ctypes
import errno
import os
import random
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model as m
from model import Inode, Model, Result, Unsuitable

NAMES = [b"a", b"b", b"c", b"d", b"e", "\u00fc".encode(), b"\xff\xfe raw", b"n" * 255]
TOO_LONG = b"l" * 256
XATTRS = ["user.one", "user.two", "trusted.three"]
SLOTS = 6
MAX_FILE = 300_000

_libc = ctypes.CDLL(None, use_errno=True)


class Mismatch(Exception):
    """The file system did what the model says it must not; the text says where."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: the node it runs on, its name in `Model`, its arguments."""

    node: str
    kind: str
    args: tuple[Any, ...]

    def __str__(self) -> str:
        shown = [
            f"<{len(arg)} bytes {arg[:4].hex()}>" if isinstance(arg, bytes) and len(arg) > 60 else repr(arg)
            for arg in self.args
        ]
        return f"{self.node} {self.kind}({', '.join(shown)})"


def _renameat2(old: bytes, new: bytes, flags: int) -> None:
    at_fdcwd = -100
    if _libc.renameat2(at_fdcwd, old, at_fdcwd, new, flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def kernel_fields(st: os.stat_result) -> tuple[int, ...]:
    """Return what `Inode.fields` returns, of a real object."""
    size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
    return st.st_mode, st.st_nlink, st.st_uid, st.st_gid, size, st.st_rdev


class Executor:
    """Runs operations with real system calls below one folder, which several nodes may see by several paths."""

    def __init__(self, roots: dict[str, Path]) -> None:
        self.roots = {node: os.fsencode(root) for node, root in roots.items()}
        self.fds: dict[int, int] = {}

    def close(self) -> None:
        """Close whatever descriptors are left."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def apply(self, op: Op) -> Result:
        """Run *op*; ("ok", value) or ("err", errno)."""
        root = self.roots[op.node]
        try:
            return "ok", getattr(self, "_" + op.kind)(root, *op.args)
        except OSError as failed:
            return "err", failed.errno

    @staticmethod
    def _at(root: bytes, path: bytes) -> bytes:
        return root + b"/" + path if path else root

    def _with(self, path: bytes, flags: int, use: Callable[[int], Any], mode: int = 0) -> Any:
        fd = os.open(path, flags | os.O_NONBLOCK, mode)
        try:
            return use(fd)
        finally:
            os.close(fd)

    def _mkdir(self, root: bytes, path: bytes, mode: int) -> None:
        os.mkdir(self._at(root, path), mode)

    def _mknod(self, root: bytes, path: bytes, mode: int, rdev: int) -> None:
        os.mknod(self._at(root, path), mode, rdev)

    def _symlink(self, root: bytes, target: bytes, path: bytes) -> None:
        os.symlink(target, self._at(root, path))

    def _link(self, root: bytes, old: bytes, new: bytes) -> None:
        os.link(self._at(root, old), self._at(root, new), follow_symlinks=False)

    def _unlink(self, root: bytes, path: bytes) -> None:
        os.unlink(self._at(root, path))

    def _rmdir(self, root: bytes, path: bytes) -> None:
        os.rmdir(self._at(root, path))

    def _rename(self, root: bytes, old: bytes, new: bytes, flags: int) -> None:
        old, new = self._at(root, old), self._at(root, new)
        try:
            _renameat2(old, new, flags)
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
            # docs/limits.md: a directory that another node has just moved, met first inside a rename of ours.
            for path in (old, new):
                with contextlib.suppress(OSError):
                    os.lstat(path)
            _renameat2(old, new, flags)

    def _create(self, root: bytes, path: bytes, excl: bool, mode: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if excl else 0)
        self._with(self._at(root, path), flags, lambda fd: None, mode)

    def _write(self, root: bytes, path: bytes, offset: int, payload: bytes) -> Any:
        return self._with(self._at(root, path), os.O_WRONLY, lambda fd: os.pwrite(fd, payload, offset))

    def _append(self, root: bytes, path: bytes, payload: bytes) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        return self._with(self._at(root, path), flags, lambda fd: os.write(fd, payload), 0o644)

    def _read(self, root: bytes, path: bytes, offset: int, size: int) -> Any:
        return self._with(self._at(root, path), os.O_RDONLY, lambda fd: os.pread(fd, size, offset))

    def _truncate(self, root: bytes, path: bytes, size: int) -> None:
        os.truncate(self._at(root, path), size)

    def _open(
        self, root: bytes, slot: int, path: bytes, readable: bool, writable: bool, append: bool, trunc: bool
    ) -> None:
        access = (os.O_RDWR if readable else os.O_WRONLY) | os.O_CREAT if writable else os.O_RDONLY
        flags = access | (os.O_APPEND if append else 0) | (os.O_TRUNC if trunc else 0)
        self.fds[slot] = os.open(self._at(root, path), flags | os.O_NONBLOCK, 0o600)

    def _fread(self, _root: bytes, slot: int, offset: int, size: int) -> bytes:
        return os.pread(self.fds[slot], size, offset)

    def _fwrite(self, _root: bytes, slot: int, offset: int, payload: bytes) -> int:
        return os.pwrite(self.fds[slot], payload, offset)

    def _ftruncate(self, _root: bytes, slot: int, size: int) -> None:
        os.ftruncate(self.fds[slot], size)

    def _fstat(self, _root: bytes, slot: int) -> tuple[int, ...]:
        return kernel_fields(os.fstat(self.fds[slot]))

    def _fsync(self, _root: bytes, slot: int) -> None:
        os.fsync(self.fds[slot])

    def _close(self, _root: bytes, slot: int) -> None:
        os.close(self.fds.pop(slot))

    def _stat(self, root: bytes, path: bytes, follow: bool) -> tuple[int, ...]:
        return kernel_fields(os.stat(self._at(root, path), follow_symlinks=follow))

    def _chmod(self, root: bytes, path: bytes, mode: int) -> None:
        os.chmod(self._at(root, path), mode)

    def _chown(self, root: bytes, path: bytes, uid: int, gid: int) -> None:
        os.chown(self._at(root, path), uid, gid, follow_symlinks=False)

    def _utime(self, root: bytes, path: bytes, atime: int, mtime: int) -> None:
        os.utime(self._at(root, path), ns=(atime, mtime), follow_symlinks=False)

    def _readlink(self, root: bytes, path: bytes) -> bytes:
        return os.readlink(self._at(root, path))

    def _readdir(self, root: bytes, path: bytes) -> list[tuple[bytes, int]]:
        with os.scandir(self._at(root, path)) as entries:
            return sorted((e.name, stat.S_IFMT(e.stat(follow_symlinks=False).st_mode)) for e in entries)

    def _setxattr(self, root: bytes, path: bytes, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self._at(root, path), name, value, flags, follow_symlinks=False)

    def _getxattr(self, root: bytes, path: bytes, name: str) -> bytes:
        return os.getxattr(self._at(root, path), name, follow_symlinks=False)

    def _listxattr(self, root: bytes, path: bytes) -> list[str]:
        return sorted(os.listxattr(self._at(root, path), follow_symlinks=False))

    def _removexattr(self, root: bytes, path: bytes, name: str) -> None:
        os.removexattr(self._at(root, path), name, follow_symlinks=False)


class Generator:
    """Makes operations that mostly succeed, by looking at the model's tree; the same seed makes the same ones."""

    WEIGHTS: tuple[tuple[str, int], ...] = (
        ("mkdir", 6), ("create", 8), ("mknod", 3), ("symlink", 4), ("link", 5), ("unlink", 7), ("rmdir", 4),
        ("rename", 12), ("write", 10), ("append", 6), ("read", 8), ("truncate", 6), ("open", 10), ("fread", 8),
        ("fwrite", 10), ("ftruncate", 3), ("fstat", 4), ("fsync", 2), ("close", 6), ("stat", 8), ("chmod", 3),
        ("chown", 3), ("utime", 3), ("readlink", 2), ("readdir", 5), ("setxattr", 4), ("getxattr", 3),
        ("listxattr", 2), ("removexattr", 2),
    )  # fmt: skip

    def __init__(self, seed: int, nodes: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.nodes = list(nodes)
        self.kinds = [kind for kind, _ in self.WEIGHTS]
        self.weights = [weight for _, weight in self.WEIGHTS]
        self.slot_node: dict[int, str] = {}

    def _existing(self, model: Model, want: Callable[[Inode], bool]) -> bytes:
        """A path whose object satisfies *want*, seven times of eight; else any path, which may not exist."""
        paths = [path for path, inode in model.tree() if path and want(inode)]
        if paths and self.random.random() < 0.875:
            return self.random.choice(sorted(paths))
        return self._any(model)

    def _any(self, model: Model) -> bytes:
        folders = sorted(path for path, inode in model.tree() if inode.is_dir and path.count(b"/") < 3)
        folder = self.random.choice(folders)
        if self.random.random() < 0.03:
            everything = sorted(path for path, _ in model.tree() if path.count(b"/") < 3)
            folder = self.random.choice(everything)
        name = self.random.choice(NAMES)
        return folder + b"/" + name if folder else name

    def _offset(self) -> int:
        pick = self.random.random()
        if pick < 0.5:
            return self.random.randrange(0, 20_000)
        return self.random.choice([0, 1, 4095, 4096, 8192, 65_536, 131_072, self.random.randrange(MAX_FILE)])

    def _payload(self) -> bytes:
        size = self.random.choice([0, 1, 3, 100, 4096, 4097, 10_000, self.random.randrange(1, 70_000)])
        return self.random.randbytes(size)

    def next(self, model: Model) -> Op:
        """Make the next operation for the state *model* is in."""
        while True:
            kind = self.random.choices(self.kinds, self.weights)[0]
            node = self.random.choice(self.nodes)
            args = getattr(self, "_make_" + kind)(model)
            if args is None:
                continue
            if kind == "open":
                self.slot_node[args[0]] = node
            elif kind in ("fread", "fwrite", "ftruncate", "fstat", "fsync", "close"):
                node = self.slot_node[args[0]]
            return Op(node, kind, args)

    def _make_mkdir(self, model: Model) -> tuple[Any, ...]:
        return self._any(model), self.random.choice([0o777, 0o755, 0o700, 0o1777])

    def _make_create(self, model: Model) -> tuple[Any, ...]:
        return self._any(model), self.random.random() < 0.5, self.random.choice([0o666, 0o644, 0o600, 0o444])

    def _make_mknod(self, model: Model) -> tuple[Any, ...]:
        kind, rdev = self.random.choice(
            [(stat.S_IFIFO, 0), (stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(259, 70_000))]
        )
        return self._any(model), kind | 0o660, rdev

    def _make_symlink(self, model: Model) -> tuple[Any, ...]:
        target = self.random.choice([*NAMES[:4], b"a/b", b"b/a/c", b"x" * 900])
        return target, self._any(model)

    def _make_link(self, model: Model) -> tuple[Any, ...]:
        return self._existing(model, lambda i: not i.is_dir), self._any(model)

    def _make_unlink(self, model: Model) -> tuple[Any, ...]:
        return (self._existing(model, lambda i: not i.is_dir),)

    def _make_rmdir(self, model: Model) -> tuple[Any, ...]:
        return (self._existing(model, lambda i: i.is_dir and (not i.entries or self.random.random() < 0.2)),)

    def _make_rename(self, model: Model) -> tuple[Any, ...]:
        old = self._existing(model, lambda i: True)
        pick = self.random.random()
        if pick < 0.4:
            new = self._existing(model, lambda i: True)
        elif pick < 0.5:
            new = self._existing(model, lambda i: i.is_dir and not i.entries)
        else:
            new = self._any(model)
        flags = self.random.choice([0, 0, 0, 0, m.RENAME_NOREPLACE, m.RENAME_EXCHANGE])
        return old, new, flags

    def _make_write(self, model: Model) -> tuple[Any, ...]:
        return self._existing(model, lambda i: i.is_file), self._offset(), self._payload()

    def _make_append(self, model: Model) -> tuple[Any, ...] | None:
        path = self._existing(model, lambda i: i.is_file and len(i.data) < MAX_FILE)
        return path, self._payload()

    def _make_read(self, model: Model) -> tuple[Any, ...]:
        return self._existing(model, lambda i: i.is_file), self._offset(), self.random.choice([1, 4096, 400_000])

    def _make_truncate(self, model: Model) -> tuple[Any, ...]:
        return self._existing(model, lambda i: i.is_file), self._offset()

    def _make_open(self, model: Model) -> tuple[Any, ...] | None:
        free = [slot for slot in range(SLOTS) if slot not in model.handles]
        if not free:
            return None
        readable, writable, append = self.random.choice(
            [(True, False, False), (True, True, False), (False, True, False), (True, True, True), (False, True, True)]
        )
        trunc = writable and self.random.random() < 0.15
        return free[0], self._existing(model, lambda i: i.is_file), readable, writable, append, trunc

    def _slot(self, model: Model) -> int | None:
        return self.random.choice(sorted(model.handles)) if model.handles else None

    def _make_fread(self, model: Model) -> tuple[Any, ...] | None:
        slot = self._slot(model)
        return None if slot is None else (slot, self._offset(), self.random.choice([1, 4096, 400_000]))

    def _make_fwrite(self, model: Model) -> tuple[Any, ...] | None:
        slot = self._slot(model)
        return None if slot is None else (slot, self._offset(), self._payload())

    def _make_ftruncate(self, model: Model) -> tuple[Any, ...] | None:
        slot = self._slot(model)
        return None if slot is None else (slot, self._offset())

    def _make_fstat(self, model: Model) -> tuple[Any, ...] | None:
        slot = self._slot(model)
        return None if slot is None else (slot,)

    _make_fsync = _make_fstat
    _make_close = _make_fstat

    def _make_stat(self, model: Model) -> tuple[Any, ...]:
        path = self._existing(model, lambda i: True)
        if self.random.random() < 0.05:
            path = TOO_LONG
        return path, self.random.random() < 0.5

    def _make_chmod(self, model: Model) -> tuple[Any, ...]:
        path = self._existing(model, lambda i: True)
        if not self.random.randrange(3):
            return self._existing(model, lambda i: i.is_dir), self.random.choice([0o2775, 0o1777, 0o700])
        return path, self.random.choice([0o644, 0o600, 0o755, 0o000, 0o777])

    def _make_chown(self, model: Model) -> tuple[Any, ...]:
        path = self._existing(model, lambda i: True)
        return path, self.random.choice([0, 1, 1234]), self.random.choice([0, 2, 70_000])

    def _make_utime(self, model: Model) -> tuple[Any, ...]:
        def moment() -> int:
            return self.random.randrange(1, 4_000_000_000) * 1_000_000_000 + self.random.randrange(1_000_000_000)

        return self._existing(model, lambda i: True), moment(), moment()

    def _make_readlink(self, model: Model) -> tuple[Any, ...]:
        return (self._existing(model, lambda i: i.kind == stat.S_IFLNK),)

    def _make_readdir(self, model: Model) -> tuple[Any, ...]:
        return (self._existing(model, lambda i: i.is_dir),)

    def _make_setxattr(self, model: Model) -> tuple[Any, ...]:
        value = self.random.randbytes(self.random.choice([0, 5, 200, 3000]))
        flags = self.random.choice([0, 0, m.XATTR_CREATE, m.XATTR_REPLACE])
        return self._existing(model, lambda i: True), self.random.choice(XATTRS), value, flags

    def _make_getxattr(self, model: Model) -> tuple[Any, ...]:
        return self._existing(model, lambda i: bool(i.xattrs)), self.random.choice(XATTRS)

    def _make_listxattr(self, model: Model) -> tuple[Any, ...]:
        return (self._existing(model, lambda i: bool(i.xattrs)),)

    _make_removexattr = _make_getxattr


def _describe(value: Result) -> str:
    kind, what = value
    if kind == "err":
        return errno.errorcode.get(what, str(what))
    if isinstance(what, bytes) and len(what) > 80:
        return f"ok <{len(what)} bytes>"
    return f"ok {what!r}"


def _difference(expected: Result, got: Result) -> str:
    text = f"expected {_describe(expected)}, got {_describe(got)}"
    if expected[0] == got[0] == "ok" and isinstance(expected[1], bytes) and isinstance(got[1], bytes):
        pairs = zip(expected[1], got[1], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected[1]), len(got[1])))
        text += f"; first difference at byte {at}"
    return text


def compare_tree(model: Model, root: Path, who: str) -> dict[bytes, int]:
    """Compare everything below *root* with the model; raise Mismatch. Return the inode number of each path."""
    top = os.fsencode(root)
    numbers: dict[bytes, int] = {}
    identity: dict[int, Inode] = {}
    for path, inode in model.tree():
        full = top + b"/" + path if path else top
        where = f"{who}: {path[:60]!r}"
        st = os.lstat(full)
        if path and kernel_fields(st) != inode.fields():
            raise Mismatch(f"{where}: stat (mode nlink uid gid size rdev) {kernel_fields(st)}, not {inode.fields()}")
        if inode.mtime is not None and st.st_mtime_ns != inode.mtime:
            raise Mismatch(f"{where}: mtime {st.st_mtime_ns}, set to {inode.mtime}")
        numbers[path] = st.st_ino
        if identity.setdefault(st.st_ino, inode) is not inode:
            raise Mismatch(f"{where}: inode {st.st_ino} is another object's as well")
        _compare_inside(full, inode, where)
    links: dict[int, int] = {}
    for path, inode in model.tree():
        if links.setdefault(id(inode), numbers[path]) != numbers[path]:
            raise Mismatch(f"{who}: {path[:60]!r}: hard links of one file differ in inode number")
    return numbers


def _compare_inside(full: bytes, inode: Inode, where: str) -> None:
    """Compare names, target, content and extended attributes of one object."""
    if inode.is_dir:
        names = sorted(os.listdir(full))
        if names != sorted(inode.entries):
            raise Mismatch(f"{where}: holds {names}, not {sorted(inode.entries)}")
    elif inode.kind == stat.S_IFLNK:
        if os.readlink(full) != inode.target:
            raise Mismatch(f"{where}: link to {os.readlink(full)!r}, not {inode.target!r}")
    elif inode.is_file:
        with open(full, "rb") as stream:
            content = stream.read()
        if content != inode.data:
            raise Mismatch(f"{where}: content: {_difference(('ok', bytes(inode.data)), ('ok', content))}")
    found = {name: os.getxattr(full, name, follow_symlinks=False) for name in os.listxattr(full, follow_symlinks=False)}
    if found != inode.xattrs:
        raise Mismatch(f"{where}: xattrs {sorted(found)}, not {sorted(inode.xattrs)} (or their values differ)")


class Run:
    """One run: operations one after the other on the model, on native XFS and on the lab's nodes."""

    def __init__(self, nodes: dict[str, Path], native: Path) -> None:
        self.nodes = nodes
        self.native = native
        self.model = Model()
        self.real = Executor(nodes)
        self.reference = Executor(dict.fromkeys(nodes, native))

    def step(self, op: Op) -> bool:
        """Run one operation everywhere; Mismatch when the answers differ. False when it does not apply."""
        slotted = op.kind in ("fread", "fwrite", "ftruncate", "fstat", "fsync", "close")
        if slotted and op.args[0] not in self.model.handles:
            return False
        if op.kind == "open" and op.args[0] in self.model.handles:
            return False
        try:
            expected = self.model.apply(op.kind, op.args)
        except Unsuitable:
            return False
        native = self.reference.apply(op)
        if native != expected:
            raise Mismatch(f"THE MODEL IS WRONG about native XFS: {op}: {_difference(expected, native)}")
        got = self.real.apply(op)
        if got != expected:
            raise Mismatch(f"{op}: {_difference(expected, got)}")
        return True

    def finish(self) -> None:
        """Compare the whole trees from every node and of native XFS."""
        compare_tree(self.model, self.native, "native")
        numbers = {name: compare_tree(self.model, root, name) for name, root in self.nodes.items()}
        first = next(iter(numbers))
        for name, found in numbers.items():
            if found != numbers[first]:
                raise Mismatch(f"inode numbers on {name} differ from those on {first}")

    def close(self) -> None:
        """Close the descriptors on both sides."""
        self.real.close()
        self.reference.close()


def shrink(ops: list[Op], fails: Callable[[list[Op]], bool], budget_s: float) -> list[Op]:
    """Leave out parts of *ops* as long as the rest still fails, for at most *budget_s* seconds."""
    deadline = time.monotonic() + budget_s
    size = len(ops) // 2
    while size >= 1:
        start = 0
        while start < len(ops) and time.monotonic() < deadline:
            candidate = ops[:start] + ops[start + size :]
            if candidate and fails(candidate):
                ops = candidate
            else:
                start += size
        size //= 2
    return ops
