"""SG_IO and the block layer's ioctls against a kernel of our own, whose disk is in memory; probing; iscsi addresses.

The structures are written here once more, with ctypes, so that a wrong offset in the code is seen.
"""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from faketarget import FakeTarget
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError
from mxfsd.pr import blockpr, iscsi, probe
from mxfsd.pr.blockpr import BlockNexus, decode_report
from mxfsd.pr.errors import (
    BadReply,
    CheckCondition,
    NotOffered,
    PathFailure,
    Preempted,
    ReservationConflict,
    ReservationError,
    Unconfirmed,
)
from mxfsd.pr.reservations import Reservations, Standing
from mxfsd.pr.scsi import Busy, ScsiNexus
from mxfsd.pr.sense import Sense
from mxfsd.pr.sgio import SG_IO, SG_SCSI_RESET, SgIo
from mxfsd.pr.spc import Held, InAction, OutAction, PrOut, pr_in, read16, write16

Ioctl = Callable[[int, int, bytearray], int]


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "disk"
    path.touch()
    return str(path)


# --- SG_IO ---


class SgHeader(ctypes.Structure):
    """struct sg_io_hdr of <scsi/sg.h>."""

    _fields_ = [
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    ]


def sense_bytes(sense: Sense) -> bytes:
    return bytes([0x70, 0, sense.key, 0, 0, 0, 0, 10, 0, 0, 0, 0, sense.asc, sense.ascq, 0, 0, 0, 0])


class ScsiKernel:
    """SG_IO and SG_SCSI_RESET on a disk in memory, for one initiator."""

    def __init__(self, target: FakeTarget, name: str) -> None:
        self.wire = target.transport(name)
        self.timeouts: list[int] = []
        self.driver_status = 0

    def __call__(self, _fd: int, request: int, argument: bytearray) -> int:
        if request == SG_SCSI_RESET:
            assert struct.unpack("=i", argument) == (0x101,)  # the device, no escalation
            self.wire.lun_reset()
            return 0
        assert request == SG_IO
        header = SgHeader.from_buffer(argument)
        assert header.interface_id == ord("S")
        assert header.iovec_count == header.flags == 0
        self.timeouts.append(header.timeout)
        cdb = ctypes.string_at(header.cmdp, header.cmd_len)
        sending = header.dxfer_direction == -2
        assert (header.dxfer_direction in (-2, -3)) == bool(header.dxfer_len)
        out = ctypes.string_at(header.dxferp, header.dxfer_len) if sending else b""
        try:
            answer = self.wire.execute(cdb, out, 0 if sending else header.dxfer_len)
        except CheckCondition as error:
            raw = sense_bytes(error.sense)
            assert header.mx_sb_len >= len(raw)
            ctypes.memmove(header.sbp, raw, len(raw))
            header.status, header.sb_len_wr, header.driver_status = 2, len(raw), self.driver_status
        except ReservationConflict:
            header.status = 0x18
        except PathFailure:
            header.host_status = 3
        else:
            if not sending:
                ctypes.memmove(header.dxferp, answer, len(answer))
                header.resid = header.dxfer_len - len(answer)
        header.info = 1 if header.status else 0
        return 0


@pytest.mark.parametrize("abort", [True, False])
def test_a_fence_through_sg_io(device: str, abort: bool) -> None:
    target = FakeTarget(abort=abort)
    kernels = [ScsiKernel(target, name) for name in "ab"]
    kernels[0].driver_status = 8
    paths = [ScsiNexus(SgIo(device, timeout_ms=1234, ioctl=kernel)) for kernel in kernels]
    a, b = (Reservations(device, [path]) for path in paths)
    for node, key in ((a, 0xA), (b, 0xB)):
        node.register(key)
        node.reserve()
    paths[1].run(write16(3, 1), b"b" * 512)
    a.preempt(0xB)
    target.land()
    assert target.blocks == {}
    assert paths[0].run(read16(3, 1), alloc_in=512) == bytes(512)
    with pytest.raises(ReservationConflict):
        paths[1].run(write16(3, 1), b"b" * 512)
    assert b.check() is Standing.PREEMPTED
    with pytest.raises(Preempted):
        b.register(0xB)
    assert target.resets == (0 if abort else 1)
    assert set(kernels[0].timeouts) == {1234}
    status = a.full_status()
    assert status is not None
    assert [found.key for found in status.registrants] == [0xA]
    a.close()
    a.close()
    with pytest.raises(MisuseError, match="is closed"):
        a.read_keys()


