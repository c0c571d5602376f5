"""SCSI commands of persistent reservations over a transport that carries one command at a time.

The transport (``sgio``, ``iscsi``) gives SCSI status and sense data back as exceptions; here it is decided what is
tried again: what the target has not executed (unit attention, busy, task set full) or may safely do twice.
"""

import time
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

from mxfsd.pr.errors import BadReply, CheckCondition, NotOffered, PathFailure, ReservationConflict
from mxfsd.pr.sense import SenseKey, decode_sense
from mxfsd.pr.spc import (
    MAX_IN_BYTES,
    OUR_TYPE,
    Capabilities,
    FullStatus,
    Held,
    InAction,
    Keys,
    NeedMore,
    OutAction,
    PrOut,
    ReservationData,
    pr_in,
)

ATTENTION_TRIES = 10
"""A target queues a unit attention for each event and each is told once: a handful is normal after a reset."""
BUSY_TRIES = 5
BUSY_PAUSE_S = 0.1
_FIRST_ASK = 8 + 8 * 256

GOOD, CHECK_CONDITION, BUSY, CONFLICT, TASK_SET_FULL, TASK_ABORTED = 0x00, 0x02, 0x08, 0x18, 0x28, 0x40
"""SCSI status codes, SAM-5 5.3.1."""

_Answer = TypeVar("_Answer", Keys, ReservationData, FullStatus)


class Transport(Protocol):
    """Carries SCSI commands to one logical unit over one I_T nexus."""

    name: str

    def execute(self, cdb: bytes, data_out: bytes, alloc_in: int) -> bytes:
        """Run one command that sends *data_out* or receives up to *alloc_in* bytes (not both); return what came.

        Raises what ``raise_status`` raises, and PathFailure when the outcome is unknown.
        """
        ...

    def lun_reset(self) -> None:
        """LOGICAL UNIT RESET (SAM-5 7.6); return when the target has done it. Raises PathFailure, NotOffered."""
        ...

    def spare(self) -> "Transport | None":
        """Open another I_T nexus to the same unit; None where this transport cannot. Raises PathFailure."""
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


class Busy(PathFailure):
    """BUSY, TASK SET FULL or TASK ABORTED: the same command later may succeed."""


def raise_status(name: str, what: str, status: int, sense: bytes) -> None:
    """Raise the exception that a SCSI status other than GOOD stands for; *what* names the command."""
    if status == GOOD:
        return
    if status == CHECK_CONDITION:
        raise CheckCondition(f"{name}: {what}", decode_sense(sense))
    if status == CONFLICT:
        raise ReservationConflict(f"{name}: {what}: RESERVATION CONFLICT")
    if status in (BUSY, TASK_SET_FULL, TASK_ABORTED):
        raise Busy(f"{name}: {what}: target is busy (status {status:02x}h)")
    raise PathFailure(f"{name}: {what}: SCSI status {status:02x}h")


class ScsiNexus:
    """One path to a SCSI disk, see ``Nexus``."""

    def __init__(self, transport: Transport, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Use an open transport; *sleep* takes seconds."""
        self.transport = transport
        self.name = transport.name
        self._sleep = sleep

    def run(self, cdb: bytes, data_out: bytes = b"", alloc_in: int = 0) -> bytes:
        """Execute a command, again a bounded number of times after unit attentions and while the target is busy."""
        attentions = busy = 0
        while True:
            try:
                return self.transport.execute(cdb, data_out, alloc_in)
            except CheckCondition as error:
                attentions += 1
                again = error.sense.key in (SenseKey.UNIT_ATTENTION, SenseKey.ABORTED_COMMAND)
                if not again or attentions >= ATTENTION_TRIES:
                    raise
            except Busy:
                busy += 1
                if busy >= BUSY_TRIES:
                    raise
                self._sleep(BUSY_PAUSE_S * busy)

    # --- PERSISTENT RESERVE OUT -------------------------------------------------------------------------------

    def _out(self, action: OutAction, key: int, action_key: int = 0, kind: int = 0, aptpl: bool = False) -> None:
        cdb, parameters = PrOut(action, key, action_key, kind, aptpl).encode()
        self.run(cdb, parameters)

    def register(self, key: int, new_key: int, *, aptpl: bool) -> None:
        """See ``Nexus``."""
        self._out(OutAction.REGISTER, key, new_key, aptpl=aptpl)

    def register_ignoring(self, new_key: int, *, aptpl: bool) -> None:
        """See ``Nexus``."""
        self._out(OutAction.REGISTER_AND_IGNORE_EXISTING_KEY, 0, new_key, aptpl=aptpl)

    def reserve(self, key: int) -> None:
        """See ``Nexus``."""
        self._out(OutAction.RESERVE, key, 0, OUR_TYPE)

    def preempt(self, key: int, victim: int, *, abort: bool) -> None:
        """See ``Nexus``."""
        self._out(OutAction.PREEMPT_AND_ABORT if abort else OutAction.PREEMPT, key, victim, OUR_TYPE)

    def clear(self, key: int) -> None:
        """See ``Nexus``."""
        self._out(OutAction.CLEAR, key)

    # --- PERSISTENT RESERVE IN --------------------------------------------------------------------------------

    def _ask(self, action: InAction, decode: Callable[[bytes, int], _Answer]) -> _Answer:
        asked = _FIRST_ASK
        for _ in range(4):  # others may register while we ask
            try:
                return decode(self.run(pr_in(action, asked), alloc_in=asked), asked)
            except NeedMore as error:
                asked = min(error.length + 64 * 8, MAX_IN_BYTES)
        raise BadReply(f"{self.name}: the answer to {action.name} grows faster than it can be read")

    def read_keys(self) -> Keys:
        """See ``Nexus``."""
        return self._ask(InAction.READ_KEYS, Keys.decode)

    def read_reservation(self) -> Held | None:
        """See ``Nexus``."""
        return self._ask(InAction.READ_RESERVATION, ReservationData.decode).held

    def full_status(self) -> FullStatus | None:
        """See ``Nexus``."""
        try:
            return self._ask(InAction.READ_FULL_STATUS, FullStatus.decode)
        except (NotOffered, CheckCondition) as error:
            if isinstance(error, CheckCondition) and not error.sense.refused:
                raise
            return None

    def capabilities(self) -> Capabilities | None:
        """See ``Nexus``."""
        try:
            return Capabilities.decode(self.run(pr_in(InAction.REPORT_CAPABILITIES, 8), alloc_in=8))
        except (NotOffered, CheckCondition) as error:
            if isinstance(error, CheckCondition) and not error.sense.refused:
                raise
            return None

    def lun_reset(self) -> None:
        """See ``Nexus``."""
        self.transport.lun_reset()

    def spare(self) -> Self | None:
        """See ``Nexus``."""
        transport = self.transport.spare()
        return None if transport is None else type(self)(transport, sleep=self._sleep)

    def close(self) -> None:
        """See ``Nexus``."""
        self.transport.close()


def command_name(cdb: bytes) -> str:
    """Return the name of a command that we send, for messages."""
    action = cdb[1] & 0x1F if len(cdb) > 1 else 0
    try:
        if cdb[0] == 0x5E:
            return InAction(action).name.replace("_", " ")
        if cdb[0] == 0x5F:
            return OutAction(action).name.replace("_", " ")
    except ValueError:
        pass
    names = {0x00: "TEST UNIT READY", 0x88: "READ", 0x89: "COMPARE AND WRITE", 0x8A: "WRITE", 0x9E: "READ CAPACITY"}
    return names.get(cdb[0], f"SCSI command {cdb[0]:02x}h")
