"""Open files: which descriptors are cached, and how READ and WRITE upcalls get their data (DESIGN.md section 5).

Whether the kernel may cache is decided at open. A cached descriptor stays cached for its life, so each of its upcalls
needs a lock of its own. A direct one needs none: each access runs at the home under a lock held by the operation.
"""

import asyncio
import errno
import itertools
import os
from contextlib import suppress
from typing import TypeAlias, cast

from pyfuse3 import FileHandleT, FileInfo

from mxfs_fuse.channel.types import Opened
from mxfs_fuse.locks import PAGE
from mxfs_fuse.nodes import Descriptor, Handle, Node
from mxfs_fuse.passthrough import Passthrough, PassthroughFile
from mxfs_fuse.state import State
from mxfs_fuse.writes import ShippedWrites
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Grant, Op
from mxfsd.io.lower import kill_priv

Way: TypeAlias = tuple[PassthroughFile | None, bool]

_PR = LockMode.PR
_PW = LockMode.PW
_EX = LockMode.EX
_OPEN = LockFlag.OPEN | LockFlag.ALT_UNCACHED
CAPABILITY = b"security.capability"
_LOWER_FLAGS = os.O_APPEND | os.O_NOATIME


def _always_direct(flags: int) -> bool:
    """Whether a descriptor is direct whatever lock is held.

    A write-only one reads nothing from the cache, and the kernel asks for security.capability at each cached write:
    twice the upcalls.
    """
    return bool(flags & (os.O_APPEND | os.O_DIRECT)) or flags & os.O_ACCMODE == os.O_WRONLY


def _share_page(start: int, stop: int, offset: int, size: int) -> bool:
    """Whether the bytes from *start* to *stop* lie on a page of *size* bytes at *offset*."""
    return start // PAGE * PAGE < offset + size and offset // PAGE * PAGE < stop


