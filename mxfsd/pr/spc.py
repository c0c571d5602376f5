"""PERSISTENT RESERVE IN and OUT, and the few block commands needed beside them: their bytes, each once (pure).

Integers are big-endian. Sources: SPC-4 (T10/1731-D) 6.15 PERSISTENT RESERVE IN, 6.16 PERSISTENT RESERVE OUT, 7.6.4
TransportID; SBC-3 5.2 COMPARE AND WRITE, 5.11 READ (16), 5.16 READ CAPACITY (16), 5.32 WRITE (16).
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import BadReply

MAX_KEY = (1 << 64) - 1
MAX_IN_BYTES = 0xFFFF
"""Longest parameter data of PERSISTENT RESERVE IN: its allocation length has 16 bits."""


class InAction(IntEnum):
    """Service actions of PERSISTENT RESERVE IN, SPC-4 table 178."""

    READ_KEYS = 0
    READ_RESERVATION = 1
    REPORT_CAPABILITIES = 2
    READ_FULL_STATUS = 3


class OutAction(IntEnum):
    """Service actions of PERSISTENT RESERVE OUT, SPC-4 table 189."""

    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_AND_ABORT = 5
    REGISTER_AND_IGNORE_EXISTING_KEY = 6


class PrType(IntEnum):
    """Reservation types, SPC-4 table 183."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8

    @property
    def all_registrants(self) -> bool:
        """Every registrant holds the reservation, and it lasts as long as there is one."""
        return self >= PrType.WRITE_EXCLUSIVE_ALL_REGISTRANTS


OUR_TYPE = PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS
_LU_SCOPE = 0


class NeedMore(Exception):
    """The data is longer than what was asked for: ask again for ``length`` bytes."""

    def __init__(self, length: int) -> None:
        super().__init__(f"{length} bytes needed")
        self.length = length


def _declare(layout: str, size: int) -> Struct:
    declared = Struct(layout)
    if declared.size != size:
        raise MisuseError(f"{layout} is {declared.size} bytes, not {size}")
    return declared


# --- commands -------------------------------------------------------------------------------------------------

_PR_IN = _declare(">BB5xHx", 10)  # 5Eh, service action, reserved, allocation length, control
_PR_OUT = _declare(">BBB2xIx", 10)  # 5Fh, service action, scope and type, reserved, parameter list length, control
_PR_OUT_LIST = _declare(">QQ4xB3x", 24)  # reservation key, service action key, obsolete, flags, obsolete
_RW16 = _declare(">BBQIBx", 16)  # operation code, flags, block address, blocks, group, control
_CAW = _declare(">BBQ3xBBx", 16)  # 89h, flags, block address, reserved, blocks, group, control
_CAPACITY = _declare(">BB8xI2x", 16)  # 9Eh, service action 10h, obsolete, allocation length, reserved, control
_CAPACITY_DATA = _declare(">QI20x", 32)  # last block address, bytes a block, and what we do not use

PR_IN = 0x5E
PR_OUT = 0x5F
_APTPL = 0x01


def pr_in(action: InAction, length: int) -> bytes:
    """Return the 10 bytes of PERSISTENT RESERVE IN that asks for at most *length* bytes (SPC-4 6.15.1)."""
    if not 0 < length <= MAX_IN_BYTES:
        raise MisuseError(f"an allocation length of {length} bytes does not fit")
    return _PR_IN.pack(PR_IN, action, length)


