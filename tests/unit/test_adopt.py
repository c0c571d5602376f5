"""mxfs adopt: every write may be the last one, the XFS stays as it is, and what is refused changes nothing."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import LOCKSPACE, OFFSET, SIZE, VOLUME, FakeClock, LoopDisk, loop_device, make_image, xfs_sector
from test_grow import CutDisk, PowerCut

from mxfs_proto.errors import IoFailure, MediaError
from mxfs_proto.ondisk import RECORD_BYTES, HeaderRecord, format_uuid, slot_record
from mxfs_proto.xfs_sb import XfsSuper, has_quotas, obstacle
from mxfsd import growth
from mxfsd.adopt import CannotAdopt, adopt, plan, remains, unfinished
from mxfsd.cli import adopt as command
from mxfsd.cli import fsck, mkfs, mxfs
from mxfsd.core.lease import Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.io import headers, libc
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import Lockspace

T = Timeouts.named("fast")
MIB = 1 << 20
FILLER = b"\xa5"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The first sector of an XFS, and behind the XFS the room of a lockspace, with anything in it."""
    path = tmp_path / "plain.img"
    with open(path, "wb") as file:
        file.write(xfs_sector().ljust(OFFSET, b"x"))
        file.write(FILLER * LOCKSPACE)
    return path


def run(disk: Disk) -> HeaderRecord:
    """What the command does to a disk, from wherever it was interrupted."""
    xfs = XfsSuper.decode(disk.read(0, RECORD_BYTES))
    header = unfinished(disk)
    finish = header is not None
    if header is None:
        header = plan(disk, xfs, LOCKSPACE)
        assert remains(disk, header, xfs.size) == ""
    adopt(disk, header, finish=finish)
    return header


def is_volume(disk: Disk) -> bool:
    try:
        Lockspace(disk)
    except MediaError:
        return False
    return True


