"""Reservation keys: 64 bits, a new one for each incarnation of a node (pure; the caller brings the random bits).

Bits 63..48 are 0x4D58 ("MX"), 47..40 the slot, 39..0 random and not 0. So a registrant can be named where the lockspace
cannot be read; who a key belongs to is decided by the slot record alone.
"""

from mxfs_proto.errors import MisuseError
from mxfs_proto.ondisk import SLOT_COUNT

PREFIX = 0x4D58
RANDOM_BITS = 40


def make_key(slot: int, random: int) -> int:
    """Return the key of an incarnation in *slot* (1..64) with 40 *random* bits, not all 0. Raises MisuseError."""
    if not 1 <= slot <= SLOT_COUNT:
        raise MisuseError(f"no slot {slot}: slots are 1 to {SLOT_COUNT}")
    if not 0 < random < 1 << RANDOM_BITS:
        raise MisuseError(f"a reservation key needs {RANDOM_BITS} random bits that are not all 0")
    return PREFIX << 48 | slot << RANDOM_BITS | random


def slot_of(key: int) -> int | None:
    """Return the slot that a key was made for, or None if it is none of ours."""
    slot = key >> RANDOM_BITS & 0xFF
    ours = key >> 48 == PREFIX and 1 <= slot <= SLOT_COUNT and key & (1 << RANDOM_BITS) - 1
    return slot if ours else None


def key_text(key: int) -> str:
    """Return a key as people and sg_persist write it: 0x and 16 digits."""
    return f"0x{key:016x}"