class FileIO:
    """Opens, reads, writes, closes. Raises OSError."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.handles: dict[int, Handle] = {}
        self._next = 0
        self._serial = itertools.count()
        self.bytes_read = 0
        self.bytes_written = 0
        self.writes = ShippedWrites(state)
        self.passthrough = Passthrough(state, self._closed)

    # -- opening ---------------------------------------------------------------------------------------------------

    async def open(self, node: Node, flags: int, uid: int) -> FileInfo:
        """Open an existing file."""
        state = self.state
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable:
            state.check_writable()
        while node.removing is not None:
            await asyncio.shield(node.removing)
        if state.gate is not None:
            await state.pass_gate()
        ino = node.fid.ino
        self._count(node, writable, 1)
        wanted = _EX if writable else _PR
        # Counted before it is one: a BAST that comes before this open has ended must not leave pages under PR.
        coming = writable and not _always_direct(flags)
        node.cached_writers += coming
        try:
            cached = state.locks.cache.may_open(ino, writable)
            if not cached:
                node.registered = node.opens
                known, losses = state.may_read(ino), state.losses
                asked = [asyncio.ensure_future(self._expect_write(node))] if coming and known else []
                got = await state.locks.want(ino, wanted, _OPEN, node.opens)
                cached = got >= wanted
                if state.lower is None and not (known and state.losses == losses):
                    # Without a lock all the time: ESTALE where it was removed meanwhile.
                    if coming and cached:
                        asked.append(asyncio.ensure_future(self._expect_write(node)))
                    await state.link.ship(Op.GETATTR, 0, 0, node.fid)
                if asked:
                    await asyncio.wait(asked)
            # A lock that came may be on its way back by now; for what cannot be called back it must be held.
            firm = cached and state.locks.mode(ino) >= wanted
            handle = self._handle(node, flags, uid, writable, cached, self._passthrough(node, writable, firm))
            if state.lower is not None and not handle.free:
                try:
                    self._fd(handle)
                except BaseException:
                    self._let_go(handle)
                    raise
        except BaseException:
            self._count(node, writable, -1)
            self._closed(node)
            raise
        finally:
            node.cached_writers -= coming
        return self._register(handle)

    async def _expect_write(self, node: Node) -> None:
        """Know the answer when the kernel asks for security.capability, before the first write that it caches."""
        if self.state.lower is None:
            with suppress(OSError):  # it asks again
                await self.capability(node)

    def made(self, node: Node, flags: int, grants: list[Grant]) -> None:
        """A file that a shipped operation has just made, with these locks, will be opened."""
        if not _always_direct(flags) and self.state.granted(grants, node.fid.ino):
            node.no_capability_seq = self.state.locks.seq(node.fid.ino)

    async def capability(self, node: Node) -> bytes:
        """security.capability of a file, as the home has it: remember that there is none. Raises OSError."""
        state = self.state
        ino = node.fid.ino
        held, losses = state.may_read(ino), state.losses
        if held and node.no_capability_seq == state.locks.seq(ino):
            raise OSError(errno.ENODATA, "not set")
        try:
            _, (value,) = await state.link.ship(Op.GETXATTR, 0, 0, (*node.fid, CAPABILITY))
        except OSError as exc:
            if exc.errno == errno.ENODATA and held and state.losses == losses and state.may_read(ino):
                node.no_capability_seq = state.locks.seq(ino)
            raise
        return cast(bytes, value)

    async def open_new(self, node: Node, flags: int, fd: int, uid: int) -> FileInfo:
        """Open a file that this node has just created; *fd*: its lower descriptor (-1: not the home)."""
        state = self.state
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if not state.locks.cache.may_open(node.fid.ino, writable):
            if fd >= 0:
                os.close(fd)
            return await self.open(node, flags, uid)
        self._count(node, writable, 1)
        try:
            handle = self._handle(node, flags, uid, writable, True, self._passthrough(node, writable, True))
        except BaseException:
            self._count(node, writable, -1)
            if fd >= 0:
                os.close(fd)
            raise
        if fd >= 0 and (handle.append or handle.free):
            os.close(fd)
            fd = -1
        handle.fd = fd
        return self._register(handle)

    def _passthrough(self, node: Node, writable: bool, cached: bool) -> Way:
        """Whether the kernel is to read and write by itself, through which file, or only to map. Raises OSError."""
        file = self.passthrough.choose(node, cached)
        return file, file is not None and self.passthrough.is_free(file, writable, cached)

    def _handle(self, node: Node, flags: int, uid: int, writable: bool, cached: bool, way: Way) -> Handle:
        append = bool(flags & os.O_APPEND)
        file, free = way
        direct = not cached or _always_direct(flags) or file is not None
        handle = Handle(node, flags, writable, append, direct, privileged=uid == 0)
        if file is not None:
            self.passthrough.opened(handle, file, free)
        if not direct:
            node.may_have_pages = True
            if writable:
                node.cached_writers += 1
        return handle

    def _let_go(self, handle: Handle) -> None:
        """An open is over, or came to nothing."""
        if handle.writable and not handle.direct:
            handle.node.cached_writers -= 1
        if handle.passthrough is not None:
            self.passthrough.closed(handle)

    def _register(self, handle: Handle) -> FileInfo:
        self._next += 1
        self.handles[self._next] = handle
        if handle.passthrough is not None:
            return cast(FileInfo, Opened(self._next, handle.passthrough.backing_id, direct_io=not handle.free))
        # Pages are dropped whenever a lock is lost: what is cached now is current, so it may stay.
        return FileInfo(fh=self._next, direct_io=handle.direct, keep_cache=not handle.direct)

    @staticmethod
    def _count(node: Node, writable: bool, step: int) -> None:
        if writable:
            node.opens_w += step
        else:
            node.opens_r += step

    def _fd(self, handle: Handle) -> int:
        """The lower descriptor, opened (again, after a change of home) by handle."""
        if handle.fd < 0:
            lower = self.state.lower
            assert lower is not None
            access = os.O_RDWR if handle.writable else os.O_RDONLY
            handle.fd = lower.open(handle.node.fid, access | handle.flags & _LOWER_FLAGS)
        return handle.fd

    def close_lower(self) -> None:
        """Close every lower descriptor: this node is the home no longer."""
        for handle in self.handles.values():
            if handle.fd >= 0:
                os.close(handle.fd)
                handle.fd = -1

    # -- closing ---------------------------------------------------------------------------------------------------

    async def release(self, fh: FileHandleT) -> None:
        """The last reference to a descriptor is gone."""
        handle = self.handles.pop(fh)
        node = handle.node
        if handle.fd >= 0:
            os.close(handle.fd)
        self._let_go(handle)
        self._count(node, handle.writable, -1)
        self._closed(node)

    def _closed(self, node: Node) -> None:
        """Report what others may be waiting to know; free an orphan after its last close."""
        state = self.state
        ino = node.fid.ino
        mode = state.locks.mode(ino)
        last = not node.opens_r and not node.opens_w
        if mode < _PR or (last and node.registered != (0, 0)):
            state.locks.report_opens(node)
        if last and state.nodes.get(ino) is node:
            if state.lower is not None:
                if state.may_free(ino) and not state.readonly:
                    state.lower.reap(node.fid)
            elif node.unnamed or (node.attr is not None and node.attr.nlink == 0):
                state.reap(node.fid)
            state.forget(node)

    # -- data ------------------------------------------------------------------------------------------------------

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """READ upcall."""
        handle = self.handles[fh]
        state = self.state
        node = handle.node
        needed = _PW if node.cached_writers else _PR
        if handle.fd >= 0 and state.gate is None and state.locks.mode(handle.ino) >= needed and not node.writes:
            node.refilled = True
            data = os.pread(handle.fd, size, off)
            self.bytes_read += len(data)
            return data
        if handle.direct:
            if state.gate is not None:
                await state.pass_gate()
            return await self._pread(handle, off, size)
        return await self._cached_read(handle, off, size)

    async def _cached_read(self, handle: Handle, off: int, size: int) -> bytes:
        node = handle.node
        serial = next(self._serial)
        node.came(serial, off, off + size)
        try:
            while True:
                # A node with a cached writer fills its pages under PW only (see locks._gaps).
                if await self._usable(node, _PW if node.cached_writers else _PR):
                    older = [end for start, stop, end in node.writes.values() if _share_page(start, stop, off, size)]
                    if older:
                        await asyncio.wait(older)
                        continue
                    node.refilled = True
                    node.serves(serial, off, off + size)
                    try:
                        data = await self._pread(handle, off, size)
                    finally:
                        left_out = self._served(node, serial)
                    if not left_out:
                        return data
                    # The lock was lost meanwhile: without one nobody would ever take these pages from the kernel again.
                    node.came(serial, off, off + size)
        finally:
            node.waits_no_more(serial)

    def _served(self, node: Node, serial: int) -> bool:
        """An upcall ran. True: all locks were lost meanwhile, and its pages left out when the others were dropped."""
        if node.revocation is not None:
            node.revocation.again = True
        return node.served(serial)

    async def _usable(self, node: Node, needed: LockMode, write: int = -1) -> bool:
        """Whether an upcall of a cached descriptor may run now; waits for what is missing otherwise."""
        state = self.state
        ino = node.fid.ino
        if state.gate is not None:
            await state.pass_gate()
        if state.locks.mode(ino) >= needed:
            return True
        revocation = node.revocation
        if revocation is not None:
            if revocation.serve and revocation.held >= needed:
                return True
            node.late |= {write} & node.writes.keys()
            try:
                await revocation.wait()
            finally:
                node.late -= {write}
        else:
            await state.locks.want(ino, needed)
        return False

    async def _pread(self, handle: Handle, off: int, size: int) -> bytes:
        state = self.state
        if state.lower is not None and (not handle.direct or state.may_read(handle.ino)):
            data = os.pread(self._fd(handle), size, off)
        else:
            _, (data,) = await state.link.ship(Op.READ, 0, 0, (*handle.node.fid, off, size))
        self.bytes_read += len(data)
        return data

    async def write(self, fh: FileHandleT, off: int, buf: bytes, privileged: bool | None = None) -> int:
        """WRITE upcall. *privileged*: whoever writes may leave set-id bits alone; None: as who opened the file may."""
        handle = self.handles[fh]
        if privileged is not None:
            handle.privileged = privileged
        state = self.state
        again = handle.node.first_write and handle.node.refilled and not handle.direct
        if handle.fd >= 0 and state.gate is None and state.locks.mode(handle.ino) >= _PW and not again:
            if not handle.direct:
                handle.node.first_write = False
            return self._pwrite(handle, off, buf)
        if handle.direct:
            if state.gate is not None:
                await state.pass_gate()
            if state.lower is not None and state.locks.mode(handle.ino) >= _PW:
                return self._pwrite(handle, off, buf)
            return await self._ship_write(handle, off, buf)
        return await self._cached_write(handle, off, buf)

    async def _cached_write(self, handle: Handle, off: int, buf: bytes) -> int:
        node = handle.node
        serial = next(self._serial)
        node.came(serial, off, off + len(buf))
        node.write_came(serial, off, off + len(buf), asyncio.get_running_loop().create_future())
        # Its folios may have been dropped, and read again, between the kernel's filling them and this upcall.
        again = node.first_write and node.refilled
        node.first_write = False
        try:
            while True:
                if await self._usable(node, _PW, serial):
                    node.serves(serial, off, off + len(buf))
                    try:
                        if self.state.lower is not None:
                            done = self._pwrite(handle, off, buf)
                        else:
                            done = await self._ship_write(handle, off, buf)
                        if again:
                            await self.state.locks.drop_written(node, off, len(buf))
                    finally:
                        left_out = self._served(node, serial)
                    if left_out:
                        node.came(serial, off, off + len(buf))
                        while not await self._usable(node, _PW, serial):
                            pass  # its folios stay in the cache when it is answered: only under a lock
                        await self.state.locks.drop_written(node, off, len(buf))
                    return done
        finally:
            node.waits_no_more(serial)
            node.write_over(serial)

    def _pwrite(self, handle: Handle, off: int, buf: bytes) -> int:
        node = handle.node
        fd = self._fd(handle)
        done = os.pwrite(fd, buf, off)  # an O_APPEND descriptor appends whatever the offset
        if node.privileged and not handle.privileged:
            kill_priv(fd)
            node.privileged = False
        self.state.changed(handle.ino)
        self.bytes_written += done
        return done

    async def _ship_write(self, handle: Handle, off: int, buf: bytes) -> int:
        done = await self.writes.write(handle, off, buf)
        self.bytes_written += done
        return done

    async def flush(self, fh: FileHandleT) -> None:
        """A descriptor is closed: everything written through this node has reached the home, or the error is told."""
        handle = self.handles[fh]
        self._check_lower(handle)
        await self.writes.settle(handle.node)
        handle.raise_error("close")

    async def fsync(self, handle: Handle) -> None:
        """Make durable what was written through this node."""
        if handle.passthrough is not None and handle.writable:
            await self.passthrough.pass_gate(handle.passthrough)
            self._check_lower(handle)
        await self.fsync_object(handle)

    @staticmethod
    def _check_lower(handle: Handle) -> None:
        """EIO for a file that was written without asking, on a lower mount that has ended: what became of the last
        writes, through mappings too, only the kernel knows."""
        file = handle.passthrough
        if file is not None and file.stale and handle.writable:
            raise OSError(errno.EIO, "the lower mount has ended")

    async def fsync_object(self, opened: Descriptor) -> None:
        """Make an object durable: on the home by fsync of the lower one, elsewhere by the home."""
        state, node = self.state, opened.node
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is None:
            await self.writes.fsync(node)
        else:
            await self.writes.commit(node)
            await state.sync_local(node)
        opened.raise_error("fsync")