@pytest.mark.parametrize("default", [LOCKSPACE, 16 * MIB])
@pytest.mark.parametrize("grows", [False, True])
def test_every_write_may_be_the_last(
    plain: Path, tmp_path: Path, default: int, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each cut, between writes and between the sectors of one, there is no volume or a good one, and a second run
    ends it; also where the device *grows* between the two, and some hosts have not seen that."""
    monkeypatch.setattr(headers, "DEFAULT_LOCKSPACE_BYTES", default)
    path = tmp_path / "disk.img"
    shutil.copyfile(plain, path)
    with CutDisk(str(path)) as disk:
        run(disk)
        total = disk.writes
    assert total == 1 + 2 + 64 + 2
    seen = []
    for whole in [0, 1, 2, 3, 40, *range(total - 4, total + 1)]:
        for sectors in (0, 1, 7):
            shutil.copyfile(plain, path)
            with CutDisk(str(path), whole, sectors) as disk:
                try:
                    run(disk)
                except PowerCut:
                    pass
            if grows:
                with open(path, "ab") as file:
                    file.write(FILLER * (2 * MIB))
            with Disk(str(path)) as disk:
                seen.append(is_volume(disk))
                key = Lockspace(disk).header.cluster_key if seen[-1] else b""
                if not (seen[-1] and Lockspace(disk).settled):
                    header = run(disk)
                    assert not seen[-1] or header.cluster_key == key, "whoever had mounted it already goes on"
                space = Lockspace(disk)
                assert space.settled and space.volume == VOLUME
                assert space.snapshot().lease is not None and None not in space.snapshot().slots
                with pytest.raises(CannotAdopt, match="already"):
                    unfinished(disk)
                where = space.header.lockspace_offset
            assert path.read_bytes()[:OFFSET] == plain.read_bytes()[:OFFSET]
            os.truncate(path, SIZE)  # a host that has not seen the device grow: the same lockspace, or none
            with Disk(str(path)) as disk:
                assert not is_volume(disk) or Lockspace(disk).header.lockspace_offset == where
    assert seen == sorted(seen) and set(seen) == {False, True}


def test_the_rest_of_the_room_is_for_the_xfs(plain: Path) -> None:
    with Disk(str(plain)) as disk:
        xfs = XfsSuper.decode(disk.read(0, RECORD_BYTES))
        assert plan(disk, xfs, LOCKSPACE).xfs_bytes == OFFSET
        assert plan(disk, replace(xfs, size=OFFSET - MIB), LOCKSPACE).xfs_bytes == OFFSET
        # Not rounded down to less than it is.
        odd = replace(xfs, size=OFFSET - 4096)
        assert plan(disk, odd, LOCKSPACE + 4096).xfs_bytes == odd.size
        with pytest.raises(CannotAdopt, match=r"leaves 1044480 bytes .* by 1 MiB or more, and do not grow the XFS"):
            plan(disk, replace(xfs, size=OFFSET + 4096), LOCKSPACE)
        with pytest.raises(CannotAdopt, match=r"leaves 0 bytes .* needs 16777216: enlarge the device by 16 MiB"):
            plan(disk, replace(xfs, size=SIZE))


def test_a_used_lockspace_without_headers_is_not_overwritten(plain: Path) -> None:
    """Its nodes do not read the header again: they may be there. Slots of another volume are only named."""
    clock = FakeClock()
    with Disk(str(plain)) as disk:
        header = run(disk)
        space = Lockspace(disk, clock=clock, sleep=clock.sleep)
        space.claim_slot(Joiner(b"n" * 16, "n1"), T)
        for at in (OFFSET, SIZE - RECORD_BYTES):
            disk.write(at, FILLER * RECORD_BYTES)
        assert unfinished(disk) is None
        with pytest.raises(CannotAdopt, match="was an MXFS volume"):
            remains(disk, header, OFFSET)
        assert format_uuid(VOLUME) in remains(disk, replace(header, volume=b"o" * 16), OFFSET)


def test_a_volume_with_one_damaged_header_is_a_volume(tmp_path: Path) -> None:
    """Only where no node was there yet is it what an interrupted run leaves."""
    path, clock = make_image(tmp_path / "disk.img"), FakeClock()
    with Disk(str(path)) as disk:
        Lockspace(disk, clock=clock, sleep=clock.sleep).claim_slot(Joiner(b"n" * 16, "n1"), T)
        disk.write(OFFSET, FILLER * RECORD_BYTES)
        with pytest.raises(CannotAdopt, match="is an MXFS volume already"):
            unfinished(disk)


def test_what_does_not_come_back_is_no_success(plain: Path) -> None:
    class Lossy(Disk):
        def write(self, offset: int, data: bytes) -> None:
            if offset != SIZE - RECORD_BYTES:
                super().write(offset, data)

    with Lossy(str(plain)) as disk, pytest.raises(MediaError, match="does not give back"):
        run(disk)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (100, b"\xb4\xa4", "version 4"),
        (126, b"\1", "not finished"),
        (32, bytes(16), "without a uuid"),
        (48, bytes(8), "external log"),
        (16, b"\0\0\0\0\0\0\0\1", "realtime"),
        (216, b"\0\0\0\x13", "needs xfs_repair"),
    ],
)
def test_what_mxfs_cannot_carry(at: int, value: bytes, says: str) -> None:
    good = bytearray(xfs_sector())
    good[100:102], good[48:56], good[216:220] = b"\xb4\xa5", (77).to_bytes(8, "big"), b"\0\0\0\x03"
    assert obstacle(bytes(good)) == "" and not has_quotas(bytes(good))
    good[at : at + len(value)] = value
    assert says in obstacle(bytes(good))


# -- the command, on loop devices --------------------------------------------------------------------------------------

loops = pytest.mark.needs("root", "loop", "xfs")
XFS, GROWN = 320 * MIB, 336 * MIB


class Plain(LoopDisk):
    def put(self, offset: int, data: bytes) -> None:
        with Disk(self.device) as disk:
            disk.write(offset, data)
            disk.sync()

    def mount(self, *work: str) -> None:
        """Mount it once, and run a command in it."""
        folder = self.image.parent / "mnt"
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "xfs", self.device, folder], check=True)
        try:
            subprocess.run(work, check=True, cwd=folder)
        finally:
            subprocess.run(["umount", folder], check=True)

    def hash(self) -> tuple[str, str]:
        """Of the XFS, and of what is behind it."""
        subprocess.run(["blockdev", "--flushbufs", self.device], check=True)
        with open(self.image, "rb") as file:
            before = hashlib.file_digest(_Part(file.fileno(), XFS), "sha256").hexdigest()  # type: ignore[arg-type]
            file.seek(XFS)
            return before, hashlib.sha256(file.read()).hexdigest()


class _Part:
    """The first bytes of a file."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.left = fd, size

    def readinto(self, buffer: memoryview) -> int:
        data = os.read(self.fd, min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)

    def readable(self) -> bool:
        return True


@pytest.fixture
def grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plain]:
    """An XFS of 320 MiB on a device that has grown by 16 MiB since."""
    monkeypatch.setenv("MXFS_RUN_ROOT", str(tmp_path / "run"))
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(XFS)
    subprocess.run(["mkfs.xfs", "-q", "-L", "old", image], check=True)
    os.truncate(image, GROWN)
    with loop_device(image) as device:
        yield Plain(image, device)


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one line on stderr."""
    capsys.readouterr()
    assert mxfs.main(["adopt", *args]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mxfs adopt: ") and err.count("\n") == 1, (out, err)
    return err


@loops
def test_an_xfs_becomes_a_volume(grown: Plain, capsys: pytest.CaptureFixture[str]) -> None:
    grown.mount("cp", mkfs.__file__, "file")
    before = grown.hash()
    assert mxfs.main(["adopt", grown.device]) == 0
    out = capsys.readouterr().out
    assert out.endswith("(old), XFS 320 MiB, lockspace 16 MiB\n"), out
    after = grown.hash()
    assert after[0] == before[0], "the XFS was written"
    assert after[1] != before[1]
    space = Lockspace.open(grown.device, readonly=True)
    space.close()
    assert (space.label, space.header.lockspace_offset, space.header.xfs_bytes) == ("old", XFS, XFS)
    assert format_uuid(space.volume) in out
    assert fsck.check(grown.device, change=False).code == fsck.EXIT_CLEAN
    assert f"{grown.device} is an MXFS volume already" in refusal(capsys, grown.device, "-f")
    assert grown.hash() == after
    grown.mount("cmp", mkfs.__file__, "file")  # as plain XFS, where no node has it


@loops
def test_more_room_is_for_the_xfs(grown: Plain, capsys: pytest.CaptureFixture[str]) -> None:
    grown.resize(2 * XFS + 5 * 512)
    assert mxfs.main(["adopt", grown.device]) == 0
    assert "XFS 320 MiB, lockspace 16 MiB; the first mount grows the XFS to 624 MiB" in capsys.readouterr().out
    fd = libc.mount_detached(grown.device, False)
    space = Lockspace.open(grown.device)
    try:
        assert growth.grow_lower(fd, space)
        block, blocks, _ = growth.size_of(fd)
        assert block * blocks == 624 * MIB
    finally:
        space.close()
        os.close(fd)
    assert fsck.check(grown.device, change=False).code == fsck.EXIT_CLEAN


@loops
def test_a_run_that_was_cut_off_is_run_again(
    grown: Plain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Disk.write

    def cut(disk: Disk, offset: int, data: bytes) -> None:
        if offset == GROWN - RECORD_BYTES:
            raise IoFailure("cut")
        write(disk, offset, data)

    monkeypatch.setattr(Disk, "write", cut)
    assert "cut" in refusal(capsys, grown.device)
    monkeypatch.undo()
    key = Lockspace.open(grown.device).header.cluster_key
    assert mxfs.main(["adopt", grown.device]) == 0
    space = Lockspace.open(grown.device)
    assert space.settled and space.header.cluster_key == key
    space.close()


def _xfs_to_the_end(disk: Plain) -> None:
    disk.resize(XFS)


def _a_little(disk: Plain) -> None:
    disk.resize(XFS + 10 * MIB)


def _shrunk(disk: Plain) -> None:
    disk.resize(XFS - MIB)


def _no_xfs(disk: Plain) -> None:
    disk.put(0, bytes(MIB))


def _ext4(disk: Plain) -> None:
    disk.put(0, bytes(MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.device], check=True)


def _a_volume(disk: Plain) -> None:
    assert mkfs.main(["-f", disk.device]) == 0


def _damaged_volume(disk: Plain) -> None:
    _a_volume(disk)
    clock = FakeClock()
    with Disk(disk.device) as raw:
        Lockspace(raw, clock=clock, sleep=clock.sleep).claim_slot(Joiner(b"n" * 16, "n1"), T)
    for at in (XFS, GROWN - RECORD_BYTES):
        disk.put(at, bytes(RECORD_BYTES))


def _other_version(disk: Plain) -> None:
    import zlib

    _a_volume(disk)
    for at in (XFS, GROWN - RECORD_BYTES):
        with Disk(disk.device) as raw:
            data = bytearray(raw.read(at, RECORD_BYTES))
        data[8] = 9
        data[44:48] = zlib.crc32(data[:44]).to_bytes(4, "little")
        disk.put(at, bytes(data))


def _read_only(disk: Plain) -> None:
    subprocess.run(["blockdev", "--setro", disk.device], check=True)


def _external_log(disk: Plain) -> None:
    log = disk.image.parent / "log.img"
    with open(log, "wb") as file:
        file.truncate(80 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-f", "-d", f"size={XFS}", "-l", f"logdev={log}", disk.device], check=True)


def _dirty_log(disk: Plain) -> None:
    disk.mount("sh", "-c", "mkdir d && sync -f . && mkdir e && xfs_io -x -c 'shutdown -f' .")


def _hidden(disk: Plain) -> None:
    disk.mount("touch", ".mxfs")


def _broken_log(disk: Plain) -> None:
    with Disk(disk.device) as raw:
        first = bytearray(raw.read(0, RECORD_BYTES))
    first[96:100] = (1 << 30).to_bytes(4, "big")  # sb_logblocks
    disk.put(0, bytes(first))


@loops
@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_xfs_to_the_end, "leaves 0 bytes behind it and the lockspace needs 16777216: enlarge the device by 16 MiB"),
        (_a_little, "leaves 10485760 bytes behind it and the lockspace needs 16777216: enlarge the device by 6 MiB"),
        (_shrunk, "rescan it here"),
        (_no_xfs, "holds no file system, no XFS"),
        (_ext4, "holds ext4, no XFS: mkfs.mxfs makes a new volume"),
        (_a_volume, "is an MXFS volume already"),
        (_damaged_volume, "was an MXFS volume, and no copy of its lockspace's header is good"),
        (_other_version, "has format version 9, this is version 1"),
        (_read_only, "is read-only: make it writable"),
        (_external_log, "external log"),
        (_dirty_log, "the log of the XFS is not clean: unmount it on every host"),
        (_hidden, "the XFS has a .mxfs, a name that MXFS keeps for itself"),
        (_broken_log, "xfs_logprint cannot read the log"),
    ],
)
def test_refusals(
    grown: Plain, prepare: Callable[[Plain], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(grown)
    before = grown.hash()
    for more in ((), ("-f",)):
        assert says in refusal(capsys, grown.device, *more)
    assert grown.hash() == before


def _gpt(disk: Plain) -> None:
    """The copy at the end of the device, whose first one mkfs.xfs has overwritten."""
    disk.put(GROWN - RECORD_BYTES, bytes(RECORD_BYTES - 512) + b"EFI PART".ljust(512, b"\0"))


def _gpt_of_large_sectors(disk: Plain) -> None:
    disk.put(GROWN - RECORD_BYTES, b"EFI PART".ljust(RECORD_BYTES, b"\0"))


def _lvm(disk: Plain) -> None:
    sector = b"LABELONE" + (1).to_bytes(8, "little") + bytes(4) + (32).to_bytes(4, "little") + b"LVM2 001" + b"u" * 32
    crc = 0xF597A6CF
    data = sector.ljust(512, b"\0")
    for byte in data[20:]:  # LVM's own CRC: of what is behind it in the sector
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    data = data[:16] + crc.to_bytes(4, "little") + data[20:]
    disk.put(XFS, (bytes(512) + data).ljust(RECORD_BYTES, b"\0"))


def _raid(disk: Plain) -> None:
    """Superblock of md, format 1.0: eight KiB before the end."""
    fields = bytearray(256)
    fields[0:8] = (0xA92B4EFC).to_bytes(4, "little") + (1).to_bytes(4, "little")
    fields[16:32] = b"r" * 16
    fields[144:152] = ((GROWN - 8192) // 512).to_bytes(8, "little")
    words = sum(int.from_bytes(fields[at : at + 4], "little") for at in range(0, 256, 4))
    fields[216:220] = ((words & 0xFFFFFFFF) + (words >> 32)).to_bytes(4, "little")
    disk.put(GROWN - 8192, bytes(fields).ljust(RECORD_BYTES, b"\0"))


def _file_system(disk: Plain) -> None:
    with loop_device(disk.image, "--offset", str(XFS)) as part:
        subprocess.run(["mkfs.ext4", "-q", "-F", part], check=True)


def _other_lockspace(disk: Plain) -> None:
    _a_volume(disk)
    subprocess.run(["mkfs.xfs", "-q", "-f", "-K", "-d", f"size={XFS}", disk.device], check=True)


def _torn_record(disk: Plain) -> None:
    disk.put(XFS + RECORD_BYTES, b"MXFSLOCK".ljust(RECORD_BYTES, b"\x01"))


def _quotas(disk: Plain) -> None:
    """As a kernel with quotas leaves it: XFS_PQUOTA_ENFD."""
    subprocess.run(["xfs_db", "-x", "-c", "sb 0", "-c", "write -d qflags 0x200", disk.device], check=True)


@loops
@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_gpt, "behind the XFS (the copy of a partition table (GPT)): use -f to overwrite it"),
        (_gpt_of_large_sectors, "(the copy of a partition table (GPT))"),
        (_lvm, "(LVM2_member)"),
        (_raid, "(linux_raid_member)"),
        (_file_system, "(ext4)"),
        (_other_lockspace, "record belongs to volume"),
        (_torn_record, "checksum of the envelope does not match"),
        (_quotas, "has quotas, which MXFS does not enforce"),
    ],
)
def test_refusals_that_can_be_overruled(
    grown: Plain, prepare: Callable[[Plain], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(grown)
    before = grown.hash()
    assert says in refusal(capsys, grown.device)
    assert grown.hash() == before
    assert mxfs.main(["adopt", grown.device, "-f"]) == 0
    assert grown.hash()[0] == before[0]
    # Nothing of it is found any more.
    assert command.kinds(grown.device) == ["xfs"]
    assert command.kinds(grown.device, "-O", str(XFS), "-S", str(GROWN - XFS)) == []
    assert fsck.check(grown.device, change=False).code == fsck.EXIT_CLEAN


@loops
def test_it_is_mounted_or_in_use(grown: Plain, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grown.image.parent / "mnt"
    folder.mkdir()
    subprocess.run(["mount", "-t", "xfs", grown.device, folder], check=True)
    try:
        assert f"is mounted at {folder} already (type xfs): unmount it first" in refusal(capsys, grown.device, "-f")
    finally:
        subprocess.run(["umount", folder], check=True)
    fd = libc.mount_detached(grown.device, False)
    try:
        assert "in use on this host" in refusal(capsys, grown.device, "-f")
    finally:
        os.close(fd)
    with Disk(grown.device, exclusive=True):
        assert "in use on this host" in refusal(capsys, grown.device, "-f")


@loops
def test_nodes_of_another_volume_are_there(
    grown: Plain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody made an XFS over a volume that has a live node."""
    _a_volume(grown)
    clock = FakeClock()
    space = Lockspace(Disk(grown.device), clock=clock, sleep=clock.sleep)
    space.claim_slot(Joiner(b"m" * 16, "n7"), T)

    def beat() -> None:
        found = space.read_slots()[0]
        assert found is not None
        space.write_slot(replace(found, counter=found.counter + 1))

    clock.on_sleep = beat

    def opened(path: str, *, readonly: bool = False, check_xfs: bool = True) -> Lockspace:
        return Lockspace(Disk(path, readonly=readonly), check_xfs=check_xfs, clock=clock, sleep=clock.sleep)

    subprocess.run(["mkfs.xfs", "-q", "-f", "-K", "-d", f"size={XFS}", grown.device], check=True)
    monkeypatch.setattr(Lockspace, "open", opened)
    assert "in use by node 'n7' (slot 1): unmount it there first" in refusal(capsys, grown.device, "-f")
    with Disk(grown.device) as disk:
        assert Lockspace(disk, check_xfs=False).read_slots()[0] is not None
        assert disk.read(XFS + slot_record(1) * RECORD_BYTES, RECORD_BYTES).startswith(b"MXFSLOCK")
    space.close()


