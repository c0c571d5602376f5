"""mxfs grow: every write may be the last one, hosts that see other sizes agree, and what is refused."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import KEY, LOCKSPACE, OFFSET, SIZE, VOLUME, FakeClock, LoopDisk, loop_device, make_image, xfs_sector

from mxfs_proto.errors import IoFailure, MediaError
from mxfs_proto.ondisk import (
    RECORD_BYTES,
    DeviceTooSmall,
    ForeignRecord,
    HeaderRecord,
    MovedRecord,
    SlotRecord,
    SlotState,
    slot_record,
)
from mxfsd import fencing, grow, growth, rundir
from mxfsd.cli import fsck, mkfs, mxfs
from mxfsd.cli import grow as command
from mxfsd.core.lease import Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.io import headers, libc
from mxfsd.io.clock import now_ms
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import ClaimRefused, Lockspace
from mxfsd.lockcheck import InUse, find_damage
from mxfsd.pr.probe import Probe

T = Timeouts.named("fast")
MIB = 1 << 20
GROWN = SIZE + 3 * MIB
ME = Joiner(b"m" * 16, "me", 5)
FILLER = b"\xa5"
"""What a device has where it has grown: anything."""


class PowerCut(Exception):
    """No write comes after this."""


class CutDisk(Disk):
    """Does *whole* writes, of the next one the first *sectors* sectors, and nothing more."""

    def __init__(self, path: str, whole: int = 1 << 30, sectors: int = 0) -> None:
        super().__init__(path)
        self.left, self.sectors, self.writes = whole, sectors, 0

    def write(self, offset: int, data: bytes) -> None:
        if self.left == 0:
            old = self.read(offset, len(data))
            super().write(offset, data[: self.sectors * 512] + old[self.sectors * 512 :])
            raise PowerCut
        self.left -= 1
        self.writes += 1
        super().write(offset, data)


def use(path: Path) -> None:
    """Leave traces of a cluster: an epoch, incarnations; nobody has the volume, and slot 1 is ours, with the lease."""
    clock = FakeClock()
    with Disk(str(path)) as disk:
        space = Lockspace(disk, clock=clock, sleep=clock.sleep)
        for name in (b"a", b"b", b"a"):
            held = space.claim_slot(Joiner(name * 16, name.decode()), T)
            lease = space.claim_lease(held.record, T)
            space.give_lease(lease.record, clock.ms + 100, 0, T)
            space.release_slot(held.record)
        held = space.claim_slot(Joiner(b"g" * 16, "grow on x", 7), T)
        space.claim_lease(held.record, T)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that has grown by 3 MiB, as ``use`` leaves it."""
    path = make_image(tmp_path_factory.mktemp("grow") / "disk.img")
    use(path)
    with open(path, "ab") as file:
        file.write(FILLER * (GROWN - SIZE))
    return path


def holder(space: Lockspace) -> int:
    (slot,) = [slot.slot for slot in space.read_slots() if slot is not None and slot.name == "grow on x"]
    return slot


def in_time() -> None:
    """We may write."""


def move(path: Path, disk: Disk, *, looked: bool = True) -> None:
    """What ``mxfs grow`` writes, from wherever it was interrupted. Not *looked*: a claim came right after its look."""
    space = Lockspace.open(str(path))
    try:
        if not space.arriving:
            new = grow.plan(space.header, headers.end_of(disk), "disk")
            if looked:
                grow.move(disk, space, new, holder(space), in_time)
            else:
                grow.copy_records(disk, space, new, holder(space))
                grow.decide(disk, space.header, new, in_time)
    finally:
        space.close()
    grow.settle(disk, Lockspace.open(str(path)).header)


def done(disk: Disk, new: int) -> bool:
    space = Lockspace(disk)
    return space.settled and space.header.lockspace_offset == new