@dataclass(frozen=True, slots=True)
class PrOut:
    """One PERSISTENT RESERVE OUT: the command and its parameter list (SPC-4 6.16.1 and 6.16.3).

    *key* is the reservation key that the sender is registered with (0: none), *action_key* the one acted upon: the new
    key in REGISTER (0 unregisters), the victim's in PREEMPT. *type* 0 where the action does not use it.
    """

    action: OutAction
    key: int = 0
    action_key: int = 0
    type: int = 0
    aptpl: bool = False

    def encode(self) -> tuple[bytes, bytes]:
        """Return the command (10 bytes) and the parameter list (24 bytes). Raises MisuseError."""
        if not (0 <= self.key <= MAX_KEY and 0 <= self.action_key <= MAX_KEY and 0 <= self.type <= 15):
            raise MisuseError(f"a value does not fit: {self}")
        cdb = _PR_OUT.pack(PR_OUT, self.action, _LU_SCOPE << 4 | self.type, _PR_OUT_LIST.size)
        return cdb, _PR_OUT_LIST.pack(self.key, self.action_key, _APTPL if self.aptpl else 0)

    @classmethod
    def decode(cls, cdb: bytes, parameters: bytes) -> "PrOut":
        """Return the command that the bytes are; raises BadReply. (Tests' targets need it.)"""
        if len(cdb) != _PR_OUT.size or len(parameters) != _PR_OUT_LIST.size:
            raise BadReply(f"PERSISTENT RESERVE OUT of {len(cdb)} and {len(parameters)} bytes")
        operation, action, scope_type, length = _PR_OUT.unpack(cdb)
        key, action_key, flags = _PR_OUT_LIST.unpack(parameters)
        if operation != PR_OUT or length != _PR_OUT_LIST.size or scope_type >> 4 or flags & ~_APTPL:
            raise BadReply("no PERSISTENT RESERVE OUT of ours")
        try:
            return cls(OutAction(action), key, action_key, scope_type & 15, bool(flags))
        except ValueError as error:
            raise BadReply(f"PERSISTENT RESERVE OUT with service action {action}") from error


TEST_UNIT_READY = bytes(6)
"""SPC-4 6.47."""
CAPACITY_BYTES = _CAPACITY_DATA.size


def read_capacity16() -> bytes:
    """Return READ CAPACITY (16)."""
    return _CAPACITY.pack(0x9E, 0x10, _CAPACITY_DATA.size)


def decode_capacity16(data: bytes) -> tuple[int, int]:
    """Return (number of blocks, bytes a block). Raises BadReply."""
    if len(data) < _CAPACITY_DATA.size:
        raise BadReply(f"READ CAPACITY (16) gave {len(data)} bytes")
    last, block = _CAPACITY_DATA.unpack_from(data)
    if block < 512 or block & (block - 1):
        raise BadReply(f"READ CAPACITY (16) says {block} bytes a block")
    return last + 1, block


def read16(block: int, count: int) -> bytes:
    """Return READ (16) of *count* blocks from *block* on."""
    return _RW16.pack(0x88, 0, block, count, 0)


def write16(block: int, count: int) -> bytes:
    """Return WRITE (16), without FUA: a disk that does not support it refuses such a command."""
    return _RW16.pack(0x8A, 0, block, count, 0)


def compare_and_write(block: int, count: int) -> bytes:
    """Return COMPARE AND WRITE of *count* blocks (1..255); the data is what must be there, then what to write."""
    if not 0 < count < 256:
        raise MisuseError(f"COMPARE AND WRITE of {count} blocks")
    return _CAW.pack(0x89, 0, block, count, 0)


# --- parameter data of PERSISTENT RESERVE IN --------------------------------------------------------------------

_IN_HEADER = _declare(">II", 8)  # generation, bytes that follow
_KEY = _declare(">Q", 8)
_RESERVATION = _declare(">Q5xB2x", 16)  # key, obsolete, scope and type, obsolete
_CAPABILITIES = _declare(">HBBBB2x", 8)  # length, flags, flags, two bytes of types, reserved
_STATUS = _declare(">Q4xBB4xHI", 24)  # key, reserved, flags, scope and type, reserved, target port, bytes that follow
_TRANSPORT_MIN = 24
_HOLDER, _ALL_PORTS = 0x01, 0x02