def filled(**fields: int) -> Ioctl:
    def ioctl(_fd: int, _request: int, argument: bytearray) -> int:
        header = SgHeader.from_buffer(argument)
        for name, value in fields.items():
            setattr(header, name, value)
        return 0

    return ioctl


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"status": 0x18}, ReservationConflict, "READ KEYS: RESERVATION CONFLICT"),
        ({"status": 0x18, "host_status": 17}, ReservationConflict, "CONFLICT"),
        ({"status": 0x08}, Busy, "busy"),
        ({"status": 0x28}, Busy, "busy"),
        ({"status": 0x30}, PathFailure, "status 30h"),
        ({"host_status": 1}, PathFailure, "no connection"),
        ({"host_status": 3}, PathFailure, "timed out"),
        ({"host_status": 99}, PathFailure, "host error 0x63"),
        ({"driver_status": 6}, PathFailure, "driver error 0x6"),
        ({"status": 2, "sb_len_wr": 0}, CheckCondition, "NO SENSE"),
    ],
)
def test_sg_io_failures(device: str, fields: dict[str, int], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SgIo(device, ioctl=filled(**fields)).execute(pr_in(InAction.READ_KEYS, 64), b"", 64)


def test_sg_io_gives_what_came(device: str) -> None:
    assert SgIo(device, ioctl=filled(resid=50)).execute(pr_in(InAction.READ_KEYS, 64), b"", 64) == bytes(14)
    assert SgIo(device, ioctl=filled(resid=70)).execute(pr_in(InAction.READ_KEYS, 64), b"", 64) == b""
    assert SgIo(device, ioctl=filled(resid=-5)).execute(pr_in(InAction.READ_KEYS, 64), b"", 64) == bytes(64)


def failing(code: int) -> Ioctl:
    def ioctl(_fd: int, _request: int, _argument: bytearray) -> int:
        raise OSError(code, os.strerror(code))

    return ioctl


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOTTY, NotOffered),
        (errno.EINVAL, NotOffered),
        (errno.EOPNOTSUPP, NotOffered),
        (errno.EPERM, ReservationError),
        (errno.EIO, PathFailure),
        (errno.ENODEV, PathFailure),
    ],
)
def test_ioctl_errors(device: str, code: int, error: type[ReservationError]) -> None:
    sg, block = SgIo(device, ioctl=failing(code)), BlockNexus(device, ioctl=failing(code))
    for act in (lambda: sg.execute(bytes(6), b"", 0), sg.lun_reset, lambda: block.reserve(1)):
        with pytest.raises(ReservationError) as caught:
            act()
        assert type(caught.value) is error
        assert device in str(caught.value)


def test_a_positive_result_of_sg_io_is_a_failure(device: str) -> None:
    with pytest.raises(PathFailure, match="returned 1"):
        SgIo(device, ioctl=lambda *_: 1).lun_reset()


def test_a_device_that_is_not_there() -> None:
    for opener in (SgIo, BlockNexus, probe.open_reservations):
        with pytest.raises(ReservationError, match="cannot open /dev/nosuch") as caught:
            opener("/dev/nosuch")
        assert caught.value.errno == errno.ENOENT


# --- the block layer ---


def test_ioctl_numbers() -> None:
    """As the compiler makes them from <linux/pr.h> and <linux/nvme_ioctl.h>."""
    assert blockpr.IOC_PR_REGISTER == 0x401870C8
    assert blockpr.IOC_PR_RESERVE == 0x401070C9
    assert blockpr.IOC_PR_RELEASE == 0x401070CA
    assert blockpr.IOC_PR_PREEMPT == 0x401870CB
    assert blockpr.IOC_PR_PREEMPT_ABORT == 0x401870CC
    assert blockpr.IOC_PR_CLEAR == 0x401070CD
    assert blockpr.IOC_PR_READ_KEYS == 0xC01070CE
    assert blockpr.IOC_PR_READ_RESERVATION == 0x801070CF
    assert blockpr.NVME_IOCTL_IO_CMD == 0xC0484E43


