"""The rules that make a fence by persistent reservations safe, over any paths to the disk.

Blocking; one thread at a time.

``docs/fencing.md`` explains them. In short: reservation type 8 (exclusive access, all registrants); one key for one
incarnation of a node, registered on every path; a command that changes something may be repeated at any time, and
what counts is what READ KEYS and READ RESERVATION say afterwards.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from typing import TypeVar

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import (
    CheckCondition,
    DamagedReservation,
    ForeignReservation,
    NotOffered,
    PathFailure,
    Preempted,
    ReservationConflict,
    ReservationError,
    ReservationLost,
    StaleRegistration,
    Unconfirmed,
)
from mxfsd.pr.keys import PREFIX, RANDOM_BITS, key_text
from mxfsd.pr.nexus import Nexus
from mxfsd.pr.spc import MAX_KEY, Capabilities, FullStatus, Held, Keys

_T = TypeVar("_T")
_TRIES = 3
"""How often a sequence that another node's command crossed, or whose answer was lost, begins again."""
_REPAIR_S = 2.0
"""How long a damaged reservation is left to the node whose key it shows: it has just registered, and repairs it."""
_GLANCE_S = 0.2
"""How long a look is repeated while the reservation is damaged: mostly somebody is just repairing it."""
_PAUSE_S = 0.02


class Standing(Enum):
    """What ``check`` found: our registration and the reservation are there; we were fenced; the target lost them.

    LOST does not say that we were not fenced: the target may have restarted after that.
    """

    OK = "ok"
    PREEMPTED = "preempted"
    LOST = "lost"


class _State(Enum):
    NEW = "new"
    REGISTERED = "registered"
    LEFT = "left"
    PREEMPTED = "preempted"