def _body(data: bytes, asked: int, what: str) -> tuple[int, bytes]:
    """Return (generation, what follows the header), complete. Raises NeedMore, BadReply.

    The header tells the whole length even when the data was cut to what was asked for: keys that are not seen must
    never count as absent.
    """
    if len(data) < _IN_HEADER.size:
        raise BadReply(f"{what}: only {len(data)} bytes")
    generation, length = _IN_HEADER.unpack_from(data)
    total = _IN_HEADER.size + length
    if total > MAX_IN_BYTES:
        raise BadReply(f"{what}: {length} bytes are said to follow")
    if total > asked:
        raise NeedMore(total)
    if total > len(data):
        raise BadReply(f"{what}: {total} bytes announced, {len(data)} came")
    return generation, data[_IN_HEADER.size : total]


@dataclass(frozen=True, slots=True)
class Keys:
    """Answer to READ KEYS: a key for each registered I_T nexus, so one key may be there several times."""

    generation: int
    keys: tuple[int, ...]

    def encode(self) -> bytes:
        """Return the parameter data (SPC-4 6.15.2)."""
        body = b"".join(_KEY.pack(key) for key in self.keys)
        return _IN_HEADER.pack(self.generation, len(body)) + body

    @classmethod
    def decode(cls, data: bytes, asked: int) -> "Keys":
        """Return the keys; *asked* is the allocation length. Raises NeedMore, BadReply."""
        generation, body = _body(data, asked, "READ KEYS")
        if len(body) % _KEY.size:
            raise BadReply(f"READ KEYS: {len(body)} bytes are no whole keys")
        return cls(generation, tuple(key for (key,) in _KEY.iter_unpack(body)))


@dataclass(frozen=True, slots=True)
class Held:
    """The reservation on the disk. *key* is 0 for the types that all registrants hold (some targets give one)."""

    generation: int
    key: int
    type: int

    @property
    def ours(self) -> bool:
        """Return whether it is the type that MXFS uses."""
        return self.type == OUR_TYPE

    @property
    def known(self) -> bool:
        """Return whether it is a type that SPC-4 has; another one is no reservation but damage in the target."""
        return self.type in _TYPE_BIT