def offset_for(path: Path, size: int, folder: Path) -> int | None:
    """Where a host that sees *size* bytes of the device finds the lockspace; None where it uses none."""
    seen = folder / "seen.img"
    shutil.copyfile(path, seen)
    os.truncate(seen, size)
    try:
        with Disk(str(seen)) as disk:
            return Lockspace(disk).header.lockspace_offset
    except MediaError:
        return None


def count_writes(grown: Path, folder: Path) -> int:
    path = folder / "count.img"
    shutil.copyfile(grown, path)
    with CutDisk(str(path)) as disk:
        move(path, disk)
        return disk.writes


@pytest.mark.parametrize("default", [LOCKSPACE, 16 * MIB])
def test_every_write_may_be_the_last(
    grown: Path, tmp_path: Path, default: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each cut, between writes and between the sectors of one, all hosts that use the volume use the same
    lockspace, it has all that the old one had, and a second run ends the move."""
    monkeypatch.setattr(headers, "DEFAULT_LOCKSPACE_BYTES", default)
    new = GROWN - LOCKSPACE
    path = tmp_path / "disk.img"
    total = count_writes(grown, tmp_path)
    assert total == 2 + 64 + 1 + 2 + 2
    seen = []
    # The records behind the pending header matter; of the copies before it some are enough.
    for whole in [0, 1, 2, 40, *range(total - 6, total + 1)]:
        for sectors in (0, 1, 8):
            shutil.copyfile(grown, path)
            with CutDisk(str(path), whole, sectors) as disk:
                try:
                    move(path, disk)
                except PowerCut:
                    pass
            here, before = offset_for(path, GROWN, tmp_path), offset_for(path, SIZE, tmp_path)
            later = offset_for(path, GROWN + MIB // 2, tmp_path)  # it has grown again, and one host sees that
            assert here in (OFFSET, new) and later == here
            # A host that still sees the old size: with the others, or not at all.
            assert before in ((OFFSET,) if here == OFFSET else (None,))
            seen.append(here)
            _all_is_there(path)
            with Disk(str(path)) as disk:
                if not done(disk, new):
                    move(path, disk)
            space = Lockspace.open(str(path))
            assert space.settled and not space.arriving
            assert (space.header.lockspace_offset, space.header.cluster_key, space.header.volume) == (new, KEY, VOLUME)
            assert space.header.xfs_bytes == new - new % MIB
            assert find_damage(space) == []
            space.close()
            _all_is_there(path)
    assert seen == sorted(seen) and set(seen) == {OFFSET, new}


def _all_is_there(path: Path) -> None:
    space = Lockspace.open(str(path))
    snap = space.snapshot()
    space.close()
    assert snap.lease is not None and snap.lease.epoch == 4
    assert None not in snap.slots
    named = {slot.name: slot.incarnation for slot in snap.slots if slot is not None and slot.name}
    assert named["a"] == 2 and named["b"] == 1


def test_a_host_that_sees_too_little_says_so(grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    with Disk(str(path)) as disk:
        move(path, disk)
    os.truncate(path, SIZE)
    with pytest.raises(DeviceTooSmall, match="rescan"):
        Lockspace.open(str(path))
    # Later the XFS has grown over the place of the old lockspace.
    with open(path, "r+b") as file:
        file.write(xfs_sector(size=GROWN - LOCKSPACE))
        file.seek(OFFSET)
        file.write(FILLER * LOCKSPACE)
    with pytest.raises(DeviceTooSmall, match="rescan"):
        Lockspace.open(str(path))


def test_record_0_decides(grown: Path, tmp_path: Path) -> None:
    """The disk has lost the write of step 2: a host that sees the old size finds the old header there."""
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    with Disk(str(path)) as disk:
        last = disk.read(SIZE - RECORD_BYTES, RECORD_BYTES)
        move(path, disk)
        disk.write(SIZE - RECORD_BYTES, last)
    assert offset_for(path, SIZE, tmp_path) is None


def test_a_device_that_has_grown_is_a_volume_as_before(grown: Path) -> None:
    space = Lockspace.open(str(grown), readonly=True)
    assert space.header.lockspace_offset == OFFSET and space.settled
    space.close()


def test_who_claims_a_slot_meanwhile_gives_up(grown: Path, tmp_path: Path) -> None:
    """It has opened the old lockspace; the move is decided before its claim, or in the middle of it."""
    path = tmp_path / "disk.img"
    for decided_in_sleep in (False, True):
        shutil.copyfile(grown, path)
        clock = FakeClock()
        with Disk(str(path)) as disk, Disk(str(path)) as other:
            space = Lockspace(disk, clock=clock, sleep=clock.sleep)
            if decided_in_sleep:
                clock.on_sleep = lambda: move(path, other, looked=False)
            else:
                move(path, other)
            with pytest.raises(ClaimRefused, match="mount again"):
                space.claim_slot(ME, T)


def test_who_claims_the_lease_meanwhile_gives_up(grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    clock = FakeClock()
    with Disk(str(path)) as disk, Disk(str(path)) as other:
        space = Lockspace(disk, clock=clock, sleep=clock.sleep)
        mine = space.claim_slot(ME, T)
        lease = space.read_lease()
        space.give_lease(lease, clock.ms + 100, 0, T)  # what the holder does when it has moved the lockspace
        move(path, other, looked=False)
        with pytest.raises(ClaimRefused, match="mount again"):
            space.claim_lease(mine.record, T)


@pytest.mark.parametrize("sees", [SIZE, GROWN])
def test_where_xfs_is_by_now_nothing_is_claimed(grown: Path, tmp_path: Path, sees: int) -> None:
    """A host stood still between finding the lockspace and claiming a slot; the XFS has grown over it meanwhile."""
    path, clock = tmp_path / "disk.img", FakeClock()
    shutil.copyfile(grown, path)
    os.truncate(path, sees)
    with Disk(str(path)) as disk:
        space = Lockspace(disk, clock=clock, sleep=clock.sleep)
        with open(path, "ab") as file:
            file.write(FILLER * (GROWN - sees))
        with Disk(str(path)) as other:
            move(path, other)
        with open(path, "r+b") as file:
            file.write(xfs_sector(size=GROWN - LOCKSPACE))
            file.seek(OFFSET)
            file.write(FILLER * LOCKSPACE)
        before = path.read_bytes()
        with pytest.raises(ClaimRefused, match="mount again"):
            space.claim_slot(ME, T)
    assert path.read_bytes() == before


def test_a_damaged_header_copy_keeps_nobody_from_claiming(tmp_path: Path) -> None:
    path, clock = make_image(tmp_path / "disk.img"), FakeClock()
    with Disk(str(path)) as disk:
        disk.write(OFFSET, FILLER * RECORD_BYTES)
        space = Lockspace(disk, clock=clock, sleep=clock.sleep)
        assert space.claim_slot(ME, T).record.slot == 1


def test_a_slot_claimed_before_is_seen(grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    clock = FakeClock()
    with Disk(str(path)) as disk:
        space = Lockspace(disk, clock=clock, sleep=clock.sleep)
        grow.check_alone(space.snapshot(), holder(space))
        space.claim_slot(ME, T)
        with pytest.raises(InUse, match="'me'"):
            grow.check_alone(space.snapshot(), holder(space))
        new = grow.plan(space.header, GROWN, "disk")
        with pytest.raises(InUse, match="'me'"):
            grow.move(disk, space, new, holder(space), in_time)
    assert offset_for(path, GROWN, tmp_path) == OFFSET, "nothing was decided"


class LostHold:
    """Stands for a hold that has ended: it is *lost*, or its deadline has passed."""

    def __init__(self, slot: int, lost: str, fence_at_ms: int) -> None:
        self.slot, self.lost, self.fence_at_ms = slot, lost, fence_at_ms

    def __enter__(self) -> "LostHold":
        return self

    def __exit__(self, *_exc: object) -> None: ...


@pytest.mark.parametrize(
    ("lost", "left_ms", "why"), [("slot taken", 60_000, "slot taken"), ("", 0, "the disk is too slow")]
)
def test_a_hold_that_has_ended_decides_nothing(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, left_ms: int, why: str
) -> None:
    """A home may be there by now: it looks at the old lockspace, and must go on to find it there."""
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    space = Lockspace.open(str(path))
    hold = LostHold(holder(space), lost, now_ms() + left_ms)
    monkeypatch.setattr(grow, "Hold", lambda *_arguments: hold)
    with pytest.raises(IoFailure, match=why):
        grow._move(space, str(path), grow.plan(space.header, GROWN, "disk"), None)
    space.close()
    assert offset_for(path, GROWN, tmp_path) == offset_for(path, SIZE, tmp_path) == OFFSET


def test_who_holds_no_longer_decides_nothing(grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)

    def too_late() -> None:
        raise IoFailure("too late")

    with Disk(str(path)) as disk:
        space = Lockspace(disk)
        new = grow.plan(space.header, GROWN, "disk")
        grow.copy_records(disk, space, new, holder(space))
        with pytest.raises(IoFailure):
            grow.decide(disk, space.header, new, too_late)
    assert offset_for(path, GROWN, tmp_path) == offset_for(path, SIZE, tmp_path) == OFFSET
    unfinished = Lockspace.open(str(path))
    damages = find_damage(unfinished)
    unfinished.close()
    assert [(damage.unfinished, "run it again" in damage.advice) for damage in damages] == [(True, True)]


def test_moves_that_lead_nowhere(grown: Path, tmp_path: Path) -> None:
    good = MovedRecord(VOLUME, OFFSET, GROWN - LOCKSPACE, LOCKSPACE)
    assert MovedRecord.decode(good.encode(0)) == good
    for bad in (replace(good, new_offset=OFFSET), replace(good, new_offset=OFFSET + 1), replace(good, new_bytes=4096)):
        with pytest.raises(ForeignRecord):
            MovedRecord.decode(bad.encode(0))
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    with Disk(str(path)) as disk:
        disk.write(OFFSET, good.encode(0))
    with pytest.raises(MediaError, match="no copy of its header is good"):
        Lockspace.open(str(path))


# -- the command, on loop devices --------------------------------------------------------------------------------------

loops = pytest.mark.needs("root", "loop", "xfs")
FIRST, SECOND = 320 * MIB, 640 * MIB


class Volume(LoopDisk):
    def slot(self, record: SlotRecord) -> None:
        with Disk(self.device) as disk:
            space = Lockspace(disk)
            space.write_slot(record)
            disk.sync()


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volume]:
    """A volume of 320 MiB on a loop device; no daemon of this host has it."""
    monkeypatch.setenv("MXFS_RUN_ROOT", str(tmp_path / "run"))
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(FIRST)
    with loop_device(image) as device:
        assert mkfs.main([device]) == 0
        yield Volume(image, device)


def header(device: str) -> HeaderRecord:
    space = Lockspace.open(device, readonly=True)
    space.close()
    assert space.found.moved is None
    return space.header


@loops
def test_a_volume_grows(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    key = header(volume.device).cluster_key
    for size in (SECOND, 2 * SECOND):
        before = header(volume.device).xfs_bytes
        volume.resize(size)
        assert mxfs.main(["grow", volume.device]) == 0
        assert f"room for an XFS of {(size >> 20) - 16} MiB (it had {before >> 20} MiB)" in capsys.readouterr().out
        found = header(volume.device)
        assert (found.lockspace_offset, found.device_bytes) == (size - 16 * MIB, size)
        assert (found.xfs_bytes, found.cluster_key) == (size - 16 * MIB, key)
        assert fsck.check(volume.device, change=False).code == fsck.EXIT_CLEAN
        fd = libc.mount_detached(volume.device, False)
        space = Lockspace.open(volume.device)
        assert growth.grow_lower(fd, space)
        block, blocks, _ = growth.size_of(fd)
        assert block * blocks == size - 16 * MIB
        assert not growth.grow_lower(fd, space)
        space.close()
        # The superblock on the disk says so while XFS is mounted.
        with Disk(volume.device, readonly=True) as disk:
            assert int.from_bytes(disk.read(0, RECORD_BYTES)[8:16], "big") == blocks
        os.close(fd)
    assert fsck.check(volume.device, change=False).code == fsck.EXIT_CLEAN
    assert mxfs.main(["grow", volume.device]) == 1
    assert "has not grown" in capsys.readouterr().err


@loops
def test_xfs_does_not_grow_before_the_move_is_finished(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    volume.resize(SECOND)
    monkeypatch.setattr(grow, "settle", lambda _disk, _header: (_ for _ in ()).throw(IoFailure("cut")))
    assert mxfs.main(["grow", volume.device]) == 1
    monkeypatch.undo()
    fd = libc.mount_detached(volume.device, False)
    space = Lockspace.open(volume.device)
    assert space.arriving and space.header.xfs_bytes == SECOND - 16 * MIB
    assert not growth.grow_lower(fd, space)
    os.close(fd)
    space.close()
    assert fsck.check(volume.device, change=False).code == fsck.EXIT_ERRORS
    monkeypatch.setenv("MXFS_RUN_ROOT", str(volume.image.parent / "run"))
    assert mxfs.main(["grow", volume.device]) == 0
    assert fsck.check(volume.device, change=False).code == fsck.EXIT_CLEAN


@loops
def test_reservations_that_are_elsewhere(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the volume registers there, for the move and for its end."""
    asked = []

    def at(device: str, **_options: object) -> Probe:
        asked.append(device)
        return Probe(None, "none", "a test has none")

    monkeypatch.setattr(fencing, "open_reservations", at)
    volume.resize(SECOND)
    assert mxfs.main(["grow", volume.device, "--prdev", "iscsi://there/t/1"]) == 0
    assert asked == ["iscsi://there/t/1"] * 2


def _not_grown(_volume: Volume) -> None:
    pass


def _a_little(volume: Volume) -> None:
    volume.resize(FIRST + 8 * MIB)


def _read_only(volume: Volume) -> None:
    volume.resize(SECOND)
    subprocess.run(["blockdev", "--setro", volume.device], check=True)


def _dead_node(volume: Volume) -> None:
    volume.resize(SECOND)
    volume.slot(SlotRecord(3, SlotState.FAILED, b"n" * 16, "n3", 4, 5, 6, 0, 0, T.heartbeat_ms, T.lease_ms, 100))


def _damaged(volume: Volume) -> None:
    volume.resize(SECOND)
    with Disk(volume.device) as disk:
        disk.write(FIRST - 16 * MIB + slot_record(9) * RECORD_BYTES, FILLER * RECORD_BYTES)
    volume.slot(SlotRecord(3, SlotState.FREE, b"n" * 16, "n3", 4, 5, 6, 0, 0, T.heartbeat_ms, T.lease_ms, 100))


def _plain_xfs(volume: Volume) -> None:
    subprocess.run(["mkfs.xfs", "-q", "-f", volume.device], check=True)


def _daemon(volume: Volume) -> None:
    volume.resize(SECOND)
    space = Lockspace.open(volume.device, readonly=True)
    space.close()
    from mxfs_proto.ondisk import format_uuid

    folder = volume.image.parent / "run" / format_uuid(space.volume)
    folder.mkdir(parents=True)
    rundir.remember(folder, rundir.FUSE, os.getpid())


@loops
@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_not_grown, "has not grown, it has 335544320 bytes as before"),
        (_a_little, "has grown by 8388608 bytes only: the lockspace needs 16777216 new ones"),
        (_read_only, "is read-only: make it writable"),
        (_dead_node, "node 'n3' (slot 3) died and left the volume as it was: mount it on one node"),
        (_damaged, "slot 9 is damaged"),
        (_plain_xfs, "no MXFS volume"),
        (_daemon, "the volume is mounted already"),
    ],
)
def test_refusals(
    volume: Volume, prepare: Callable[[Volume], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(volume)
    subprocess.run(["blockdev", "--flushbufs", volume.device], check=True)
    before = volume.image.read_bytes()[FIRST - 16 * MIB :]
    capsys.readouterr()
    assert mxfs.main(["grow", volume.device]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("mxfs grow: ") and says in last, last
    subprocess.run(["blockdev", "--flushbufs", volume.device], check=True)
    assert volume.image.read_bytes()[FIRST - 16 * MIB :] == before


@loops
def test_a_node_has_it(volume: Volume, capsys: pytest.CaptureFixture[str]) -> None:
    """Its slot moves while it is watched."""
    volume.resize(SECOND)
    beating = SlotRecord(3, SlotState.ACTIVE, b"n" * 16, "n3", 4, 5, 6, 0, 0, T.heartbeat_ms, T.lease_ms, 4000)
    volume.slot(beating)
    naps = iter(range(1000))

    def sleep(self: Lockspace, _seconds: float) -> None:
        if next(naps) == 2:
            volume.slot(replace(beating, counter=6))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow, "watch_nodes", _with_sleep(sleep))
        assert mxfs.main(["grow", volume.device]) == 1
    assert "in use by node 'n3' (slot 3): unmount it there first" in capsys.readouterr().err


def _with_sleep(sleep: Callable[[Lockspace, float], None]) -> Callable[..., object]:
    from mxfsd.lockcheck import watch_nodes

    def watching(space: Lockspace, say: Callable[[str], None]) -> object:
        space.sleep = lambda seconds: sleep(space, seconds)
        return watch_nodes(space, say)

    return watching


@loops
def test_it_is_in_use_here(volume: Volume, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume.resize(SECOND)
    fd = libc.mount_detached(volume.device, False)
    try:
        assert mxfs.main(["grow", volume.device]) == 1
    finally:
        os.close(fd)
    assert "in use on this host" in capsys.readouterr().err


def test_what_cannot_be_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name, says in (("file", "regular file"), ("absent", "No such file"), (".", "not a block device")):
        assert mxfs.main(["grow", str(tmp_path / name)]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        mxfs.main(["grow"])
    assert ended.value.code == 1


@loops
def test_only_root_grows(volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert mxfs.main(["grow", volume.device]) == 1
    assert "only root can grow a device" in capsys.readouterr().err


@loops
def test_what_else_keeps_it_from_growing(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An XFS without a superblock; reservations of others; an interruption."""

    def conflict(_disk: Disk, _offset: int, _length: int) -> bytes:
        raise IoFailure("Invalid exchange", errno.EBADE)

    def refusal() -> str:
        capsys.readouterr()
        assert mxfs.main(["grow", volume.device]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    with Disk(volume.device) as disk:
        first = disk.read(0, RECORD_BYTES)
        disk.write(0, bytes(RECORD_BYTES))
        assert "the XFS has no superblock that can be read: see mxfs fsck" in refusal()
        disk.write(0, first)
        disk.sync()
    volume.resize(SECOND)
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "read", conflict)
        assert f"{volume.device} is reserved by others" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(command, "grow", lambda *_words: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "interrupted; the volume can be mounted: run it again when no node has it" in refusal()
    assert header(volume.device).lockspace_offset == FIRST - 16 * MIB


def test_records_that_cannot_be_read_are_not_copied(grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    shutil.copyfile(grown, path)
    with Disk(str(path)) as disk:
        space = Lockspace(disk)
        disk.write(OFFSET + slot_record(9) * RECORD_BYTES, FILLER * RECORD_BYTES)
        before = path.read_bytes()
        with pytest.raises(IoFailure, match="the lockspace cannot be read just now"):
            grow.copy_records(disk, space, grow.plan(space.header, GROWN, "disk"), holder(space))
        assert path.read_bytes() == before