class BlockKernel:
    """An NVMe namespace with the disk in memory; *reads*: the ioctls of newer kernels that read."""

    def __init__(self, target: FakeTarget, name: str, *, reads: bool, extended: bool = True, conflict: int = 0x18):
        self.target, self.name = target, name
        self.reads, self.extended, self.conflict = reads, extended, conflict
        target.transport(name)

    def __call__(self, _fd: int, request: int, argument: bytearray) -> int:
        if request == blockpr.NVME_IOCTL_ID:
            return 1
        if request == blockpr.NVME_IOCTL_IO_CMD:
            return self.report(argument)
        if request == blockpr.IOC_PR_READ_KEYS and self.reads:
            keys = list(self.target.registered.values())
            _, room, address = struct.unpack("=IIQ", argument)
            raw = struct.pack(f"={len(keys)}Q", *keys)[: 8 * room]
            ctypes.memmove(address, raw, len(raw))
            argument[:8] = struct.pack("=II", self.target.generation, len(keys))
            return 0
        if request == blockpr.IOC_PR_READ_RESERVATION and self.reads:
            argument[:] = struct.pack("=QII", 0, self.target.generation, 6 if self.target.type else 0)
            return 0
        if request in (blockpr.IOC_PR_READ_KEYS, blockpr.IOC_PR_READ_RESERVATION):
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        result = self.target.out(self.name, self.command(request, argument))
        if isinstance(result, Sense):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return self.conflict if result else 0

    def command(self, request: int, argument: bytearray) -> PrOut:
        if request == blockpr.IOC_PR_REGISTER:
            old, new, flags, pad = struct.unpack("=QQII", argument)
            assert pad == 0
            action = OutAction.REGISTER_AND_IGNORE_EXISTING_KEY if flags == 1 else OutAction.REGISTER
            return PrOut(action, old, new)
        if request == blockpr.IOC_PR_CLEAR:
            return PrOut(OutAction.CLEAR, struct.unpack("=QII", argument)[0])
        if request == blockpr.IOC_PR_RESERVE:
            key, kind, flags = struct.unpack("=QII", argument)
            assert (kind, flags) == (6, 0)
            return PrOut(OutAction.RESERVE, key, 0, 8)
        key, victim, kind, flags = struct.unpack("=QQII", argument)
        assert (kind, flags) == (6, 0)
        abort = request == blockpr.IOC_PR_PREEMPT_ABORT
        return PrOut(OutAction.PREEMPT_AND_ABORT if abort else OutAction.PREEMPT, key, victim, 8)

    def report(self, argument: bytearray) -> int:
        opcode, nsid = struct.unpack_from("=B3xI", argument)
        address, length, dwords, form = struct.unpack_from("=Q4xIII", argument, 24)
        assert (opcode, nsid, (dwords + 1) * 4) == (0x0E, 1, length)
        if form != int(self.extended):
            return 0x4018  # host identifier of another size, do not retry
        keys = self.target.registered.values()
        data = struct.pack("<IBHHB14x", self.target.generation, 6 if self.target.type else 0, len(keys), 0, 1)
        data = data.ljust(64, b"\0") if form else data
        for number, key in enumerate(keys):
            status = int(bool(self.target.type))
            if form:
                data += struct.pack("<HB5xQ16s32x", number, status, key, bytes([number]) * 16)
            else:
                data += struct.pack("<HB5xQQ", number, status, number, key)
        ctypes.memmove(address, data[:length], min(length, len(data)))
        return 0


VARIANTS = [
    {"reads": True},
    {"reads": False},
    {"reads": False, "extended": False},
    {"reads": False, "conflict": 0x4083},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=["ioctls", "report", "short-report", "old-kernel"])
def test_a_fence_through_the_block_layer(device: str, variant: dict[str, bool]) -> None:
    target = FakeTarget()
    a, b = (
        Reservations(device, [BlockNexus(device, ioctl=BlockKernel(target, name, **variant))])  # type: ignore[arg-type]
        for name in "ab"
    )
    for node, key in ((a, 0xA), (b, 0xB)):
        node.register(key)
        node.reserve()
    assert target.registered == {"a": 0xA, "b": 0xB}
    assert a.check() is b.check() is Standing.OK
    target.queued.append(("b", 0, b"late"))
    a.preempt(0xB)
    a.preempt(0xB)
    assert target.queued == []
    assert b.check() is Standing.PREEMPTED
    status, capabilities = a.full_status(), a.capabilities()
    assert status is not None
    assert [(found.key, found.holder, found.type) for found in status.registrants] == [(0xA, True, 8)]
    assert capabilities is not None
    assert capabilities.aptpl_active
    a.unregister()
    assert (target.registered, target.type) == ({}, 0)


def test_more_keys_than_room(device: str) -> None:
    for reads, count in ((True, 1100), (False, 200)):
        target = FakeTarget(registered={f"n{number}": 1 + number for number in range(count)})
        keys = BlockNexus(device, ioctl=BlockKernel(target, "a", reads=reads)).read_keys().keys
        assert keys == tuple(range(1, count + 1))


def test_without_abort_the_block_layer_confirms_no_fence(device: str) -> None:
    target = FakeTarget(abort=False)
    a = Reservations(device, [BlockNexus(device, ioctl=BlockKernel(target, "a", reads=True))])
    a.register(0xA)
    a.reserve()
    with pytest.raises(Unconfirmed):
        a.preempt(0xB)


