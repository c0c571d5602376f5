"""A SCSI disk in memory with persistent reservations, as SPC-4 describes them, and faults to order.

Writes are *queued* at the disk: they have passed the reservation check and land later, unless a preempt with abort
or a reset ends them. That is what a plain PREEMPT leaves alive.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mxfsd.pr.errors import CheckCondition, NotOffered, PathFailure
from mxfsd.pr.scsi import CONFLICT, ScsiNexus, command_name, raise_status
from mxfsd.pr.sense import Sense, SenseKey
from mxfsd.pr.spc import (
    Capabilities,
    Held,
    Keys,
    OutAction,
    PrOut,
    Registrant,
    ReservationData,
    encode_registrant,
)

ATTENTION_RESET = Sense(SenseKey.UNIT_ATTENTION, 0x29, 0)
ATTENTION_PREEMPTED = Sense(SenseKey.UNIT_ATTENTION, 0x2A, 0x05)
INVALID_FIELD = Sense(SenseKey.ILLEGAL_REQUEST, 0x24, 0)
INVALID_OPCODE = Sense(SenseKey.ILLEGAL_REQUEST, 0x20, 0)
BLOCK = 512


@dataclass
class FakeTarget:
    """One disk. *abort*: has PREEMPT AND ABORT; *aptpl*: keeps registrations over ``restart`` when asked to.

    *dangles*: as tgt does, it keeps the reservation with one registrant, *holder*; when that one is preempted, the
    next registration is taken for the reservation, which then has the type 0 and the key *damaged*.
    """

    abort: bool = True
    aptpl: bool = True
    full: bool = True
    reset: bool = True
    registered: dict[str, int] = field(default_factory=dict)
    type: int = 0
    generation: int = 0
    keep: bool = False
    blocks: dict[int, bytes] = field(default_factory=dict)
    queued: list[tuple[str, int, bytes]] = field(default_factory=list)
    attentions: dict[str, deque[Sense]] = field(default_factory=dict)
    resets: int = 0
    dangles: bool = False
    holder: str | None = ""
    damaged: int = 0
    spares: int = 0

    def transport(self, name: str) -> "FakeTransport":
        self.attentions.setdefault(name, deque())
        return FakeTransport(self, name)

    def nexus(self, name: str) -> ScsiNexus:
        return ScsiNexus(self.transport(name), sleep=lambda _seconds: None)

    def restart(self) -> None:
        """Lose power."""
        self.generation = 0
        self.queued.clear()
        if not self.keep:
            self.registered.clear()
            self.type = self.damaged = 0

    def land(self) -> None:
        """Execute what is queued."""
        for _, block, data in self.queued:
            self.blocks[block] = data
        self.queued.clear()

    def allowed(self, name: str) -> bool:
        return self.type == 0 or name in self.registered

    def logical_unit_reset(self) -> None:
        if not self.reset:
            raise NotOffered("no reset")
        self.resets += 1
        self.queued.clear()
        for waiting in self.attentions.values():
            waiting.append(ATTENTION_RESET)

    def out(self, name: str, command: PrOut) -> int | Sense:
        """Return the SCSI status, or the sense data of a refusal."""
        action, own = command.action, self.registered.get(name, 0)
        if action is OutAction.PREEMPT_AND_ABORT and not self.abort:
            return INVALID_FIELD
        if command.aptpl and not self.aptpl:
            return INVALID_FIELD
        if action is OutAction.REGISTER and command.key != own:
            return CONFLICT
        if action in (OutAction.REGISTER, OutAction.REGISTER_AND_IGNORE_EXISTING_KEY):
            return self._register(name, command)
        if own == 0 or command.key != own:
            return CONFLICT
        if action is OutAction.RESERVE:
            if self.type not in (0, command.type) or self.damaged:
                return CONFLICT
            self.holder = self.holder if self.type else name
            self.type = command.type
        elif action is OutAction.CLEAR:
            self._remove(set(self.registered), name)
            self.registered.clear()
            self.type = self.damaged = 0
            self.generation += 1
        elif action in (OutAction.PREEMPT, OutAction.PREEMPT_AND_ABORT):
            return self._preempt(name, command)
        return 0

    def _register(self, name: str, command: PrOut) -> int:
        self.keep = command.aptpl  # SPC-4 5.13.5: the last one counts, from whomever and also where it unregisters
        if command.action_key:
            if self.type and self.holder is None and name not in self.registered:
                self.holder, self.damaged = name, command.action_key
            self.registered[name] = command.action_key
        else:
            gone = self.registered.pop(name, None)
            if not self.registered or (self.damaged and gone == self.damaged):
                self.type = self.damaged = 0
            elif not self.damaged:
                self.holder = next(iter(self.registered))
        self.generation += 1
        return 0

    def _preempt(self, name: str, command: PrOut) -> int:
        everyone = command.action_key == 0  # SPC-4 5.13.11.4: all registrants, key 0
        victims = {n for n, key in self.registered.items() if key == command.action_key or (everyone and n != name)}
        if not victims:
            return CONFLICT
        if self.damaged:
            victims.discard(name)
            if command.action_key == self.damaged:
                self.holder, self.type, self.damaged = name, command.type, 0
        self._remove(victims, name)
        if self.dangles and self.holder in victims:
            self.holder = None
        if command.action is OutAction.PREEMPT_AND_ABORT:
            self.queued = [entry for entry in self.queued if entry[0] not in victims]
        self.generation += 1
        return 0

    def _remove(self, victims: set[str], by: str) -> None:
        for victim in victims:
            self.registered.pop(victim, None)
            if victim != by:
                self.attentions[victim].append(ATTENTION_PREEMPTED)


@dataclass
class FakeTransport:
    """One I_T nexus. ``hook`` runs before each command and may raise; ``lose`` counts answers to be lost."""

    target: FakeTarget
    name: str
    hook: Callable[[str], None] = lambda _what: None
    lose: int = 0
    dead: bool = False
    log: list[str] = field(default_factory=list)
    closed: bool = False

    def execute(self, cdb: bytes, data_out: bytes, alloc_in: int) -> bytes:
        what = command_name(cdb)
        if self.dead:
            raise PathFailure(f"{self.name}: {what}: no connection")
        self.hook(what)
        waiting = self.target.attentions[self.name]
        if waiting:
            raise CheckCondition(f"{self.name}: {what}", waiting.popleft())
        self.log.append(what)
        try:
            return self._execute(cdb, data_out, alloc_in, what)[:alloc_in]
        finally:
            if self.lose and cdb[0] == 0x5F:
                self.lose -= 1
                raise PathFailure(f"{self.name}: {what}: timed out")

    def _execute(self, cdb: bytes, data_out: bytes, alloc_in: int, what: str) -> bytes:
        target = self.target
        if cdb[0] == 0x5F:
            result = target.out(self.name, PrOut.decode(cdb, data_out))
            if isinstance(result, Sense):
                raise CheckCondition(f"{self.name}: {what}", result)
            raise_status(self.name, what, result, b"")
            return b""
        if cdb[0] == 0x5E:
            return self._read(cdb[1])
        block, count = int.from_bytes(cdb[2:10]), int.from_bytes(cdb[10:14])
        if not target.allowed(self.name):
            raise_status(self.name, what, CONFLICT, b"")
        if cdb[0] == 0x8A:
            target.queued.append((self.name, block, data_out))
            return b""
        if cdb[0] == 0x88:
            return b"".join(target.blocks.get(block + at, bytes(BLOCK)) for at in range(count))
        raise CheckCondition(f"{self.name}: {what}", INVALID_OPCODE)

    def _read(self, action: int) -> bytes:
        target = self.target
        if action == 0:
            return Keys(target.generation, tuple(target.registered.values())).encode()
        if action == 1:
            kind = 0 if target.damaged else target.type
            held = Held(target.generation, target.damaged, kind) if target.type else None
            return ReservationData(target.generation, held).encode()
        if action == 2:
            return Capabilities(target.aptpl, target.keep, frozenset({5, 8})).encode()
        if not target.full:
            raise CheckCondition(f"{self.name}: READ FULL STATUS", INVALID_FIELD)
        body = b"".join(
            encode_registrant(Registrant(key, bool(target.type), target.type, 1, f"iqn.test:{name}"))
            for name, key in target.registered.items()
        )
        return target.generation.to_bytes(4) + len(body).to_bytes(4) + body

    def lun_reset(self) -> None:
        if self.dead:
            raise PathFailure(f"{self.name}: LOGICAL UNIT RESET: no connection")
        self.hook("LOGICAL UNIT RESET")
        self.log.append("LOGICAL UNIT RESET")
        self.target.logical_unit_reset()

    def spare(self) -> "FakeTransport | None":
        self.hook("LOGIN")
        if not self.target.dangles:
            return None
        self.target.spares += 1
        return self.target.transport(f"{self.name}+{self.target.spares}")

    def close(self) -> None:
        self.closed = True
