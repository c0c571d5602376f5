"""The heartbeat process as the guard of a home: a real process, a real XFS, real signals, a disk that hangs."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diskimage import FakeClock, loop_device, make_image, open_lockspace
from xfsdisk import IMAGE_BYTES, xfs_device

from mxfs_proto.errors import IoFailure, MisuseError
from mxfs_proto.ondisk import SlotRecord, SlotState
from mxfsd.core.keeper import Keeper
from mxfsd.core.lease import HeldLease, HeldSlot, Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.guard import LowerGuard
from mxfsd.heartbeat import Beater
from mxfsd.io import libc
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import BeatReport, HeartbeatClient, HeartbeatEvent
from mxfsd.io.lockspace import Lockspace
from tests.hangfs import hanging_disk

T = Timeouts.named("fast")
JOINER = Joiner(b"m" * 16, "me", 5)


def is_down(mount_fd: int) -> bool:
    """Whether the XFS is shut down; makes a file where it is not."""
    try:
        os.close(os.open("probe", os.O_CREAT | os.O_RDWR, dir_fd=mount_fd))
    except OSError as error:
        assert error.errno == errno.EIO
        return True
    return False


class Home:
    """A node that is home: lockspace in one image, XFS on another device; what its heartbeat process said."""

    def __init__(self, image: Path, xfs: str) -> None:
        self.lockspace = Lockspace.open(str(image))
        self.held = self.lockspace.claim_slot(JOINER, T)
        self.client = HeartbeatClient(str(image), self.held, T, self._report, self._event)
        self.events: list[HeartbeatEvent] = []
        self.down_at_event: dict[str, bool] = {}
        self.heard_ms: dict[str, int] = {}
        self.xfs = xfs
        self.fd = libc.mount_detached(xfs, False)
        self._wake = asyncio.Event()
        self.lease: HeldLease | None = None

    def _report(self, _report: BeatReport) -> None:
        self._wake.set()

    def _event(self, event: HeartbeatEvent) -> None:
        self.events.append(event)
        self.heard_ms.setdefault(event.name, now_ms())
        if event.name in ("lower_down", "lease_lost", "slot_lost"):
            self.down_at_event.setdefault(event.name, is_down(self.fd))
        self._wake.set()

    async def begin(self, *, arm: bool = True) -> None:
        """Beat, take the lease, have the mount guarded."""
        await self.client.start()
        self.lease = await asyncio.to_thread(self.lockspace.claim_lease, self.held.record, T)
        await self.client.set_home(self.lease)
        if arm:
            await self.client.arm(self.fd)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something that was said makes *true* come true."""
        async with asyncio.timeout(30):
            while not true():
                self._wake.clear()
                await self._wake.wait()

    def said(self, name: str) -> bool:
        return any(event.name == name for event in self.events)

    def order(self) -> list[str]:
        """The names of the events about the end of being home, in order."""
        wanted = ("lower_down", "lease_lost", "slot_lost")
        return [event.name for event in self.events if event.name in wanted]

    def close(self) -> None:
        self.client.kill()
        os.close(self.fd)
        self.lockspace.close()


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    with xfs_device(tmp_path) as xfs:
        made = Home(make_image(tmp_path / "disk.img"), xfs)
        try:
            yield made
        finally:
            made.close()


pytestmark = pytest.mark.needs("root", "loop", "xfs")


async def test_arm_and_disarm_around_an_unmount(home: Home) -> None:
    """When disarm returns, nothing in the heartbeat process keeps the device mounted."""
    await home.begin()
    with pytest.raises(MisuseError, match="guarded still"):
        await home.client.leave()
    with pytest.raises(IoFailure, match="disarm first"):
        await home.client.set_home(None)
    mount, home.fd = home.fd, os.open("/", os.O_RDONLY)
    os.close(mount)
    with pytest.raises(OSError, match="busy"):
        os.open(home.xfs, os.O_RDONLY | os.O_EXCL)
    await home.client.disarm()
    os.close(os.open(home.xfs, os.O_RDONLY | os.O_EXCL))
    assert await home.client.set_home(None) > now_ms()
    await home.client.leave()
    assert home.lockspace.read_slots()[0].state is SlotState.LEFT  # type: ignore[union-attr]
    assert home.order() == []


async def test_lease_taken_shuts_down_first(home: Home) -> None:
    await home.begin()
    assert home.lease is not None
    assert not is_down(home.fd)
    home.lockspace.write_lease(replace(home.lease.record, epoch=2, nonce=1, owner_slot=9))
    await home.until(lambda: home.said("lease_lost"))
    assert home.order() == ["lower_down", "lease_lost"]
    assert home.down_at_event == {"lower_down": True, "lease_lost": True}


async def test_slot_taken_shuts_down_first(home: Home) -> None:
    await home.begin()
    taken = replace(home.held.record, nonce=1, name="thief")

    def lost() -> bool:
        if home.lockspace.read_slots()[0] != taken:
            home.lockspace.write_slot(taken)  # covered by a beat that had read before
        return home.said("slot_lost")

    await home.until(lost)
    assert home.order()[0] == "lower_down"
    assert home.down_at_event["slot_lost"]


