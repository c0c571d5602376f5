"""mxfs fsck and fsck.mxfs, on loop devices: what they refuse, each kind of damage, and that nothing else changes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import FakeClock, LoopDisk, loop_device, open_lockspace
from faketarget import FakeTarget

from mxfs_proto.errors import IoFailure
from mxfs_proto.ondisk import (
    LEASE_RECORDS,
    RECORD_BYTES,
    Kind,
    LeaseState,
    SlotRecord,
    SlotState,
    format_uuid,
    seal,
    slot_record,
)
from mxfsd import fencing, hold, rundir, xfsprogs
from mxfsd import lockcheck as lockcheck_module
from mxfsd.cli import fsck, mkfs, mxfs
from mxfsd.core.lease import UNKNOWN_INCARNATIONS, Joiner
from mxfsd.core.takeover import Verdict, Victim
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import ClaimRefused, Lockspace
from mxfsd.options import RUN_ROOT_ENV
from mxfsd.pr.probe import Probe
from mxfsd.pr.reservations import Reservations

pytestmark = pytest.mark.needs("root", "loop", "xfs")
T = Timeouts.named("fast")
MIB = 1 << 20
SIZE = 320 * MIB
LOCKSPACE = SIZE - 16 * MIB
INOBT = 4096
"""Where the first inode B+tree of a new XFS of 4 KiB blocks has its root."""


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    image = tmp_path_factory.mktemp("fsck") / "formatted.img"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    with loop_device(image) as device:
        assert mkfs.main([device]) == 0
    yield image
    image.unlink()


class Volume(LoopDisk):
    """A volume of one test."""

    def blocks(self) -> dict[int, bytes]:
        """What is in the image: the blocks of 4096 bytes that are not all zeros, by their byte offset."""
        subprocess.run(["blockdev", "--flushbufs", self.device], check=True)
        zeros, blocks = bytes(RECORD_BYTES), {}
        fd = os.open(self.image, os.O_RDONLY)
        try:
            end = 0
            while True:
                try:
                    at = os.lseek(fd, end, os.SEEK_DATA)
                except OSError as error:
                    assert error.errno == errno.ENXIO  # only a hole is left
                    return blocks
                end = os.lseek(fd, at, os.SEEK_HOLE)
                for offset in range(at - at % RECORD_BYTES, end, RECORD_BYTES):
                    data = os.pread(fd, RECORD_BYTES, offset)
                    if data != zeros:
                        blocks[offset] = data
        finally:
            os.close(fd)

    def changed(self, before: dict[int, bytes]) -> set[int]:
        """The byte offsets of the blocks that are not as they were."""
        now = self.blocks()
        return {offset for offset in before.keys() | now.keys() if before.get(offset) != now.get(offset)}

    def put(self, offset: int, data: bytes) -> None:
        with Disk(self.device) as disk:
            old = disk.read(offset, RECORD_BYTES)
            disk.write(offset, data + old[len(data) :])
            disk.sync()

    def put_record(self, number: int, data: bytes) -> None:
        self.put(LOCKSPACE + number * RECORD_BYTES, data)

    def tear(self, number: int) -> None:
        """Half of the record is of another write."""
        self.put_record(number, self.record(number)[:512] + b"\xa5" * 512)

    def record(self, number: int) -> bytes:
        with Disk(self.device, readonly=True) as disk:
            return disk.read(LOCKSPACE + number * RECORD_BYTES, RECORD_BYTES)

    def snapshot(self) -> Snapshot:
        space = Lockspace.open(self.device, readonly=True)
        try:
            return space.snapshot()
        finally:
            space.close()

    def join(self, name: str, state: SlotState, *, home: bool = False) -> SlotRecord:
        """Leave a node's slot (and lease) as if it had beaten and died."""
        space = open_lockspace(self.device, FakeClock())
        try:
            record = space.claim_slot(Joiner(name.encode().ljust(16, b"."), name), T).record
            if home:
                space.claim_lease(record, T)
            record = replace(record, state=state, counter=record.counter + 1, is_home=home)
            space.write_slot(record)
            return record
        finally:
            space.close()

    def as_xfs(self, folder: Path, *, crash: bool = False) -> None:
        """Mount the XFS by hand, change something, and unmount it."""
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "xfs", self.device, str(folder)], check=True)
        try:
            for number in range(50):
                (folder / f"{number}.{time.monotonic_ns()}").write_text("x")
            if crash:
                subprocess.run(["xfs_io", "-x", "-c", "shutdown -f", str(folder)], check=True)
        finally:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def volume(formatted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Volume]:
    monkeypatch.setenv(RUN_ROOT_ENV, str(tmp_path / "run"))
    image = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", str(formatted), str(image)], check=True)
    with loop_device(image) as device:
        yield Volume(image, device)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Let fsck watch the slots on a clock of the test's."""
    made = FakeClock()

    def opened(path: str, *, readonly: bool = False, check_xfs: bool = True) -> Lockspace:
        disk = Disk(path, readonly=readonly)
        try:
            return Lockspace(disk, check_xfs=check_xfs, clock=made, sleep=made.sleep)
        except BaseException:
            disk.close()
            raise

    monkeypatch.setattr(Lockspace, "open", opened)
    return made


