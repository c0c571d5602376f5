"""The lockspace in an image file: finding it, reading damaged records, claims through real I/O."""

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import KEY, LOCKSPACE, OFFSET, SIZE, VOLUME, FakeClock, make_image, open_lockspace, xfs_sector

from mxfs_proto.errors import IoFailure, MediaError, MisuseError
from mxfs_proto.ondisk import (
    ForeignRecord,
    LeaseRecord,
    LeaseState,
    OtherVersion,
    SlotState,
    TornRecord,
    WrongVolume,
    seal,
)
from mxfsd.core.lease import HeldSlot, Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import ClaimRefused, Lockspace, read_header

T = Timeouts.named("default")
JOINER = Joiner(b"m" * 16, "me", 5)
SLOT_1 = OFFSET + 16 * 4096
LEASES = (OFFSET + 4096, OFFSET + 8192)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def lockspace(image: Path, clock: FakeClock) -> Iterator[Lockspace]:
    space = open_lockspace(image, clock)
    yield space
    space.close()


def damage(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_empty_lockspace(lockspace: Lockspace) -> None:
    assert lockspace.header.cluster_key == KEY
    assert lockspace.label == "data"
    assert lockspace.read_lease() == LeaseRecord(sequence=1)
    states = [slot.state for slot in lockspace.read_slots() if slot is not None]
    assert states == [SlotState.FREE] * 64


@pytest.mark.parametrize("lost", [OFFSET, SIZE - 4096])
@pytest.mark.parametrize("default", [LOCKSPACE, 16 << 20])
def test_one_header_copy_may_be_lost(image: Path, lost: int, default: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record 0 is found at the default place, else behind the XFS."""
    monkeypatch.setattr("mxfsd.io.headers.DEFAULT_LOCKSPACE_BYTES", default)
    damage(image, lost, bytes(4096))
    Lockspace.open(str(image)).close()


def test_no_volume(image: Path) -> None:
    damage(image, OFFSET, bytes(4096))
    damage(image, SIZE - 4096, bytes(4096))
    with pytest.raises(ForeignRecord, match="no MXFS volume"):
        Lockspace.open(str(image))


def test_torn_header_is_named(image: Path) -> None:
    damage(image, OFFSET + 100, b"torn")
    damage(image, SIZE - 4096 + 100, b"torn")
    with pytest.raises(TornRecord):
        Lockspace.open(str(image))


def test_header_of_another_version(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Disk(str(image)) as disk:
        header = read_header(disk)
        monkeypatch.setattr("mxfs_proto.ondisk.VERSION", 2)
        disk.write(SIZE - 4096, header.encode(1))
        disk.write(OFFSET, header.encode(0))
        monkeypatch.undo()
    with pytest.raises(OtherVersion, match="version 2"):
        Lockspace.open(str(image))


def test_shrunk_device(image: Path) -> None:
    with Disk(str(image)) as disk:
        header = replace(read_header(disk), lockspace_bytes=LOCKSPACE * 2)
        disk.write(SIZE - 4096, header.encode(1))
        disk.write(OFFSET, header.encode(0))
    with pytest.raises(MediaError, match="shrunk"):
        Lockspace.open(str(image))


@pytest.mark.parametrize("sector", [xfs_sector(b"x" * 16), xfs_sector(size=SIZE), bytes(4096)])
def test_lockspace_that_outlived_its_xfs(image: Path, sector: bytes) -> None:
    damage(image, 0, sector)
    with pytest.raises(MediaError):
        Lockspace.open(str(image))


def test_missing_device(tmp_path: Path) -> None:
    with pytest.raises(IoFailure) as caught:
        Lockspace.open(str(tmp_path / "nothing"))
    assert caught.value.errno == errno.ENOENT


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ForeignRecord):
        Lockspace.open(str(tmp_path / "empty"))


def test_read_only_lockspace_refuses_writes(image: Path) -> None:
    space = Lockspace.open(str(image), readonly=True)
    with pytest.raises(MisuseError):
        space.write_lease(LeaseRecord(sequence=2))
    space.close()


def test_io_is_aligned(image: Path) -> None:
    with Disk(str(image)) as disk:
        for offset, length in ((1, 4096), (0, 100), (0, 2 << 20), (-4096, 4096), (0, 0)):
            with pytest.raises(MisuseError):
                disk.read(offset, length)
        with pytest.raises(IoFailure, match="end of the device"):
            disk.read(SIZE, 4096)
    with pytest.raises(MisuseError, match="closed"):
        disk.read(0, 4096)


def test_damaged_slots_are_unreadable_and_named(image: Path, lockspace: Lockspace) -> None:
    held = lockspace.claim_slot(JOINER, T)
    damage(image, SLOT_1 + 60, b"torn")
    foreign = held.record.encode(b"x" * 16)
    damage(image, SLOT_1 + 4096, foreign)
    damage(image, SLOT_1 + 2 * 4096, held.record.encode(VOLUME))
    slots = lockspace.read_slots()
    assert slots[:3] == (None, None, None)
    assert isinstance(lockspace.bad[1], TornRecord)
    assert isinstance(lockspace.bad[2], WrongVolume)
    assert isinstance(lockspace.bad[3], ForeignRecord)
    lockspace.write_slot(held.record)
    assert lockspace.read_slots()[0] == held.record
    assert 1 not in lockspace.bad


def test_torn_lease_copy_leaves_the_other_one(image: Path, lockspace: Lockspace) -> None:
    held = lockspace.claim_slot(JOINER, T)
    lease = lockspace.claim_lease(held.record, T).record
    damage(image, LEASES[lease.sequence % 2] + 50, b"torn")
    found = lockspace.read_lease()
    assert (found.epoch, found.nonce, found.sequence) == (1, lease.nonce, lease.sequence - 1)
    damage(image, LEASES[1 - lease.sequence % 2] + 50, b"torn")
    with pytest.raises(TornRecord, match="both copies"):
        lockspace.read_lease()
    with pytest.raises(ClaimRefused) as caught:
        lockspace.claim_lease(held.record, T)
    assert caught.value.errno == errno.EUCLEAN


def test_claim_lease_move_and_release(image: Path, lockspace: Lockspace, clock: FakeClock) -> None:
    one = lockspace.claim_slot(JOINER, T)
    began = clock.ms
    two = lockspace.claim_slot(Joiner(b"o" * 16, "other"), T)
    assert clock.ms - began < 500
    assert (one.record.slot, two.record.slot) == (1, 2)
    first = lockspace.claim_lease(one.record, T)
    with pytest.raises(ClaimRefused, match="held by slot 1") as caught:
        lockspace.claim_lease(two.record, T)
    assert caught.value.errno == errno.EBUSY
    lockspace.give_lease(first.record, clock.ms + 100, 2, T)
    second = lockspace.claim_lease(two.record, T)
    assert second.record.epoch == 2
    lockspace.give_lease(second.record, clock.ms + 100, 0, T)
    assert lockspace.read_lease().state is LeaseState.FREE
    assert lockspace.claim_lease(one.record, T).record.epoch == 3
    with pytest.raises(ClaimRefused) as caught:
        lockspace.give_lease(second.record, clock.ms + 100, 0, T)
    assert caught.value.errno == errno.ESTALE


def test_a_claim_is_durable_before_it_counts(lockspace: Lockspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that a power failure takes back would leave a home with a lease that the next one does not see."""
    disk = lockspace.disk
    done: list[str] = []
    for name in ("write", "sync"):
        call = getattr(disk, name)
        monkeypatch.setattr(disk, name, lambda *args, name=name, call=call: (done.append(name), call(*args))[1])
    one = lockspace.claim_slot(JOINER, T)
    assert done[-1] == "sync" and "write" in done
    done.clear()
    lockspace.claim_lease(one.record, T)
    assert done[-1] == "sync" and "write" in done


def test_release_and_clear(lockspace: Lockspace) -> None:
    one = lockspace.claim_slot(JOINER, T)
    assert lockspace.release_slot(one.record)
    (slot, *_) = lockspace.read_slots()
    assert slot is not None
    assert slot.state is SlotState.LEFT
    again = lockspace.claim_slot(JOINER, T)
    assert (again.record.slot, again.record.incarnation) == (1, 2)
    assert not lockspace.release_slot(one.record)
    lockspace.clear_slot(again.record, T)
    (slot, *_) = lockspace.read_slots()
    assert slot is not None
    assert slot.state is SlotState.FREE
    with pytest.raises(ClaimRefused):
        lockspace.clear_slot(again.record, T)


def test_two_claimants_on_one_image(image: Path, lockspace: Lockspace, clock: FakeClock) -> None:
    """The second one claims while the first one waits."""
    other_clock = FakeClock()
    other = open_lockspace(image, other_clock)
    rivals: list[HeldSlot] = []

    def act() -> None:
        clock.on_sleep = lambda: None
        rivals.append(other.claim_slot(Joiner(b"o" * 16, "other"), T))

    clock.on_sleep = act
    mine = lockspace.claim_slot(JOINER, T)
    other.close()
    assert [rivals[0].record.slot, mine.record.slot] == [2, 1]


def test_sealed_record_of_another_size(image: Path, lockspace: Lockspace) -> None:
    from mxfs_proto.ondisk import Kind

    damage(image, SLOT_1, seal(Kind.SLOT, VOLUME, 0, b"short"))
    assert lockspace.read_slots()[0] is None
