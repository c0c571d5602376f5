"""The channel that speaks the FUSE protocol itself, on a socket pair in place of /dev/fuse."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pyfuse3 import FileInfo, FUSEError

from mxfs_fuse.callers import caller, interrupt
from mxfs_fuse.channel import native
from mxfs_fuse.channel.native import NativeChannel, mount_words
from mxfs_fuse.channel.replies import Listing, NativeReplies, attr_out
from mxfs_fuse.channel.types import Opened
from mxfs_proto import fuse
from mxfs_proto.errors import PeerError
from mxfs_proto.fuse import InitFlag, Opcode
from mxfs_proto.ops import Attr
from mxfsd import mountinfo
from mxfsd.io import libc

ATTR = Attr(7, 3, 0o100644, 1, 1000, 1001, 0, 5, 8, 1_000_000_001, -2_500_000_000, 3_000_000_003)
NEW_KERNEL = int(~InitFlag(0)) & 0xFFFFFFFF


class Operations:
    """Answers of every kind."""

    def __init__(self) -> None:
        self.replies = NativeReplies()
        self.gate = asyncio.Event()
        self.seen: list[Any] = []
        self.released: list[int] = []
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.local_locks = True
        self.freed: list[tuple[int, int, bool]] = []

    def use(self, _replies: NativeReplies) -> None: ...

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> bytes:
        self.seen.append((parent, name, ctx))
        if name == b"wait":
            await self.gate.wait()
        if name == b"gone":
            raise FUSEError(errno.ENOENT)
        if name == b"absent":
            return self.replies.absent(2.5)
        return self.replies.entry(7, ATTR, 1.25, 0.5)

    async def getattr(self, inode: int, ctx: Any) -> bytes:
        try:
            await self.broken
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
        return self.replies.entry(inode, ATTR, 0.0, 0.0)

    async def readlink(self, _inode: int, _ctx: Any) -> bytes:
        raise ValueError("a fault of ours")

    async def unlink(self, _parent: int, _name: bytes, _ctx: Any) -> None:
        signal = interrupt.get()
        assert signal is not None
        await signal.wait()
        raise OSError(errno.EINTR, "interrupted")

    async def open(self, inode: int, flags: int, _ctx: Any) -> FileInfo:
        return FileInfo(fh=inode + flags, direct_io=True)

    async def tmpfile(self, _parent: int, mode: int, flags: int, _ctx: Any) -> tuple[FileInfo, bytes]:
        return FileInfo(fh=mode + flags), self.replies.entry(7, ATTR, 1.25, 0.5)

    async def write(self, fh: int, off: int, buf: bytes, privileged: bool) -> int:
        self.seen.append((fh, off, buf, privileged))
        return len(buf)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, _ctx: Any) -> bytes:
        self.seen.append((attr, fields, fh))
        return self.replies.entry(inode, ATTR, 0.0, 0.0)

    async def setxattr(self, inode: int, name: bytes, value: bytes, _ctx: Any, flags: int) -> None:
        self.seen.append((inode, name, value, flags))

    async def getxattr(self, _inode: int, _name: bytes, _ctx: Any) -> bytes:
        return b"value"

    async def readdir(self, _fh: int, start: int, listing: Listing) -> None:
        for index in range(start, 3):
            if not self.replies.add(listing, b"n%d" % index, self.replies.entry(7, ATTR, 1, 1), index + 1):
                return

    async def forget(self, rows: Any) -> None:
        self.seen.append(list(rows))

    async def release(self, fh: int) -> None:
        self.released.append(fh)

    async def flush(self, fh: int) -> None:
        if fh == 13:
            raise OSError(errno.EIO, "what was written is lost")

    async def flush_locks(self, fh: int, owner: int) -> None:
        self.freed.append((fh, owner, False))

    async def release_locks(self, fh: int, owner: int, flock: bool) -> None:
        self.freed.append((fh, owner, flock))

    async def setlk(self, inode: int, fh: int, lock: Any, sleep: bool, _ctx: Any) -> None:
        self.seen.append((inode, fh, lock, sleep))

    async def getlk(self, inode: int, fh: int, lock: Any, _ctx: Any) -> Any:
        return lock

    async def fallocate(self, fh: int, offset: int, length: int, mode: int, _ctx: Any) -> None:
        self.seen.append((fh, offset, length, mode))

    async def lseek(self, fh: int, offset: int, whence: int, _ctx: Any) -> int:
        return fh + offset + whence

    async def copy_file_range(self, fh: int, offset: int, to_fh: int, to_offset: int, length: int, _ctx: Any) -> int:
        self.seen.append((fh, offset, to_fh, to_offset))
        return length

    async def ioctl(self, inode: int, command: int, given: bytes, _ctx: Any) -> bytes:
        self.seen.append((inode, command, given))
        return b"result"

    async def btime(self, inode: int, _ctx: Any) -> int:
        return -1


class Kernel:
    """The other end: sends requests, gets answers."""

    def __init__(self, sock: socket.socket, operations: Operations, channel: NativeChannel) -> None:
        self.sock = sock
        self.operations = operations
        self.channel = channel
        self.unique = 0

    def send(self, opcode: int, body: bytes = b"", nodeid: int = 1, length: int = -1) -> int:
        self.unique += 2
        size = fuse.IN_HEADER.size + len(body) if length < 0 else length
        self.sock.send(fuse.IN_HEADER.pack(size, opcode, self.unique, nodeid, 10, 20, 30, 0, 0) + body)
        return self.unique

    async def answer(self) -> tuple[int, int, bytes]:
        """Unique, errno, body of the next answer."""
        async with asyncio.timeout(5):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
        length, error, unique = fuse.OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return unique, -error, data[fuse.OUT_HEADER.size :]

    async def ask(self, opcode: int, body: bytes = b"", nodeid: int = 1) -> tuple[int, bytes]:
        unique = self.send(opcode, body, nodeid)
        found, code, data = await self.answer()
        assert found == unique
        return code, data


@contextlib.asynccontextmanager
async def serving(local_locks: bool = True) -> AsyncIterator[Kernel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    operations = Operations()
    operations.local_locks = local_locks
    channel = NativeChannel(ours.detach())
    channel._serve_with(operations)  # type: ignore[arg-type]
    task = asyncio.create_task(channel.serve())
    await asyncio.sleep(0)
    try:
        yield Kernel(theirs, operations, channel)
    finally:
        theirs.close()
        async with asyncio.timeout(5):
            await task  # the mount is gone: serving ends
        channel.close()


@pytest.fixture
async def kernel() -> AsyncIterator[Kernel]:
    async with serving() as found:
        yield found


def init(major: int = 7, minor: int = 45, flags: int = NEW_KERNEL) -> bytes:
    return fuse.INIT_IN.pack(major, minor, 131072, flags) + bytes(48)


async def test_init_agrees_on_what_both_know(kernel: Kernel) -> None:
    code, data = await kernel.ask(Opcode.INIT, init())
    fields = fuse.INIT_OUT.unpack(data)
    assert (code, fields[0], fields[2], fields[6]) == (0, 7, 131072, fuse.MAX_WRITE)
    assert InitFlag(fields[3]) & InitFlag.HANDLE_KILLPRIV_V2
    assert not InitFlag(fields[3]) & InitFlag.POSIX_LOCKS, "these operations have no locks"
    assert fields[4:6] == (65535, 65535)


async def test_init_with_an_older_kernel_asks_for_less(kernel: Kernel) -> None:
    offered = InitFlag.DO_READDIRPLUS | InitFlag.BIG_WRITES | InitFlag.ASYNC_READ
    code, data = await kernel.ask(Opcode.INIT, init(minor=31, flags=int(offered)))
    assert (code, fuse.INIT_OUT.unpack(data)[1], fuse.INIT_OUT.unpack(data)[3]) == (0, 31, int(offered))


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize(("flags", "flags2"), [(NEW_KERNEL, 1 << 5), (NEW_KERNEL, 0), (NEW_KERNEL ^ 1 << 30, 1 << 5)])
async def test_passthrough_is_agreed_upon_where_both_want_it(
    kernel: Kernel, wants: bool, flags: int, flags2: int
) -> None:
    kernel.channel.wants_passthrough = wants
    body = fuse.INIT_IN_EXT.pack(7, 45, 131072, flags, flags2) + bytes(44)
    code, data = await kernel.ask(Opcode.INIT, body)
    fields = fuse.INIT_OUT.unpack(data)
    agreed = wants and flags2 != 0 and bool(flags & InitFlag.INIT_EXT)
    assert (code, kernel.channel.has_passthrough) == (0, agreed)
    assert (fields[10], fields[11], bool(fields[3] & InitFlag.INIT_EXT)) == (
        (1 << 5, 1, True) if agreed else (0, 0, False)
    )


@pytest.mark.parametrize(("direct", "flags"), [(False, 1 << 7), (True, 1 << 7 | 1)])
async def test_an_open_for_passthrough(kernel: Kernel, direct: bool, flags: int) -> None:
    async def opened(inode: int, _flags: int, _ctx: Any) -> Opened:
        return Opened(inode, 9, direct)

    kernel.operations.open = opened  # type: ignore[assignment,method-assign]
    code, data = await kernel.ask(Opcode.OPEN, fuse.OPEN_IN.pack(os.O_RDWR, 0), nodeid=5)
    assert (code, fuse.OPEN_OUT.unpack(data)) == (0, (5, flags, 9))


def effective() -> int:
    """This thread's effective capabilities (proc(5))."""
    with open("/proc/thread-self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith("CapEff:")).split()[1], 16)


async def test_a_backing_file_is_taken_without_the_right_to_leave_set_id_bits(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bytes, int]] = []

    def ioctl(_fd: int, command: int, argument: bytes) -> int:
        asked.append((command, bytes(argument), effective()))
        return 9

    before = effective()
    monkeypatch.setattr(native.fcntl, "ioctl", ioctl)
    assert kernel.channel.open_backing(5) == 9
    kernel.channel.close_backing(9)
    assert asked == [
        (0x4010E501, fuse.BACKING_MAP.pack(5, 0, 0), before & ~(1 << 4)),
        (0x4004E502, fuse.BACKING_ID.pack(9), before),
    ]
    assert effective() == before