Capsys = pytest.CaptureFixture[str]


def run(capsys: Capsys, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = mxfs.main(["fsck", *args])
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys: Capsys, *args: str) -> str:
    """Return the one line on stderr (news of how it goes left out); nothing was said on stdout."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (8, "")
    lines = [line for line in err.splitlines() if not line.startswith("fsck: ")]
    assert len(lines) == 1
    assert lines[0].startswith("mxfs fsck: ")
    return lines[0]


def failure(capsys: Capsys, *args: str) -> tuple[str, str]:
    """Return the one line on stderr, and what was said before of what had been found and done."""
    code, out, err = run(capsys, *args)
    assert code == 8
    lines = [line for line in err.splitlines() if not line.startswith("fsck: ")]
    assert len(lines) == 1
    assert lines[0].startswith("mxfs fsck: ")
    assert out.splitlines()[-1].endswith(": not done")
    return lines[0], out


def found(capsys: Capsys, *args: str) -> tuple[int, dict[str, object]]:
    code, out, _ = run(capsys, *args, "--json")
    data = json.loads(out)
    assert data["exit"] == code
    return code, data


# -- a good volume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-n",)])
def test_a_clean_volume_is_not_changed(volume: Volume, capsys: Capsys, options: tuple[str, ...]) -> None:
    before = volume.blocks()
    code, out, err = run(capsys, volume.device, *options)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == ["XFS: clean", f"{volume.device}: clean"]
    assert volume.changed(before) == set()


def test_a_node_that_left_is_no_obstacle_and_not_waited_for(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    volume.join("n1", SlotState.LEFT)
    began = clock.ms
    assert found(capsys, volume.device)[0] == 0
    assert clock.ms == began


# -- what is refused -------------------------------------------------------------------------------------------


def test_refuses_a_mounted_device(volume: Volume, tmp_path: Path, capsys: Capsys) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()
    subprocess.run(["mount", "-t", "xfs", volume.device, str(folder)], check=True)
    try:
        assert f"mounted at {folder} already (type xfs): unmount it first" in refusal(capsys, volume.device, "-n")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_refuses_a_device_in_use_out_of_sight(volume: Volume, capsys: Capsys) -> None:
    with Disk(volume.device, exclusive=True):
        assert "in use on this host" in refusal(capsys, volume.device)


def test_refuses_a_volume_whose_fuse_process_waits_here(volume: Volume, tmp_path: Path, capsys: Capsys) -> None:
    space = Lockspace.open(volume.device, readonly=True)
    folder = tmp_path / "run" / format_uuid(space.volume)
    space.close()
    folder.mkdir(parents=True)
    rundir.remember(str(folder), rundir.FUSE, os.getpid())
    assert "waits for a daemon: unmount it" in refusal(capsys, volume.device, "-n")


@pytest.mark.parametrize("state", [SlotState.CLAIMING, SlotState.JOINING, SlotState.ACTIVE, SlotState.RESTARTING])
def test_refuses_a_volume_that_a_node_has(volume: Volume, clock: FakeClock, capsys: Capsys, state: SlotState) -> None:
    record = volume.join("n7", state)
    space = open_lockspace(volume.device, clock)

    def beat() -> None:
        if clock.ms > 2500:  # late, but before it counts as dead
            slot = space.read_slots()[record.slot - 1]
            assert slot is not None
            space.write_slot(replace(slot, counter=slot.counter + 1))

    clock.on_sleep = beat
    assert "in use by node 'n7' (slot 1): unmount it there first" in refusal(capsys, volume.device, "-n")
    space.close()


def test_refuses_a_volume_that_a_node_joins_meanwhile(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    volume.join("dead", SlotState.ACTIVE)
    clock.on_sleep = lambda: volume.join("new", SlotState.CLAIMING) and None
    assert "in use by node 'new' (slot 2)" in refusal(capsys, volume.device, "-n")


def test_refuses_a_volume_that_a_node_leaves_meanwhile(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    record = volume.join("n1", SlotState.ACTIVE)
    space = open_lockspace(volume.device, clock)
    clock.on_sleep = lambda: space.write_slot(replace(record, state=SlotState.LEFT, counter=record.counter + 1))
    said = refusal(capsys, volume.device, "-n")
    assert "slot 1 was just given up: unmount the volume on every node, then try again" in said
    space.close()


def test_refuses_a_volume_whose_home_renews(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    """Its slot stands still, or is torn: the lease's counter tells too."""
    volume.join("n1", SlotState.ACTIVE, home=True)
    space = open_lockspace(volume.device, clock)
    clock.on_sleep = lambda: space.write_lease(
        replace(space.read_lease(), sequence=space.read_lease().sequence + 1, renewals=9)
    )
    assert "in use by the home in slot 1" in refusal(capsys, volume.device, "-n")
    space.close()


