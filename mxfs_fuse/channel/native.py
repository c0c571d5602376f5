"""The channel of our own: mounts, and speaks the FUSE protocol on /dev/fuse from the event loop.

A request is answered in the turn of the loop in which it is read, where its operation waits for nothing: its coroutine
is run up to its first wait without a task. What waits becomes a task, so that it keeps nothing else out.
"""

import asyncio
import errno
import fcntl
import os
import select
import stat
from collections.abc import Coroutine, Generator, Iterable
from typing import Any, NamedTuple

import structlog
from pyfuse3 import FUSEError

from mxfs_fuse.callers import Interrupt, caller, interrupt
from mxfs_fuse.channel.replies import NativeReplies
from mxfs_fuse.channel.requests import Dispatcher, Parts, Request
from mxfs_fuse.channel.types import Context
from mxfs_fuse.operations import Operations
from mxfs_proto import fuse
from mxfs_proto.errors import MxfsError, PeerError
from mxfs_proto.fuse import InitFlag, Opcode
from mxfsd import mountinfo
from mxfsd.io import libc

log = structlog.get_logger(__name__)

DEVICE = "/dev/fuse"
_AT_ONCE = 32
"""Requests taken before the loop has another turn."""
_WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.HANDLE_KILLPRIV
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.POSIX_ACL
    | InitFlag.MAX_PAGES
)
_LOCKS = InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS
_PASSTHROUGH = InitFlag.INIT_EXT | InitFlag.PASSTHROUGH
_U32 = 0xFFFFFFFF
_NEEDED = InitFlag.DO_READDIRPLUS | InitFlag.BIG_WRITES
_UNLIMITED = 65535
"""Requests in the background: the kernel is to hand over every one at once (see `mxfs_fuse.kernel`)."""
_PAGES = fuse.MAX_WRITE // 4096
_LONG_S = 10.0
"""A request that has waited so long is named in the log."""
_NAMED = 8