async def test_init_with_another_major_version(kernel: Kernel) -> None:
    code, data = await kernel.ask(Opcode.INIT, init(major=8))
    assert (code, fuse.INIT_OUT.unpack(data)[0]) == (0, 7)  # the kernel asks again, with 7
    assert (await kernel.ask(Opcode.INIT, init()))[0] == 0


@pytest.mark.error_logs
@pytest.mark.parametrize("offer", [init(minor=30), init(flags=0), b"\0" * 3])
async def test_init_with_a_kernel_that_is_too_old(kernel: Kernel, offer: bytes) -> None:
    assert (await kernel.ask(Opcode.INIT, offer))[0] == errno.EPROTO


async def test_an_entry_and_its_attributes(kernel: Kernel) -> None:
    code, data = await kernel.ask(Opcode.LOOKUP, b"name\0", nodeid=5)
    fields = fuse.ENTRY_OUT.unpack(data)
    assert (code, fields[:6]) == (0, (7, 3, 0, 1, 500_000_000, 250_000_000))
    assert fields[6:9] == (7, 5, 8)
    assert fields[10] == (1 << 64) - 3 and fields[13] == 500_000_000  # 2.5 s before 1970
    assert fields[15:21] == (0o100644, 1, 1000, 1001, 0, 4096)
    parent, name, ctx = kernel.operations.seen[0]
    assert (parent, name, ctx.uid, ctx.gid, ctx.pid) == (5, b"name", 10, 20, 30)
    code, data = await kernel.ask(Opcode.LOOKUP, b"absent\0")
    assert (code, fuse.ENTRY_OUT.unpack(data)[0], fuse.ENTRY_OUT.unpack(data)[2]) == (0, 0, 2)


