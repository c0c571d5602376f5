"""An in-memory model of a POSIX tree as XFS keeps it, for the random operation tester.

The model knows nothing of the code under test: it implements path resolution and the operations from the Linux manual
pages (path_resolution(7), rename(2), link(2), open(2), xattr(7)), with XFS's own choices where pages leave one (EEXIST
for a rename over a directory that is not empty). One process, uid 0, umask 022.
"""

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

UMASK = 0o022
MAX_LINKS_FOLLOWED = 40
NAME_MAX = 255
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
XATTR_CREATE = 1
XATTR_REPLACE = 2

Path = bytes
Result = tuple[str, Any]


class Failed(Exception):
    """The operation ends with this errno."""

    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode[code])
        self.code = code


class Unsuitable(Exception):
    """The operation would open a device or a fifo, which tells nothing about a file system: leave it out."""


@dataclass(eq=False, slots=True)
class Inode:
    """One object. ``mode`` has the type bits; ``times`` are (atime, mtime) in ns, None when not known exactly."""

    mode: int
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, "Inode"] = field(default_factory=dict)
    parent: "Inode | None" = None
    target: bytes = b""
    rdev: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    atime: int | None = None
    mtime: int | None = None

    @property
    def kind(self) -> int:
        """The type bits of the mode (S_IFREG and so on)."""
        return stat.S_IFMT(self.mode)

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def is_file(self) -> bool:
        return self.kind == stat.S_IFREG

    def fields(self) -> tuple[int, ...]:
        """(mode, nlink, uid, gid, size, rdev); a directory's size is XFS's affair and counts as 0."""
        size = 0 if self.is_dir else len(self.target or self.data)
        return self.mode, self.nlink, self.uid, self.gid, size, self.rdev


@dataclass(slots=True)
class Handle:
    """An open descriptor of the model."""

    inode: Inode
    readable: bool
    writable: bool
    append: bool