class NativeChannel:
    """/dev/fuse (see `mxfs_fuse.channel.Channel`). *fd*: a descriptor of it that is mounted already, for tests."""

    limits_background = False

    def __init__(self, fd: int = -1) -> None:
        self._fd = fd
        self._mountpoint = ""
        self._device = -1
        """st_dev of the mount: nobody else's while ours lives."""
        self._buffer = bytearray(fuse.BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._dispatcher: Dispatcher | None = None
        self._has_locks = False
        self._ended: asyncio.Future[None] | None = None
        self._over = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[int, _Waiting] = {}
        """Requests that are not answered, by their unique number."""
        self._named: set[int] = set()
        """Those of them that the log has named already."""
        self.flags = InitFlag(0)
        """What was agreed upon with the kernel."""
        self.wants_passthrough = False

    # -- mounting --------------------------------------------------------------------------------------------------

    def mount(self, operations: Operations, mountpoint: str, options: Iterable[str]) -> int:
        """Mount; return the descriptor of /dev/fuse. Raises OSError."""
        self._serve_with(operations)
        words = list(options)
        source = next((word[7:] for word in words if word.startswith("fsname=")), "mxfs")
        mode = os.stat(mountpoint).st_mode
        self._fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = f"fd={self._fd},rootmode={stat.S_IFMT(mode):o},user_id={os.geteuid()},group_id={os.getegid()}"
            flags, more = mount_words(words)
            libc.mount(source, mountpoint, "fuse.mxfs", flags, ",".join([data, *more]))
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise
        self._mountpoint = mountpoint
        made = mountinfo.at(mountpoint)
        self._device = made.device if made is not None else -1
        return self._fd

    def _serve_with(self, operations: Operations) -> None:
        operations.use(NativeReplies())
        self._dispatcher = Dispatcher(operations)
        self._has_locks = not operations.local_locks

    def close(self) -> None:
        """Unmount where it is still mounted, and give the descriptor back."""
        if self._fd < 0:
            return
        if self._mountpoint and not self._over and self._is_mounted():
            try:
                libc.umount(self._mountpoint, libc.MNT_DETACH)
            except OSError as exc:
                log.info("not unmounted", reason=str(exc))
        os.close(self._fd)
        self._fd = -1

    def _is_mounted(self) -> bool:
        """Whether what is mounted there is this mount: another one may have been made in its place."""
        poll = select.poll()
        poll.register(self._fd, 0)
        if any(events & select.POLLERR for _fd, events in poll.poll(0)):
            return False  # the connection has ended, and its numbers may be somebody else's by now
        there = mountinfo.at(self._mountpoint)
        return there is not None and there.device == self._device

    # -- passthrough -----------------------------------------------------------------------------------------------

    @property
    def has_passthrough(self) -> bool:
        """Whether the kernel reads and writes files by itself that it is told to. Known when the mount answers."""
        return InitFlag.PASSTHROUGH in self.flags

    def open_backing(self, fd: int) -> int:
        """Have the kernel take a file of another file system, open at *fd*; return its backing id. Raises OSError.

        What is written through it is written with this thread's capabilities of now. Without CAP_FSETID: else set-id
        bits would stay when somebody without it writes, and the FUSE layer hears of no write.
        """
        with libc.without_fsetid():
            # (The ioctl's own result comes with a buffer that may be changed.)
            return int(fcntl.ioctl(self._fd, fuse.IOC_BACKING_OPEN, bytearray(fuse.BACKING_MAP.pack(fd, 0, 0))))

    def close_backing(self, backing_id: int) -> None:
        """Give a backing id back; files that were opened with it stay open. Raises OSError."""
        fcntl.ioctl(self._fd, fuse.IOC_BACKING_CLOSE, fuse.BACKING_ID.pack(backing_id))

    # -- serving ---------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Answer requests until the mount is gone, or terminate() is called."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        os.set_blocking(self._fd, False)
        loop.add_reader(self._fd, self._readable)
        try:
            await self._ended
        finally:
            loop.remove_reader(self._fd)
        if self._tasks and self._over:
            # Nobody waits for their answers any more, but a close or a forget may be among them.
            await asyncio.wait(set(self._tasks), timeout=1)

    def terminate(self) -> None:
        """End serve(). May be repeated."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _readable(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                size = os.readv(self._fd, [self._buffer])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno == errno.ENOENT:
                    continue  # the request was interrupted before it was read
                if exc.errno != errno.ENODEV:
                    log.error("reading from the kernel failed", reason=str(exc))
                self._over = True  # unmounted
                self.terminate()
                return
            if not size:
                self._over = True
                self.terminate()
                return
            self._take(self._view[:size])

    def _take(self, data: memoryview) -> None:
        """Serve one request; whatever it holds, the mount goes on."""
        if len(data) < fuse.IN_HEADER.size:
            log.error("a FUSE request is cut short", bytes=len(data))
            return
        length, opcode, unique, nodeid, uid, gid, pid, _ext, _pad = fuse.IN_HEADER.unpack_from(data)
        if opcode == Opcode.INIT:
            self._init(unique, data[fuse.IN_HEADER.size :])
            return
        try:
            if length != len(data):
                raise PeerError(f"a FUSE request of {length} bytes came with {len(data)}")
            fields, names, rest = fuse.unpack_request(opcode, data[fuse.IN_HEADER.size :])
        except fuse.UnknownRequest:
            self._answer(unique, errno.ENOSYS, ())
            return
        except PeerError as exc:
            log.error("a FUSE request makes no sense", opcode=opcode, reason=str(exc))
            if opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
                self._answer(unique, errno.EIO, ())
            return
        request = Request(opcode, unique, nodeid, Context(uid, gid, pid), fields, names, bytes(rest))
        self._dispatch(request)

    def _dispatch(self, request: Request) -> None:
        assert self._dispatcher is not None
        opcode = request.opcode
        if opcode == Opcode.FORGET:
            self._run(None, self._dispatcher.forget([(request.nodeid, request.fields[0])]))
        elif opcode == Opcode.BATCH_FORGET:
            whole = request.data[: len(request.data) // fuse.FORGET_ONE.size * fuse.FORGET_ONE.size]
            rows = list(fuse.FORGET_ONE.iter_unpack(whole))[: request.fields[0]]
            self._run(None, self._dispatcher.forget(rows))
        elif opcode == Opcode.INTERRUPT:
            waiting = self._waiting.get(request.fields[0])
            if waiting is not None:
                waiting.signal.set()
        elif opcode == Opcode.DESTROY:
            self._answer(request.unique, 0, ())
        else:
            handler = self._dispatcher.handler(opcode)
            if handler is None or (opcode in _LOCK_REQUESTS and not self._has_locks):
                self._answer(request.unique, errno.ENOSYS, ())
            else:
                self._run(request, handler(request))

    # -- running ---------------------------------------------------------------------------------------------------

    def _run(self, request: Request | None, work: Coroutine[Any, Any, Any]) -> None:
        """Run up to the first wait; the rest, if there is one, in a task."""
        signal = Interrupt()
        caller.set(request.ctx.pid if request is not None else 0)
        interrupt.set(signal)
        try:
            waits_for = work.send(None)
        except StopIteration as done:
            if request is not None:
                self._reply(request, done.value)
            return
        except Exception as exc:  # noqa: BLE001 (an answer must go out, whatever went wrong)
            self._failed(request, exc)
            return
        if request is not None:
            self._waiting[request.unique] = _Waiting(request, signal, work, asyncio.get_running_loop().time())
        task = asyncio.get_running_loop().create_task(self._go_on(request, work, waits_for))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _go_on(self, request: Request | None, work: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        try:
            parts = await _Rest(work, waits_for)
        except Exception as exc:  # noqa: BLE001
            self._failed(request, exc)
        else:
            if request is not None:
                self._reply(request, parts)
        finally:
            if request is not None:
                self._waiting.pop(request.unique, None)

    def _failed(self, request: Request | None, exc: Exception) -> None:
        code = getattr(exc, "errno", None) or errno.EIO
        if not isinstance(exc, FUSEError | OSError | MxfsError):
            log.error("a request failed", opcode=request.opcode if request is not None else 0, exc_info=exc)
        if request is not None:
            self._answer(request.unique, code, ())

    def _reply(self, request: Request, parts: Parts) -> None:
        if not self._answer(request.unique, 0, parts):
            assert self._dispatcher is not None
            self._run(None, self._dispatcher.undo(request, parts))

    def _answer(self, unique: int, code: int, parts: Parts) -> bool:
        """Write an answer. False: the kernel does not want it any more."""
        length = fuse.OUT_HEADER.size
        for part in parts:
            length += len(part)
        try:
            if len(parts) > 500:  # writev(2) takes 1024
                parts = (b"".join(parts),)
            os.writev(self._fd, [fuse.OUT_HEADER.pack(length, -code, unique), *parts])
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                return False
            log.error("an answer was not taken", unique=unique, reason=str(exc))
            if not code:
                return self._answer(unique, errno.EIO, ())
        return True

    # -- what waits ------------------------------------------------------------------------------------------------

    def name_long_waits(self) -> None:
        """Log, once, each request that has waited for long, and where it waits. Whoever waits for another's file lock
        does so knowingly."""
        now = asyncio.get_running_loop().time()
        long = [
            waiting
            for unique, waiting in self._waiting.items()
            if now - waiting.since_s > _LONG_S and unique not in self._named
            if waiting.request.opcode != Opcode.SETLKW
        ]
        self._named &= self._waiting.keys()
        if not long:
            return
        self._named |= {waiting.request.unique for waiting in long}
        log.warning(
            "requests wait for long",
            count=len(long),
            longest_s=round(now - min(waiting.since_s for waiting in long), 1),
            first=[waiting.described() for waiting in long[:_NAMED]],
        )

    # -- the hand-shake --------------------------------------------------------------------------------------------

    def _init(self, unique: int, body: memoryview) -> None:
        if len(body) < fuse.INIT_IN.size:
            self._answer(unique, errno.EPROTO, ())
            return
        major, minor, readahead, offered = fuse.INIT_IN.unpack_from(body)
        if offered & InitFlag.INIT_EXT and len(body) >= fuse.INIT_IN_EXT.size:
            offered |= fuse.INIT_IN_EXT.unpack_from(body)[4] << 32
        if major > fuse.MAJOR:  # the kernel asks again with ours
            self._answer(unique, 0, (fuse.INIT_OUT.pack(fuse.MAJOR, fuse.MINOR, *[0] * 11),))
            return
        wanted = _WANTED | (_LOCKS if self._has_locks else 0)
        if self.wants_passthrough and InitFlag(offered & int(_PASSTHROUGH)) == _PASSTHROUGH:
            wanted |= _PASSTHROUGH
        flags = InitFlag(offered & int(wanted))
        if major < fuse.MAJOR or minor < fuse.MINOR_MIN or flags & _NEEDED != _NEEDED:
            log.error("this kernel's FUSE is too old", version=f"{major}.{minor}", flags=f"{offered:#x}")
            self._answer(unique, errno.EPROTO, ())
            if not self.flags:
                self.terminate()
            return
        self.flags = flags
        out = fuse.INIT_OUT.pack(
            fuse.MAJOR, min(minor, fuse.MINOR), readahead, int(flags) & _U32, _UNLIMITED, _UNLIMITED, fuse.MAX_WRITE, 1,
            _PAGES, 0, int(flags) >> 32, fuse.STACK_DEPTH if self.has_passthrough else 0, 0,
        )  # fmt: skip
        self._answer(unique, 0, (out,))
        log.debug("FUSE agreed upon", kernel=f"{major}.{minor}", flags=str(flags))


class _Waiting(NamedTuple):
    """A request that is not answered yet. *since_s*: time of the event loop when it came."""

    request: Request
    signal: Interrupt
    work: Coroutine[Any, Any, Any]
    since_s: float

    def described(self) -> str:
        """What it is, of whom, and where in this program it waits."""
        request = self.request
        place = "?"
        inner: Any = self.work
        while inner is not None and (frame := getattr(inner, "cr_frame", None)) is not None:
            if "mxfs" in frame.f_globals["__name__"]:  # and not deep in asyncio
                place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            inner = inner.cr_await
        return f"{Opcode(request.opcode).name} of inode {request.nodeid} for thread {request.ctx.pid} at {place}"


_LOCK_REQUESTS = frozenset({Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW})


class _Rest:
    """Awaits a coroutine that was run up to its first wait already; *waits_for* is what it yielded."""

    def __init__(self, work: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self._work = work
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        # The task that runs this takes the future as if the coroutine had yielded it just now, and throws in what the
        # future failed with.
        while True:
            error: BaseException | None = None
            try:
                yield self._waits_for
            except BaseException as exc:  # noqa: BLE001 (it is passed on, whatever it is)
                error = exc
            try:
                self._waits_for = self._work.send(None) if error is None else self._work.throw(error)
            except StopIteration as done:
                return done.value


_FLAGS = {
    "ro": libc.MS_RDONLY,
    "noexec": libc.MS_NOEXEC,
    "nodev": libc.MS_NODEV,
    "nosuid": libc.MS_NOSUID,
    "sync": libc.MS_SYNCHRONOUS,
    "dirsync": libc.MS_DIRSYNC,
    "noatime": libc.MS_NOATIME,
    "nodiratime": libc.MS_NODIRATIME,
    "relatime": libc.MS_RELATIME,
    "strictatime": libc.MS_STRICTATIME,
    "lazytime": libc.MS_LAZYTIME,
}
_DEFAULTS = frozenset({"rw", "exec", "dev", "suid"})
_FUSE_WORDS = frozenset({"default_permissions", "allow_other"})


def mount_words(words: Iterable[str]) -> tuple[int, list[str]]:
    """Return mount(2)'s flags for mount options, and the words that go to the file system. Raises OSError (EINVAL)."""
    flags = 0
    more = []
    for word in words:
        if word in _FLAGS:
            flags |= _FLAGS[word]
        elif word in _FUSE_WORDS:
            more.append(word)
        elif word not in _DEFAULTS and not word.startswith(("fsname=", "subtype=")):
            raise OSError(errno.EINVAL, f"unknown mount option {word}")
    return flags, more