@pytest.mark.error_logs
async def test_errors(kernel: Kernel) -> None:
    assert await kernel.ask(Opcode.LOOKUP, b"gone\0") == (errno.ENOENT, b"")
    assert await kernel.ask(Opcode.READLINK) == (errno.EIO, b"")  # a fault of ours is an error, and the mount goes on
    assert await kernel.ask(4711) == (errno.ENOSYS, b"")
    assert await kernel.ask(Opcode.SETLK, bytes(48)) == (errno.ENOSYS, b"")
    assert await kernel.ask(Opcode.LOOKUP, b"a name without end") == (errno.EIO, b"")
    assert await kernel.ask(Opcode.READ, bytes(39)) == (errno.EIO, b"")
    kernel.send(Opcode.STATFS, length=4711)
    assert (await kernel.answer())[1] == errno.EIO
    kernel.sock.send(b"short")
    assert (await kernel.ask(Opcode.LOOKUP, b"name\0"))[0] == 0


async def test_a_request_that_waits_keeps_no_other_out(kernel: Kernel) -> None:
    waiting = kernel.send(Opcode.LOOKUP, b"wait\0")
    assert (await kernel.ask(Opcode.LOOKUP, b"name\0"))[0] == 0
    kernel.operations.gate.set()
    assert (await kernel.answer())[:2] == (waiting, 0)


