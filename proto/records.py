"""The records that netlink messages and LOCK frames carry: plain values, no wire knowledge.

A resource is a lower inode number of the volume that the channel belongs to. Times are in milliseconds.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode


class NodeState(IntEnum):
    """What the daemon tells its FUSE layer about a node."""

    ABSENT = 0
    JOINING = 1
    ACTIVE = 2
    SUSPECT = 3
    LEFT = 4
    DEAD = 5


@dataclass(frozen=True, slots=True)
class LockReq:
    """Ask for *mode* on *ino*; *opens_r*/*opens_w* are the node's absolute counts of open descriptors."""

    req_id: int
    ino: int
    mode: LockMode
    flags: LockFlag
    opens_r: int
    opens_w: int


@dataclass(frozen=True, slots=True)
class LockGrant:
    """*mode* is held from now on under grant sequence *seq*; req_id 0 when nobody asked."""

    req_id: int
    ino: int
    mode: LockMode
    seq: int
    flags: LockFlag


@dataclass(frozen=True, slots=True)
class LockDeny:
    """The request ended without a lock; *errno* is positive (EAGAIN for NOQUEUE, ECANCELED for a cancel)."""

    req_id: int
    ino: int
    errno: int


@dataclass(frozen=True, slots=True)
class LockRelease:
    """The lock of grant *seq* went down to *mode* (NL: given up), with the open counts at that moment."""

    ino: int
    seq: int
    mode: LockMode
    opens_r: int
    opens_w: int


@dataclass(frozen=True, slots=True)
class LockBast:
    """Somebody wants *mode*: give grant *seq* up as far as that needs."""

    ino: int
    seq: int
    mode: LockMode
    flags: LockFlag


@dataclass(frozen=True, slots=True)
class Opens:
    """The node's absolute counts of open descriptors of *ino*, outside a request or a release."""

    ino: int
    opens_r: int
    opens_w: int
    flags: LockFlag


@dataclass(frozen=True, slots=True)
class CacheInval:
    """Drop cached pages of *ino* in [offset, offset + length) bytes; length 0 means all of them."""

    ino: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """State of a node; *home* is the home's slot (0 unknown); *lease_ms* what is left of our own lease."""

    node: int
    state: NodeState
    epoch: int
    home: int
    lease_ms: int


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """The FUSE layer of process *pid* serves the volume *uuid* (16 bytes)."""

    uuid: bytes
    pid: int


@dataclass(frozen=True, slots=True)
class VolumeUmount:
    """The FUSE layer of process *pid* no longer serves the volume *uuid* (16 bytes)."""

    uuid: bytes
    pid: int


@dataclass(frozen=True, slots=True)
class StatusReq:
    """Channel control: the sender of this has sent up to *sent* and has received all up to *received*.

    With *resend* everything after *received* is to be sent again; without, only an answer is wanted.
    """

    sent: int
    received: int
    resend: bool


@dataclass(frozen=True, slots=True)
class StatusResp:
    """Channel control: an acknowledgement; fields as in StatusReq, no answer wanted."""

    sent: int
    received: int


@dataclass(frozen=True, slots=True)
class RecoveryStart:
    """The home is lost or leaving: hold new operations back. *epoch* is the one that ends; *node*: the home to name to
    what is held and open, 0: none yet. *number* counts these records of a daemon: the reclaims that answer one carry it
    as their frames' sequence, so that those that answer an earlier one are not taken for them."""

    epoch: int
    node: int
    number: int


@dataclass(frozen=True, slots=True)
class RecoveryDone:
    """*node* is the home of *epoch*: go on."""

    epoch: int
    node: int


@dataclass(frozen=True, slots=True)
class DaemonReady:
    """The daemon *daemon_pid* serves as *node*; *home* is the home's slot, *uuid* the volume's (16 bytes)."""

    daemon_pid: int
    node: int
    epoch: int
    home: int
    uuid: bytes


LockRecord: TypeAlias = LockReq | LockGrant | LockDeny | LockRelease | LockBast | Opens | CacheInval
Control: TypeAlias = StatusReq | StatusResp
Record: TypeAlias = (
    LockRecord | NodeStatus | VolumeMount | VolumeUmount | Control | RecoveryStart | RecoveryDone | DaemonReady
)