@dataclass(frozen=True, slots=True)
class ReservationData:
    """Answer to READ RESERVATION: *held* is None when there is no reservation."""

    generation: int
    held: Held | None

    def encode(self) -> bytes:
        """Return the parameter data (SPC-4 6.15.3)."""
        body = b"" if self.held is None else _RESERVATION.pack(self.held.key, _LU_SCOPE << 4 | self.held.type)
        return _IN_HEADER.pack(self.generation, len(body)) + body

    @classmethod
    def decode(cls, data: bytes, asked: int) -> "ReservationData":
        """Return what is there. Raises NeedMore, BadReply."""
        generation, body = _body(data, asked, "READ RESERVATION")
        if not body:
            return cls(generation, None)
        if len(body) < _RESERVATION.size:
            raise BadReply(f"READ RESERVATION: a descriptor of {len(body)} bytes")
        key, scope_type = _RESERVATION.unpack_from(body)
        return cls(generation, Held(generation, key, scope_type & 15))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Answer to REPORT CAPABILITIES, as far as it matters.

    *types* None: the target does not say. *aptpl_capable*: a registration can survive a loss of power; *aptpl_active*:
    those that are there now do.
    """

    aptpl_capable: bool
    aptpl_active: bool
    types: frozenset[int] | None

    def encode(self) -> bytes:
        """Return the parameter data (SPC-4 6.15.4)."""
        mask = 0 if self.types is None else sum(1 << _TYPE_BIT[kind] for kind in self.types)
        flags = (0 if self.types is None else 0x80) | (1 if self.aptpl_active else 0)
        return _CAPABILITIES.pack(_CAPABILITIES.size, 1 if self.aptpl_capable else 0, flags, mask >> 8, mask & 0xFF)

    @classmethod
    def decode(cls, data: bytes) -> "Capabilities":
        """Return what the target can do. Raises BadReply."""
        if len(data) < _CAPABILITIES.size:
            raise BadReply(f"REPORT CAPABILITIES: only {len(data)} bytes")
        length, first, second, high, low = _CAPABILITIES.unpack_from(data)
        if length < _CAPABILITIES.size:
            raise BadReply(f"REPORT CAPABILITIES: length {length}")
        mask = high << 8 | low
        types = frozenset(kind for kind, bit in _TYPE_BIT.items() if mask >> bit & 1) if second & 0x80 else None
        return cls(bool(first & 1), bool(second & 1), types)


_TYPE_BIT: dict[int, int] = {
    PrType.WRITE_EXCLUSIVE_ALL_REGISTRANTS: 15,
    PrType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY: 14,
    PrType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY: 13,
    PrType.EXCLUSIVE_ACCESS: 11,
    PrType.WRITE_EXCLUSIVE: 9,
    PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS: 0,
}
"""Bit of each type in the persistent reservation type mask, bytes 4 and 5 as one number (SPC-4 table 186)."""


@dataclass(frozen=True, slots=True)
class Registrant:
    """One I_T nexus in READ FULL STATUS. *initiator* names its initiator port as far as the data tells."""

    key: int
    holder: bool
    type: int
    target_port: int
    initiator: str


@dataclass(frozen=True, slots=True)
class FullStatus:
    """Answer to READ FULL STATUS (SPC-4 6.15.5)."""

    generation: int
    registrants: tuple[Registrant, ...]

    @classmethod
    def decode(cls, data: bytes, asked: int) -> "FullStatus":
        """Return all registrants. Raises NeedMore, BadReply."""
        generation, body = _body(data, asked, "READ FULL STATUS")
        found, at = [], 0
        while at < len(body):
            if len(body) - at < _STATUS.size:
                raise BadReply("READ FULL STATUS: a descriptor is cut off")
            key, flags, scope_type, port, length = _STATUS.unpack_from(body, at)
            at += _STATUS.size
            if length > len(body) - at:
                raise BadReply("READ FULL STATUS: a TransportID is cut off")
            holder = bool(flags & _HOLDER)
            name = transport_name(body[at : at + length])
            found.append(Registrant(key, holder, scope_type & 15 if holder else 0, port, name))
            at += length
        return cls(generation, tuple(found))


def encode_registrant(registrant: Registrant) -> bytes:
    """Return a descriptor of READ FULL STATUS with an iSCSI TransportID. (Tests' targets need it.)"""
    name = registrant.initiator.encode() + b"\0"
    name = name.ljust(max(_TRANSPORT_MIN - 4, (len(name) + 3) // 4 * 4), b"\0")
    transport = struct.pack(">BxH", 0x05 | (0x40 if ",i," in registrant.initiator else 0), len(name)) + name
    flags = _HOLDER if registrant.holder else 0
    return _STATUS.pack(registrant.key, flags, registrant.type, registrant.target_port, len(transport)) + transport


def transport_name(data: bytes) -> str:
    """Return the name in a TransportID (SPC-4 7.6.4): iSCSI name, WWN in hex, or "" where there is none."""
    if len(data) < 4:
        return ""
    protocol = data[0] & 0x0F
    if protocol == 5:  # iSCSI: length of the name, then the name padded with zeros
        length = int.from_bytes(data[2:4])
        text = data[4 : 4 + length].split(b"\0", 1)[0].decode(errors="replace")
        # A name comes from the network and goes to a terminal.
        return "".join(character if character.isprintable() else "?" for character in text)
    if protocol == 0 and len(data) >= 16:  # Fibre Channel: port name
        return data[8:16].hex()
    if protocol == 6 and len(data) >= 12:  # SAS address
        return data[4:12].hex()
    return data.hex()