@pytest.mark.parametrize(("failed", "code"), [(errno.ESTALE, 0), (errno.EIO, errno.EIO)])
async def test_what_a_request_waits_for_fails_in_the_operation(kernel: Kernel, failed: int, code: int) -> None:
    """And not beside it: the operation may have an answer to that."""
    unique = kernel.send(Opcode.GETATTR, bytes(16))
    await asyncio.sleep(0.01)
    kernel.operations.broken.set_exception(OSError(failed, "what was waited for"))
    assert (await kernel.answer())[:2] == (unique, code)


async def test_interrupt_ends_a_wait(kernel: Kernel) -> None:
    unique = kernel.send(Opcode.UNLINK, b"name\0")
    kernel.send(Opcode.INTERRUPT, fuse.INTERRUPT_IN.pack(unique))
    assert (await kernel.answer())[:2] == (unique, errno.EINTR)
    kernel.send(Opcode.INTERRUPT, fuse.INTERRUPT_IN.pack(unique))  # too late: nothing happens
    assert (await kernel.ask(Opcode.LOOKUP, b"name\0"))[0] == 0


async def test_ranges_and_flags_of_files(kernel: Kernel) -> None:
    assert await kernel.ask(Opcode.FALLOCATE, fuse.FALLOCATE_IN.pack(3, 1 << 40, 5, 2, 0)) == (0, b"")
    assert await kernel.ask(Opcode.LSEEK, fuse.LSEEK_IN.pack(3, 1 << 40, 4, 0)) == (
        0,
        fuse.LSEEK_OUT.pack((1 << 40) + 7),
    )
    asked = fuse.COPY_FILE_RANGE_IN.pack(3, 1 << 40, 9, 4, 5, 77, 0)
    assert await kernel.ask(Opcode.COPY_FILE_RANGE, asked) == (0, fuse.WRITE_OUT.pack(77, 0))
    code, answer = await kernel.ask(Opcode.IOCTL, fuse.IOCTL_IN.pack(3, 0, 7, 0, 4, 3) + b"data", nodeid=9)
    assert (code, answer) == (0, fuse.IOCTL_OUT.pack(0, 0, 0, 0) + b"res"), "no more than there is room for"
    assert (await kernel.ask(Opcode.IOCTL, fuse.IOCTL_IN.pack(3, 0, 7, 0, 5, 0) + b"data"))[0] == errno.EIO
    assert (await kernel.ask(Opcode.COPY_FILE_RANGE, asked[:-8] + b"\1" * 8))[0] == errno.EINVAL
    assert kernel.operations.seen == [(3, 1 << 40, 5, 2), (3, 1 << 40, 4, 5), (9, 7, b"data")]


