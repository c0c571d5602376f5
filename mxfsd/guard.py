"""What a home must not outlive: a descriptor of the lower mount that can be shut down at any moment, and a watchdog.

Used by the heartbeat process. Source: XFS_IOC_GOINGDOWN in <xfs/xfs_fs.h>; the kernel's
Documentation/watchdog/watchdog-api.rst.

Tried on a real XFS whose device had stopped to answer: GOINGDOWN without log flush returns within some milliseconds,
also while another thread's GOINGDOWN with flush hangs in the same device. The last close of the mount does hang.
"""

import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from mxfs_proto.errors import IoFailure, MisuseError

_XFS_IOC_GOINGDOWN = 0x8004587D  # _IOR('X', 125, __u32)
FLUSH = 0
"""XFS_FSOP_GOING_FLAGS_DEFAULT: freeze (which writes everything back), then shut down."""
NO_FLUSH = 2
"""XFS_FSOP_GOING_FLAGS_NOLOGFLUSH: from now on nothing more is written."""

_WDIOC_SETTIMEOUT = 0xC0045706  # _IOWR('W', 6, int)
_NOWAYOUT = "/sys/class/watchdog/{}/nowayout"


def going_down(fd: int, flags: int) -> None:
    """Shut the XFS that *fd* is on down. Raises OSError."""
    fcntl.ioctl(fd, _XFS_IOC_GOINGDOWN, struct.pack("=I", flags))


def _is_down(fd: int) -> bool:
    """Whether the XFS that *fd* is on is shut down: stat(2) says EIO then (xfs_vn_getattr)."""
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def check_watchdog(path: str) -> None:
    """Refuse what cannot be a watchdog before anybody relies on it; opening it would arm it. Raises MisuseError."""
    try:
        fits = stat.S_ISCHR(os.stat(path).st_mode)
    except OSError as error:
        raise MisuseError(f"watchdog={path}: {error.strerror}") from error
    if not fits:
        raise MisuseError(f"watchdog={path}: not a character device")


class WatchdogDevice:
    """The system calls on a watchdog device, in one place so that a test can stand in for the hardware."""

    def open(self, path: str) -> int:
        """Open it, which arms it. Raises OSError."""
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def may_be_disarmed(self, path: str) -> bool:
        """Whether the driver was loaded without ``nowayout``; true where it does not say."""
        name = os.path.basename(os.path.realpath(path))
        try:
            with open(_NOWAYOUT.format("watchdog0" if name == "watchdog" else name), encoding="ascii") as file:
                return file.read().strip() == "0"
        except FileNotFoundError:
            return True

    def set_timeout(self, fd: int, seconds: int) -> int:
        """Set the timeout; return the one that the driver took. Raises OSError."""
        taken = fcntl.ioctl(fd, _WDIOC_SETTIMEOUT, struct.pack("=i", seconds))
        return int(struct.unpack("=i", taken)[0])

    def write(self, fd: int, data: bytes) -> None:
        """Feed it (any byte), or announce an orderly close (``V``). Raises OSError."""
        os.write(fd, data)

    def close(self, fd: int) -> None:
        """Close it; without the announcement before, it stays armed. Raises OSError."""
        os.close(fd)