async def test_mount_that_comes_after_the_lease_is_shut_down(home: Home) -> None:
    await home.client.start()
    with pytest.raises(IoFailure, match="lease was over"):
        await home.client.arm(home.fd)
    assert is_down(home.fd)


async def test_stopped_process_shuts_down_before_it_writes(home: Home) -> None:
    """SIGSTOP for longer than the lease: what the disk shows when the XFS goes down is what it showed before."""
    await home.begin()
    os.kill(home.client.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep((T.lease_ms + 200) / 1000)
        assert not is_down(home.fd)
        before = home.lockspace.snapshot()
    finally:
        os.kill(home.client.pid, signal.SIGCONT)
    await home.until(lambda: home.said("lease_lost"))
    assert home.order() == ["lower_down", "lease_lost"]
    assert home.down_at_event["lower_down"]
    assert home.lockspace.read_lease() == before.lease


async def test_hanging_disk_shuts_down_before_the_lease_ends(tmp_path: Path) -> None:
    """Lockspace and XFS are on a disk that stops to answer, with writeback under way."""
    source = tmp_path / "source"
    source.mkdir()
    make_image(source / "disk.img")
    with open(source / "xfs.img", "wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.xfs", "-q", str(source / "xfs.img")], check=True, timeout=60)
    with hanging_disk(source, tmp_path / "disk") as disk:
        with loop_device(disk.folder / "xfs.img", "--direct-io=on") as xfs:
            home = Home(disk.folder / "disk.img", xfs)
            try:
                await home.begin()
                await home.client.beat()
                file_fd = os.open("data", os.O_CREAT | os.O_RDWR, dir_fd=home.fd)
                os.write(file_fd, bytes(1 << 20))
                disk.hang()
                sync = asyncio.create_task(asyncio.to_thread(_fsync, file_fd))
                await home.until(lambda: home.said("lease_lost"))
                report = home.client.report
                assert report is not None and report.lease_until_ms is not None
                assert home.heard_ms["lower_down"] < report.lease_until_ms
                assert home.order() == ["lower_down", "lease_lost"]
                assert home.down_at_event["lower_down"]
            finally:
                disk.go_on()
                home.client.kill()
                assert await sync == errno.EIO
                os.close(file_fd)
                home.close()


def _fsync(fd: int) -> int:
    try:
        os.fsync(fd)
    except OSError as error:
        return error.errno or 0
    return 0


DAEMON = """
import asyncio, sys
from pathlib import Path
from mxfsd.core.lease import Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.io.heartbeat_client import HeartbeatClient
from mxfsd.io.lockspace import Lockspace

async def main(image, fd, arm):
    times = Timeouts.named("fast")
    space = Lockspace.open(image)
    held = space.claim_slot(Joiner(b"m" * 16, "me", 5), times)
    client = HeartbeatClient(image, held, times, lambda report: None, lambda event: None)
    await client.start()
    await client.set_home(space.claim_lease(held.record, times))
    if arm:
        await client.arm(fd)
    print(client.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "arm"))
"""


def start_daemon(image: str, fd: int, arm: str) -> tuple["subprocess.Popen[bytes]", int]:
    """Start a stand-in for the daemon; return it and a pidfd of its heartbeat process."""
    command = [sys.executable, "-c", DAEMON, image, str(fd), arm]
    daemon = subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    return daemon, os.pidfd_open(int(daemon.stdout.readline()))


def wait_for_end(pidfd: int) -> None:
    import select

    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_last_gasp_comes_after_flush_and_shutdown(tmp_path: Path) -> None:
    """FAILED in the slot proves that the XFS is down; what the daemon had written is on the disk."""
    image = make_image(tmp_path / "disk.img")
    space = open_lockspace(image, FakeClock())
    content = os.urandom(1 << 20) * 24
    with xfs_device(tmp_path) as xfs:
        fd = libc.mount_detached(xfs, False)
        daemon, pidfd = start_daemon(str(image), fd, "arm")
        with daemon:
            file_fd = os.open("data", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd)
            assert os.write(file_fd, content) == len(content)
            daemon.kill()
            while _state(space) is not SlotState.FAILED:
                pass
            assert is_down(fd)
        wait_for_end(pidfd)
        os.close(file_fd)
        os.close(fd)
        fd = libc.mount_detached(xfs, False)
        file_fd = os.open("data", os.O_RDONLY, dir_fd=fd)
        assert os.read(file_fd, 1 << 26) == content
        os.close(file_fd)
        os.close(fd)
    space.close()