async def test_statx_has_the_birth_time_beside_the_attributes(kernel: Kernel) -> None:
    kernel.operations.broken.set_result(None)
    code, answer = await kernel.ask(Opcode.STATX, fuse.STATX_IN.pack(0, 0, 0, 0, 0xFFF), nodeid=7)
    fields = fuse.STATX_OUT.unpack(answer)
    assert (code, fields[3], fields[6:10]) == (0, 0xFFF, (ATTR.nlink, ATTR.uid, ATTR.gid, ATTR.mode))
    assert fields[10:13] == (7, ATTR.size, ATTR.blocks)
    assert fields[14:22] == (1, 1, -1, 999_999_999, 3, 3, -3, 500_000_000)


async def test_what_waits_for_long_is_named_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    unique = kernel.send(Opcode.LOOKUP, b"wait\0", nodeid=9)
    await asyncio.sleep(0.05)
    with structlog.testing.capture_logs() as logs:
        kernel.channel.name_long_waits()
        assert not logs
        monkeypatch.setattr(native, "_LONG_S", 0.01)
        kernel.channel.name_long_waits()
        kernel.channel.name_long_waits()
        kernel.operations.gate.set()
        assert (await kernel.answer())[0] == unique
        kernel.channel.name_long_waits()
    (line,) = logs
    assert (line["event"], line["count"]) == ("requests wait for long", 1)
    assert line["first"][0].startswith("LOOKUP of inode 9 for thread 30 at requests.py:")


async def test_the_caller_is_known_while_an_operation_waits(kernel: Kernel) -> None:
    callers = []

    async def readlink(_inode: int, _ctx: Any) -> bytes:
        callers.append(caller.get())
        await asyncio.sleep(0.01)
        callers.append(caller.get())
        return b"target"

    kernel.operations.readlink = readlink  # type: ignore[method-assign]
    assert await kernel.ask(Opcode.READLINK) == (0, b"target")
    assert callers == [30, 30]


async def test_files(kernel: Kernel) -> None:
    code, data = await kernel.ask(Opcode.OPEN, fuse.OPEN_IN.pack(2, 0), nodeid=40)
    assert (code, fuse.OPEN_OUT.unpack(data)) == (0, (42, 3, 0))  # FileInfo keeps the cache unless told otherwise
    for flags in (0, fuse.WRITE_KILL_SUIDGID):
        body = fuse.WRITE_IN.pack(42, 1 << 40, 4, flags, 0, 0, 0) + b"data"
        assert await kernel.ask(Opcode.WRITE, body) == (0, fuse.WRITE_OUT.pack(4, 0))
        assert kernel.operations.seen[-1] == (42, 1 << 40, b"data", not flags)
    body = fuse.WRITE_IN.pack(42, 0, 5, 0, 0, 0, 0) + b"data"
    assert (await kernel.ask(Opcode.WRITE, body))[0] == errno.EIO


async def test_setattr(kernel: Kernel) -> None:
    minus = (1 << 64) - 2
    valid = fuse.SetAttr.MODE | fuse.SetAttr.SIZE | fuse.SetAttr.MTIME | fuse.SetAttr.FH
    body = fuse.SETATTR_IN.pack(valid, 0, 9, 77, 0, 0, minus, 0, 0, 5, 0, 0o600, 0, 1, 2, 0)
    code, data = await kernel.ask(Opcode.SETATTR, body)
    assert (code, len(data)) == (0, fuse.ATTR_OUT_HEAD.size + fuse.ATTR.size)
    attr, fields, fh = kernel.operations.seen[0]
    assert (attr.st_mode, attr.st_size, attr.st_mtime_ns, fh) == (0o600, 77, -2 * 10**9 + 5, 9)
    assert (fields.update_mode, fields.update_size, fields.update_mtime) == (True, True, True)
    assert (fields.update_uid, fields.update_gid, fields.update_atime) == (False, False, False)


