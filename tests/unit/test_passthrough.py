"""Which opens the kernel serves by itself, and until when it may write: the table, over plain files."""

import asyncio
import errno
import fcntl
import functools
import mmap
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mxfs_fuse.channel.types import Opened
from mxfs_fuse.fileio import FileIO
from mxfs_fuse.main import Server
from mxfs_fuse.passthrough import leases_enabled, writers_gone
from mxfs_fuse.state import State
from mxfs_proto.frames import FrameType, unpack_json
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid
from mxfs_proto.records import LockBast, LockGrant, LockRelease, LockReq, Opens, Record
from mxfsd.core.epochs import first_seq

INO = 77
R, W, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
SEQ = first_seq(1)


class Kernel:
    """Hands out backing ids, and has programs that hold what was opened with them."""

    has_epoch = False

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.next = 0
        self.fails = False
        self.dropped = 0

    def open_backing(self, fd: int) -> int:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == R, "it would look like a writer"
        if self.fails:
            raise OSError(errno.EPERM, "not privileged")
        self.next += 1
        self.ids.add(self.next)
        return self.next

    def close_backing(self, backing_id: int) -> None:
        self.ids.remove(backing_id)

    def inval_attributes(self, nodeid: int) -> int:
        self.dropped += 1
        return 0


class Below:
    """A lower mount of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reaped: list[Fid] = []
        self.synced: list[Fid] = []
        self.fails = False
        self.on_sync: Callable[[], None] = lambda: None

    def open(self, _fid: Fid, flags: int) -> int:
        return os.open(self.path, flags)

    def forget(self, _ino: int) -> None: ...

    def sync(self, fid: Fid) -> None:
        if self.fails:
            raise OSError(errno.EIO, "the disk is gone")
        self.synced.append(fid)
        self.on_sync()

    def reap(self, fid: Fid) -> None:
        self.reaped.append(fid)


class Rig:
    """The FUSE layer of a home with one file."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"x" * 4096)
        self.path = path
        self.records: list[Record] = []
        self.state = State(Fid(128, 1), 1000, False, self.records.append)
        self.state.open_gate()
        self.below = Below(path)
        self.state.lower = self.below  # type: ignore[assignment]
        self.state.locks.cache.set_implicit(True)
        self.kernel = Kernel()
        self.state.kernel = self.state.locks.kernel = self.kernel  # type: ignore[assignment]
        self.io = FileIO(self.state)
        self.table = self.io.passthrough
        self.table.backing = self.kernel
        self.node = self.state.known(Fid(INO, 1))
        self.node.nlookup = 1
        self.others: LockMode | None = None
        """What a request to open is granted while other nodes have the file open."""

    async def open(self, flags: int) -> Any:
        task = asyncio.get_running_loop().create_task(self.io.open(self.node, flags, 0))
        await asyncio.sleep(0)
        while not task.done():
            asked = [record for record in self.records if isinstance(record, LockReq)][-1]
            mode = self.others if self.others is not None else asked.mode
            seq = SEQ + 10 + len(self.records)
            flag = LockFlag.OTHER_OPEN if mode is LockMode.NL else LockFlag.NONE
            self.state.locks.on_record(LockGrant(asked.req_id, INO, mode, seq, flag))
            await asyncio.sleep(0)
        return await task

    async def bast(self, seq: int = SEQ + 1, mode: LockMode = LockMode.EX, flags: LockFlag = LockFlag.NONE) -> None:
        """The home's master calls the lock back; returns when it has the answer."""
        count = len(self.releases())
        self.state.locks.on_record(LockBast(INO, seq, mode, flags))
        async with asyncio.timeout(5):
            while len(self.releases()) == count:
                await asyncio.sleep(0.001)

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not what():
                await asyncio.sleep(0.001)

    def releases(self) -> list[LockRelease]:
        return [record for record in self.records if isinstance(record, LockRelease)]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "file")
    yield rig
    rig.state.locks.close()


def kind(info: Any) -> str:
    """How the kernel serves an open."""
    if not isinstance(info, Opened):
        return "ordinary"
    return "direct" if info.direct_io else "free"


async def test_all_opens_of_an_inode_go_one_way(rig: Rig) -> None:
    """The first decides; they share a backing id, which is given back behind the last."""
    first, second, third = await rig.open(R), await rig.open(RW), await rig.open(W | os.O_APPEND)
    assert [kind(info) for info in (first, second, third)] == ["free"] * 3
    assert first.backing_id == second.backing_id == third.backing_id and rig.kernel.ids == {first.backing_id}
    assert not first.keep_cache, "the kernel refuses that beside"
    for info in (second, third, first):
        await rig.io.release(info.fh)
    assert rig.kernel.ids == set() and rig.node.opens == (0, 0) and not rig.node.pinned
    rig.table.backing = None
    ordinary = await rig.open(R)
    rig.table.backing = rig.kernel
    assert [kind(ordinary), kind(await rig.open(R)), kind(await rig.open(RW))] == ["ordinary"] * 3