@pytest.mark.parametrize(
    ("result", "error"),
    [(2, PathFailure), (0x18, ReservationConflict), (0x83, ReservationConflict), (0x4083, ReservationConflict)]
    + [(1, NotOffered), (0x10000, PathFailure)],
)
def test_a_positive_result_is_a_failure(device: str, result: int, error: type[ReservationError]) -> None:
    with pytest.raises(ReservationError) as caught:
        BlockNexus(device, ioctl=lambda *_: result).register(0, 1, aptpl=True)
    assert type(caught.value) is error


def test_report_of_a_held_type_and_of_garbage() -> None:
    head = struct.pack("<IBHHB14x", 7, 4, 2, 0, 0)
    data = head + struct.pack("<HB5xQQ", 1, 0, 5, 0xA) + struct.pack("<HB5xQQ", 2, 1, 6, 0xB)
    status, held, persists = decode_report(data, extended=False)
    assert (status.generation, held, persists) == (7, Held(7, 0xB, 6), False)
    for length in range(len(data)):
        with pytest.raises(BadReply):
            decode_report(data[:length], extended=False)
    with pytest.raises(BadReply, match="type 9"):
        decode_report(struct.pack("<IBHHB14x", 7, 9, 0, 0, 0), extended=False)


@given(st.binary(max_size=300), st.booleans())
def test_any_report(data: bytes, extended: bool) -> None:
    try:
        decode_report(data, extended)
    except BadReply:
        pass


# --- probing ---