class Reservations:
    """The reservations of one disk, for one incarnation of a node.

    Every method raises PathFailure when no path answers, CheckCondition or BadReply when the target misbehaves, and
    MisuseError when called out of turn. Once Preempted was raised (or ``check`` returned PREEMPTED), every method that
    would change something raises Preempted again.
    """

    def __init__(self, device: str, paths: Sequence[Nexus], *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Use the open *paths* (one or more) to the one disk *device*; *sleep* takes seconds."""
        if not paths:
            raise MisuseError(f"{device}: no path")
        self.device = device
        self.paths = tuple(paths)
        self.key = 0
        """Our key, 0 before ``register``."""
        self.aptpl = False
        """Whether the target promised to keep our registration over a loss of power."""
        self.returned: frozenset[int] = frozenset()
        """Keys that this object has fenced and that the last ``check`` found registered again. They must be fenced
        again before anything that relies on the fence goes on."""
        self._state = _State.NEW
        self._fenced: set[int] = set()
        self._generation = 0
        self._live = 0
        self._sleep = sleep

    # --- joining and leaving ----------------------------------------------------------------------------------

    def register(self, key: int, *, aptpl: bool = True, replace: bool = False) -> None:
        """Register *key* (1..2^64-1) on every path. Call before the key is published in the slot record.

        *aptpl*: ask that the registration survives a loss of power; a target that cannot is used without (``aptpl``
        then says so). A path on which this host is registered with another key: StaleRegistration, unless *replace*.
        Replace only when nothing of the earlier incarnation on this host can have I/O under way (a trial O_EXCL open of
        the device succeeded): the target lets that I/O pass under the new key, and to the other nodes the old key
        looks fenced. If one path fails, the others are unregistered again: I/O on it would be refused.
        """
        self._check_key(key)
        if self._state is _State.PREEMPTED:
            raise Preempted(self.device, self.key)
        if self._state is not _State.NEW and key != self.key:
            raise MisuseError(f"{self.device}: a new key needs a new object")
        if self._state is _State.LEFT:
            raise MisuseError(f"{self.device}: this incarnation has unregistered")
        if self._state is _State.REGISTERED:
            self._own_keys()
            return
        self.key = key
        self._register_paths(aptpl, replace)
        self._state = _State.REGISTERED
        self._own_keys()

    def _register_paths(self, aptpl: bool, replace: bool) -> None:
        done: list[Nexus] = []
        self.aptpl = aptpl
        try:
            for path in self.paths:
                done.append(path)  # also a path with an unknown outcome is to be undone
                self._register_path(path, replace)
        except BaseException:
            for path in done:
                try:
                    path.register(self.key, 0, aptpl=self.aptpl)
                except (ReservationError, OSError):
                    continue  # the first error is the one to report; a leftover key is shown by mxfs pr
            raise

    def _register_path(self, path: Nexus, replace: bool) -> None:
        failures = 0
        while True:
            try:
                self._register_once(path, replace)
                return
            except PathFailure:
                failures += 1
                if failures == _TRIES:
                    raise
            except CheckCondition as error:
                # tgt answers 5/2400 and others 5/2600 when they are asked for APTPL and do not have it.
                if not (self.aptpl and error.sense.refused):
                    raise
                self.aptpl = False

    def _register_once(self, path: Nexus, replace: bool) -> None:
        try:
            path.register(0, self.key, aptpl=self.aptpl)
            return
        except ReservationConflict:
            pass  # this path is registered already; with our key, if an earlier answer was lost
        try:
            path.register(self.key, self.key, aptpl=self.aptpl)
            return
        except ReservationConflict as error:
            if not replace:
                raise StaleRegistration(
                    f"{path.name}: this host is registered with another key, of an earlier mount that did not end well "
                    f"or of another program: see mxfs pr {self.device}"
                ) from error
        path.register_ignoring(self.key, aptpl=self.aptpl)

    def unregister(self) -> None:
        """Take our registration back on every path; the reservation stays for the others. Nothing to do: success."""
        if self._state in (_State.NEW, _State.LEFT):
            return
        if self._state is _State.PREEMPTED:
            raise Preempted(self.device, self.key)
        failure: PathFailure | None = None
        for path in self.paths:
            try:
                self._unregister_path(path)
            except PathFailure as error:
                failure = error
        if self.key in self._read_keys().keys:
            raise failure or ReservationError(f"{self.device}: our key is still registered after unregistering it")
        self._state = _State.LEFT

    def _unregister_path(self, path: Nexus) -> None:
        # The last REGISTER from anybody, also one that takes a key back, says for all what a loss of power does (SPC-4
        # 5.13.5): without APTPL it would make the target forget the keys of those who stay.
        for attempt in range(_TRIES):
            try:
                path.register(self.key, 0, aptpl=self.aptpl)
            except ReservationConflict:
                return  # not registered any more: READ KEYS decides
            except PathFailure:
                if attempt + 1 == _TRIES:
                    raise
            else:
                return

    def reserve(self) -> None:
        """Make sure that the disk has our reservation, and put a damaged one right.

        Raises ForeignReservation for one of another type, DamagedReservation.
        """
        self._must_be_registered()
        repaired = False
        for attempt in range(_TRIES):
            if self._our_reservation():
                break
            try:
                if self.read_reservation() is None:
                    self._any(lambda path: path.reserve(self.key))
                else:
                    repaired = True
                    self._repair()
            except (ReservationConflict, PathFailure):
                # Another node reserved or repaired meanwhile, or the answer was lost, or we were preempted.
                self._own_keys()
                if attempt + 1 == _TRIES:
                    raise
        if not self._our_reservation():
            raise ReservationLost(f"{self.device}: the target accepted the reservation but does not show it")
        self._own_keys()
        if repaired:
            for path in self.paths:  # a PREEMPT of our own key spares only the path that it takes
                self._register_path(path, replace=False)

    # --- a target that loses track of its reservation --------------------------------------------------------

    # tgt keeps the reservation with one of the registrants, and when that one is preempted it goes on using the memory
    # which it has freed. The next registration, or anything else, may get that memory: then READ RESERVATION shows
    # whatever is there. tgt goes on to refuse writes of those who are not registered, but nobody should build on that.
    # A PREEMPT of the key that it shows takes such a reservation over as one of type 8, with no moment in between in
    # which there is none (RELEASE and CLEAR would have one). So do we.

    def _damaged(self, held: Held | None, keys: Keys) -> bool:
        """Whether a reservation cannot be anybody's: of no type that there is, or held by a key that is not registered.

        One of another type with our own key counts too: we never make such.
        """
        if held is None:
            return False
        if held.key == self.key:
            return not held.ours
        return not held.known or (held.key != 0 and held.key not in keys.keys)

    def _look(self, seconds: float) -> tuple[Keys, Held | None, bool]:
        """Return keys, reservation, and whether it is damaged; for so long look again while it is."""
        for last in range(int(seconds / _PAUSE_S), -1, -1):
            keys, held = self._read_keys(), self.read_reservation()
            damaged = self._damaged(held, keys)
            if not damaged or not last:
                break
            self._sleep(_PAUSE_S)
        return keys, held, damaged

    def _repair(self) -> None:
        """Make a damaged reservation ours. Raises DamagedReservation; ReservationConflict: look again."""
        keys, held, damaged = self._look(0)
        if damaged and held is not None and held.key != self.key and held.key in keys.keys:
            keys, held, damaged = self._look(_REPAIR_S)  # that node has just registered, and does what we do
        if not damaged or held is None:
            return
        shown = held.key
        if shown in self._own_keys().keys:
            self._any(lambda path: path.preempt(self.key, shown, abort=False))
            return
        with self._spare() as spare:
            # Looked at again, since our log-in may have changed it.
            keys, held, damaged = self._look(0)
            if not damaged or held is None or held.key in keys.keys:
                return
            if spare is None or held.key == 0:  # with key 0, PREEMPT would remove all others
                raise DamagedReservation(
                    f"{self.device}: the target shows a reservation of type {held.type} whose holder "
                    f"{key_text(held.key)} is not registered: unmount everywhere and restart the target"
                )
            shown = held.key
            with _registered(spare, shown, aptpl=self.aptpl):
                self._any(lambda path: path.preempt(self.key, shown, abort=False))

    @contextmanager
    def _anchored(self) -> Iterator[None]:
        """For a plain PREEMPT: have such a target keep the reservation with a registrant that is there.

        When a registration is taken back, tgt hands the reservation on to one of the others. It is not our own that we
        take back for that, right after the PREEMPT, but one made before. Where it cannot be made there is the repair.
        """
        key = PREFIX << 48 | secrets.randbits(RANDOM_BITS)
        spare: Nexus | None = None
        with ExitStack() as stack:
            with suppress(PathFailure, ReservationConflict, CheckCondition):
                spare = stack.enter_context(self._spare())
                if spare is not None:
                    stack.enter_context(_registered(spare, key, aptpl=self.aptpl))
            yield
            if spare is not None and _held_by(spare.read_reservation(), key):
                # Another node has preempted the same victim just before we made it.
                self._any(lambda path: path.preempt(self.key, key, abort=False))

    @contextmanager
    def _spare(self) -> Iterator[Nexus | None]:
        spare = self._any(lambda path: path.spare())
        try:
            yield spare
        finally:
            if spare is not None:
                spare.close()

    # --- fencing ----------------------------------------------------------------------------------------------

    def preempt(self, victim: int) -> None:
        """Shut the node with the key *victim* out, and end its commands under way. Returns when that is confirmed.

        Confirmed: READ KEYS shows our key and not the victim's, and the reservation is there, after the target had
        aborted the victim's commands. May be repeated, by any node, at any point. Raises Unconfirmed when the target
        cannot abort them, ReservationLost without a reservation (then a fence is worth nothing), Preempted when the
        victim was faster.
        """
        self._check_key(victim)
        self._must_be_registered()
        if victim == self.key:
            raise MisuseError(f"{self.device}: a node does not fence itself")
        self._own_keys()
        if not self._our_reservation(_GLANCE_S):
            raise ReservationLost(f"{self.device}: there is no reservation: fencing needs it")
        for attempt in range(_TRIES):
            try:
                self._preempt_once(victim)
                self._confirm(victim)
            except (Unconfirmed, PathFailure):
                if attempt + 1 == _TRIES:
                    raise
            else:
                self._fenced.add(victim)
                return

    def _preempt_once(self, victim: int) -> None:
        """Preempt and abort; the target's own command for both, else PREEMPT and a reset of the logical unit.

        CONFLICT to the first means that the target has that command and does not know the victim: whoever removed the
        key used the same command. To the second it does not: he who preempted may have died before the reset.
        """
        try:
            self._any(lambda path: self._preempt_on(path, victim, abort=True))
            return
        except NotOffered:
            pass
        except CheckCondition as error:
            if not error.sense.refused:
                raise
        with self._anchored():
            self._any(lambda path: self._preempt_on(path, victim, abort=False))
        try:
            self._any(lambda path: path.lun_reset())
        except NotOffered as error:
            raise Unconfirmed(
                f"{self.device}: {key_text(victim)} is shut out, but its commands cannot be aborted"
            ) from (error)

    def _preempt_on(self, path: Nexus, victim: int, *, abort: bool) -> None:
        try:
            path.preempt(self.key, victim, abort=abort)
        except ReservationConflict:
            if victim in self._own_keys().keys:
                # Neither key is missing, so this path is not registered: the target has forgotten it.
                raise PathFailure(f"{path.name}: the target refuses our key on this path") from None

    def _confirm(self, victim: int) -> None:
        if victim in self._own_keys().keys:
            raise Unconfirmed(f"{self.device}: {key_text(victim)} is still registered after preempting it")
        if not self._our_reservation(_GLANCE_S):
            raise ReservationLost(f"{self.device}: the reservation is gone after preempting {key_text(victim)}")

    # --- looking after it -------------------------------------------------------------------------------------

    def check(self) -> Standing:
        """Look whether our registration and the reservation are there; call it at each renewal of the lease.

        A generation that went back shows a restarted target even where other nodes have re-established theirs already.
        """
        self._must_be_registered()
        keys, held, damaged = self._look(_GLANCE_S)
        restarted = keys.generation < self._generation
        self.returned = frozenset(self._fenced.intersection(keys.keys))
        if self.key not in keys.keys:
            if held is None or not keys.keys or restarted:
                return Standing.LOST
            self._state = _State.PREEMPTED
            return Standing.PREEMPTED
        self._generation = keys.generation
        return Standing.OK if held is not None and held.ours and not damaged else Standing.LOST

    def reestablish(self, still_ours: Callable[[], bool]) -> None:
        """After LOST, with all I/O frozen: register the same key again, and reserve.

        *still_ours* reads from the disk whether this node still has its slot, under the same incarnation, and nobody
        has fenced it (the lease too, on the home). It is asked after registering, since the disk cannot be read before;
        when it says no or raises, our key is taken back and Preempted (or its exception) raised. Without that, a node
        that was fenced before the target restarted would let itself in again. Thaw only after this has returned.
        """
        self._must_be_registered()
        standing = self.check()
        if standing is Standing.PREEMPTED:
            raise Preempted(self.device, self.key)
        if standing is Standing.OK:
            return
        self._generation = 0
        if self.key not in self._read_keys().keys:
            self._register_paths(self.aptpl, replace=False)
        try:
            ours = still_ours()
        except BaseException:
            self._withdraw()
            raise
        if not ours:
            self._withdraw()
            raise Preempted(self.device, self.key)
        self.reserve()
        self._own_keys()

    def _withdraw(self) -> None:
        """Take back a registration that we should not have made; whatever happens this object is done."""
        self._state = _State.PREEMPTED
        for path in self.paths:
            self._unregister_path(path)

    def clear(self, key: int) -> None:
        """For an operator: remove the reservation and every registration. Every node loses its fence protection.

        *key* is a key to register with for the purpose; an object that is registered uses its own.
        """
        if self._state is _State.PREEMPTED:
            raise Preempted(self.device, self.key)
        if self._state is not _State.REGISTERED:
            self._check_key(key)
            self.key = key
        self._any(self._clear_on)
        self._state = _State.LEFT
        left = self._read_keys().keys
        if left or self.read_reservation() is not None:
            raise ReservationError(f"{self.device}: {len(left)} keys are registered again after clearing")

    def _clear_on(self, path: Nexus) -> None:
        if self._state is not _State.REGISTERED:
            path.register_ignoring(self.key, aptpl=False)
        path.clear(self.key)

    # --- reading ----------------------------------------------------------------------------------------------

    def read_keys(self) -> Keys:
        """Return the registered keys."""
        return self._any(lambda path: path.read_keys())

    def read_reservation(self) -> Held | None:
        """Return the reservation, or None."""
        return self._any(lambda path: path.read_reservation())

    def full_status(self) -> FullStatus | None:
        """Return each registrant with its initiator, or None where the target does not offer that."""
        return self._any(lambda path: path.full_status())

    def capabilities(self) -> Capabilities | None:
        """Return what the target can do, or None where it does not say."""
        return self._any(lambda path: path.capabilities())

    def close(self) -> None:
        """Let go of the device. Registrations stay: ``unregister`` first, when leaving in order."""
        for path in self.paths:
            path.close()

    # --- helpers ----------------------------------------------------------------------------------------------

    def _any(self, act: Callable[[Nexus], _T]) -> _T:
        """Do it on the first path that answers, beginning with the one that did last: a dead one costs its timeout."""
        for number in range(len(self.paths)):
            at = (self._live + number) % len(self.paths)
            try:
                result = act(self.paths[at])
            except PathFailure:
                if number + 1 == len(self.paths):
                    raise
            else:
                self._live = at
                return result
        raise AssertionError("unreachable")

    def _check_key(self, key: int) -> None:
        # PREEMPT of key 0 would remove every other node at once.
        if not 0 < key <= MAX_KEY:
            raise MisuseError(f"{self.device}: no reservation key: {key}")

    def _must_be_registered(self) -> None:
        if self._state is _State.PREEMPTED:
            raise Preempted(self.device, self.key)
        if self._state is not _State.REGISTERED:
            raise MisuseError(f"{self.device}: not registered")

    def _read_keys(self) -> Keys:
        return self._any(lambda path: path.read_keys())

    def _own_keys(self) -> Keys:
        """Return all keys; raises Preempted or ReservationLost when ours is not among them."""
        keys = self._read_keys()
        if self.key in keys.keys:
            self._generation = keys.generation
            return keys
        standing = self.check()
        if standing is Standing.PREEMPTED:
            raise Preempted(self.device, self.key)
        raise ReservationLost(f"{self.device}: our registration is gone: the target has restarted")

    def _our_reservation(self, glance_s: float = 0) -> bool:
        """Whether ours is there; a damaged one does not count. Raises ForeignReservation."""
        _, held, damaged = self._look(glance_s)
        if held is not None and not held.ours and not damaged:
            raise ForeignReservation(
                f"{self.device} has a reservation of type {held.type} that is not of MXFS; its owner must release it"
            )
        return held is not None and not damaged


def _held_by(held: Held | None, key: int) -> bool:
    """Whether a reservation of another type than ours is held by *key*."""
    return held is not None and not held.ours and held.key == key


@contextmanager
def _registered(path: Nexus, key: int, *, aptpl: bool) -> Iterator[None]:
    """Have *key* registered on *path* for the length of a with block; *aptpl* as the others have it."""
    path.register(0, key, aptpl=aptpl)
    try:
        yield
    finally:
        # Not while a damaged reservation hangs on it: that would end the reservation.
        if not _held_by(path.read_reservation(), key):
            with suppress(ReservationConflict):  # it was preempted
                path.register(key, 0, aptpl=aptpl)