async def test_opens_under_way_at_once_go_one_way(rig: Rig) -> None:
    await rig.bast()  # so that each of them asks, and waits
    tasks = [asyncio.create_task(rig.io.open(rig.node, flags, 0)) for flags in (R, R)]
    await asyncio.sleep(0)
    for number, asked in enumerate([record for record in rig.records if isinstance(record, LockReq)]):
        rig.state.locks.on_record(LockGrant(asked.req_id, INO, asked.mode, SEQ + 5 + number, LockFlag.NONE))
    infos = await asyncio.gather(*tasks)
    assert len({kind(info) for info in infos}) == 1


async def test_without_a_backing_id_an_open_is_ordinary(rig: Rig) -> None:
    rig.kernel.fails = True
    assert kind(await rig.open(R)) == "ordinary"


async def test_only_at_the_home_and_where_others_let_us_cache(rig: Rig) -> None:
    await rig.bast()
    rig.others = LockMode.NL
    info = await rig.open(RW)
    assert kind(info) == "ordinary" and info.direct_io
    await rig.io.release(info.fh)
    rig.state.locks.cache.set_implicit(False)
    rig.state.lower = None
    assert rig.table.choose(rig.node, cached=True) is None


async def test_a_writer_beside_others_is_not_served_by_the_kernel(rig: Rig) -> None:
    """But for its mapping, if it can have one; that is enough for a pin, which the master hears of at once."""
    reader = await rig.open(R)
    await rig.bast()
    rig.others = LockMode.NL
    rig.records.clear()
    only = await rig.open(W)
    assert kind(only) == "direct" and not rig.node.pinned
    both = await rig.open(RW)
    assert kind(both) == "direct" and rig.node.pinned
    told = [record for record in rig.records if isinstance(record, Opens)]
    assert told[-1].flags == LockFlag.KERNEL_WRITER and told[-1].opens_w == 3
    assert kind(await rig.open(RW)) == "direct", "others may cache it for a moment still"
    assert kind(await rig.open(R)) == "free"
    assert both.backing_id == reader.backing_id


async def test_a_lock_lost_on_the_way_is_not_enough(rig: Rig) -> None:
    """The grant came, and was called back before the open went on."""
    await rig.bast()
    task = asyncio.create_task(rig.io.open(rig.node, RW, 0))
    await asyncio.sleep(0)
    asked = next(record for record in rig.records if isinstance(record, LockReq))
    rig.state.locks.on_record(LockGrant(asked.req_id, INO, LockMode.EX, SEQ + 5, LockFlag.NONE))
    rig.state.locks.tick()
    rig.state.locks.cache._fresh.clear()
    rig.state.locks.on_record(LockBast(INO, SEQ + 5, LockMode.EX, LockFlag.NONE))
    assert kind(await task) == "ordinary"


async def test_the_pin_is_told_before_the_lock_is_given_back(rig: Rig) -> None:
    """Nothing is said while the home has everything to itself."""
    info = await rig.open(RW)
    assert rig.node.pinned and rig.records == [] and rig.kernel.dropped == 1
    rig.state._dirty.clear()
    await rig.bast()
    pin, release = rig.records
    assert pin == Opens(INO, 0, 2, LockFlag.KERNEL_WRITER)
    assert isinstance(release, LockRelease) and (release.mode, release.opens_w) == (LockMode.NL, 2)
    assert kind(await rig.open(RW)) == "free", "nobody else caches it"
    rig.records.clear()
    await rig.io.release(info.fh)
    assert rig.node.pinned


async def test_a_mapping_keeps_the_pin(rig: Rig) -> None:
    """It ends when the mapping has gone, though nobody says so."""
    if not leases_enabled():
        pytest.fail("this host grants no leases")
    info = await rig.open(RW)
    with open(rig.path, "r+b") as file:  # the kernel's own descriptor, in a mapping
        mapped = mmap.mmap(file.fileno(), 4096)
    await rig.bast()
    await rig.io.release(info.fh)
    rig.table.tick()
    assert rig.node.pinned and rig.node.opens == (0, 1) and rig.table.held() == [INO]
    rig.records.clear()
    mapped.close()
    rig.below.synced.clear()
    rig.table.tick()
    assert rig.node.pinned, "not before all is durable"
    await rig.until(lambda: not rig.node.pinned)
    assert rig.below.synced == [rig.node.fid]
    assert rig.node.opens == (0, 0) and rig.table.held() == [] and rig.kernel.ids == set()
    assert [record for record in rig.records if isinstance(record, Opens)][-1] == Opens(INO, 0, 0, LockFlag.NONE)
    assert INO in rig.state.unsynced


async def test_an_orphan_lives_as_long_as_its_pin(rig: Rig) -> None:
    info = await rig.open(RW)
    held = os.open(rig.path, RW)
    await rig.io.release(info.fh)
    assert rig.below.reaped == []
    os.close(held)
    rig.table.tick()
    assert rig.below.reaped == [rig.node.fid]