def test_refuses_a_volume_with_a_torn_slot_that_is_written(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    volume.tear(slot_record(5))
    clock.on_sleep = lambda: volume.put_record(slot_record(5), clock.ms.to_bytes(8, "little") * 512)
    assert "somebody writes to slot 5" in refusal(capsys, volume.device)


def test_refuses_plain_xfs(volume: Volume, capsys: Capsys) -> None:
    subprocess.run(["mkfs.xfs", "-q", "-f", "-K", volume.device], check=True)
    volume.put(SIZE - RECORD_BYTES, bytes(RECORD_BYTES))
    volume.put(LOCKSPACE, bytes(RECORD_BYTES))
    said = refusal(capsys, volume.device, "-n")
    assert "holds plain XFS, no MXFS volume, as this host sees it: if it is one elsewhere, rescan" in said


def test_refuses_a_lockspace_that_outlived_its_xfs(volume: Volume, capsys: Capsys) -> None:
    subprocess.run(["mkfs.xfs", "-q", "-f", "-K", "-d", "size=304m", volume.device], check=True)
    before = volume.blocks()
    assert "the lockspace belongs to volume" in refusal(capsys, volume.device)
    assert volume.changed(before) == set()


def test_refuses_another_file_system_over_the_xfs(volume: Volume, capsys: Capsys) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", volume.device, "300m"], check=True)
    before = volume.blocks()
    assert "holds ext4 where the volume's XFS was" in refusal(capsys, volume.device)
    assert volume.changed(before) == set()


def test_refuses_a_torn_header(volume: Volume, capsys: Capsys) -> None:
    for offset in (LOCKSPACE, SIZE - RECORD_BYTES):
        with Disk(volume.device, readonly=True) as disk:
            old = disk.read(offset, RECORD_BYTES)
        volume.put(offset, old[:60] + b"\xa5" * 8)
    before = volume.blocks()
    assert "no copy of the lockspace's header is good" in refusal(capsys, volume.device)
    assert volume.changed(before) == set()


def test_refuses_a_volume_of_another_version(volume: Volume, capsys: Capsys) -> None:
    import zlib

    for offset in (LOCKSPACE, SIZE - RECORD_BYTES):
        with Disk(volume.device, readonly=True) as disk:
            data = bytearray(disk.read(offset, RECORD_BYTES))
        data[8:10] = b"\x02\0"
        data[44:48] = zlib.crc32(data[:44]).to_bytes(4, "little")
        volume.put(offset, bytes(data))
    assert "format version 2, this is version 1: check it with the mxfs that its nodes run" in refusal(
        capsys, volume.device
    )


def test_refuses_what_is_no_device(
    tmp_path: Path, volume: Volume, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "regular file: attach it with losetup" in refusal(capsys, str(volume.image))
    assert "not a block device" in refusal(capsys, "/dev/null")
    assert "No such file" in refusal(capsys, str(tmp_path / "nothing"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root can check a device: use sudo" in refusal(capsys, volume.device, "-n")


def test_a_read_only_device_is_only_checked(formatted: Path, capsys: Capsys) -> None:
    with loop_device(formatted, "--read-only") as device:
        assert "read-only: check it with -n" in refusal(capsys, device)
        assert run(capsys, device, "-n")[0] == 0


def test_says_the_way_out_of_a_reservation(volume: Volume, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def conflict(self: Disk, offset: int, length: int) -> bytes:
        raise IoFailure("read: Invalid exchange", errno.EBADE)

    monkeypatch.setattr(Disk, "read", conflict)
    assert f"see who they are with mxfs pr {volume.device}" in refusal(capsys, volume.device, "-n")


def test_says_that_xfsprogs_is_missing(volume: Volume, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xfsprogs.shutil, "which", lambda name: "/nonexistent/xfs_repair")
    assert "install xfsprogs" in failure(capsys, volume.device, "-n")[0]


def test_a_tool_that_does_not_begin_is_no_clean_volume(
    volume: Volume, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, monkeypatch, "echo cannot open it; exit 1")
    line, out = failure(capsys, volume.device, "-n")
    assert "could not work on" in line
    assert "XFS: not checked" in out


@pytest.mark.parametrize("args", [[], ["/dev/null", "--what"], ["-x"]])
def test_bad_arguments(args: list[str], capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        mxfs.main(["fsck", *args])
    assert caught.value.code == 8
    assert capsys.readouterr().err.count("\n") == 1


# -- fsck.mxfs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["-a"], ["-p"], ["-a", "-C9"], ["-C", "-p"], ["-p", "-f"]])
def test_the_helper_does_nothing_at_boot(args: list[str], capsys: Capsys) -> None:
    assert fsck.main([*args, "/dev/no-such-device"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_helper_checks_else(volume: Volume, capsys: Capsys) -> None:
    assert fsck.main([volume.device, "-n"]) == 0
    assert fsck.main(["-y", volume.device]) == 0
    assert fsck.main(["/dev/null"]) == 8
    assert "fsck.mxfs: /dev/null is not a block device" in capsys.readouterr().err


# -- damage in the lockspace -----------------------------------------------------------------------------------


def other_slot(volume: Volume) -> bytes:
    return volume.record(slot_record(9))


def other_volume(volume: Volume) -> bytes:
    return SlotRecord(5).encode(b"q" * 16)


def other_version(volume: Volume) -> bytes:
    import zlib

    data = bytearray(volume.record(slot_record(5)))
    data[8:10] = b"\x09\0"
    data[44:48] = zlib.crc32(data[:44]).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [None, bytes(RECORD_BYTES), b"\xff" * RECORD_BYTES, other_slot],
    ids=["torn", "zeros", "ones", "of another slot"],
)
def test_a_damaged_slot_that_nobody_owns(
    volume: Volume, clock: FakeClock, capsys: Capsys, data: bytes | Callable[[Volume], bytes] | None
) -> None:
    number = slot_record(5)
    last = volume.join("n1", SlotState.LEFT)
    if data is None:
        volume.tear(number)
    else:
        volume.put_record(number, data(volume) if callable(data) else data)
    before = volume.blocks()
    code, found_ = found(capsys, volume.device, "-n")
    assert code == 4
    assert [(r["record"], r["repaired"], r["repairable"]) for r in found_["records"]] == [("slot 5", False, True)]  # type: ignore[attr-defined]
    assert volume.changed(before) == set()
    code, out, _ = run(capsys, volume.device)
    assert code == 1
    assert "slot 5: damaged: " in out
    assert "written anew" in out
    assert volume.changed(before) == {LOCKSPACE + number * RECORD_BYTES}
    slot = volume.snapshot().slot(5)
    assert slot is not None
    assert slot.state is SlotState.FREE
    # No node may get an incarnation again that the lost record had.
    assert slot.incarnation == last.incarnation + UNKNOWN_INCARNATIONS
    assert found(capsys, volume.device, "-n")[0] == 0


def test_a_damaged_slot_is_watched_as_long_as_its_owner_may_take(
    volume: Volume, clock: FakeClock, capsys: Capsys
) -> None:
    volume.tear(slot_record(5))
    began = clock.ms
    _, _, err = run(capsys, volume.device, "-n")
    assert clock.ms - began >= Timeouts.named("patient").node_dead_ms  # nobody says which set it ran
    assert "fsck: watching whether slot 5 moves: 2 of 60 s" in err
    volume.join("n1", SlotState.LEFT)
    began = clock.ms
    run(capsys, volume.device, "-n")
    assert T.node_dead_ms <= clock.ms - began < 2 * T.node_dead_ms


@pytest.mark.parametrize("make", [other_volume, other_version])
def test_a_slot_that_no_broken_write_leaves_stays(
    volume: Volume, clock: FakeClock, capsys: Capsys, make: Callable[[Volume], bytes]
) -> None:
    volume.put_record(slot_record(5), make(volume))
    before = volume.blocks()
    code, out, _ = run(capsys, volume.device)
    assert code == 4
    assert "slot 5: damaged: " in out
    assert volume.changed(before) == set()


def test_a_damaged_slot_of_the_home_stays(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    """Whoever takes over has to find the home's registration there, or take it for unknown."""
    record = volume.join("n1", SlotState.ACTIVE, home=True)
    volume.tear(slot_record(record.slot))
    before = volume.blocks()
    code, out, _ = run(capsys, volume.device)
    assert code == 4
    assert "it is the home's: mount the volume on one node" in out
    assert volume.changed(before) == set()


@pytest.mark.parametrize("copy", [1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_a_damaged_copy_of_the_lease(volume: Volume, clock: FakeClock, capsys: Capsys, copy: int, held: bool) -> None:
    if held:
        volume.join("n1", SlotState.FAILED, home=True)
    number = LEASE_RECORDS[copy - 1]
    volume.tear(number)
    lease = volume.snapshot().lease
    assert lease is not None
    before = volume.blocks()
    code, data = found(capsys, volume.device, "-n")
    assert code == 4
    assert [r["record"] for r in data["records"]] == [f"lease copy {copy}"]  # type: ignore[attr-defined]
    assert volume.changed(before) == set()
    assert found(capsys, volume.device)[0] == 1
    assert volume.changed(before) == {LOCKSPACE + number * RECORD_BYTES}
    now = volume.snapshot().lease
    assert now is not None
    if not held:
        assert (now.state, now.epoch) == (LeaseState.FREE, lease.epoch)
    else:
        assert now == lease  # the good copy goes on to count
    assert found(capsys, volume.device)[0] == 0


def test_both_copies_of_the_lease(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    for number in LEASE_RECORDS:
        volume.tear(number)
    volume.tear(slot_record(3))
    before = volume.blocks()
    code, out, _ = run(capsys, volume.device)
    assert code == 4
    for name in ("lease copy 1", "lease copy 2", "slot 3"):
        assert f"{name}: damaged: " in out
    assert "no copy is left" in out
    assert volume.changed(before) == set()


def test_a_lease_in_the_place_of_the_other_copy_stays(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    """A node would read it, so that what counts might change."""
    volume.put_record(LEASE_RECORDS[0], volume.record(LEASE_RECORDS[1]))
    before = volume.blocks()
    code, out, _ = run(capsys, volume.device)
    assert code == 4
    assert "lease copy 1: damaged: lease number 1 found in the place of the other copy" in out
    assert volume.changed(before) == set()


@pytest.mark.parametrize(("copy", "offset"), [(1, LOCKSPACE), (2, SIZE - RECORD_BYTES)])
def test_a_damaged_copy_of_the_header_is_named(volume: Volume, capsys: Capsys, copy: int, offset: int) -> None:
    volume.put(offset, bytes(RECORD_BYTES))
    before = volume.blocks()
    code, out, _ = run(capsys, volume.device)
    assert code == 4
    assert f"header copy {copy}: damaged: " in out
    assert "the other copy is good" in out
    assert volume.changed(before) == set()


def test_a_record_that_was_claimed_since_is_not_written(volume: Volume, clock: FakeClock) -> None:
    volume.tear(slot_record(5))
    space = Lockspace.open(volume.device)
    damages = lockcheck_module.find_damage(space)
    space.write_slot(SlotRecord(5, SlotState.CLAIMING, b"n" * 16, "new", 7, 1))
    with pytest.raises(lockcheck_module.InUse, match="somebody has just written to slot 5"):
        lockcheck_module.repair(space, damages)
    slot = space.read_slots()[4]
    assert slot is not None
    assert slot.name == "new"
    space.close()


def test_a_disk_that_loses_the_repair_is_no_success(
    volume: Volume, clock: FakeClock, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.tear(slot_record(5))
    monkeypatch.setattr(Lockspace, "write_record", lambda self, number, data: None)
    line, out = failure(capsys, volume.device)
    assert "the disk loses writes" in line
    assert "slot 5: damaged: " in out
    assert out.splitlines()[1].endswith(": not written")


def test_dead_nodes_are_named(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    volume.join("n1", SlotState.ACTIVE, home=True)
    volume.join("n2", SlotState.FAILED)
    began = clock.ms
    code, out, err = run(capsys, volume.device, "-n")
    assert code == 0
    assert "slot 1: node 'n1', the home, is dead (it left the slot ACTIVE): no damage" in out
    assert "slot 2: node 'n2' is dead (it left the slot FAILED)" in out
    assert "fsck: watching whether slot 1 (n1) moves: 2 of 4 s" in err
    assert T.node_dead_ms <= clock.ms - began < 2 * T.node_dead_ms


# -- the XFS ---------------------------------------------------------------------------------------------------


def test_a_log_to_be_replayed_is_never_thrown_away(volume: Volume, tmp_path: Path, capsys: Capsys) -> None:
    volume.as_xfs(tmp_path / "mnt", crash=True)
    before = volume.blocks()
    for options in (("-n",), ()):
        code, out, _ = run(capsys, volume.device, *options)
        assert code == 4
        assert "XFS: dirty log: its home died. Mount it once, which replays the log" in out
        assert "xfs_repair: " not in out
    assert volume.changed(before) == set()
    volume.as_xfs(tmp_path / "mnt")
    assert run(capsys, volume.device)[0] == 0


def test_a_corrupt_xfs_is_repaired_while_the_volume_is_held(volume: Volume, tmp_path: Path, capsys: Capsys) -> None:
    volume.as_xfs(tmp_path / "mnt")
    volume.put(INOBT, os.urandom(RECORD_BYTES))
    before = volume.blocks()
    code, out, _ = run(capsys, volume.device, "-n")
    assert code == 4
    assert "XFS: corrupt: run without -n to repair it" in out
    assert "xfs_repair: " in out
    assert volume.changed(before) == set()
    code, out, err = run(capsys, volume.device)
    assert code == 1
    assert "XFS: the volume was held for the repair (slot 1, epoch 1)" in out
    assert "XFS: repaired" in out
    outside = {offset for offset in volume.changed(before) if offset >= LOCKSPACE}
    assert outside == {LOCKSPACE + number * RECORD_BYTES for number in (*LEASE_RECORDS, slot_record(1))}
    snap = volume.snapshot()
    assert snap.lease is not None
    assert (snap.lease.state, snap.lease.epoch) == (LeaseState.FREE, 1)
    assert {slot.state for slot in snap.slots if slot is not None} == {SlotState.FREE}
    assert run(capsys, volume.device)[:1] == (0,)
    volume.as_xfs(tmp_path / "mnt")  # it mounts


def test_errors_that_are_left(volume: Volume, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, 'echo "Phase 1 - x"; echo bad magic; [ "$1" = -n ] && exit 1; exit 4')
    code, out, _ = run(capsys, volume.device)
    assert code == 4
    assert "xfs_repair: bad magic" in out


def test_a_dead_home_is_fenced_before_the_repair(
    volume: Volume, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims: list[Victim] = []

    class Agent(fencing.LeaseFencing):
        key = 0x4D58_0100_0000_0001

        def fence(self, victim: Victim) -> None:
            lease = volume.snapshot().lease
            assert lease is not None
            assert lease.epoch == 1  # fenced first, the lease after
            victims.append(victim)

        def leave(self) -> None:
            lease = volume.snapshot().lease
            assert lease is not None
            left.append(lease.state)

    left: list[LeaseState] = []
    monkeypatch.setattr(fencing, "choose", lambda device, options: Agent("a test"))
    record = volume.join("n1", SlotState.ACTIVE, home=True)
    volume.put(INOBT, os.urandom(RECORD_BYTES))
    assert run(capsys, volume.device)[0] == 1
    assert victims == [Victim(record.slot, record.incarnation, 0, Verdict.SILENT)]
    assert left == [LeaseState.FREE]
    lease = volume.snapshot().lease
    assert lease is not None
    assert (lease.state, lease.epoch) == (LeaseState.FREE, 2)


def test_a_home_that_cannot_be_fenced_stops_the_repair(
    volume: Volume, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Agent(fencing.LeaseFencing):
        def fence(self, victim: Victim) -> None:
            raise IoFailure("no answer")

    monkeypatch.setattr(fencing, "choose", lambda device, options: Agent("a test"))
    volume.join("n1", SlotState.FAILED, home=True)
    volume.put(INOBT, os.urandom(RECORD_BYTES))
    before = volume.blocks()
    line, out = failure(capsys, volume.device)
    assert "no answer" in line
    assert "XFS: corrupt: not repaired" in out
    assert {offset for offset in volume.changed(before) if offset < LOCKSPACE} == set()


def test_a_home_with_a_registration_that_this_host_cannot_take_away(volume: Volume, capsys: Capsys) -> None:
    """Its nodes fence by reservations that are reached elsewhere (prdev=): its silence is no proof here."""
    record = volume.join("n1", SlotState.FAILED, home=True)
    space = Lockspace.open(volume.device)
    space.write_slot(replace(record, counter=record.counter + 1, pr_key=0x4D58_0100_0000_0001))
    space.close()
    volume.tear(slot_record(5))
    volume.put(INOBT, os.urandom(RECORD_BYTES))
    before = volume.blocks()
    line, out = failure(capsys, volume.device)
    assert "died with a registration at the disk, which this host cannot take away" in line
    assert "slot 5: damaged" in out
    assert "written anew" in out  # what was done before is said
    assert {offset for offset in volume.changed(before) if offset < LOCKSPACE} == set()


# -- the hold --------------------------------------------------------------------------------------------------


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a program in the place of xfs_repair."""
    path = folder / "bin" / "xfs_repair"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    assert shutil.which("xfs_repair") == str(path)


def test_nobody_becomes_the_home_while_it_is_held(volume: Volume) -> None:
    volume.join("n1", SlotState.LEFT)  # the set of timeouts
    with hold.Hold(volume.device, "fsck") as held:
        space = Lockspace.open(volume.device)
        record = space.claim_slot(Joiner(b"m" * 16, "n2"), T).record
        with pytest.raises(ClaimRefused) as caught:
            # Longer than it would take to find the holder dead.
            space.claim_lease(record, T, wait_ms=T.node_dead_ms + 1000)
        assert caught.value.errno == errno.EBUSY
        assert f"held by slot {held.slot}" in str(caught.value)
        slot = space.snapshot().slot(held.slot)
        assert slot is not None
        assert (slot.state, slot.is_home, slot.name[:8]) == (SlotState.ACTIVE, True, "fsck on ")
        assert slot.node_dead_ms == T.node_dead_ms
    assert space.claim_lease(record, T).record.epoch == held.epoch + 1
    space.close()


SLOW = 'echo "Phase 1 - x"; [ "$1" = -n ] && exit 1; echo $$ > $0.pid; exec sleep 60'


def stopped(folder: Path) -> bool:
    pid = int((folder / "bin" / "xfs_repair.pid").read_text())
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def slow(volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """xfs_repair finds damage at once, and takes for ever to repair it."""
    tool(tmp_path, monkeypatch, SLOW)
    volume.join("n1", SlotState.LEFT)
    return tmp_path


def test_the_repair_ends_when_the_lease_is_taken_away(volume: Volume, slow: Path, capsys: Capsys) -> None:
    def take() -> None:
        while not (slow / "bin" / "xfs_repair.pid").exists():
            time.sleep(0.05)
        space = Lockspace.open(volume.device)
        lease = space.read_lease()
        for sequence in (lease.sequence + 5, lease.sequence + 6):
            space.write_lease(replace(lease, sequence=sequence, epoch=lease.epoch + 1, nonce=99, owner_slot=7))
        space.close()

    thief = threading.Thread(target=take)
    thief.start()
    line, _ = failure(capsys, volume.device)
    thief.join()
    assert "xfs_repair was stopped, the volume could not be held (taken by slot 7" in line
    assert stopped(slow)
    lease = volume.snapshot().lease
    assert lease is not None
    assert (lease.owner_slot, lease.epoch) == (7, 2)  # what others hold is theirs


def test_the_repair_ends_before_the_lease_when_the_disk_does_not_answer(
    volume: Volume, slow: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = hold.Hold._beat
    last: list[float] = []

    def failing(self: hold.Hold) -> None:
        if (slow / "bin" / "xfs_repair.pid").exists():
            raise IoFailure("the disk is away")
        beat(self)
        last.append(time.monotonic())

    monkeypatch.setattr(hold.Hold, "_beat", failing)
    assert mxfs.main(["fsck", volume.device]) == 8
    assert "the volume could not be held (the disk did not answer in time)" in capsys.readouterr().err
    assert time.monotonic() - last[-1] < T.node_dead_ms / 1000
    assert stopped(slow)


def test_a_disk_with_reservations_lets_only_the_holder_in(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the dead home's registration is gone before the lease is claimed."""
    target = FakeTarget()

    def join(name: str) -> fencing.PrFencing:
        agent = fencing.PrFencing(Reservations(volume.device, [target.nexus(name)]), "a test")
        agent.join(replace=True)
        return agent

    dead = join("dead")
    record = volume.join("n1", SlotState.FAILED, home=True)
    space = Lockspace.open(volume.device)
    space.write_slot(replace(record, counter=record.counter + 1, pr_key=dead.key))
    space.close()
    assert set(target.registered) == {"dead"}
    monkeypatch.setattr(fencing, "choose", lambda device, options: join("holder"))
    with hold.Hold(volume.device, "fsck") as held:
        assert set(target.registered) == {"holder"}
        slot = volume.snapshot().slot(held.slot)
        assert slot is not None
        assert slot.pr_key == target.registered["holder"]  # so that others can fence this hold
        assert not target.allowed("dead")
        assert not target.allowed("another host")
    assert target.registered == {}
    slot = volume.snapshot().slot(held.slot)
    assert slot is not None
    assert (slot.state, slot.pr_key) == (SlotState.FREE, 0)


def test_reservations_that_are_elsewhere(volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    """With --prdev the dead home is fenced where its nodes fence, and this program's registration is there."""
    target = FakeTarget()
    asked = []

    def at(device: str, **_options: object) -> Probe:
        asked.append(device)
        return Probe(Reservations(device, [target.nexus("holder")]), "a test", "")

    monkeypatch.setattr(fencing, "open_reservations", at)
    dead = fencing.PrFencing(Reservations("elsewhere", [target.nexus("dead")]), "a test")
    dead.join(replace=True)
    record = volume.join("n1", SlotState.FAILED, home=True)
    space = Lockspace.open(volume.device)
    space.write_slot(replace(record, counter=record.counter + 1, pr_key=dead.key))
    space.close()
    volume.put(INOBT, os.urandom(RECORD_BYTES))
    code, out, _ = run(capsys, volume.device, "--prdev", "iscsi://there/t/1")
    assert (code, asked) == (1, ["iscsi://there/t/1"]), out
    assert "XFS: repaired" in out and target.registered == {}


def test_the_repair_ends_with_the_program_that_holds_the_volume(volume: Volume, slow: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "mxfsd.cli.mxfs", "fsck", volume.device], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 30
    while not (slow / "bin" / "xfs_repair.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stopped(slow)
    program.kill()
    program.communicate()
    while not stopped(slow) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stopped(slow)
    lease = volume.snapshot().lease
    assert lease is not None
    assert lease.state is LeaseState.HELD  # as of a dead home: who comes next waits, and fences


def test_the_timeouts_are_those_that_the_nodes_ran(volume: Volume) -> None:
    assert hold.recorded_timeouts(volume.snapshot()) == Timeouts.named("default")
    volume.join("n1", SlotState.LEFT)
    assert hold.recorded_timeouts(volume.snapshot()) == T


def test_a_record_of_a_kind_that_is_none(volume: Volume, clock: FakeClock, capsys: Capsys) -> None:
    """A sealed record of another kind in a slot's place."""
    volume.put_record(slot_record(2), seal(Kind.LEASE, volume_uuid(volume), 1, bytes(64)))
    code, out, _ = run(capsys, volume.device, "-n")
    assert code == 4
    assert "slot 2: damaged: expected a SLOT record" in out


def volume_uuid(volume: Volume) -> bytes:
    space = Lockspace.open(volume.device, readonly=True)
    space.close()
    return space.volume


# -- the rest of what is said ----------------------------------------------------------------------------------


def test_an_interruption(volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    def interrupted(*_words: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fsck, "_check", interrupted)
    assert "interrupted; what was begun may be half done: run it again" in refusal(capsys, volume.device)


def test_refuses_a_device_that_this_host_sees_too_short(volume: Volume, capsys: Capsys) -> None:
    volume.resize(LOCKSPACE - (8 << 20))
    said = refusal(capsys, volume.device, "-n")
    assert "this host sees" in said and "rescan it here" in said


def test_a_hold_that_is_lost_starts_no_repair(volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "touch $0.ran")
    volume.join("n1", SlotState.LEFT)
    with hold.Hold(volume.device, "fsck") as held:
        held.lost = "slot taken"
        with pytest.raises(IoFailure, match=r"xfs_repair was stopped, the volume could not be held \(slot taken\)"):
            fsck.xfs_repair(volume.device, hold=held)
    assert not (tmp_path / "bin/xfs_repair.ran").exists()


def test_a_volume_that_cannot_be_held(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lease to be read; one whose owner left no word; one that is renewed; a disk that is too slow. Each frees the
    slot that was claimed, if any."""
    record = volume.join("n1", SlotState.ACTIVE, home=True)

    def refused(match: str) -> None:
        with pytest.raises(IoFailure, match=match), hold.Hold(volume.device, "fsck"):
            pass
        slots = volume.snapshot().slots
        assert [slot.name for slot in slots if slot is not None and slot.state is not SlotState.FREE] == ["n1"]

    with monkeypatch.context() as patch:
        seen = hold.Hold._await_silence
        beats = iter(range(100))

        def renewed(held: hold.Hold, lease: object, owner: object) -> None:
            def sleep(_seconds: float) -> None:
                space = Lockspace.open(volume.device)
                space.write_slot(replace(record, counter=record.counter + 1 + next(beats)))
                space.close()

            held._lockspace.sleep = sleep
            seen(held, lease, owner)  # type: ignore[arg-type]

        patch.setattr(hold.Hold, "_await_silence", renewed)
        refused("in use by the home 'n1' \\(slot 1\\): unmount it there first")
    space = Lockspace.open(volume.device)
    space.write_slot(replace(record, state=SlotState.LEFT, incarnation=record.incarnation + 1, counter=900))
    with (
        pytest.raises(IoFailure, match="the home in slot 1 ended and left no word of it"),
        hold.Hold(volume.device, "x"),
    ):
        pass
    space.write_slot(replace(record, state=SlotState.FAILED, counter=901))
    with monkeypatch.context() as patch:
        patch.setattr(hold.Keeper, "hold", lambda *_words: hold.LeaseLost("too late"))
        refused("the disk is too slow to hold the volume: too late")
    space.close()
    for number in (1, 2):
        volume.tear(number)
    with pytest.raises(IoFailure, match="no copy of the home lease can be read"), hold.Hold(volume.device, "fsck"):
        pass