async def test_extended_attributes(kernel: Kernel) -> None:
    assert await kernel.ask(Opcode.SETXATTR, fuse.SETXATTR_IN.pack(3, 1) + b"user.a\0val") == (0, b"")
    assert kernel.operations.seen[0] == (1, b"user.a", b"val", 1)
    assert (await kernel.ask(Opcode.SETXATTR, fuse.SETXATTR_IN.pack(4, 1) + b"user.a\0val"))[0] == errno.EIO
    assert await kernel.ask(Opcode.GETXATTR, fuse.GETXATTR_IN.pack(0, 0) + b"user.a\0") == (0, b"\5\0\0\0\0\0\0\0")
    assert await kernel.ask(Opcode.GETXATTR, fuse.GETXATTR_IN.pack(5, 0) + b"user.a\0") == (0, b"value")
    assert (await kernel.ask(Opcode.GETXATTR, fuse.GETXATTR_IN.pack(4, 0) + b"user.a\0"))[0] == errno.ERANGE


async def test_listing(kernel: Kernel) -> None:
    one = fuse.ENTRY_OUT.size + fuse.DIRENT.size + 8
    for size, start, count in ((4096, 0, 3), (2 * one, 0, 2), (2 * one, 2, 1), (one - 1, 0, 0)):
        code, data = await kernel.ask(Opcode.READDIRPLUS, fuse.READ_IN.pack(5, start, size, 0, 0, 0, 0))
        assert (code, len(data)) == (0, count * one)
        for index in range(count):
            ino, offset, length, kind = fuse.DIRENT.unpack_from(data, index * one + fuse.ENTRY_OUT.size)
            assert (ino, offset, length, kind) == (7, start + index + 1, 2, 8)
    code, data = await kernel.ask(Opcode.READDIR, fuse.READ_IN.pack(5, 0, 4096, 0, 0, 0, 0))
    assert len(data) == 3 * (fuse.DIRENT.size + 8)


async def test_file_locks() -> None:
    async with serving(local_locks=False) as kernel:
        code, data = await kernel.ask(Opcode.INIT, init())
        agreed = InitFlag(fuse.INIT_OUT.unpack(data)[3])
        assert agreed & InitFlag.POSIX_LOCKS and agreed & InitFlag.FLOCK_LOCKS
        body = fuse.LK_IN.pack(5, 77, 10, 19, 1, 4711, 0, 0)
        assert await kernel.ask(Opcode.SETLKW, body, nodeid=9) == (0, b"")
        assert await kernel.ask(Opcode.SETLK, fuse.LK_IN.pack(5, 77, 0, 9, 0, 1, fuse.LK_FLOCK, 0)) == (0, b"")
        posix, flock = kernel.operations.seen
        assert (posix[0], posix[1], posix[3], flock[3]) == (9, 5, True, False)
        lock = posix[2]
        assert (lock.owner, lock.start, lock.end, lock.type, lock.pid, lock.flock) == (77, 10, 19, 1, 4711, False)
        assert flock[2].flock
        assert await kernel.ask(Opcode.GETLK, body) == (0, fuse.LK.pack(10, 19, 1, 4711))
        assert (await kernel.ask(Opcode.FLUSH, fuse.FLUSH_IN.pack(13, 0, 0, 77)))[0] == errno.EIO
        assert (await kernel.ask(Opcode.RELEASE, fuse.RELEASE_IN.pack(5, 0, 2, 78)))[0] == 0
        assert kernel.operations.freed == [(13, 77, False), (5, 78, True)], "locks go, whatever else a close says"


async def test_forget(kernel: Kernel) -> None:
    kernel.send(Opcode.FORGET, fuse.FORGET_IN.pack(3), nodeid=8)
    rows = b"".join(fuse.FORGET_ONE.pack(nodeid, 1) for nodeid in (5, 6))
    kernel.send(Opcode.BATCH_FORGET, fuse.BATCH_FORGET_IN.pack(2, 0) + rows + b"half")
    assert (await kernel.ask(Opcode.LOOKUP, b"gone\0"))[0] == errno.ENOENT
    assert kernel.operations.seen[:2] == [[(8, 3)], [(5, 1), (6, 1)]]


