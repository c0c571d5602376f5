"""SCSI commands through the kernel: the SG_IO ioctl on a SCSI disk's block device.

Sources: <scsi/sg.h>, the SCSI Generic HOWTO, Documentation/scsi/scsi-generic.rst. Needs CAP_SYS_RAWIO (commands) and
CAP_SYS_ADMIN (reset). The device is opened for reading only: closing one that was open for writing makes udev probe it.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import NotOffered, PathFailure, ReservationError
from mxfsd.pr.iscsi import Iscsi
from mxfsd.pr.kernelsession import open_beside
from mxfsd.pr.scsi import GOOD, command_name, raise_status

SG_IO = 0x2285
SG_SCSI_RESET = 0x2284
RESET_DEVICE_NO_ESCALATE = 0x101
"""SG_SCSI_RESET_DEVICE | SG_SCSI_RESET_NO_ESCALATE: the logical unit, and nothing bigger when that fails."""
TIMEOUT_MS = 10_000

_NONE, _TO_DEVICE, _FROM_DEVICE = -1, -2, -3
_SENSE_BYTES = 252
HEADER = struct.Struct("@iiBBHIPPPIIiPBBBBHHiII0P")
"""struct sg_io_hdr: interface_id, dxfer_direction, cmd_len, mx_sb_len, iovec_count, dxfer_len, dxferp, cmdp, sbp,
timeout (ms), flags, pack_id, usr_ptr, status, masked_status, msg_status, sb_len_wr, host_status, driver_status, resid,
duration, info."""
if HEADER.size != 88:
    raise MisuseError(f"struct sg_io_hdr is {HEADER.size} bytes, not 88: only 64-bit machines are supported")

_HOST = {
    1: "no connection",
    2: "bus busy",
    3: "timed out",
    4: "bad target",
    5: "aborted",
    7: "error in the adapter",
    8: "reset",
    11: "soft error",
    12: "retry now",
    13: "requeued",
    14: "transport disrupted",
    15: "transport failed fast",
    16: "target failure",
    17: "nexus failure",
}
_DRIVER_SENSE = 8


class SgIo:
    """One SCSI disk device of this kernel, see ``mxfsd.pr.scsi.Transport``."""

    def __init__(
        self,
        path: str,
        *,
        timeout_ms: int = TIMEOUT_MS,
        ioctl: Callable[[int, int, bytearray], int] = fcntl.ioctl,
        sysfs: Path | None = None,
    ) -> None:
        """Open *path*, whose folder in sysfs is *sysfs*. Raises ReservationError with the errno of open(2)."""
        self.name = path
        self._timeout_ms = timeout_ms
        self._ioctl = ioctl
        self._sysfs = sysfs
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ReservationError(f"cannot open {path}: {error.strerror}", error.errno) from error

    def execute(self, cdb: bytes, data_out: bytes, alloc_in: int) -> bytes:
        """See ``Transport``. NotOffered: this device takes no SCSI commands."""
        if data_out and alloc_in:
            raise MisuseError("a command either sends or receives")
        what = command_name(cdb)
        length = len(data_out) or alloc_in
        data = ctypes.create_string_buffer(data_out or bytes(max(alloc_in, 1)), max(length, 1))
        command = ctypes.create_string_buffer(cdb, len(cdb))
        sense = ctypes.create_string_buffer(_SENSE_BYTES)
        direction = _TO_DEVICE if data_out else _FROM_DEVICE if alloc_in else _NONE
        header = bytearray(
            HEADER.pack(
                *(ord("S"), direction, len(cdb), _SENSE_BYTES, 0, length),
                *(ctypes.addressof(data), ctypes.addressof(command), ctypes.addressof(sense)),
                *(self._timeout_ms, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
            )
        )
        self._call(SG_IO, header, what)
        status, _, _, sensed, host, driver, resid = HEADER.unpack(header)[13:20]
        # The SCSI status first: some kernels give a host error beside RESERVATION CONFLICT.
        if status != GOOD:
            raise_status(self.name, what, status, sense.raw[: min(sensed, _SENSE_BYTES)])
        if host:
            raise PathFailure(f"{self.name}: {what}: {_HOST.get(host, f'host error {host:#x}')}")
        if driver & 0x0F not in (0, _DRIVER_SENSE):
            raise PathFailure(f"{self.name}: {what}: driver error {driver:#x}")
        return data.raw[: max(0, alloc_in - max(0, resid))] if alloc_in else b""

    def lun_reset(self) -> None:
        """See ``Transport``."""
        self._call(SG_SCSI_RESET, bytearray(struct.pack("=i", RESET_DEVICE_NO_ESCALATE)), "LOGICAL UNIT RESET")

    def spare(self) -> Iscsi | None:
        """See ``Transport``: the kernel has one nexus for this device; where that is one of iSCSI, log in beside it."""
        return None if self._sysfs is None else open_beside(self._sysfs, self._timeout_ms)

    def close(self) -> None:
        """Close the device; more than once is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _call(self, request: int, argument: bytearray, what: str) -> None:
        if self._fd < 0:
            raise MisuseError(f"{self.name} is closed")
        try:
            result = self._ioctl(self._fd, request, argument)
        except OSError as error:
            message = f"{self.name}: {what}: {error.strerror}"
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
                raise NotOffered(message) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise ReservationError(message, error.errno) from error
            raise PathFailure(message, error.errno) from error
        if result != 0:
            raise PathFailure(f"{self.name}: {what}: the kernel returned {result}")
