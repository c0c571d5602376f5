"""What shuts a home down, without a kernel: order, what happens twice, what fails; and the watchdog."""

import os
import threading
from collections.abc import Iterator

import pytest

from mxfs_proto.errors import IoFailure, MisuseError
from mxfsd.core.timeouts import Timeouts
from mxfsd.guard import FLUSH, NO_FLUSH, LowerGuard, Watchdog, WatchdogDevice, check_watchdog

T = Timeouts.named("default")


class FakeDevice(WatchdogDevice):
    """Notes what a driver would be told."""

    def __init__(self, taken: int = 0, disarmable: bool = True) -> None:
        self.told: list[object] = []
        self.taken = taken
        self.disarmable = disarmable

    def open(self, path: str) -> int:
        self.told.append("open")
        return 77

    def may_be_disarmed(self, path: str) -> bool:
        return self.disarmable

    def set_timeout(self, fd: int, seconds: int) -> int:
        self.told.append(seconds)
        return self.taken or seconds

    def write(self, fd: int, data: bytes) -> None:
        assert fd == 77
        self.told.append(data)

    def close(self, fd: int) -> None:
        self.told.append("close")


def watchdog(device: WatchdogDevice) -> Watchdog:
    return Watchdog("/dev/watchdog", T.watchdog_ms, T.node_dead_ms - T.lease_ms, device)


@pytest.fixture
def fd() -> Iterator[int]:
    """A descriptor that is the guard's once it was given to it."""
    reader, writer = os.pipe()
    yield writer
    os.close(reader)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_fence_shuts_down_without_flush_once(fd: int) -> None:
    calls: list[int] = []
    guard = LowerGuard(shut=lambda _fd, flags: calls.append(flags))
    assert not guard.fence()
    guard.arm(fd)
    assert guard.armed
    assert guard.fence()
    assert not guard.fence()
    assert calls == [NO_FLUSH]
    assert guard.fenced
    assert not guard.armed
    again = os.dup(1)
    with pytest.raises(MisuseError, match="shut down"):
        guard.arm(again)
    assert not is_open(again)
    with pytest.raises(MisuseError, match="shut down"):
        guard.disarm()


def test_disarm_closes_the_descriptor(fd: int) -> None:
    guard = LowerGuard()
    guard.arm(fd)
    other = os.dup(fd)
    with pytest.raises(MisuseError, match="already"):
        guard.arm(other)
    assert not is_open(other)
    guard.disarm()
    assert not is_open(fd)
    with pytest.raises(MisuseError):
        guard.disarm()


def test_what_cannot_be_shut_down_stays_guarded(fd: int) -> None:
    guard = LowerGuard()  # the ioctl on a pipe fails
    guard.arm(fd)
    with pytest.raises(IoFailure, match="cannot be shut down"):
        guard.fence()
    assert guard.armed
    assert not guard.fenced
    guard.disarm()


def test_a_flush_is_followed_by_the_sure_way(fd: int) -> None:
    """The kernel reports success for a flush whose freeze failed: nothing is shut down then."""
    calls: list[int] = []
    guard = LowerGuard(shut=lambda _fd, flags: calls.append(flags))
    guard.arm(fd)
    assert guard.flush_and_fence(5)
    assert calls == [FLUSH, NO_FLUSH]


def test_a_flush_that_hangs_is_not_waited_for(fd: int) -> None:
    calls: list[int] = []
    end = threading.Event()

    def shut(_fd: int, flags: int) -> None:
        calls.append(flags)
        if flags == FLUSH:
            assert end.wait(60)

    guard = LowerGuard(shut=shut)
    guard.arm(fd)
    assert guard.flush_and_fence(0.01)
    assert calls == [FLUSH, NO_FLUSH]
    end.set()


def test_watchdog_lives_as_long_as_the_home(fd: int) -> None:
    device = FakeDevice()
    guard = LowerGuard(watchdog(device), shut=lambda *_: None)
    guard.feed()
    assert device.told == []
    guard.arm(fd)
    guard.feed()
    assert device.told == ["open", T.watchdog_ms // 1000, b"\0", b"\0"]
    guard.disarm()
    assert device.told[4:] == [b"V", "close"]
    guard.feed()
    assert len(device.told) == 6


def test_watchdog_is_disarmed_after_the_shutdown_only(fd: int) -> None:
    device = FakeDevice()
    guard = LowerGuard(watchdog(device), shut=lambda *_: device.told.append("down"))
    guard.arm(fd)
    guard.fence()
    assert device.told[-3:] == ["down", b"V", "close"]


def test_watchdog_resets_a_machine_whose_lower_mount_stays_up(fd: int) -> None:
    device = FakeDevice()
    guard = LowerGuard(watchdog(device))
    guard.arm(fd)
    with pytest.raises(IoFailure):
        guard.fence()
    assert b"V" not in device.told


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (FakeDevice(taken=11), "gives 11 s where 5 s"),
        (FakeDevice(taken=4), "gives 4 s"),
        (FakeDevice(disarmable=False), "nowayout"),
        (WatchdogDevice(), "cannot be used"),
    ],
)
def test_unfit_watchdogs_are_refused(device: WatchdogDevice, reason: str, fd: int) -> None:
    """One that fires after others have taken over, or before the home had its chance; one that is none at all."""
    guard = LowerGuard(Watchdog("/dev/null", T.watchdog_ms, T.node_dead_ms - T.lease_ms, device))
    with pytest.raises(IoFailure, match=reason):
        guard.arm(fd)
    assert not guard.armed
    assert not is_open(fd)
    if isinstance(device, FakeDevice) and device.disarmable:
        assert device.told[-2:] == [b"V", "close"]


@pytest.mark.parametrize(("path", "reason"), [("/nowhere", "No such file"), ("/etc/passwd", "not a character device")])
def test_what_is_no_watchdog_is_refused_unopened(path: str, reason: str) -> None:
    check_watchdog("/dev/null")
    with pytest.raises(MisuseError, match=f"watchdog={path}: {reason}"):
        check_watchdog(path)
