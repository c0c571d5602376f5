"""The relations of lock modes as tables indexed by mode, for the hot paths (pure; made from ``mxfs_proto.modes``)."""

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, compatible, covers

COMPATIBLE: tuple[tuple[bool, ...], ...] = tuple(tuple(compatible(a, b) for b in LockMode) for a in LockMode)
COVERS: tuple[tuple[bool, ...], ...] = tuple(tuple(covers(a, b) for b in LockMode) for a in LockMode)


def _join(a: LockMode, b: LockMode) -> LockMode:
    """Return the weakest mode that covers both (PR and CW: PW)."""
    return min(mode for mode in LockMode if covers(mode, a) and covers(mode, b))


def _meet(a: LockMode, b: LockMode) -> LockMode:
    """Return the strongest mode that both cover (PR and CW: CR)."""
    return max(mode for mode in LockMode if covers(a, mode) and covers(b, mode))


JOIN: tuple[tuple[LockMode, ...], ...] = tuple(tuple(_join(a, b) for b in LockMode) for a in LockMode)
MEET: tuple[tuple[LockMode, ...], ...] = tuple(tuple(_meet(a, b) for b in LockMode) for a in LockMode)

FLAGS: tuple[LockFlag, ...] = tuple(LockFlag(bits) for bits in range(1 << len(LockFlag)))
"""Every combination, made once: making one costs as much as granting a lock."""
