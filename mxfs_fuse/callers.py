"""Who waits: the kernel cannot interrupt a request that this process has taken, so a wait looks after its caller.

A request that the FUSE server has read is waited for without signals (fuse_simple_request, fs/fuse/dev.c), until it is
answered. FUSE_INTERRUPT tells of the first signal only, which need not be a fatal one, and pyfuse3 does not hand it on.
So who waits at the gate asks now and then whether the calling thread has a fatal signal pending, and is answered EINTR
then, which nobody sees. What any signal may end, a wait for a file lock, waits for the request's `Interrupt` too.
"""

import asyncio
from contextvars import ContextVar


class Interrupt:
    """Whether the kernel has said that the caller of a request has a signal to handle."""

    __slots__ = ("_waiter", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """The caller has a signal to handle."""
        self.is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return when the caller has a signal to handle."""
        if not self.is_set:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


interrupt: ContextVar[Interrupt | None] = ContextVar("interrupt", default=None)
"""Of this request; None where the channel is not told of signals."""

caller: ContextVar[int] = ContextVar("caller", default=0)
"""Thread id of the caller of this request; 0 where the kernel's request does not name one to us."""

LOOK_S = 0.25
_KILL = 1 << 8  # SIGKILL is signal 9; any other fatal signal becomes one (complete_signal, kernel/signal.c)


def is_dying(tid: int) -> bool:
    """Whether a thread has a fatal signal pending, or is gone. /proc/TID/status: SigPnd and ShdPnd (proc(5))."""
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line[7:], 16) & _KILL:
                    return True
    except (FileNotFoundError, ProcessLookupError):
        return True
    return False


def is_unmounting(tid: int) -> bool:
    """Whether the caller is umount(8): it looks at the mount before it unmounts (stat, statfs), and must not wait."""
    try:
        with open(f"/proc/{tid}/comm", "rb") as file:
            return file.read().strip() in (b"umount", b"fusermount3", b"fusermount")
    except (FileNotFoundError, ProcessLookupError):
        return False
