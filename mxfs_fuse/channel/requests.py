"""From a request's bytes to the operation that it asks for, and from what that returns to the answer's bytes."""

import errno
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeAlias

from pyfuse3 import FileInfo

from mxfs_fuse.channel.replies import Listing, attr_out
from mxfs_fuse.channel.types import Attributes, Context, Fields, FileLock, Opened
from mxfs_fuse.operations import Operations
from mxfs_proto import fuse
from mxfs_proto.fuse import Opcode, OpenFlag, SetAttr

_NS = 1_000_000_000
Parts: TypeAlias = Sequence[bytes]


class Request(NamedTuple):
    """A request with its struct and names taken apart; *data* is what was behind them."""

    opcode: int
    unique: int
    nodeid: int
    ctx: Context
    fields: tuple[int, ...]
    names: list[bytes]
    data: bytes


class Dispatcher:
    """Runs requests. Each handler is a coroutine that returns the answer in parts; it raises what operations raise."""

    def __init__(self, operations: Operations) -> None:
        self._ops: Any = operations
        self._handlers: dict[int, Callable[[Request], Coroutine[Any, Any, Parts]]] = {
            op: getattr(self, "_" + op.name.lower()) for op in Opcode if hasattr(self, "_" + op.name.lower())
        }

    def handler(self, opcode: int) -> Callable[[Request], Coroutine[Any, Any, Parts]] | None:
        """Return what answers an opcode, None where nothing does."""
        return self._handlers.get(opcode)

    async def forget(self, rows: Sequence[tuple[int, int]]) -> None:
        """FORGET and BATCH_FORGET, which are not answered: (nodeid, lookups) each."""
        await self._ops.forget(rows)

    async def undo(self, request: Request, parts: Parts) -> None:
        """The kernel did not take an answer, since its caller was interrupted: take back what it stands for."""
        if request.opcode in (Opcode.OPEN, Opcode.CREATE, Opcode.TMPFILE):
            fh = fuse.OPEN_OUT.unpack(parts[-1])[0]
            await self._ops.flush(fh)
            await self._ops.release(fh)
        elif request.opcode == Opcode.OPENDIR:
            await self._ops.releasedir(fuse.OPEN_OUT.unpack(parts[-1])[0])
        if request.opcode in _LOOKS_UP:
            nodeid = fuse.ENTRY_OUT.unpack(parts[0])[0]
            if nodeid:
                await self._ops.forget([(nodeid, 1)])

    # -- names -----------------------------------------------------------------------------------------------------

    async def _lookup(self, r: Request) -> Parts:
        return (await self._ops.lookup(r.nodeid, r.names[0], r.ctx),)

    async def _symlink(self, r: Request) -> Parts:
        return (await self._ops.symlink(r.nodeid, r.names[0], r.names[1], r.ctx),)

    async def _mknod(self, r: Request) -> Parts:
        mode, rdev = r.fields[:2]
        return (await self._ops.mknod(r.nodeid, r.names[0], mode, rdev, r.ctx),)

    async def _mkdir(self, r: Request) -> Parts:
        return (await self._ops.mkdir(r.nodeid, r.names[0], r.fields[0], r.ctx),)

    async def _unlink(self, r: Request) -> Parts:
        await self._ops.unlink(r.nodeid, r.names[0], r.ctx)
        return ()

    async def _rmdir(self, r: Request) -> Parts:
        await self._ops.rmdir(r.nodeid, r.names[0], r.ctx)
        return ()

    async def _rename(self, r: Request) -> Parts:
        await self._ops.rename(r.nodeid, r.names[0], r.fields[0], r.names[1], 0, r.ctx)
        return ()

    async def _rename2(self, r: Request) -> Parts:
        await self._ops.rename(r.nodeid, r.names[0], r.fields[0], r.names[1], r.fields[1], r.ctx)
        return ()

    async def _link(self, r: Request) -> Parts:
        return (await self._ops.link(r.fields[0], r.nodeid, r.names[0], r.ctx),)

    async def _readlink(self, r: Request) -> Parts:
        return (await self._ops.readlink(r.nodeid, r.ctx),)

    # -- attributes ------------------------------------------------------------------------------------------------

    async def _getattr(self, r: Request) -> Parts:
        return (attr_out(await self._ops.getattr(r.nodeid, r.ctx)),)

    async def _setattr(self, r: Request) -> Parts:
        (valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = r.fields
        now = time.time_ns() if valid & (SetAttr.ATIME_NOW | SetAttr.MTIME_NOW) else 0
        attr = Attributes(
            mode,
            uid,
            gid,
            size,
            now if valid & SetAttr.ATIME_NOW else _signed(atime) * _NS + atime_ns,
            now if valid & SetAttr.MTIME_NOW else _signed(mtime) * _NS + mtime_ns,
        )
        fields = Fields(
            bool(valid & SetAttr.MODE),
            bool(valid & SetAttr.UID),
            bool(valid & SetAttr.GID),
            bool(valid & SetAttr.SIZE),
            bool(valid & (SetAttr.ATIME | SetAttr.ATIME_NOW)),
            bool(valid & (SetAttr.MTIME | SetAttr.MTIME_NOW)),
        )
        handle = fh if valid & SetAttr.FH else None
        return (attr_out(await self._ops.setattr(r.nodeid, attr, fields, handle, r.ctx)),)

    async def _statfs(self, r: Request) -> Parts:
        s = await self._ops.statfs(r.ctx)
        return (
            fuse.STATFS_OUT.pack(
                s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, s.f_namemax, s.f_frsize, 0
            ),
        )

    async def _access(self, r: Request) -> Parts:
        if not await self._ops.access(r.nodeid, r.fields[0], r.ctx):
            raise OSError(errno.EACCES, "access denied")
        return ()

    async def _setxattr(self, r: Request) -> Parts:
        size, flags = r.fields
        if size != len(r.data):
            raise OSError(errno.EIO, f"SETXATTR of {size} bytes with {len(r.data)}")
        await self._ops.setxattr(r.nodeid, r.names[0], r.data, r.ctx, flags)
        return ()

    async def _getxattr(self, r: Request) -> Parts:
        return _sized(await self._ops.getxattr(r.nodeid, r.names[0], r.ctx), r.fields[0])

    async def _listxattr(self, r: Request) -> Parts:
        names = await self._ops.listxattr(r.nodeid, r.ctx)
        return _sized(b"".join([name + b"\0" for name in names]), r.fields[0])

    async def _removexattr(self, r: Request) -> Parts:
        await self._ops.removexattr(r.nodeid, r.names[0], r.ctx)
        return ()

    # -- files -----------------------------------------------------------------------------------------------------

    async def _open(self, r: Request) -> Parts:
        return (_opened(await self._ops.open(r.nodeid, r.fields[0], r.ctx)),)

    async def _create(self, r: Request) -> Parts:
        flags, mode = r.fields[:2]
        info, entry = await self._ops.create(r.nodeid, r.names[0], mode, flags, r.ctx)
        return (entry, _opened(info))

    async def _tmpfile(self, r: Request) -> Parts:
        flags, mode = r.fields[:2]
        info, entry = await self._ops.tmpfile(r.nodeid, mode, flags, r.ctx)
        return (entry, _opened(info))

    async def _read(self, r: Request) -> Parts:
        fh, offset, size = r.fields[:3]
        return (await self._ops.read(fh, offset, size),)

    async def _write(self, r: Request) -> Parts:
        fh, offset, size, flags = r.fields[:4]
        if size != len(r.data):
            raise OSError(errno.EIO, f"WRITE of {size} bytes with {len(r.data)}")
        privileged = not flags & fuse.WRITE_KILL_SUIDGID
        return (fuse.WRITE_OUT.pack(await self._ops.write(fh, offset, r.data, privileged), 0),)

    async def _flush(self, r: Request) -> Parts:
        try:
            await self._ops.flush(r.fields[0])
        finally:
            await self._ops.flush_locks(r.fields[0], r.fields[3])
        return ()

    async def _release(self, r: Request) -> Parts:
        fh, _, flags, owner = r.fields
        try:
            await self._ops.release_locks(fh, owner, bool(flags & fuse.RELEASE_FLOCK_UNLOCK))
        finally:
            await self._ops.release(fh)
        return ()

    async def _fsync(self, r: Request) -> Parts:
        await self._ops.fsync(r.fields[0], bool(r.fields[1] & fuse.FSYNC_DATASYNC))
        return ()

    async def _fallocate(self, r: Request) -> Parts:
        fh, offset, length, mode = r.fields[:4]
        await self._ops.fallocate(fh, offset, length, mode, r.ctx)
        return ()

    async def _lseek(self, r: Request) -> Parts:
        fh, offset, whence = r.fields[:3]
        return (fuse.LSEEK_OUT.pack(await self._ops.lseek(fh, offset, whence, r.ctx)),)

    async def _copy_file_range(self, r: Request) -> Parts:
        fh, offset, _, to_fh, to_offset, length, flags = r.fields
        if flags:
            raise OSError(errno.EINVAL, f"copy_file_range with flags {flags:#x}")
        return (fuse.WRITE_OUT.pack(await self._ops.copy_file_range(fh, offset, to_fh, to_offset, length, r.ctx), 0),)

    async def _ioctl(self, r: Request) -> Parts:
        _, _, command, _, size, room = r.fields
        if size != len(r.data):
            raise OSError(errno.EIO, f"IOCTL of {size} bytes with {len(r.data)}")
        result = await self._ops.ioctl(r.nodeid, command, r.data, r.ctx)
        return (fuse.IOCTL_OUT.pack(0, 0, 0, 0), result[:room])

    async def _statx(self, r: Request) -> Parts:
        found = fuse.ENTRY_OUT.unpack(await self._ops.getattr(r.nodeid, r.ctx))
        (_, _, _, valid_s, _, valid_ns, ino, size, blocks, *times) = found[:15]
        mode, nlink, uid, gid, rdev, blksize, _ = found[15:]
        born = await self._ops.btime(r.nodeid, r.ctx)
        a_s, m_s, c_s, a_ns, m_ns, c_ns = times
        b_s, b_ns = divmod(born, _NS)
        return (
            fuse.STATX_OUT.pack(
                valid_s, valid_ns, 0,
                fuse.STATX_BASIC_STATS | fuse.STATX_BTIME, blksize, 0, nlink, uid, gid, mode, ino, size, blocks, 0,
                _signed(a_s), a_ns, b_s, b_ns, _signed(c_s), c_ns, _signed(m_s), m_ns,
                os.major(rdev), os.minor(rdev), 0, 0,
            ),
        )  # fmt: skip

    # -- directories -----------------------------------------------------------------------------------------------

    async def _opendir(self, r: Request) -> Parts:
        return (fuse.OPEN_OUT.pack(await self._ops.opendir(r.nodeid, r.ctx), 0, 0),)

    async def _readdir(self, r: Request) -> Parts:
        fh, offset, size = r.fields[:3]
        listing = Listing(size, plus=False)
        await self._ops.readdir(fh, offset, listing)
        return listing.parts

    async def _readdirplus(self, r: Request) -> Parts:
        fh, offset, size = r.fields[:3]
        listing = Listing(size, plus=True)
        await self._ops.readdir(fh, offset, listing)
        return listing.parts

    async def _releasedir(self, r: Request) -> Parts:
        await self._ops.releasedir(r.fields[0])
        return ()

    async def _fsyncdir(self, r: Request) -> Parts:
        await self._ops.fsyncdir(r.fields[0], bool(r.fields[1] & fuse.FSYNC_DATASYNC))
        return ()

    # -- locks: not asked for where the operations have none (see NativeChannel) ---------------------------------------

    async def _getlk(self, r: Request) -> Parts:
        found = await self._ops.getlk(r.nodeid, r.fields[0], _lock(r.fields), r.ctx)
        return (fuse.LK.pack(found.start, found.end, found.type, found.pid),)

    async def _setlk(self, r: Request) -> Parts:
        await self._ops.setlk(r.nodeid, r.fields[0], _lock(r.fields), False, r.ctx)
        return ()

    async def _setlkw(self, r: Request) -> Parts:
        await self._ops.setlk(r.nodeid, r.fields[0], _lock(r.fields), True, r.ctx)
        return ()


_LOOKS_UP = frozenset(
    {Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.LINK, Opcode.CREATE, Opcode.TMPFILE}
)
"""What they return is an entry, by which the kernel has one more reference."""


def _signed(seconds: int) -> int:
    """Times before 1970 are negative."""
    return seconds - (1 << 64) if seconds >> 63 else seconds


def _sized(value: bytes, size: int) -> Parts:
    """The answer to GETXATTR and LISTXATTR, which may ask for the size alone."""
    if not size:
        return (fuse.GETXATTR_OUT.pack(len(value), 0),)
    if len(value) > size:
        raise OSError(errno.ERANGE, "the attribute does not fit")
    return (value,)


def _opened(info: FileInfo | Opened) -> bytes:
    flags = OpenFlag(0)
    if info.direct_io:
        flags |= OpenFlag.DIRECT_IO
    if info.keep_cache:
        flags |= OpenFlag.KEEP_CACHE
    if info.nonseekable:
        flags |= OpenFlag.NONSEEKABLE
    if not isinstance(info, Opened):
        return fuse.OPEN_OUT.pack(info.fh, flags, 0)
    return fuse.OPEN_OUT.pack(info.fh, flags | OpenFlag.PASSTHROUGH, info.backing_id)


def _lock(fields: tuple[int, ...]) -> FileLock:
    _, owner, start, end, kind, pid, flags, _ = fields
    return FileLock(owner, start, end, kind, pid, bool(flags & fuse.LK_FLOCK))
