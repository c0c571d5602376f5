"""DLM lock modes and their compatibility (the VMS matrix, numbered as in <linux/dlmconstants.h>)."""

from enum import IntEnum


class LockMode(IntEnum):
    """A DLM lock mode; the numbers are those of DLM_LOCK_NL .. DLM_LOCK_EX."""

    NL = 0
    CR = 1
    CW = 2
    PR = 3
    PW = 4
    EX = 5


_COMPATIBLE: dict[LockMode, frozenset[LockMode]] = {
    LockMode.NL: frozenset(LockMode),
    LockMode.CR: frozenset({LockMode.NL, LockMode.CR, LockMode.CW, LockMode.PR, LockMode.PW}),
    LockMode.CW: frozenset({LockMode.NL, LockMode.CR, LockMode.CW}),
    LockMode.PR: frozenset({LockMode.NL, LockMode.CR, LockMode.PR}),
    LockMode.PW: frozenset({LockMode.NL, LockMode.CR}),
    LockMode.EX: frozenset({LockMode.NL}),
}


def compatible(held: LockMode, wanted: LockMode) -> bool:
    """Return whether *wanted* can be granted to one owner while another holds *held*."""
    return wanted in _COMPATIBLE[held]


_COVERS: dict[LockMode, frozenset[LockMode]] = {
    LockMode.NL: frozenset({LockMode.NL}),
    LockMode.CR: frozenset({LockMode.NL, LockMode.CR}),
    LockMode.CW: frozenset({LockMode.NL, LockMode.CR, LockMode.CW}),
    LockMode.PR: frozenset({LockMode.NL, LockMode.CR, LockMode.PR}),
    LockMode.PW: frozenset({LockMode.NL, LockMode.CR, LockMode.CW, LockMode.PR, LockMode.PW}),
    LockMode.EX: frozenset(LockMode),
}


def covers(held: LockMode, needed: LockMode) -> bool:
    """Return whether an owner that holds *held* may do what *needed* allows, without asking."""
    return needed in _COVERS[held]