class FakeDevice:
    """A block device that exists in a sysfs of our own only; what opens it gets the file *device*."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
        self.sysfs = tmp_path / "sys"
        self.folder = self.sysfs / "devices" / name
        self.folder.mkdir(parents=True)
        (self.sysfs / "dev/block").mkdir(parents=True)
        (self.sysfs / "dev/block/8:16").symlink_to(self.folder)
        status = os.stat_result((stat.S_IFBLK, *[0] * 9), {"st_rdev": os.makedev(8, 16)})
        monkeypatch.setattr(probe, "_stat", lambda _path: status)
        self.opened: list[str] = []
        self.target = FakeTarget()

    def sg(self, path: str, *, timeout_ms: int, sysfs: Path) -> SgIo:
        self.opened.append(path)
        assert sysfs.name == path.removeprefix("/dev/")
        return SgIo("/dev/null", timeout_ms=timeout_ms, ioctl=ScsiKernel(self.target, path), sysfs=sysfs)

    def block(self, path: str) -> BlockNexus:
        self.opened.append(path)
        return BlockNexus("/dev/null", ioctl=BlockKernel(self.target, path, reads=False))


def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> FakeDevice:
    made = FakeDevice(monkeypatch, tmp_path, name)
    monkeypatch.setattr(probe, "SgIo", made.sg)
    monkeypatch.setattr(probe, "BlockNexus", made.block)
    return made


def test_probing_a_scsi_disk_and_a_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = fake(monkeypatch, tmp_path / "1", "sdb")
    found = probe.open_reservations("/dev/sdb", sysfs=disk.sysfs)
    assert (found.transport, disk.opened) == ("sg", ["/dev/sdb"])
    assert found.reservations is not None
    assert found.reservations.read_keys().keys == ()
    disk = fake(monkeypatch, tmp_path / "2", "nvme0n1")
    found = probe.open_reservations("/dev/nvme0n1", sysfs=disk.sysfs)
    assert (found.transport, disk.opened) == ("nvme", ["/dev/nvme0n1"])
    assert found.reservations is not None


def test_probing_multipath_takes_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = fake(monkeypatch, tmp_path, "dm-3")
    (disk.folder / "dm").mkdir()
    (disk.folder / "dm/uuid").write_text("mpath-3600140\n")
    (disk.folder / "slaves").mkdir()
    with pytest.raises(ReservationError, match="no path"):
        probe.open_reservations("/dev/dm-3", sysfs=disk.sysfs)
    for name in ("sdc", "sdb"):
        (disk.folder / "slaves" / name).mkdir()
    found = probe.open_reservations("/dev/dm-3", sysfs=disk.sysfs)
    assert (found.transport, disk.opened) == ("multipath", ["/dev/sdb", "/dev/sdc"])
    assert found.reservations is not None
    found.reservations.register(0xA)
    assert set(disk.target.registered.values()) == {0xA}
    assert len(disk.target.registered) == 2


@pytest.mark.parametrize(
    ("name", "entry", "text"),
    [("sdb1", "partition", "is a partition"), ("dm-1", "dm", "no multipath")],
)
def test_devices_whose_reservations_are_not_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, entry: str, text: str
) -> None:
    disk = fake(monkeypatch, tmp_path, name)
    (disk.folder / entry).mkdir()
    found = probe.open_reservations(f"/dev/{name}", sysfs=disk.sysfs)
    assert found.reservations is None
    assert text in found.reason
    assert disk.opened == []


@pytest.mark.parametrize("sense", ["05 00000000 0a 00000000 20 00", "02 00000000 0a 00000000 04 03"])
def test_a_scsi_disk_without_reservations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sense: str) -> None:
    """One that has no such command; but not one that is not ready and may have it."""
    disk = fake(monkeypatch, tmp_path, "sdb")
    refusal = {"status": 2, "sb_len_wr": 18}
    raw = bytes.fromhex(f"70 00 {sense} 00000000")

    def refuse(fd: int, request: int, argument: bytearray) -> int:
        filled(**refusal)(fd, request, argument)
        ctypes.memmove(SgHeader.from_buffer(argument).sbp, raw, len(raw))
        return 0

    monkeypatch.setattr(probe, "SgIo", lambda _path, **_: SgIo("/dev/null", ioctl=refuse))
    if sense.startswith("02"):
        with pytest.raises(CheckCondition, match="manual intervention required"):
            probe.open_reservations("/dev/sdb", sysfs=disk.sysfs)
        return
    found = probe.open_reservations("/dev/sdb", sysfs=disk.sysfs)
    assert found.reservations is None
    assert "invalid command operation code" in found.reason


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("loop3", "/dev/loop3 is a loop device"),
        ("vda", "/dev/vda is no SCSI disk"),
        ("nvme0n1", "/dev/nvme0n1 is an NVMe disk without reservations"),
        ("dm-3", "the paths of /dev/dm-3 are no SCSI disks"),
    ],
)
def test_what_is_no_such_disk_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, name: str, reason: str
) -> None:
    disk = fake(monkeypatch, tmp_path, name)
    if name == "dm-3":
        (disk.folder / "dm").mkdir()
        (disk.folder / "dm/uuid").write_text("mpath-3600140\n")
        (disk.folder / "slaves/vdb").mkdir(parents=True)
    monkeypatch.setattr(probe, "SgIo", lambda path, **_: SgIo("/dev/null", ioctl=failing(code)))
    monkeypatch.setattr(probe, "BlockNexus", lambda path: BlockNexus("/dev/null", ioctl=failing(code)))
    found = probe.open_reservations(f"/dev/{name}", sysfs=disk.sysfs)
    assert found.reservations is None
    assert found.reason == reason


@pytest.mark.parametrize("code", [errno.EPERM, errno.EIO])
def test_what_may_pass_is_no_reason_to_go_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    disk = fake(monkeypatch, tmp_path, "sdb")
    opened = SgIo("/dev/null", ioctl=failing(code))
    monkeypatch.setattr(probe, "SgIo", lambda _path, **_: opened)
    with pytest.raises(ReservationError):
        probe.open_reservations("/dev/sdb", sysfs=disk.sysfs)
    with pytest.raises(MisuseError, match="closed"):
        opened.lun_reset()


def test_a_file_and_a_folder(tmp_path: Path, device: str) -> None:
    assert "is a file" in probe.open_reservations(device).reason
    with pytest.raises(MisuseError, match="no block device"):
        probe.open_reservations(str(tmp_path))


# --- addresses ---


def test_addresses() -> None:
    parse = iscsi.IscsiUrl.parse
    assert parse("iscsi://san/iqn.a:b/0") == iscsi.IscsiUrl("san:3260", "iqn.a:b", 0)
    assert parse("iscsi://[fe80::1]:99/iqn.a/7") == iscsi.IscsiUrl("[fe80::1]:99", "iqn.a", 7)


@pytest.mark.parametrize(
    "url",
    ["iscsi://san/iqn.a", "iscsi:///iqn.a/1", "iscsi://san//1", "iscsi://san/iqn.a/x", "iscsi://san/iqn.a/1/2"]
    + ["iscsi://san:99999/iqn.a/1", "http://san/iqn.a/1", "iscsi://u:p@san/iqn.a/1", "iscsi://san/iqn.a/256"]
    + ["iscsi://san/iqn.a/²", "iscsi://san/iqn.a/1?x", "iscsi://san/iqn.a/-1"],
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(MisuseError, match="iscsi"):
        iscsi.IscsiUrl.parse(url)
