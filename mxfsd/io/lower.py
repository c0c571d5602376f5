"""The lower XFS: operations on objects named by (inode, generation), run on a detached mount's descriptor.

Used by two processes of the home, each with a :class:`Lower` of its own over the same mount: the daemon for shipped
operations, the FUSE layer for its own. Every method is a few system calls and raises OSError with their errno. Names
are bytes. The caller holds the locks (DESIGN.md section 5); nothing here is safe against a second caller by itself.
"""

import errno
import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from mxfs_proto.errors import MxfsError
from mxfs_proto.ops import Attr, Entry, Fid, Valid
from mxfsd.io import ioctls, libc, ranges

HIDDEN = b".mxfs"
"""The folder in the lower root that no operation shows: orphans and records of operations."""
_ORPHANS = b".mxfs/orphans"
_OPS = b".mxfs/ops"
_RENAME_NOREPLACE = 1
_DIR_FDS = 512
_FILE_FDS = 256


def orphan_name(fid: Fid) -> bytes:
    """Name of an unlinked but open file under the orphans folder."""
    return f"{fid.ino:x}.{fid.gen:x}".encode()


def attr_of(st: os.stat_result, gen: int) -> Attr:
    """Return stat(2)'s result as an :class:`Attr`."""
    return Attr(
        st.st_ino,
        gen,
        st.st_mode,
        st.st_nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev,
        st.st_size,
        st.st_blocks,
        st.st_atime_ns,
        st.st_mtime_ns,
        st.st_ctime_ns,
    )


