"""SCSI sense data: why a command failed (pure). Fixed (70h, 71h) and descriptor (72h, 73h) format, SPC-4 4.5."""

from dataclasses import dataclass
from enum import IntEnum


class SenseKey(IntEnum):
    """Sense keys, SPC-4 table 54."""

    NO_SENSE = 0
    RECOVERED_ERROR = 1
    NOT_READY = 2
    MEDIUM_ERROR = 3
    HARDWARE_ERROR = 4
    ILLEGAL_REQUEST = 5
    UNIT_ATTENTION = 6
    DATA_PROTECT = 7
    BLANK_CHECK = 8
    VENDOR_SPECIFIC = 9
    COPY_ABORTED = 10
    ABORTED_COMMAND = 11
    RESERVED = 12
    VOLUME_OVERFLOW = 13
    MISCOMPARE = 14
    COMPLETED = 15


CODES: dict[int, str] = {
    0x0400: "not ready",
    0x0401: "becoming ready",
    0x0402: "initializing command required",
    0x0403: "manual intervention required",
    0x040B: "target port in standby state",
    0x040C: "target port in unavailable state",
    0x0C00: "write error",
    0x1100: "unrecovered read error",
    0x1A00: "parameter list length error",
    0x1D00: "miscompare during verify",
    0x2000: "invalid command operation code",
    0x2100: "block address out of range",
    0x2400: "invalid field in CDB",
    0x2500: "logical unit not supported",
    0x2600: "invalid field in parameter list",
    0x2602: "parameter value invalid",
    0x2604: "invalid release of persistent reservation",
    0x2700: "write protected",
    0x2900: "power on, reset or bus device reset occurred",
    0x2901: "power on occurred",
    0x2903: "bus device reset occurred",
    0x2907: "I_T nexus loss occurred",
    0x2A03: "reservations preempted",
    0x2A04: "reservations released",
    0x2A05: "registrations preempted",
    0x2F00: "commands cleared by another initiator",
    0x3A00: "medium not present",
    0x3F0E: "reported LUNs data has changed",
    0x4400: "internal target failure",
    0x5504: "insufficient registration resources",
}
"""Additional sense code << 8 | qualifier → its name in SPC-4 annex F (those that matter here)."""


@dataclass(frozen=True, slots=True)
class Sense:
    """Key, additional sense code and qualifier."""

    key: SenseKey
    asc: int
    ascq: int

    @property
    def code(self) -> int:
        """Code and qualifier in one number, as in ``CODES``."""
        return self.asc << 8 | self.ascq

    @property
    def refused(self) -> bool:
        """The target does not have this command, or a field of it (5/2000, 5/2400, 5/2600 and the like)."""
        return self.key is SenseKey.ILLEGAL_REQUEST and self.asc in (0x20, 0x24, 0x26)

    def __str__(self) -> str:
        """Return for instance ``ILLEGAL REQUEST 5/2400 (invalid field in CDB)``."""
        name = CODES.get(self.code)
        text = f"{self.key.name.replace('_', ' ')} {self.key:x}/{self.code:04x}"
        return f"{text} ({name})" if name else text


NOTHING = Sense(SenseKey.NO_SENSE, 0, 0)


def decode_sense(data: bytes) -> Sense:
    """Return what the sense bytes say; whatever is cut off or of an unknown format counts as 0.

    No exception: the command has failed already, and its error must not be replaced by another one.
    """
    code = data[0] & 0x7F if data else 0
    if code in (0x70, 0x71):
        # Byte 7 says how many bytes follow it; some targets send less than they say, none may be believed further.
        end = min(len(data), 8 + data[7]) if len(data) > 7 else 0
        at = data[:end].ljust(14, b"\0")
        key = data[2] & 0x0F if len(data) > 2 else 0
        return Sense(SenseKey(key), at[12], at[13])
    if code in (0x72, 0x73):
        at = data.ljust(4, b"\0")
        return Sense(SenseKey(at[1] & 0x0F), at[2], at[3])
    return NOTHING
