"""How to reach the reservations of a device: which paths, over which transport; or why there are none. Reads only."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mxfs_proto.errors import MisuseError, MxfsError
from mxfsd.pr.blockpr import BlockNexus
from mxfsd.pr.errors import CheckCondition, NotOffered, ReservationError
from mxfsd.pr.iscsi import SCHEME, Iscsi
from mxfsd.pr.nexus import Nexus
from mxfsd.pr.reservations import Reservations
from mxfsd.pr.scsi import ScsiNexus
from mxfsd.pr.sgio import SgIo

SYSFS = Path("/sys")
TIMEOUT_MS = 10_000


@dataclass(frozen=True, slots=True)
class Probe:
    """*reservations* (open; close them) with *transport* named, or None with the *reason* why there are none."""

    reservations: Reservations | None
    transport: str
    reason: str


def open_reservations(
    device: str,
    *,
    initiator: str | None = None,
    isid: int | None = None,
    timeout_ms: int = TIMEOUT_MS,
    sysfs: Path = SYSFS,
) -> Probe:
    """Open the reservations of a block device or of ``iscsi://HOST[:PORT]/TARGET/LUN``.

    *timeout_ms* limits each command; *initiator* and *isid* name the initiator port at an iscsi URL. A device that has
    no reservations gives a Probe with the reason. What may be passing (no permission, a path that does not answer) is
    raised instead, so that nobody goes on without fencing by mistake: ReservationError, BadReply, MisuseError.
    """
    if device.startswith(SCHEME):
        paths, transport = [_iscsi(device, initiator, isid, timeout_ms)], "iscsi"
    else:
        try:
            paths, transport = _open_device(device, timeout_ms, sysfs)
        except _NoReservations as error:
            return Probe(None, "none", str(error))
    reservations = Reservations(device, paths)
    reason = ""
    try:
        for path in paths:
            path.read_keys()
        reservations.read_reservation()
    except NotOffered:
        reason = _why_not(device, transport, sysfs)
    except CheckCondition as error:
        if not error.sense.refused:
            reservations.close()
            raise
        reason = f"the target of {device} does not have them ({error.sense})"
    except BaseException:
        reservations.close()
        raise
    if reason:
        reservations.close()
        return Probe(None, transport, reason)
    return Probe(reservations, transport, "")


class _NoReservations(MxfsError):
    """What kind of device it is shows already that it has none."""


def _iscsi(device: str, initiator: str | None, isid: int | None, timeout_ms: int) -> Nexus:
    return ScsiNexus(Iscsi(device, initiator=initiator, isid=isid, timeout_ms=timeout_ms))


def _open_device(device: str, timeout_ms: int, sysfs: Path) -> tuple[list[Nexus], str]:
    """Return the paths of a block device, all open, and the transport. Raises _NoReservations, ReservationError."""
    status = _stat(device)
    if not stat.S_ISBLK(status.st_mode):
        if stat.S_ISREG(status.st_mode):
            raise _NoReservations(f"{device} is a file")
        raise MisuseError(f"{device} is no block device")
    folder = _folder(device, sysfs)
    name = folder.name
    if (folder / "partition").exists():
        raise _NoReservations(f"{device} is a partition; reservations belong to a whole disk")
    if name.startswith("nvme"):
        return [BlockNexus(device)], "nvme"
    if not (folder / "dm").exists():
        return [ScsiNexus(SgIo(device, timeout_ms=timeout_ms, sysfs=folder))], "sg"
    uuid = _text(folder / "dm/uuid")
    if not uuid.startswith("mpath-"):
        raise _NoReservations(f"{device} is a device-mapper device and no multipath one")
    slaves = sorted(entry.name for entry in (folder / "slaves").iterdir())
    if not slaves:
        raise ReservationError(f"{device}: this multipath device has no path")
    paths: list[Nexus] = []
    try:
        for slave in slaves:
            below = (folder / "slaves" / slave).resolve()
            paths.append(ScsiNexus(SgIo(f"/dev/{slave}", timeout_ms=timeout_ms, sysfs=below)))
    except BaseException:
        for path in paths:
            path.close()
        raise
    return paths, "multipath"


def _why_not(device: str, transport: str, sysfs: Path) -> str:
    """Return in plain words why the kernel passes no reservation commands on to the device."""
    if transport == "nvme":
        return f"{device} is an NVMe disk without reservations"
    if transport == "multipath":
        return f"the paths of {device} are no SCSI disks"
    if _folder(device, sysfs).name.startswith("loop"):
        return f"{device} is a loop device"
    return f"{device} is no SCSI disk"


def _folder(device: str, sysfs: Path) -> Path:
    """Return the folder of a block device in sysfs."""
    status = _stat(device)
    return (sysfs / f"dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}").resolve()


def _stat(device: str) -> os.stat_result:
    try:
        return os.stat(device)
    except OSError as error:
        raise ReservationError(f"cannot open {device}: {error.strerror}", error.errno) from error


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # an attribute that this kernel does not have says nothing