class _FdCache:
    """Descriptors by inode, least recently used closed first."""

    __slots__ = ("_cap", "_fds")

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._fds: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Generation and descriptor, by inode number."""

    def get(self, fid: Fid) -> int | None:
        found = self._fds.get(fid[0])
        if found is None or found[0] != fid[1]:
            return None
        self._fds.move_to_end(fid[0])
        return found[1]

    def put(self, fid: Fid, fd: int) -> int:
        self.drop(fid[0])
        self._fds[fid[0]] = (fid[1], fd)
        if len(self._fds) > self._cap:
            os.close(self._fds.popitem(last=False)[1][1])
        return fd

    def drop(self, ino: int) -> None:
        found = self._fds.pop(ino, None)
        if found is not None:
            os.close(found[1])

    def clear(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1][1])


class Lower:
    """Operations on the lower XFS behind *mount_fd* (which this object owns and closes)."""

    def __init__(self, mount_fd: int) -> None:
        self.mount_fd = mount_fd
        self._dirs = _FdCache(_DIR_FDS)
        self._files = _FdCache(_FILE_FDS)
        st = os.fstat(mount_fd)
        self.root = Fid(st.st_ino, libc.generation_at(mount_fd, b""))
        self._hidden_ino = 0
        os.umask(0)

    def prepare(self) -> None:
        """Make the hidden folder where it is missing (read-write mounts only)."""
        for name in (HIDDEN, _ORPHANS, _OPS):
            try:
                os.mkdir(name, 0o700, dir_fd=self.mount_fd)
            except FileExistsError:
                pass
        self._hidden_ino = os.stat(HIDDEN, dir_fd=self.mount_fd).st_ino

    def close(self) -> None:
        """Close every descriptor; the kernel unmounts once nothing else holds the mount."""
        self._dirs.clear()
        self._files.clear()
        if self.mount_fd >= 0:
            os.close(self.mount_fd)
            self.mount_fd = -1

    # -- descriptors ---------------------------------------------------------------------------------------------

    def dir_fd(self, fid: Fid) -> int:
        """Return a descriptor of the directory; it stays in the cache, the caller does not close it.

        ENOENT where it was removed, as for a directory that is removed while a process stands in it.
        """
        fd = self._dirs.get(fid)
        if fd is not None:
            return fd
        try:
            fd = libc.open_by_handle(self.mount_fd, fid[0], fid[1], os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
            raise FileNotFoundError(errno.ENOENT, "the directory was removed") from None
        return self._dirs.put(fid, fd)

    def file_fd(self, fid: Fid) -> int:
        """Return a read-write descriptor of a regular file (read-only on a read-only mount), cached likewise."""
        fd = self._files.get(fid)
        if fd is not None:
            return fd
        try:
            fd = libc.open_by_handle(self.mount_fd, fid[0], fid[1], os.O_RDWR)
        except OSError as exc:
            if exc.errno != errno.EROFS:
                raise
            fd = libc.open_by_handle(self.mount_fd, fid[0], fid[1], os.O_RDONLY)
        return self._files.put(fid, fd)

    def open(self, fid: Fid, flags: int) -> int:
        """Open a regular file; the caller owns the descriptor."""
        return libc.open_by_handle(self.mount_fd, fid[0], fid[1], flags | os.O_NOFOLLOW)

    def forget(self, ino: int) -> None:
        """Close cached descriptors of an object that is gone or that another process may remove."""
        self._dirs.drop(ino)
        self._files.drop(ino)

    @contextmanager
    def _path_fd(self, fid: Fid) -> Iterator[int]:
        fd = libc.open_by_handle(self.mount_fd, fid[0], fid[1], os.O_PATH | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            os.close(fd)

    def _guard(self, parent: Fid, name: bytes) -> None:
        if name == HIDDEN and parent[0] == self.root[0]:
            raise PermissionError(1, "the name .mxfs is kept for MXFS itself")

    # -- looking -------------------------------------------------------------------------------------------------

    def lookup(self, parent: Fid, name: bytes) -> Attr:
        """Attributes of *name*; ENOENT where there is none."""
        if name == HIDDEN and parent[0] == self.root[0]:
            raise FileNotFoundError(2, "no such file")
        dfd = self.dir_fd(parent)
        st = os.stat(name, dir_fd=dfd, follow_symlinks=False)
        return attr_of(st, libc.generation_at(dfd, name))

    def getattr(self, fid: Fid) -> Attr:
        """Attributes by handle; ESTALE where the object is gone."""
        fd = self._dirs.get(fid) or self._files.get(fid)
        if fd is not None:
            return attr_of(os.fstat(fd), fid[1])
        fd = libc.open_by_handle(self.mount_fd, fid[0], fid[1], os.O_PATH | os.O_NOFOLLOW)
        try:
            return attr_of(os.fstat(fd), fid[1])
        finally:
            os.close(fd)

    def readlink(self, fid: Fid) -> bytes:
        """Target of a symbolic link."""
        with self._path_fd(fid) as fd:
            return os.readlink(b"", dir_fd=fd)

    def names(self, fid: Fid) -> list[bytes]:
        """The names in a directory, sorted, without ``.`` and ``..``."""
        # listdir moves the descriptor's offset, which nobody else uses, and rewinds it.
        names = sorted(os.fsencode(name) for name in os.listdir(self.dir_fd(fid)))
        if fid[0] == self.root[0] and HIDDEN in names:
            names.remove(HIDDEN)
        return names

    def readdir(self, fid: Fid, after: bytes = b"", limit: int = 0) -> tuple[list[Entry], bool]:
        """Entries in the order of their names, those behind *after*, at most *limit* (0: all), and whether that is all.

        Going on behind a name, not at an offset, an entry that is there throughout is listed exactly once, whatever
        is added or removed between two calls. ``.`` and ``..`` are left out.
        """
        dfd = self.dir_fd(fid)
        names = self.names(fid)
        start = bisect_right(names, after) if after else 0
        chosen = names[start : start + limit] if limit else names[start:]
        out: list[Entry] = []
        for name in chosen:
            try:
                st = os.stat(name, dir_fd=dfd, follow_symlinks=False)
                out.append(Entry(name, attr_of(st, libc.generation_at(dfd, name))))
            except FileNotFoundError:  # removed since the listing
                continue
        return out, start + len(chosen) == len(names)

    def statfs(self) -> tuple[int, ...]:
        """bsize, frsize, blocks, bfree, bavail, files, ffree, favail, namemax."""
        st = os.fstatvfs(self.mount_fd)
        return (
            st.f_bsize,
            st.f_frsize,
            st.f_blocks,
            st.f_bfree,
            st.f_bavail,
            st.f_files,
            st.f_ffree,
            st.f_favail,
            st.f_namemax,
        )

    # -- making --------------------------------------------------------------------------------------------------

    def create(self, parent: Fid, name: bytes, mode: int, uid: int, gid: int) -> tuple[int, Attr]:
        """Create a regular file (O_EXCL); return a read-write descriptor, the caller's, and the attributes."""
        self._guard(parent, name)
        dfd = self.dir_fd(parent)
        _become(uid, gid)
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=dfd)
        finally:
            libc.set_fs_ids(0, 0)
        try:
            return fd, attr_of(os.fstat(fd), libc.generation_at(fd, b""))
        except OSError:
            os.close(fd)
            raise

    def tmpfile(self, parent: Fid, mode: int, uid: int, gid: int) -> tuple[int, Attr]:
        """Make a regular file without a name (O_TMPFILE), as in the directory; return a read-write descriptor, the
        caller's, and the attributes. It stands among the orphans from the first, since XFS recovery would free it."""
        dfd = self.dir_fd(parent)
        _become(uid, gid)
        try:
            fd = os.open(b".", os.O_RDWR | os.O_TMPFILE, stat.S_IMODE(mode), dir_fd=dfd)
        finally:
            libc.set_fs_ids(0, 0)
        try:
            fid = Fid(os.fstat(fd).st_ino, libc.generation_at(fd, b""))
            libc.link_fd(fd, self.mount_fd, _ORPHANS + b"/" + orphan_name(fid))
            return fd, attr_of(os.fstat(fd), fid.gen)._replace(nlink=0)
        except OSError:
            os.close(fd)
            raise

    def name_orphan(self, fid: Fid, parent: Fid, name: bytes) -> Attr:
        """Give an object among the orphans its name, in one transaction. ENOENT where it is none, EEXIST where the name
        is taken."""
        self._guard(parent, name)
        orphan = _ORPHANS + b"/" + orphan_name(fid)
        libc.renameat2(self.mount_fd, orphan, self.dir_fd(parent), name, _RENAME_NOREPLACE)
        return self.lookup(parent, name)

    def mknod(self, parent: Fid, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Attr:
        """Make a file of any type but a directory or a symbolic link."""
        self._guard(parent, name)
        dfd = self.dir_fd(parent)
        _become(uid, gid)
        try:
            os.mknod(name, mode, rdev, dir_fd=dfd)
        finally:
            libc.set_fs_ids(0, 0)
        return self.lookup(parent, name)

    def mkdir(self, parent: Fid, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory."""
        self._guard(parent, name)
        dfd = self.dir_fd(parent)
        _become(uid, gid)
        try:
            os.mkdir(name, mode, dir_fd=dfd)
        finally:
            libc.set_fs_ids(0, 0)
        return self.lookup(parent, name)

    def symlink(self, parent: Fid, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link."""
        self._guard(parent, name)
        dfd = self.dir_fd(parent)
        _become(uid, gid)
        try:
            os.symlink(target, name, dir_fd=dfd)
        finally:
            libc.set_fs_ids(0, 0)
        return self.lookup(parent, name)

    def link(self, fid: Fid, parent: Fid, name: bytes) -> Attr:
        """Give the object another name."""
        self._guard(parent, name)
        with self._path_fd(fid) as fd:
            libc.link_fd(fd, self.dir_fd(parent), name)
            return attr_of(os.fstat(fd), fid[1])

    # -- removing and renaming -----------------------------------------------------------------------------------

    def unlink(self, parent: Fid, name: bytes, keep: Fid | None) -> None:
        """Remove a name. *keep*: the object, where it is open somewhere and this is its last name: it is moved to the
        orphans folder instead, since XFS recovery would free it."""
        self._guard(parent, name)
        dfd = self.dir_fd(parent)
        if keep is None:
            os.unlink(name, dir_fd=dfd)
        else:
            os.rename(name, _ORPHANS + b"/" + orphan_name(keep), src_dir_fd=dfd, dst_dir_fd=self.mount_fd)

    def rmdir(self, parent: Fid, name: bytes) -> None:
        """Remove an empty directory."""
        self._guard(parent, name)
        os.rmdir(name, dir_fd=self.dir_fd(parent))

    def rename(self, old: Fid, old_name: bytes, new: Fid, new_name: bytes, flags: int, keep: Fid | None) -> None:
        """Rename. *keep*: the object that the new name loses, where it is open and that was its last name: it gets a
        name among the orphans first."""
        self._guard(old, old_name)
        self._guard(new, new_name)
        new_fd = self.dir_fd(new)
        if keep is not None:
            orphan = _ORPHANS + b"/" + orphan_name(keep)
            os.link(new_name, orphan, src_dir_fd=new_fd, dst_dir_fd=self.mount_fd, follow_symlinks=False)
            try:
                libc.renameat2(self.dir_fd(old), old_name, new_fd, new_name, flags)
            except OSError:
                os.unlink(orphan, dir_fd=self.mount_fd)
                raise
        else:
            libc.renameat2(self.dir_fd(old), old_name, new_fd, new_name, flags)

    def is_orphan(self, fid: Fid) -> bool:
        """Whether the object stands among the orphans."""
        try:
            os.stat(_ORPHANS + b"/" + orphan_name(fid), dir_fd=self.mount_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def orphans(self) -> list[Fid]:
        """The objects in the orphans folder."""
        fd = os.open(_ORPHANS, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.mount_fd)
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        return [Fid(*(int(part, 16) for part in name.split("."))) for name in names]

    def inherits_acl(self, fid: Fid) -> bool:
        """Whether what is made in the directory gets an ACL."""
        try:
            os.getxattr(self.dir_fd(fid), "system.posix_acl_default")
        except OSError as exc:
            if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def reap(self, fid: Fid) -> None:
        """Free an orphan; nothing happens where it is none."""
        self.forget(fid.ino)
        try:
            os.unlink(_ORPHANS + b"/" + orphan_name(fid), dir_fd=self.mount_fd)
        except FileNotFoundError:
            pass

    # -- attributes ----------------------------------------------------------------------------------------------

    def setattr(
        self, fid: Fid, valid: int, mode: int, uid: int, gid: int, size: int, atime_ns: int, mtime_ns: int
    ) -> Attr:
        """Change the attributes named in *valid* (:class:`mxfs_proto.ops.Valid`), the size first."""
        with self._path_fd(fid) as fd:
            path = f"/proc/self/fd/{fd}"
            if valid & Valid.SIZE:
                os.truncate(path, size)
            if valid & (Valid.UID | Valid.GID):
                os.chown(path, uid if valid & Valid.UID else -1, gid if valid & Valid.GID else -1)
            if valid & Valid.MODE:
                os.chmod(path, stat.S_IMODE(mode))
            if valid & (Valid.ATIME | Valid.MTIME):
                now = os.fstat(fd)
                os.utime(
                    path,
                    ns=(
                        atime_ns if valid & Valid.ATIME else now.st_atime_ns,
                        mtime_ns if valid & Valid.MTIME else now.st_mtime_ns,
                    ),
                )
            if valid & Valid.KILL_PRIV:
                kill_priv(fd, path)
            return attr_of(os.fstat(fd), fid[1])

    def setxattr(self, fid: Fid, name: bytes, value: bytes, flags: int) -> None:
        """setxattr(2)."""
        with self._path_fd(fid) as fd:
            os.setxattr(f"/proc/self/fd/{fd}", name, value, flags)

    def getxattr(self, fid: Fid, name: bytes) -> bytes:
        """getxattr(2); ENODATA where it is not set."""
        with self._path_fd(fid) as fd:
            return os.getxattr(f"/proc/self/fd/{fd}", name)

    def listxattr(self, fid: Fid) -> list[bytes]:
        """listxattr(2)."""
        with self._path_fd(fid) as fd:
            return [os.fsencode(name) for name in os.listxattr(f"/proc/self/fd/{fd}")]

    def removexattr(self, fid: Fid, name: bytes) -> None:
        """removexattr(2)."""
        with self._path_fd(fid) as fd:
            os.removexattr(f"/proc/self/fd/{fd}", name)

    # -- ranges and flags ----------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, fid: Fid, flags: int) -> Iterator[int]:
        fd = self.open(fid, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def fallocate(self, fid: Fid, mode: int, offset: int, length: int, kill: int) -> None:
        """fallocate(2). *kill*: take set-id bits away."""
        with self._opened(fid, os.O_RDWR) as fd:
            libc.fallocate(fd, mode, offset, length)
            if kill:
                kill_priv(fd)

    def seek(self, fid: Fid, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""
        with self._opened(fid, os.O_RDONLY) as fd:
            return os.lseek(fd, offset, whence)

    def copy(self, source: Fid, offset: int, target: Fid, to_offset: int, length: int, kill: int) -> int:
        """copy_file_range(2); return the bytes copied. *kill*: take set-id bits of the target away."""
        with self._opened(source, os.O_RDONLY) as fd, self._opened(target, os.O_RDWR) as to_fd:
            done = ranges.copy(fd, offset, to_fd, to_offset, length)
            if kill:
                kill_priv(to_fd)
            return done

    def ioctl(self, fid: Fid, command: int, given: bytes) -> bytes:
        """Run an ioctl that `mxfs_proto.ioctls.check` has let through; return what it gives back."""
        with self._opened(fid, os.O_RDONLY | os.O_NONBLOCK) as fd:
            return ioctls.run(fd, command, given)

    def btime_ns(self, fid: Fid) -> int:
        """When the object was made, in nanoseconds since the epoch."""
        with self._path_fd(fid) as fd:
            return libc.btime_ns(fd)

    # -- records of operations (mxfsd/oprecords.py) --------------------------------------------------------------

    def op_slots(self) -> dict[int, Fid]:
        """The files that hold records of operations, by number."""
        fd = os.open(_OPS, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.mount_fd)
        try:
            return {
                int(name, 16): Fid(os.stat(name, dir_fd=fd).st_ino, libc.generation_at(fd, os.fsencode(name)))
                for name in os.listdir(fd)
            }
        finally:
            os.close(fd)

    def new_op_slot(self, number: int) -> Fid:
        """Make one more."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        fd = os.open(_OPS + b"/%x" % number, flags, 0o600, dir_fd=self.mount_fd)
        try:
            fid = Fid(os.fstat(fd).st_ino, libc.generation_at(fd, b""))
        except OSError:
            os.close(fd)
            raise
        self._files.put(fid, fd)
        return fid

    # -- durability ----------------------------------------------------------------------------------------------

    def sync(self, fid: Fid) -> None:
        """Make the object durable, and with it every change made before (see LogForcer); safe in a thread.

        What does not open for that (it is gone, or is no file or directory) is made durable with everything else.
        """
        try:
            fd = libc.open_by_handle(self.mount_fd, fid[0], fid[1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno not in (errno.ESTALE, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES):
                raise
            self.syncfs()
            return
        try:
            os.fsync(fd)
            self.check_alive()
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a FIFO opens, and cannot be synced
                raise
            self.syncfs()
        finally:
            os.close(fd)

    def is_shut_down(self) -> bool:
        """Whether XFS has shut down: then every fstat fails with EIO, also of what is in memory (xfs_vn_getattr)."""
        try:
            os.fstat(self.mount_fd)
        except OSError as exc:
            return exc.errno == errno.EIO
        return False

    def syncfs(self) -> None:
        """Write back everything and wait."""
        libc.syncfs(self.mount_fd)
        self.check_alive()

    def check_alive(self) -> None:
        """EIO where XFS has shut down. An fsync under way at that moment may report success although its log was thrown
        away: it finds its inode unpinned. The shutdown is marked before that, so looking afterwards tells."""
        os.fstat(self.mount_fd)


_thread = threading.local()


def _become(uid: int, gid: int) -> None:
    """Make objects for a user from now on; libc.set_fs_ids(0, 0) ends that.

    Capabilities stay: that is set for each thread that comes here, as a thread has it for itself.
    """
    if not hasattr(_thread, "keeps_caps"):
        libc.keep_caps_across_fsuid()
        _thread.keeps_caps = True
    libc.set_fs_ids(uid, gid)


def errno_of(error: OSError | MxfsError) -> int:
    """The errno of *error* that programs may see. RESERVATION CONFLICT is EBADE to the block layer; file systems say
    EIO where the disk refuses."""
    code = error.errno or errno.EIO
    return errno.EIO if code == errno.EBADE else code


def kill_priv(fd: int, path: str | None = None) -> None:
    """Take the set-user-id and (where group-executable) set-group-id bits away, as a write by a user does."""
    mode = os.fstat(fd).st_mode
    drop = mode & stat.S_ISUID
    if mode & stat.S_IXGRP:
        drop |= mode & stat.S_ISGID
    if drop:
        os.chmod(path or fd, stat.S_IMODE(mode & ~drop))