async def test_a_pin_that_others_know_of_ends_behind_a_sync(rig: Rig) -> None:
    """One that fails, or during which the file is opened again, ends nothing."""
    info = await rig.open(RW)
    await rig.bast()
    rig.below.fails = True
    await rig.io.release(info.fh)
    await rig.until(lambda: not rig.table._files[INO].ending)
    assert rig.node.pinned
    rig.below.fails = False
    rig.below.synced.clear()
    rig.table.tick()
    again = await rig.open(RW)
    await rig.until(lambda: rig.below.synced and not rig.table._files[INO].ending)
    assert rig.node.pinned and kind(again) == "free"
    await rig.io.release(again.fh)
    await rig.until(lambda: not rig.node.pinned)


async def test_what_is_written_while_the_lock_is_given_up_is_durable_too(rig: Rig) -> None:
    """The last writer goes while what it wrote before is made durable."""
    info = await rig.open(RW)
    handle = rig.io.handles[info.fh]
    loop = asyncio.get_running_loop()

    def last_words() -> None:
        rig.below.on_sync = lambda: None
        asyncio.run_coroutine_threadsafe(rig.io.release(info.fh), loop).result(5)

    rig.below.on_sync = last_words
    await rig.bast()
    assert not rig.node.pinned and rig.below.synced == [handle.node.fid] * 2
    assert not any(record.flags for record in rig.records if isinstance(record, Opens)), "it never was one to others"


async def test_a_pinned_file_is_always_to_be_made_durable(rig: Rig) -> None:
    rig.state._dirty.clear()
    assert rig.state._sync_of(INO) is None
    await rig.open(RW)
    assert rig.state._sync_of(INO) is not None


@pytest.mark.parametrize(("flags", "code"), [(R, 0), (RW, errno.EIO)])
async def test_after_the_lower_mount_ended(rig: Rig, flags: int, code: int) -> None:
    """What is open fails, what may have lost writes says so, and no open goes another way before the last is closed."""
    info = await rig.open(flags)
    assert rig.table.lower_gone() == [INO] and rig.table.held() == [] and not rig.node.pinned
    assert rig.table.lower_gone() == []
    with pytest.raises(OSError) as failed:
        await rig.open(R)
    assert failed.value.errno == errno.EIO
    assert sum(rig.node.opens) == 1
    if code:
        with pytest.raises(OSError):
            await rig.io.fsync(rig.io.handles[info.fh])
        with pytest.raises(OSError):
            await rig.io.flush(info.fh)
    else:
        await rig.io.flush(info.fh)
    await rig.io.release(info.fh)
    assert rig.kernel.ids == set()
    assert kind(await rig.open(R)) == "free"


async def test_an_fsync_waits_for_the_next_home_no_longer_than_it_makes_sense(rig: Rig) -> None:
    info, other = await rig.open(RW), await rig.open(R)
    rig.state.close_gate()
    waits = asyncio.create_task(rig.io.fsync(rig.io.handles[info.fh]))
    reads = asyncio.create_task(rig.io.fsync(rig.io.handles[other.fh]))
    await asyncio.sleep(0.01)
    rig.table.lower_gone()
    with pytest.raises(OSError) as failed:
        await waits
    assert failed.value.errno == errno.EIO and not reads.done()
    rig.state.open_gate()
    await reads


def test_a_lease_tells_whether_anybody_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    fd = os.open(path, R)
    reader = os.open(path, R)
    assert writers_gone(fd)
    writer = os.open(path, RW)
    assert not writers_gone(fd)
    mapped = mmap.mmap(writer, 4096)
    os.close(writer)
    assert not writers_gone(fd)
    mapped.close()
    assert writers_gone(fd)
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # the lease is gone again
    os.close(reader)
    os.close(fd)


@pytest.mark.parametrize("held", [[], [INO]], ids=["free", "held"])
async def test_the_lower_mount_is_not_left_while_the_kernel_serves_files_of_it(held: list[int]) -> None:
    """The home would unmount under them, or another node mount beside it: the daemon is told, and stays."""
    done: list[str] = []
    sent: list[tuple[FrameType, dict[str, Any]]] = []

    async def leave_lower() -> None:
        done.append("left")

    server: Any = Server.__new__(Server)
    passthrough = SimpleNamespace(held=lambda: held)
    close_lower = functools.partial(done.append, "closed")
    server.operations = SimpleNamespace(io=SimpleNamespace(passthrough=passthrough, close_lower=close_lower))
    server.state = SimpleNamespace(leave_lower=leave_lower)
    server._freeze = lambda: done.append("frozen")
    server._conn = SimpleNamespace(send=lambda kind, parts: sent.append((kind, unpack_json(parts[0]))))
    await server._leave_lower()
    assert done == (["frozen"] if held else ["frozen", "closed", "left"])
    assert sent == [(FrameType.FREEZE, {"held": held, "count": len(held)})]