def test_no_last_gasp_where_somebody_keeps_the_mount(tmp_path: Path) -> None:
    """The daemon dies between disarm and the hand-over, and the device is mounted still: FAILED would be a lie."""
    image = make_image(tmp_path / "disk.img")
    with loop_device(image) as device:
        space = open_lockspace(image, FakeClock())
        daemon, pidfd = start_daemon(device, 1, "unarmed")
        with daemon:
            holder = os.open(device, os.O_RDONLY | os.O_EXCL)
            daemon.kill()
        wait_for_end(pidfd)
        assert _state(space) is SlotState.JOINING
        os.close(holder)
        space.close()


def test_last_gasp_of_a_home_that_has_nothing_mounted(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img")
    with loop_device(image) as device:
        space = open_lockspace(image, FakeClock())
        daemon, pidfd = start_daemon(device, 1, "unarmed")
        with daemon:
            daemon.kill()
        wait_for_end(pidfd)
        assert _state(space) is SlotState.FAILED
        space.close()


def _state(space: Lockspace) -> SlotState:
    slot = space.read_slots()[0]
    assert slot is not None
    return slot.state


# -- the disk thread on a clock of the test's --------------------------------------------------------------------------


class Stage:
    """A Beater without process and threads; ``log`` has what it did to the mount and to the disk, in order."""

    def __init__(self, image: Path) -> None:
        self.clock = FakeClock()
        self.space = open_lockspace(image, self.clock)
        self.log: list[str] = []
        held = self.space.claim_slot(JOINER, T)
        lease = self.space.claim_lease(held.record, T)
        self.keeper = Keeper(HeldSlot(held.record, self.clock()), T)
        self.guard = LowerGuard(shut=lambda _fd, _flags: self.log.append("down"))
        outbox: Any = self
        self.beater = Beater(self.space, self.keeper, T, outbox, self.guard, self.clock)
        self.keeper.hold(HeldLease(lease.record, self.clock()), self.clock())
        self.guard.arm(os.open("/dev/null", os.O_RDONLY))
        self.delay_ms = 0
        write_slot, write_lease = self.space.write_slot, self.space.write_lease

        def slot(record: SlotRecord) -> None:
            self.log.append("write")
            self.clock.ms += self.delay_ms
            write_slot(record)

        def leased(record: Any) -> None:
            self.log.append("renew")
            write_lease(record)

        space: Any = self.space
        space.write_slot, space.write_lease = slot, leased

    def event(self, name: str, **_detail: object) -> None:
        self.log.append(name)

    def report(self, _message: object) -> None:
        self.log.append("report")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(make_image(tmp_path / "disk.img"))


def test_home_lives_until_the_margin(stage: Stage) -> None:
    assert stage.keeper.fence_at_ms is not None
    stage.clock.ms = stage.keeper.fence_at_ms - 1
    assert stage.beater.check_time()
    assert stage.log == []
    stage.clock.ms += 1
    assert not stage.beater.check_time()
    assert stage.log == ["down", "lower_down", "lease_lost"]


def test_process_stopped_between_read_and_write_does_not_write(stage: Stage) -> None:
    """It goes on long after: the shutdown comes first, and nothing is written over what others may have written."""
    snapshot = stage.space.snapshot

    def stopped() -> Any:
        snap = snapshot()
        stage.clock.ms += T.lease_ms
        return snap

    space: Any = stage.space
    space.snapshot = stopped
    stage.clock.ms += T.renewal_ms
    stage.beater.beat()
    assert stage.log[0] == "down"
    assert "write" not in stage.log
    assert "renew" not in stage.log


def test_renewal_that_ends_too_late_shuts_down(stage: Stage) -> None:
    stage.clock.ms += T.heartbeat_ms
    stage.delay_ms = T.lease_ms
    stage.beater.beat()
    assert stage.log[:3] == ["write", "down", "lower_down"]


def test_home_that_was_shut_down_never_renews_again(stage: Stage) -> None:
    """The other thread shut it down while this one had a renewal under way, in time by its own look."""
    assert stage.guard.fence()
    stage.clock.ms += T.renewal_ms
    stage.beater.beat()
    assert "renew" not in stage.log
    assert "lease_lost" in stage.log


def test_dead_node_is_read_in_time_out_of_turn(stage: Stage) -> None:
    """The read that finds a counter unmoved for node_dead_ms is not the one of the next regular beat."""
    stage.keeper.let_go()
    other = stage.space.claim_slot(Joiner(b"o" * 16, "other"), T).record
    stage.space.write_slot(replace(other, state=SlotState.ACTIVE))
    stage.beater.beat()
    seen = stage.clock()
    while stage.clock.ms < seen + T.node_dead_ms - T.heartbeat_ms:
        stage.clock.ms += T.heartbeat_ms - 40
        stage.beater.beat()
    assert stage.beater.next_death_ms() == seen + T.node_dead_ms
    stage.clock.ms = seen + T.node_dead_ms
    stage.beater.beat()
    assert stage.beater.watch.age_ms(other.slot) >= T.node_dead_ms
    assert stage.beater.next_death_ms() == stage.clock() + T.heartbeat_ms