@loops
def test_others_have_reserved_it(
    grown: Plain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def conflict(_disk: Disk, _offset: int, _length: int) -> bytes:
        raise IoFailure("Invalid exchange", 52)

    monkeypatch.setattr(Disk, "read", conflict)
    assert f"{grown.device} is reserved by others" in refusal(capsys, grown.device)


@loops
def test_only_root_adopts(grown: Plain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root can adopt a device" in refusal(capsys, grown.device)


@loops
@pytest.mark.parametrize(
    ("missing", "package"), [("blkid", "util-linux"), ("xfs_logprint", "xfsprogs"), ("xfs_db", "xfsprogs")]
)
def test_a_program_is_missing(
    grown: Plain,
    missing: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = subprocess.run

    def without(argv: list[str], **options: object) -> object:
        if os.path.basename(argv[0]) == missing:
            raise FileNotFoundError(2, "No such file or directory")
        return real(argv, **options)  # type: ignore[call-overload]

    before = grown.hash()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", without)
        assert f"cannot run {missing}" in (said := refusal(capsys, grown.device)) and f"install {package}" in said
    assert grown.hash() == before


@loops
def test_an_answer_that_is_not_understood(
    grown: Plain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "_ask", lambda tool, *_arguments: "<CLEAN>" if tool == "xfs_logprint" else "\n what?\n"
    )
    assert "xfs_db cannot look for .mxfs (what?)" in refusal(capsys, grown.device)


def test_what_cannot_be_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name, says in (("file", "regular file"), ("absent", "No such file"), (".", "not a block device")):
        assert says in refusal(capsys, str(tmp_path / name))
    for words in ((), ("/dev/null", "--nonsense")):
        with pytest.raises(SystemExit) as ended:
            mxfs.main(["adopt", *words])
        assert ended.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_an_interruption_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_device: str, _force: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "make_volume", interrupted)
    assert "interrupted: run it again" in refusal(capsys, "/dev/null")
