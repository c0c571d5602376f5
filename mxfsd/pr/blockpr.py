"""Reservations through the kernel's block layer, for NVMe: IOC_PR_* ioctls, and NVMe's own report for reading.

Sources: <linux/pr.h>, Documentation/block/pr.rst, block/ioctl.c; <linux/nvme_ioctl.h>; NVM Express Base Specification
2.0, 7.5 Reservation Report and figure "Reservation Status Data Structure". The ioctls that read (Linux 6.19) are tried
first. All integers are in host byte order, those of NVMe little-endian.

A *positive* return value is a failure: the status of the target in the driver's own terms.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import BadReply, NotOffered, PathFailure, ReservationConflict, ReservationError
from mxfsd.pr.spc import OUR_TYPE, Capabilities, FullStatus, Held, Keys, PrType, Registrant


def _number(direction: int, group: str, number: int, size: int) -> int:
    """Return an ioctl number as <asm-generic/ioctl.h> makes it; *direction* 1 writes, 2 reads."""
    return direction << 30 | size << 16 | ord(group) << 8 | number


RESERVATION = struct.Struct("=QII")  # struct pr_reservation: key, type, flags
REGISTRATION = struct.Struct("=QQI4x")  # struct pr_registration: old key, new key, flags
PREEMPT = struct.Struct("=QQII")  # struct pr_preempt: our key, the victim's, type, flags
CLEAR = struct.Struct("=QI4x")  # struct pr_clear: key, flags
READ_KEYS = struct.Struct("=IIQ")  # struct pr_read_keys: generation, number of keys (in: room), their address
READ_RESERVATION = struct.Struct("=QII")  # struct pr_read_reservation: key, generation, type

IOC_PR_REGISTER = _number(1, "p", 200, REGISTRATION.size)
IOC_PR_RESERVE = _number(1, "p", 201, RESERVATION.size)
IOC_PR_RELEASE = _number(1, "p", 202, RESERVATION.size)
IOC_PR_PREEMPT = _number(1, "p", 203, PREEMPT.size)
IOC_PR_PREEMPT_ABORT = _number(1, "p", 204, PREEMPT.size)
IOC_PR_CLEAR = _number(1, "p", 205, CLEAR.size)
IOC_PR_READ_KEYS = _number(3, "p", 206, READ_KEYS.size)
IOC_PR_READ_RESERVATION = _number(2, "p", 207, READ_RESERVATION.size)
IGNORE_KEY = 1
BLOCK_TYPE: dict[int, PrType] = {
    1: PrType.WRITE_EXCLUSIVE,
    2: PrType.EXCLUSIVE_ACCESS,
    3: PrType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    4: PrType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
    5: PrType.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
    6: PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
}
"""enum pr_type, which NVMe uses too (figure "Reservation Type Encoding"), → the types of SCSI."""
EXCLUSIVE_ALL = next(number for number, kind in BLOCK_TYPE.items() if kind is OUR_TYPE)

NVME_COMMAND = struct.Struct("=BBHIIIQQIIIIIIIIII")
"""struct nvme_passthru_cmd: opcode, flags, reserved, nsid, cdw2, cdw3, metadata, addr, metadata_len, data_len,
cdw10..cdw15, timeout_ms, result."""
NVME_IOCTL_ID = 0x4E40
NVME_IOCTL_IO_CMD = _number(3, "N", 0x43, NVME_COMMAND.size)
RESERVATION_REPORT = 0x0E
REPORT = struct.Struct("<IBH2xB14x")  # generation, type, registered controllers, persist through power loss, reserved
REPORT_EXTENDED_AT = 64
CONTROLLER = struct.Struct("<HB5xQQ")  # controller, status (bit 0: holder), reserved, host id, key
CONTROLLER_EXTENDED = struct.Struct("<HB5xQ16s32x")  # controller, status, reserved, key, host id of 128 bits, reserved
_REPORT_BYTES = 4096
_MAX_REPORT_BYTES = 1 << 16
_KEY_ROOM = 1024

SCSI_CONFLICT, NVME_CONFLICT = 0x18, 0x83
"""PR_STS_RESERVATION_CONFLICT; NVMe status code 83h as kernels before 6.5 returned it."""
NVME_INVALID_OPCODE, NVME_INVALID_FIELD, NVME_HOST_ID_FORMAT = 0x01, 0x02, 0x18
_NVME_STATUS = 0x7FF  # status code and its type, without the "do not retry" bit

for _layout, _size in ((RESERVATION, 16), (REGISTRATION, 24), (PREEMPT, 24), (CLEAR, 16), (READ_KEYS, 16)):
    if _layout.size != _size:
        raise MisuseError(f"struct of <linux/pr.h> with {_layout.size} bytes instead of {_size}")
if (NVME_COMMAND.size, REPORT.size, CONTROLLER.size, CONTROLLER_EXTENDED.size) != (72, 24, 24, 64):
    raise MisuseError("an NVMe structure has the wrong size")

Report = tuple[FullStatus, Held | None, bool]
"""Who is registered, the reservation, and whether they survive a loss of power."""


def decode_report(data: bytes, extended: bool) -> Report:
    """Return what a reservation report says. Raises BadReply, also for one that is cut off."""
    if len(data) < REPORT.size:
        raise BadReply(f"reservation report of {len(data)} bytes")
    generation, number, count, ptpls = REPORT.unpack_from(data)
    kind = BLOCK_TYPE.get(number)
    if number and kind is None:
        raise BadReply(f"reservation report with type {number}")
    at, layout = (REPORT_EXTENDED_AT, CONTROLLER_EXTENDED) if extended else (REPORT.size, CONTROLLER)
    if at + count * layout.size > len(data):
        raise BadReply(f"reservation report: {count} controllers announced, {len(data)} bytes came")
    found, held_key = [], 0
    for controller in range(count):
        if extended:
            port, status, key, host = layout.unpack_from(data, at + controller * layout.size)
            name = host.hex()
        else:
            port, status, host, key = layout.unpack_from(data, at + controller * layout.size)
            name = f"{host:016x}"
        holder = bool(status & 1)
        found.append(Registrant(key, holder, int(kind or 0) if holder else 0, port, f"host {name}"))
        if holder and kind is not None and not kind.all_registrants:
            held_key = key
    held = None if kind is None else Held(generation, held_key, kind)
    return FullStatus(generation, tuple(found)), held, bool(ptpls)


class BlockNexus:
    """One block device of this kernel, see ``mxfsd.pr.nexus.Nexus``.

    A registration always asks to survive a loss of power: the kernel does so by itself.
    """

    def __init__(self, path: str, *, ioctl: Callable[[int, int, bytearray], int] = fcntl.ioctl) -> None:
        """Open *path*. Raises ReservationError with the errno of open(2)."""
        self.name = path
        self._ioctl = ioctl
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ReservationError(f"cannot open {path}: {error.strerror}", error.errno) from error

    # --- changing ---------------------------------------------------------------------------------------------

    def register(self, key: int, new_key: int, *, aptpl: bool) -> None:
        """See ``Nexus``."""
        self._change("register", IOC_PR_REGISTER, REGISTRATION.pack(key, new_key, 0))

    def register_ignoring(self, new_key: int, *, aptpl: bool) -> None:
        """See ``Nexus``."""
        self._change("register", IOC_PR_REGISTER, REGISTRATION.pack(0, new_key, IGNORE_KEY))

    def reserve(self, key: int) -> None:
        """See ``Nexus``."""
        self._change("reserve", IOC_PR_RESERVE, RESERVATION.pack(key, EXCLUSIVE_ALL, 0))

    def preempt(self, key: int, victim: int, *, abort: bool) -> None:
        """See ``Nexus``."""
        request = IOC_PR_PREEMPT_ABORT if abort else IOC_PR_PREEMPT
        self._change("preempt", request, PREEMPT.pack(key, victim, EXCLUSIVE_ALL, 0))

    def clear(self, key: int) -> None:
        """See ``Nexus``."""
        self._change("clear", IOC_PR_CLEAR, CLEAR.pack(key, 0))

    def lun_reset(self) -> None:
        """See ``Nexus``: the block layer has none."""
        raise NotOffered(f"{self.name}: no reset of a logical unit through the block layer")

    def spare(self) -> None:
        """See ``Nexus``: the kernel has one for this device."""

    # --- reading ----------------------------------------------------------------------------------------------

    def read_keys(self) -> Keys:
        """See ``Nexus``."""
        room = _KEY_ROOM
        for _ in range(4):
            keys = (ctypes.c_uint64 * room)()
            argument = bytearray(READ_KEYS.pack(0, room, ctypes.addressof(keys)))
            try:
                self._call("read keys", IOC_PR_READ_KEYS, argument)
            except NotOffered:
                status = self._report()[0]
                return Keys(status.generation, tuple(found.key for found in status.registrants))
            generation, count, _ = READ_KEYS.unpack(argument)
            if count <= room:
                return Keys(generation, tuple(keys[:count]))
            room = count + 64
        raise BadReply(f"{self.name}: keys are registered faster than they can be read")

    def read_reservation(self) -> Held | None:
        """See ``Nexus``."""
        argument = bytearray(READ_RESERVATION.size)
        try:
            self._call("read reservation", IOC_PR_READ_RESERVATION, argument)
        except NotOffered:
            return self._report()[1]
        key, generation, number = READ_RESERVATION.unpack(argument)
        if number == 0:
            return None
        if number not in BLOCK_TYPE:
            raise BadReply(f"{self.name}: reservation of type {number}")
        return Held(generation, key, BLOCK_TYPE[number])

    def full_status(self) -> FullStatus | None:
        """See ``Nexus``."""
        try:
            return self._report()[0]
        except NotOffered:
            return None

    def capabilities(self) -> Capabilities | None:
        """See ``Nexus``; NVMe tells only what is in force."""
        try:
            active = self._report()[2]
        except NotOffered:
            return None
        return Capabilities(active, active, None)

    def _report(self) -> Report:
        """Ask an NVMe namespace. Raises NotOffered for any other device."""
        try:
            return self._report_as(extended=True)
        except NotOffered:
            return self._report_as(extended=False)  # host identifiers of 64 bits want the short form

    def _report_as(self, extended: bool) -> Report:
        namespace = self._call("namespace id", NVME_IOCTL_ID, bytearray(4), positive=True)
        size = _REPORT_BYTES
        while True:
            data = ctypes.create_string_buffer(size)
            command = bytearray(
                NVME_COMMAND.pack(
                    *(RESERVATION_REPORT, 0, 0, namespace, 0, 0, 0, ctypes.addressof(data), 0, size),
                    *(size // 4 - 1, 1 if extended else 0, 0, 0, 0, 0, 0, 0),
                )
            )
            status = self._call("reservation report", NVME_IOCTL_IO_CMD, command, positive=True) & _NVME_STATUS
            if status in (NVME_INVALID_OPCODE, NVME_INVALID_FIELD, NVME_HOST_ID_FORMAT):
                raise NotOffered(f"{self.name}: reservation report: NVMe status {status:03x}h")
            if status:
                raise PathFailure(f"{self.name}: reservation report: NVMe status {status:03x}h")
            count = REPORT.unpack_from(data)[2]
            wanted = REPORT_EXTENDED_AT + (count + 8) * CONTROLLER_EXTENDED.size
            if wanted <= size or size >= _MAX_REPORT_BYTES:
                return decode_report(data.raw, extended)
            size = min((wanted + 4095) // 4096 * 4096, _MAX_REPORT_BYTES)

    def close(self) -> None:
        """Close the device; more than once is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- ioctl ------------------------------------------------------------------------------------------------

    def _change(self, what: str, request: int, argument: bytes) -> None:
        self._call(what, request, bytearray(argument))

    def _call(self, what: str, request: int, argument: bytearray, *, positive: bool = False) -> int:
        """Run an ioctl; *positive*: a result above 0 is an answer of its own, else it is a failure."""
        if self._fd < 0:
            raise MisuseError(f"{self.name} is closed")
        try:
            result = self._ioctl(self._fd, request, argument)
        except OSError as error:
            message = f"{self.name}: {what}: {error.strerror}"
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
                raise NotOffered(message) from error
            if error.errno == errno.EBADE:
                raise ReservationConflict(message) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise ReservationError(message, error.errno) from error
            raise PathFailure(message, error.errno) from error
        if result > 0 and not positive:
            if result & _NVME_STATUS in (SCSI_CONFLICT, NVME_CONFLICT):
                raise ReservationConflict(f"{self.name}: {what}: reservation conflict")
            if result & _NVME_STATUS == NVME_INVALID_OPCODE:
                raise NotOffered(f"{self.name}: {what}: status {result:#x}")
            raise PathFailure(f"{self.name}: {what}: status {result:#x}")
        return int(result)