class Watchdog:
    """A hardware watchdog that is armed while this node is home.

    It resets the machine *timeout_ms* after the last good beat, at most *limit_ms* after it: that is what makes it safe
    to take over from a home whose heartbeat process is stopped or hangs.
    """

    def __init__(self, path: str, timeout_ms: int, limit_ms: int, device: WatchdogDevice | None = None) -> None:
        self.path = path
        self._timeout_ms = timeout_ms
        self._limit_ms = limit_ms
        self._device = device or WatchdogDevice()
        self._fd = -1

    def arm(self) -> None:
        """Open it and set its timeout. Raises IoFailure, and then it is not armed."""
        seconds = -(-self._timeout_ms // 1000)
        try:
            # Asked before it is opened: such a one could never be closed again.
            if not self._device.may_be_disarmed(self.path):
                raise IoFailure(f"{self.path}: its driver was loaded with nowayout, so it could never be disarmed")
            self._fd = self._device.open(self.path)
            taken = self._device.set_timeout(self._fd, seconds)
        except OSError as error:
            self.disarm()
            raise IoFailure(f"{self.path}: cannot be used as a watchdog: {error.strerror}", error.errno) from error
        if not self._timeout_ms <= taken * 1000 <= self._limit_ms:
            self.disarm()
            raise IoFailure(f"{self.path}: gives {taken} s where {seconds} s were asked for: use other timeouts")
        self.feed()

    def feed(self) -> None:
        """After a good beat. A failure is left to the watchdog itself: it will reset the machine."""
        if self._fd >= 0:
            with suppress(OSError):
                self._device.write(self._fd, b"\0")

    def disarm(self) -> None:
        """Close it in order: this node cannot write to the volume any more. Where that fails the machine is reset."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                self._device.write(fd, b"V")
            with suppress(OSError):
                self._device.close(fd)


class LowerGuard:
    """Holds a descriptor of the lower mount while this node is home. Any thread may call.

    Once fenced it stays so: a process that was a home and lost that never is one again.
    """

    def __init__(self, watchdog: Watchdog | None = None, shut: Callable[[int, int], None] = going_down) -> None:
        self._watchdog = watchdog
        self._shut = shut
        self._fd = -1
        self._lock = threading.RLock()
        self.fenced = False
        self.flushed = False
        """Everything had been written back before it was shut down."""

    @property
    def armed(self) -> bool:
        """Whether there is a lower mount that must be shut down before anybody may think that this node is gone."""
        return self._fd >= 0

    def arm(self, fd: int) -> None:
        """Take *fd*, a descriptor of the lower mount, which is ours to close. Raises MisuseError, IoFailure."""
        with self._lock:
            if self.fenced or self._fd >= 0:
                os.close(fd)
                raise MisuseError("this home was shut down" if self.fenced else "a lower mount is guarded already")
            if self._watchdog is not None:
                try:
                    self._watchdog.arm()
                except IoFailure:
                    os.close(fd)
                    raise
            self._fd = fd

    def disarm(self) -> None:
        """Close the descriptor: the mount is being left in good order. Raises MisuseError where none is held."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd < 0:
                raise MisuseError("this home was shut down" if self.fenced else "no lower mount is guarded")
            os.close(fd)
            if self._watchdog is not None:
                self._watchdog.disarm()

    def feed(self) -> None:
        """A beat was written in time."""
        with self._lock:
            if self._fd >= 0 and self._watchdog is not None:
                self._watchdog.feed()

    def fence(self) -> bool:
        """Shut the lower mount down, without log flush; True where this call did it. Raises IoFailure: it is still up.

        When it returns, nothing more is written to the volume from here, and every descriptor below gives EIO.
        """
        with self._lock:
            if self._fd < 0:
                return False
            try:
                self._shut(self._fd, NO_FLUSH)
            except OSError as error:
                raise IoFailure(f"the lower mount cannot be shut down: {error.strerror}", error.errno) from error
            fd, self._fd = self._fd, -1
            self.fenced = True
            if self._watchdog is not None:
                self._watchdog.disarm()
        # The last close unmounts, which waits for the I/O under way: for ever, on a disk that hangs.
        with suppress(RuntimeError):  # no thread to be had: the end of the process closes it
            threading.Thread(target=os.close, args=(fd,), name="close", daemon=True).start()
        return True

    def flush_and_fence(self, flush_s: float) -> bool:
        """As ``fence``, but write everything back first if that ends within *flush_s* seconds."""
        with self._lock:
            if self._fd < 0:
                return False
            fd = os.dup(self._fd)

        flushed = threading.Event()

        def flush() -> None:
            was_up = not _is_down(fd)  # XFS shuts itself down too, where its log cannot be written
            with suppress(OSError):  # what counts comes below
                self._shut(fd, FLUSH)
            # We let nobody else shut it down meanwhile: if it is down now, then the freeze before that succeeded.
            if was_up and _is_down(fd):
                flushed.set()
            os.close(fd)

        helper = threading.Thread(target=flush, name="flush", daemon=True)
        try:
            helper.start()
            helper.join(max(0.0, flush_s))
        except RuntimeError:
            os.close(fd)  # no thread to be had
        self.flushed = flushed.is_set()
        # Also after a flush that returned: the kernel says nothing where the freeze before it failed.
        return self.fence()