async def test_an_answer_that_the_kernel_does_not_take_is_taken_back(kernel: Kernel) -> None:
    """The caller was interrupted: an open file must not stay open for ever, nor an entry be counted."""
    refused = [True, True, True]

    def answer(*_args: object) -> bool:
        return not refused.pop()

    kernel.channel._answer = answer  # type: ignore[method-assign]
    kernel.send(Opcode.OPEN, fuse.OPEN_IN.pack(2, 0), nodeid=40)
    kernel.send(Opcode.LOOKUP, b"name\0")
    kernel.send(Opcode.TMPFILE, fuse.CREATE_IN.pack(2, 5, 0, 0) + b"/\0")
    async with asyncio.timeout(5):
        while len(kernel.operations.seen) < 3:
            await asyncio.sleep(0.005)
    assert kernel.operations.released == [42, 7]
    assert kernel.operations.seen[1:] == [[(7, 1)], [(7, 1)]]


@pytest.mark.error_logs
@given(st.binary(max_size=300), st.sampled_from([*Opcode, 0, 7, 4096, 1 << 31]))
def test_whatever_comes_the_mount_goes_on(body: bytes, opcode: int) -> None:
    async def run() -> None:
        async with serving() as kernel:
            kernel.operations.gate.set()
            kernel.operations.broken.set_result(None)
            assert (await kernel.ask(Opcode.INIT, init()))[0] == 0
            sent = kernel.send(opcode, body)
            probe = kernel.send(Opcode.LOOKUP, b"gone\0")
            while (got := await kernel.answer())[0] != probe:
                assert got[0] == sent
            assert got[1] == errno.ENOENT

    asyncio.run(run())


@given(st.binary(max_size=200), st.sampled_from(list(Opcode)))
def test_unpacking_never_reads_beyond_a_request(body: bytes, opcode: Opcode) -> None:
    if opcode not in fuse.REQUESTS:
        return
    struct, count = fuse.REQUESTS[opcode]
    try:
        fields, names, rest = fuse.unpack_request(opcode, memoryview(body))
    except PeerError:
        assert len(body) < struct.size or body[struct.size :].count(b"\0") < count
        return
    assert struct.pack(*fields) + b"".join(name + b"\0" for name in names) + bytes(rest) == body


def test_attributes_without_an_entry() -> None:
    data = attr_out(NativeReplies().entry(7, ATTR, 1.25, 9.0))
    assert fuse.ATTR_OUT_HEAD.unpack_from(data) == (1, 250_000_000, 0)
    assert fuse.ATTR.unpack_from(data, fuse.ATTR_OUT_HEAD.size)[0] == 7


def test_mount_words() -> None:
    words = ["fsname=/dev/sdb", "default_permissions", "allow_other", "dev", "suid", "ro", "noatime"]
    assert mount_words(words) == (libc.MS_RDONLY | libc.MS_NOATIME, ["default_permissions", "allow_other"])
    with pytest.raises(OSError) as error:
        mount_words(["nonsense"])
    assert error.value.errno == errno.EINVAL and "nonsense" in str(error.value)


class Nothing:
    """Operations of a mount that nobody asks anything of."""

    local_locks = False

    def use(self, _replies: object) -> None: ...


@pytest.mark.needs("root", "fuse")
def test_the_end_of_a_channel_leaves_a_later_mount_alone(tmp_path: Any) -> None:
    """A dead mount was unmounted, and another one made in its place, before its FUSE process came to its end."""
    place = str(tmp_path.resolve())
    first, second = NativeChannel(), NativeChannel()
    first.mount(Nothing(), place, [])  # type: ignore[arg-type]
    libc.umount(place, libc.MNT_DETACH)
    second.mount(Nothing(), place, [])  # type: ignore[arg-type]
    try:
        first.close()
        there = mountinfo.at(place)
        assert there is not None and mountinfo.is_mxfs(there)
    finally:
        second.close()
    assert mountinfo.at(place) is None


def test_a_mount_point_that_is_none(tmp_path: Any) -> None:
    channel = NativeChannel()

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        channel.mount(Nothing(), str(tmp_path / "nowhere"), [])  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before