class Model:
    """The tree, and one method an operation; each returns the result's value or raises Failed."""

    def __init__(self) -> None:
        self.root = Inode(stat.S_IFDIR | 0o755, nlink=2)
        self.root.parent = self.root
        self.handles: dict[int, Handle] = {}

    # --- path resolution ---------------------------------------------------------------------------------------

    def _step(self, here: Inode, name: bytes) -> Inode | None:
        if not here.is_dir:
            raise Failed(errno.ENOTDIR)
        if len(name) > NAME_MAX:
            raise Failed(errno.ENAMETOOLONG)
        return here.entries.get(name)

    def _walk(self, path: Path, follow: bool, budget: list[int] | None = None) -> tuple[Inode, bytes, Inode | None]:
        """Return (folder, last name, object or None); with *follow*, links at the end are followed too."""
        budget = budget if budget is not None else [MAX_LINKS_FOLLOWED]
        here = self.root
        todo = path.split(b"/")
        while True:
            name = todo.pop(0)
            found = self._step(here, name)
            if found is not None and found.kind == stat.S_IFLNK and (todo or follow):
                budget[0] -= 1
                if budget[0] < 0:
                    raise Failed(errno.ELOOP)
                todo = found.target.split(b"/") + todo
                continue
            if not todo:
                return here, name, found
            if found is None:
                raise Failed(errno.ENOENT)
            here = found

    def _existing(self, path: Path, follow: bool) -> Inode:
        if path == b"":
            return self.root
        found = self._walk(path, follow)[2]
        if found is None:
            raise Failed(errno.ENOENT)
        return found

    def _vacant(self, path: Path) -> tuple[Inode, bytes]:
        """Return (folder, name) for a name to be created; EEXIST when anything has it."""
        folder, name, found = self._walk(path, follow=False)
        if found is not None:
            raise Failed(errno.EEXIST)
        return folder, name

    # --- names -------------------------------------------------------------------------------------------------

    def _attach(self, folder: Inode, name: bytes, inode: Inode) -> None:
        folder.entries[name] = inode
        folder.mtime = None
        if inode.is_dir:
            inode.parent = folder
            folder.nlink += 1

    def _detach(self, folder: Inode, name: bytes) -> Inode:
        inode = folder.entries.pop(name)
        folder.mtime = None
        if inode.is_dir:
            folder.nlink -= 1
        return inode

    def _new(self, folder: Inode, name: bytes, kind: int, mode: int) -> Inode:
        """Make an object; a setgid folder gives its group, and to a directory the bit too."""
        permissions = 0o777 if kind == stat.S_IFLNK else mode & ~UMASK
        inode = Inode(kind | permissions, nlink=2 if kind == stat.S_IFDIR else 1)
        if folder.mode & stat.S_ISGID:
            inode.gid = folder.gid
            if kind == stat.S_IFDIR:
                inode.mode |= stat.S_ISGID
        self._attach(folder, name, inode)
        return inode

    def _drop(self, inode: Inode) -> None:
        """Take one link of an object that is no longer in its folder."""
        inode.nlink = 0 if inode.is_dir else inode.nlink - 1

    def mkdir(self, path: Path, mode: int) -> None:
        folder, name = self._vacant(path)
        self._new(folder, name, stat.S_IFDIR, mode)

    def mknod(self, path: Path, mode: int, rdev: int) -> None:
        folder, name = self._vacant(path)
        self._new(folder, name, stat.S_IFMT(mode), stat.S_IMODE(mode)).rdev = rdev

    def symlink(self, target: bytes, path: Path) -> None:
        folder, name = self._vacant(path)
        self._new(folder, name, stat.S_IFLNK, 0).target = target

    def link(self, old: Path, new: Path) -> None:
        inode = self._existing(old, follow=False)
        folder, name = self._vacant(new)
        if inode.is_dir:
            raise Failed(errno.EPERM)
        inode.nlink += 1
        self._attach(folder, name, inode)

    def unlink(self, path: Path) -> None:
        folder, name, found = self._walk(path, follow=False)
        if found is None:
            raise Failed(errno.ENOENT)
        if found.is_dir:
            raise Failed(errno.EISDIR)
        self._drop(self._detach(folder, name))

    def rmdir(self, path: Path) -> None:
        folder, name, found = self._walk(path, follow=False)
        if found is None:
            raise Failed(errno.ENOENT)
        if not found.is_dir:
            raise Failed(errno.ENOTDIR)
        if found.entries:
            raise Failed(errno.ENOTEMPTY)
        self._drop(self._detach(folder, name))

    @staticmethod
    def _above(upper: Inode, lower: Inode) -> bool:
        """Whether *upper* is *lower* or holds it."""
        here = lower
        while here is not upper:
            if here.parent is here or here.parent is None:
                return False
            here = here.parent
        return True

    def _check_rename(self, old_dir: Inode, inode: Inode, new_dir: Inode, victim: Inode | None, flags: int) -> None:
        if victim is not None and flags & RENAME_NOREPLACE:
            raise Failed(errno.EEXIST)
        if victim is None and flags & RENAME_EXCHANGE:
            raise Failed(errno.ENOENT)
        if inode.is_dir and self._above(inode, new_dir):
            raise Failed(errno.EINVAL)
        if victim is not None and victim.is_dir and self._above(victim, old_dir):
            raise Failed(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY)

    def rename(self, old: Path, new: Path, flags: int) -> None:
        # The kernel resolves both folders before it looks at either name.
        old_dir, old_name, inode = self._walk(old, follow=False)
        new_dir, new_name, victim = self._walk(new, follow=False)
        if inode is None:
            raise Failed(errno.ENOENT)
        self._check_rename(old_dir, inode, new_dir, victim, flags)
        if victim is inode:
            return
        if flags & RENAME_EXCHANGE:
            assert victim is not None
            self._detach(old_dir, old_name)
            self._detach(new_dir, new_name)
            self._attach(old_dir, old_name, victim)
            self._attach(new_dir, new_name, inode)
            inode.mtime = victim.mtime = None
            return
        if victim is not None:
            if inode.is_dir and not victim.is_dir:
                raise Failed(errno.ENOTDIR)
            if victim.is_dir and not inode.is_dir:
                raise Failed(errno.EISDIR)
            if victim.entries:
                raise Failed(errno.EEXIST)
            self._drop(self._detach(new_dir, new_name))
        self._detach(old_dir, old_name)
        self._attach(new_dir, new_name, inode)
        if inode.is_dir:
            inode.mtime = None

    # --- descriptors and data ----------------------------------------------------------------------------------

    def _opened(self, path: Path, create: bool, excl: bool, write: bool, mode: int, trunc: bool = False) -> Inode:
        folder, name, found = self._walk(path, follow=not (create and excl))
        if found is None:
            if not create:
                raise Failed(errno.ENOENT)
            return self._new(folder, name, stat.S_IFREG, mode)
        if create and excl:
            raise Failed(errno.EEXIST)
        if found.is_dir and (write or create):
            raise Failed(errno.EISDIR)
        if not found.is_dir and not found.is_file:
            raise Unsuitable
        if trunc:
            self._resize(found, 0)
        return found

    @staticmethod
    def _resize(inode: Inode, size: int) -> None:
        if size < len(inode.data):
            del inode.data[size:]
        else:
            inode.data.extend(bytes(size - len(inode.data)))
        inode.mtime = None

    @staticmethod
    def _put(inode: Inode, offset: int, payload: bytes) -> int:
        if not payload:
            return 0
        if len(inode.data) < offset:
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(payload)] = payload
        inode.mtime = None
        return len(payload)

    @staticmethod
    def _get(inode: Inode, offset: int, size: int) -> bytes:
        if inode.is_dir:
            raise Failed(errno.EISDIR)
        inode.atime = None
        return bytes(inode.data[offset : offset + size])

    def create(self, path: Path, excl: bool, mode: int) -> None:
        self._opened(path, create=True, excl=excl, write=True, mode=mode)

    def write(self, path: Path, offset: int, payload: bytes) -> int:
        return self._put(self._opened(path, False, False, write=True, mode=0), offset, payload)

    def append(self, path: Path, payload: bytes) -> int:
        inode = self._opened(path, create=True, excl=False, write=True, mode=0o644)
        return self._put(inode, len(inode.data), payload)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        return self._get(self._opened(path, False, False, write=False, mode=0), offset, size)

    def truncate(self, path: Path, size: int) -> None:
        inode = self._existing(path, follow=True)
        if inode.is_dir:
            raise Failed(errno.EISDIR)
        if not inode.is_file:
            raise Failed(errno.EINVAL)
        self._resize(inode, size)

    def open(self, slot: int, path: Path, readable: bool, writable: bool, append: bool, trunc: bool) -> None:
        inode = self._opened(path, create=writable, excl=False, write=writable, mode=0o600, trunc=trunc)
        if not inode.is_file:
            raise Unsuitable
        self.handles[slot] = Handle(inode, readable, writable, append)

    def fread(self, slot: int, offset: int, size: int) -> bytes:
        handle = self.handles[slot]
        if not handle.readable:
            raise Failed(errno.EBADF)
        return self._get(handle.inode, offset, size)

    def fwrite(self, slot: int, offset: int, payload: bytes) -> int:
        handle = self.handles[slot]
        if not handle.writable:
            raise Failed(errno.EBADF)
        # Linux: pwrite on an O_APPEND descriptor appends, whatever the offset says (pwrite(2), BUGS).
        return self._put(handle.inode, len(handle.inode.data) if handle.append else offset, payload)

    def ftruncate(self, slot: int, size: int) -> None:
        handle = self.handles[slot]
        if not handle.writable:
            raise Failed(errno.EINVAL)
        self._resize(handle.inode, size)

    def fstat(self, slot: int) -> tuple[int, ...]:
        return self.handles[slot].inode.fields()

    def fsync(self, slot: int) -> None:
        self.handles[slot]

    def close(self, slot: int) -> None:
        del self.handles[slot]

    # --- attributes --------------------------------------------------------------------------------------------

    def stat(self, path: Path, follow: bool) -> tuple[int, ...]:
        return self._existing(path, follow).fields()

    def chmod(self, path: Path, mode: int) -> None:
        inode = self._existing(path, follow=True)
        inode.mode = inode.kind | mode

    def chown(self, path: Path, uid: int, gid: int) -> None:
        inode = self._existing(path, follow=False)
        inode.uid, inode.gid = uid, gid
        # chown(2): of a file the set-id bits go, root or not; setgid without group-execute is a mark, and stays.
        if not inode.is_dir:
            inode.mode &= ~stat.S_ISUID
            if inode.mode & stat.S_IXGRP:
                inode.mode &= ~stat.S_ISGID

    def utime(self, path: Path, atime: int, mtime: int) -> None:
        inode = self._existing(path, follow=False)
        inode.atime, inode.mtime = atime, mtime

    def readlink(self, path: Path) -> bytes:
        inode = self._existing(path, follow=False)
        if inode.kind != stat.S_IFLNK:
            raise Failed(errno.EINVAL)
        return inode.target

    def readdir(self, path: Path) -> list[tuple[bytes, int]]:
        inode = self._existing(path, follow=True)
        if not inode.is_dir:
            raise Failed(errno.ENOTDIR)
        return sorted((name, child.kind) for name, child in inode.entries.items())

    def _xattr_inode(self, path: Path, name: str, refusal: int) -> Inode:
        inode = self._existing(path, follow=False)
        # xattr(7): user attributes belong to regular files and directories only.
        if name.startswith("user.") and not inode.is_dir and not inode.is_file:
            raise Failed(refusal)
        return inode

    def setxattr(self, path: Path, name: str, value: bytes, flags: int) -> None:
        inode = self._xattr_inode(path, name, errno.EPERM)
        if flags & XATTR_CREATE and name in inode.xattrs:
            raise Failed(errno.EEXIST)
        if flags & XATTR_REPLACE and name not in inode.xattrs:
            raise Failed(errno.ENODATA)
        inode.xattrs[name] = value

    def getxattr(self, path: Path, name: str) -> bytes:
        inode = self._xattr_inode(path, name, errno.ENODATA)
        if name not in inode.xattrs:
            raise Failed(errno.ENODATA)
        return inode.xattrs[name]

    def listxattr(self, path: Path) -> list[str]:
        return sorted(self._existing(path, follow=False).xattrs)

    def removexattr(self, path: Path, name: str) -> None:
        inode = self._xattr_inode(path, name, errno.EPERM)
        if name not in inode.xattrs:
            raise Failed(errno.ENODATA)
        del inode.xattrs[name]

    # --- whole tree --------------------------------------------------------------------------------------------

    def tree(self) -> Iterator[tuple[Path, Inode]]:
        """Yield (path, object) for everything below the root, and the root itself as b""."""
        todo = [(b"", self.root)]
        while todo:
            path, inode = todo.pop()
            yield path, inode
            prefix = path + b"/" if path else b""
            todo += [(prefix + name, child) for name, child in inode.entries.items()]

    def apply(self, kind: str, args: tuple[Any, ...]) -> Result:
        """Run operation *kind*; ("ok", value) or ("err", errno). Unsuitable and an unknown slot pass through."""
        try:
            return "ok", getattr(self, kind)(*args)
        except Failed as failed:
            return "err", failed.code
