"""Who waits: the kernel cannot interrupt a request that this process has taken, so a wait looks after its caller.

A request that the FUSE server has read is waited for without signals (fuse_simple_request, fs/fuse/dev.c), until it is
answered; pyfuse3 does not hand FUSE_INTERRUPT on. So who waits at the gate asks now and then whether the calling thread
has a fatal signal pending, and is answered EINTR then, which nobody sees.
"""

from contextvars import ContextVar

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
