"""The locks that the FUSE layer of one node caches (pure; see docs/architecture.md, "Giving a lock up").

``mode(ino)`` says what may be used right now. A BAST makes a lock REVOKING: new uses see NL and must ask again
(``want``), uses in flight end (``pin``/``unpin``), the executor makes the kernel drop what it cached (Invalidate,
``invalidated``), and only then is the master told (SendRelease).

**Pins.** A *use* pin covers a use of the lock that begins and ends in this process; revocation waits for it. So do
not hold one while waiting for anything from the home: a lock, an upgrade, a shipped operation. A *data* pin covers a
READ or WRITE upcall that is answered under the lock, while the kernel holds the folio that the invalidation needs: it
may begin while the lock is being revoked (``data_mode``), does not hold up the invalidation, but makes it run again.

**Order.** Grants and BASTs of the lock channel come in order. A grant that rides with the reply of an operation
(``adopt``) may be overtaken by the BAST for it. Then the BAST is answered as soon as what *is* cached is dropped, and
the grant is worth nothing when it comes: the reply that it rides with is used uncached. Without entries for resources
given back, the sequences of those last given back are kept, and one floor for all older ones.

States of a resource (no entry in ``_revokes`` = HELD):

    HELD -> DEFERRED (minimum hold) -> DRAINING (pins) -> INVALIDATING -> HELD | DRAINING (again)

A newer grant while a lock is being revoked makes it HELD again; a pass of invalidation under way is then let run.
Errors: MisuseError for calls that contradict the state; nothing is changed then.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, auto
from errno import EAGAIN

from mxfs_proto.errors import MisuseError
from mxfs_proto.filelocks import is_resource
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfsd.core.lockeffects import CacheEffect, Invalidate, Later, Opens, SendCancel, SendRelease, SendRequest, Wake
from mxfsd.core.lockmodes import COMPATIBLE, COVERS, FLAGS, MEET

_NL, _PR, _PW, _EX = LockMode.NL, LockMode.PR, LockMode.PW, LockMode.EX
_OPEN, _MAY_KEEP = int(LockFlag.OPEN), int(LockFlag.MAY_KEEP)
_OTHERS = int(LockFlag.OTHER_OPEN | LockFlag.OTHER_WRITER)
_OTHER_WRITER, _RECLAIM = int(LockFlag.OTHER_WRITER), int(LockFlag.RECLAIM)

GIVEN_BACK_KEPT = 8192
"""So many resources given back have their last sequence remembered; the floor stands for those before."""
HOT_MS = 20
"""A lock that went down to PR and is called back altogether so soon after goes all the way at once the next times,"""
HOT_FOR_MS = 1000
"""for so long: then it is tried anew."""
FORGET_BATCH = 256
"""So many locks that the kernel forgot are given back at once, or as many as there are at a tick."""


class State(Enum):
    """Where a lock is on its way back to the master."""

    HELD = auto()
    DEFERRED = auto()
    DRAINING = auto()
    INVALIDATING = auto()


_NEXT: dict[State, frozenset[State]] = {
    State.HELD: frozenset({State.DEFERRED, State.DRAINING}),
    State.DEFERRED: frozenset({State.DRAINING, State.HELD}),
    State.DRAINING: frozenset({State.INVALIDATING, State.HELD}),
    State.INVALIDATING: frozenset({State.DRAINING, State.HELD}),
}


class _Lock:
    """One cached lock. ``usable`` is ``mode``, or NL while it is being revoked."""

    __slots__ = ("flags", "mode", "seq", "usable")

    def __init__(self, mode: LockMode, seq: int, flags: int) -> None:
        self.mode = mode
        self.usable = mode
        self.seq = seq
        self.flags = flags


class _Revoke:
    """A revocation under way. ``passing``: an Invalidate is out; ``again``: it must be repeated."""

    __slots__ = ("again", "passing", "since_ms", "state", "target", "wait_data")

    def __init__(self, now_ms: int, target: LockMode) -> None:
        self.state = State.HELD
        self.since_ms = now_ms
        self.target = target
        self.passing = False
        self.again = False
        self.wait_data = False


class _Want:
    """A request without an answer. ``sent_ms`` is -1 while it waits for a revocation to end."""

    __slots__ = ("flags", "ino", "mode", "opens", "sent_ms")

    def __init__(self, ino: int, mode: LockMode, flags: LockFlag, opens: Opens | None) -> None:
        self.ino = ino
        self.mode = mode
        self.flags = flags
        self.opens = opens
        self.sent_ms = -1


def _no_opens(ino: int) -> Opens:
    return (0, 0)


def _no_writer(ino: int) -> bool:
    return False


class LockCache:
    """The lock cache of one FUSE layer. On the home every resource without an entry is held EX implicitly."""

    def __init__(
        self,
        implicit: bool,
        *,
        opens_of: Callable[[int], Opens] = _no_opens,
        has_cached_writer: Callable[[int], bool] = _no_writer,
        min_hold_ms: int = 1,
        lock_wait_ms: int = 30000,
        first_req: int = 1,
    ) -> None:
        """Make an empty cache.

        *opens_of* returns the node's (readers, writers) counts of an inode, those whose request is pending included.
        *has_cached_writer* says whether a writable descriptor that is not direct is open.
        """
        self._implicit = implicit
        self._default = _EX if implicit else _NL
        self._opens_of = opens_of
        self._has_cached_writer = has_cached_writer
        self._min_hold_ms = min_hold_ms
        self._lock_wait_ms = lock_wait_ms
        self._locks: dict[int, _Lock] = {}
        self._uses: dict[int, int] = {}
        self._data: dict[int, int] = {}
        self._revokes: dict[int, _Revoke] = {}
        self._fresh: dict[int, int] = {}
        self._wants: dict[int, _Want] = {}
        self._wants_of: dict[int, list[int]] = {}
        self._given_back: dict[int, int] = {}
        self._floor = 0
        self._first_seq = 0
        self._forgotten: dict[int, int] = {}
        self._lowered: dict[int, int] = {}
        """When locks went down to PR, the latest last; only those of the last HOT_MS count."""
        self._hot: dict[int, int] = {}
        """Until when locks that two nodes hand to and fro, reading first, go all the way."""
        self._req_id = first_req - 1

    # -- use -------------------------------------------------------------------------------------------------------

    def mode(self, ino: int) -> LockMode:
        """Return what may be used now: the cached mode, NL while it is being revoked."""
        lock = self._locks.get(ino)
        return self._default if lock is None else lock.usable

    def data_mode(self, ino: int) -> LockMode:
        """Return what is still held: READ and WRITE upcalls are answered under it even while it is being revoked."""
        lock = self._locks.get(ino)
        return self._default if lock is None else lock.mode

    def seq(self, ino: int) -> int:
        """Return the grant sequence of the lock held (0: implicit), -1 where none is."""
        lock = self._locks.get(ino)
        if lock is None:
            return 0 if self._implicit else -1
        return lock.seq

    def flags(self, ino: int) -> LockFlag:
        """Return the OTHER_OPEN and OTHER_WRITER of the last grant."""
        lock = self._locks.get(ino)
        return FLAGS[0 if lock is None else lock.flags]

    def may_open(self, ino: int, writable: bool) -> bool:
        """Return whether a cached descriptor may be opened under the lock held, without asking the master."""
        lock = self._locks.get(ino)
        if lock is None:
            return self._implicit
        if lock.usable is _EX:
            return not lock.flags & (_OTHERS if writable else _OTHER_WRITER)
        return not writable and lock.usable is _PR and not lock.flags & _OTHER_WRITER

    def state(self, ino: int) -> State:
        """Return where the lock is on its way back."""
        revoke = self._revokes.get(ino)
        return State.HELD if revoke is None else revoke.state

    def pin(self, ino: int, data: bool = False) -> None:
        """Note a use of the lock (see the module's text). Check mode() before, or data_mode() for data."""
        pins = self._data if data else self._uses
        pins[ino] = pins.get(ino, 0) + 1

    def unpin(self, now_ms: int, ino: int, data: bool = False) -> list[CacheEffect]:
        """End a use. Data pins end after the answer was written to the kernel."""
        pins = self._data if data else self._uses
        count = pins.get(ino, 0)
        if count > 1:
            pins[ino] = count - 1
        elif count == 1:
            del pins[ino]
        else:
            raise MisuseError(f"unpin of {ino}, which is not pinned")
        out: list[CacheEffect] = []
        if self._revokes:
            revoke = self._revokes.get(ino)
            if revoke is not None:
                if data and revoke.state is State.INVALIDATING:
                    revoke.again = True
                self._drained(ino, revoke, out)
        return out

    # -- asking ----------------------------------------------------------------------------------------------------

    def want(
        self, now_ms: int, ino: int, mode: LockMode, flags: LockFlag = LockFlag.NONE, opens: Opens | None = None
    ) -> tuple[int, list[CacheEffect]]:
        """Ask for *mode*. Return the request's number, on which the caller waits for Wake, and the effects.

        A request that another one with the same flags covers joins it: several waiters may share a number. With
        OPEN, *opens* counts the descriptor to be opened. While the lock is being revoked the request is held back.
        """
        out: list[CacheEffect] = []
        bits = int(flags)
        if not bits & _OPEN:
            if COVERS[self.mode(ino)][mode] and self.mode(ino) is not _NL:
                self._req_id += 1
                out.append(Wake(self._req_id, self.mode(ino), self.flags(ino), ino))
                return self._req_id, out
            for req_id in self._wants_of.get(ino, ()):
                other = self._wants[req_id]
                if COVERS[other.mode][mode] and int(other.flags) == bits:
                    return req_id, out
        elif opens is None:
            raise MisuseError(f"request to open {ino} without counts")
        self._req_id += 1
        req_id = self._req_id
        self._wants[req_id] = _Want(ino, mode, flags, opens)
        self._wants_of.setdefault(ino, []).append(req_id)
        if not self._revoking(ino):
            self._send(now_ms, req_id, out)
        return req_id, out

    def cancel(self, now_ms: int, req_id: int) -> list[CacheEffect]:
        """Nobody waits for *req_id* any more. A grant that comes all the same is kept."""
        want = self._wants.get(req_id)
        if want is None:
            return []
        self._end_want(req_id)
        return [] if want.sent_ms < 0 else [SendCancel(req_id, want.ino)]

    def on_grant(
        self, now_ms: int, req_id: int, ino: int, mode: LockMode, seq: int, flags: LockFlag = LockFlag.NONE
    ) -> list[CacheEffect]:
        """A grant came over the lock channel (*req_id* 0: unasked, or a reclaim)."""
        out: list[CacheEffect] = []
        lock = self._locks.get(ino)
        asked = req_id in self._wants
        if mode is _NL:  # uncached: what is held stays, but others have the file open
            if lock is not None:
                lock.flags |= int(flags) & _OTHERS
        elif seq > self._known(ino):
            others = int(flags) & _OTHERS
            if int(flags) & _RECLAIM and lock is not None:
                others |= lock.flags  # the other nodes may not have said yet what they have open
            self._hold(now_ms, ino, mode, seq, others, out)
            if asked:
                self._fresh[ino] = now_ms
            elif self._implicit and mode is _EX and not others and ino not in self._revokes:
                del self._locks[ino]
        if req_id in self._wants:
            self._end_want(req_id)
            out.append(Wake(req_id, mode, flags, ino))
        return out

    def on_deny(self, now_ms: int, req_id: int, ino: int, errno: int) -> list[CacheEffect]:
        """A request was denied, or (*req_id* 0) a reclaim: what was cached under that lock is dropped."""
        out: list[CacheEffect] = []
        if req_id in self._wants:
            self._end_want(req_id)
            out.append(Wake(req_id, _NL, FLAGS[0], ino, errno or EAGAIN))
        elif req_id == 0 and ino in self._locks:
            self._revoke(now_ms, ino, self._locks[ino], _NL, out)
        return out

    def adopt(
        self, now_ms: int, ino: int, mode: LockMode, seq: int, flags: LockFlag | None = None
    ) -> list[CacheEffect]:
        """Take a grant that came with an operation's reply. Use mode() afterwards: it may be called back already.

        *flags* None: the reply does not say who else has the file open; what was known of it stays.
        """
        out: list[CacheEffect] = []
        if mode is not _NL and seq > self._known(ino):
            if flags is None:
                lock = self._locks.get(ino)
                others = 0 if lock is None else lock.flags
            else:
                others = int(flags) & _OTHERS
            self._hold(now_ms, ino, mode, seq, others, out)
        return out

    # -- giving up -------------------------------------------------------------------------------------------------

    def on_bast(
        self, now_ms: int, ino: int, seq: int, mode: LockMode, flags: LockFlag = LockFlag.NONE
    ) -> list[CacheEffect]:
        """The master wants lock *seq* back as far as it conflicts with *mode*."""
        out: list[CacheEffect] = []
        lock = self._locks.get(ino)
        if lock is None:
            if not self._implicit:
                # Nothing is held: a grant on its way comes too late, or an answer was lost.
                if seq >= self._given_back.get(ino, 0):
                    self._note_given_back(ino, seq)
                    out.append(SendRelease(ino, seq, _NL, self._opens_of(ino)))
                return out
            lock = self._locks[ino] = _Lock(_EX, seq, 0)
        if seq < lock.seq:
            return out
        lock.seq = seq
        target = self._target(ino, lock.mode, mode, flags)
        if self._lowered or self._hot:
            target = self._cooled(now_ms, ino, lock.mode, target)
        revoke = self._revokes.get(ino)
        if target is lock.mode and (revoke is None or revoke.state is State.HELD):
            out.append(SendRelease(ino, seq, lock.mode, self._opens_of(ino)))
        else:
            self._revoke(now_ms, ino, lock, target, out, hold=True)
            if revoke is not None and ino in self._revokes:  # asked again: a sign of life
                out.append(SendRelease(ino, seq, lock.mode, self._opens_of(ino)))
        return out

    def invalidated(self, now_ms: int, ino: int, again: bool = False) -> list[CacheEffect]:
        """The executor ended a pass. *again*: it knows that the kernel cached something meanwhile."""
        out: list[CacheEffect] = []
        revoke = self._revokes.get(ino)
        if revoke is None or not revoke.passing:
            raise MisuseError(f"no invalidation of {ino} is under way")
        revoke.passing = False
        if revoke.state is State.HELD:  # a newer grant came meanwhile
            del self._revokes[ino]
        elif revoke.state is State.DEFERRED:
            pass
        elif revoke.again or again or ino in self._data or ino in self._uses:
            revoke.again = False
            revoke.wait_data = True
            if revoke.state is State.INVALIDATING:
                self._move(ino, revoke, State.DRAINING)
            self._drained(ino, revoke, out)
        elif revoke.state is State.DRAINING:
            self._drained(ino, revoke, out)
        else:
            self._released(now_ms, ino, revoke, out)
        return out

    def forget(self, now_ms: int, ino: int) -> list[CacheEffect]:
        """The kernel forgot the inode: its lock is given back, with others (see FORGET_BATCH)."""
        lock = self._locks.get(ino)
        if self._implicit or lock is None or ino in self._revokes or ino in self._uses or ino in self._data:
            return []
        if lock.mode is not _NL:
            self._forgotten[ino] = lock.seq
        self._drop(ino)
        return self._flush_forgotten() if len(self._forgotten) >= FORGET_BATCH else []

    def tick(self, now_ms: int) -> list[CacheEffect]:
        """End minimum holds, ask again for what did not come, give forgotten locks back."""
        out = self._flush_forgotten()
        for ino, at_ms in list(self._fresh.items()):
            if now_ms - at_ms >= self._min_hold_ms:
                del self._fresh[ino]
                revoke = self._revokes.get(ino)
                lock = self._locks.get(ino)
                if revoke is None and lock is not None and self._implicit and lock.usable is _EX and not lock.flags:
                    del self._locks[ino]  # implicit says the same
        for ino in [ino for ino, until_ms in self._hot.items() if now_ms > until_ms]:
            del self._hot[ino]
        for ino, revoke in list(self._revokes.items()):
            if revoke.state is State.DEFERRED and ino not in self._fresh:
                self._start(ino, revoke, out)
        for req_id, want in list(self._wants.items()):
            overdue = want.sent_ms <= now_ms - self._lock_wait_ms
            if overdue if want.sent_ms >= 0 else not self._revoking(want.ino):
                self._send(now_ms, req_id, out)
        return out

    def resend(self, now_ms: int) -> list[CacheEffect]:
        """Ask again for everything without an answer: messages were lost, or another node is home now."""
        out: list[CacheEffect] = []
        for req_id, want in list(self._wants.items()):
            if want.sent_ms >= 0 or not self._revoking(want.ino):
                self._send(now_ms, req_id, out)
        return out

    # -- change of home, loss of the lease ---------------------------------------------------------------------------

    def new_epoch(self, first_seq: int) -> None:
        """Another home serves, whose grants are numbered from *first_seq* on: ignore those of the homes before it.

        A reply that the new home repeats from the old one's reply cache may carry such a grant, on a lock that
        nobody reclaimed. What is held stays held, under its old sequence, until the reclaim is answered.
        """
        self._first_seq = max(self._first_seq, first_seq - 1)

    def set_implicit(self, implicit: bool, except_for: Iterable[int] = ()) -> None:
        """Become the home's cache, or cease to be it.

        Becoming: *except_for* are the resources of which the new master has a record (``LockMaster.recorded``);
        on those without an entry here nothing is held. Ceasing: what was implicit must have been invalidated, or
        be invalidated (``drop_all``) before anybody else is granted anything.
        """
        self._implicit = implicit
        self._default = _EX if implicit else _NL
        for ino in except_for:
            if ino not in self._locks:
                self._locks[ino] = _Lock(_NL, self._given_back.get(ino, 0), 0)
        if not implicit:
            for ino in [ino for ino, lock in self._locks.items() if lock.mode is _NL and self.state(ino) is State.HELD]:
                self._drop(ino)

    def drop_all(self) -> list[int]:
        """Hold nothing any more (lease lost, evicted, home moved); return the inodes whose caches must be dropped.

        Implicit EX is not in the list: a home's executor knows itself what its kernel caches. Requests stay, for
        resend() or the next tick(). Pins stay until they are unpinned, and passes under way until they end: data pins
        of upcalls that wait for the home must be unpinned now, and what those upcalls bring must not be cached.
        """
        dropped = [ino for ino, lock in self._locks.items() if lock.mode is not _NL]
        for ino, lock in list(self._locks.items()):
            if self._implicit:  # without an entry it would be held in EX, though the master has given it to others
                lock.mode = lock.usable = _NL
            else:
                self._drop(ino)
        self._revokes = {ino: revoke for ino, revoke in self._revokes.items() if revoke.passing}
        for revoke in self._revokes.values():
            revoke.state = State.HELD
        self._forgotten.clear()
        self._fresh.clear()
        return dropped

    def hold_named(self, named: Mapping[int, LockMode]) -> None:
        """Hold, of inodes, what has been named to the next home and nothing else: that one knows of nothing else.

        Nobody is told. Of what is dropped here nothing may be cached.
        """
        self.drop_where(lambda ino: not is_resource(ino) and named.get(ino, _NL) is _NL)
        for ino, lock in self._locks.items():
            mode = named.get(ino, lock.mode)
            if COVERS[lock.mode][mode]:
                if lock.usable is lock.mode:
                    lock.usable = mode
                lock.mode = mode

    def drop_where(self, chosen: Callable[[int], bool]) -> None:
        """Hold none of the resources that *chosen* says yes to; nobody is told (before a change of home)."""
        for ino in [ino for ino in self._locks if chosen(ino)]:
            revoke = self._revokes.get(ino)
            if revoke is not None:
                if revoke.passing:
                    revoke.state = State.HELD
                else:
                    del self._revokes[ino]
            self._drop(ino)
            self._fresh.pop(ino, None)
        for ino in [ino for ino in self._forgotten if chosen(ino)]:
            del self._forgotten[ino]

    def held(self) -> Iterator[tuple[int, LockMode, int, Opens]]:
        """Yield (ino, mode, seq, opens) of each lock held, for reclaims; those being revoked are still held."""
        for ino, lock in list(self._locks.items()):
            if lock.mode is not _NL:
                yield ino, lock.mode, lock.seq, self._opens_of(ino)

    def __len__(self) -> int:
        """Return the number of resources with an entry."""
        return len(self._locks)

    @property
    def pending(self) -> int:
        """The number of requests without an answer."""
        return len(self._wants)

    @property
    def pinned(self) -> int:
        """The number of resources in use (data pins not counted): a home gives its role up when there are none."""
        return len(self._uses)

    @property
    def revoking(self) -> int:
        """The number of locks on their way back."""
        return len(self._revokes)

    # -- the machine -----------------------------------------------------------------------------------------------

    def _known(self, ino: int) -> int:
        """Return the highest sequence of *ino* whose grant would come too late."""
        lock = self._locks.get(ino)
        if lock is not None:
            return max(lock.seq, self._first_seq)
        return self._first_seq if self._implicit else max(self._given_back.get(ino, self._floor), self._first_seq)

    def _hold(self, now_ms: int, ino: int, mode: LockMode, seq: int, flags: int, out: list[CacheEffect]) -> None:
        lock = self._locks.get(ino)
        if lock is None:
            self._locks[ino] = _Lock(mode, seq, flags)
            self._given_back.pop(ino, None)
            self._wake_covered(ino, out)
            return
        lock.mode = lock.usable = mode
        lock.seq = seq
        lock.flags = flags
        revoke = self._revokes.get(ino)
        if revoke is not None:
            # The BAST was for an older lock: the master holds nothing against this one.
            if revoke.state is not State.HELD:
                self._move(ino, revoke, State.HELD)
            if not revoke.passing:
                del self._revokes[ino]
        self._wake_covered(ino, out)
        if revoke is not None:
            self._send_held_back(now_ms, ino, out)

    def _wake_covered(self, ino: int, out: list[CacheEffect]) -> None:
        """Wake who waits for what is held by now. The master may have queued the request behind somebody who waits for
        this very lock, and it may not be given back before an upcall that waits here is answered."""
        usable = self.mode(ino)
        for req_id in list(self._wants_of.get(ino, ())) if usable is not _NL else ():
            want = self._wants[req_id]
            if not int(want.flags) & _OPEN and COVERS[usable][want.mode]:
                self._end_want(req_id)
                out.append(Wake(req_id, usable, self.flags(ino), ino))

    def _revoking(self, ino: int) -> bool:
        revoke = self._revokes.get(ino)
        return revoke is not None and revoke.state in (State.DRAINING, State.INVALIDATING)

    def _send_held_back(self, now_ms: int, ino: int, out: list[CacheEffect]) -> None:
        for req_id in self._wants_of.get(ino, ()):
            if self._wants[req_id].sent_ms < 0:
                self._send(now_ms, req_id, out)

    def _drop(self, ino: int) -> None:
        lock = self._locks.pop(ino)
        if not self._implicit:
            self._note_given_back(ino, lock.seq)

    def _note_given_back(self, ino: int, seq: int) -> None:
        self._given_back.pop(ino, None)
        self._given_back[ino] = seq
        if len(self._given_back) > GIVEN_BACK_KEPT:
            oldest = next(iter(self._given_back))
            self._floor = max(self._floor, self._given_back.pop(oldest))

    def _send(self, now_ms: int, req_id: int, out: list[CacheEffect]) -> None:
        want = self._wants[req_id]
        want.sent_ms = now_ms
        if want.opens is not None:  # time may have passed: too high a count is corrected later, too low a one is not
            readers, writers = self._opens_of(want.ino)
            want.opens = (max(want.opens[0], readers), max(want.opens[1], writers))
        out.append(SendRequest(req_id, want.ino, want.mode, want.flags, want.opens))

    def _end_want(self, req_id: int) -> None:
        want = self._wants.pop(req_id)
        wants = self._wants_of[want.ino]
        wants.remove(req_id)
        if not wants:
            del self._wants_of[want.ino]

    def _cooled(self, now_ms: int, ino: int, held: LockMode, target: LockMode) -> LockMode:
        """Whoever asks for PR opens the file for writing next, where that was so the last time: save the second way."""
        lowered_ms = self._lowered.pop(ino, None)
        if target is _NL and lowered_ms is not None and now_ms - lowered_ms <= HOT_MS:
            self._hot[ino] = now_ms + HOT_FOR_MS
        until_ms = self._hot.get(ino)
        if until_ms is None:
            return target
        if now_ms > until_ms:
            del self._hot[ino]
            return target
        return _NL if target is _PR and COVERS[held][_PW] else target

    def _target(self, ino: int, held: LockMode, wanted: LockMode, flags: LockFlag) -> LockMode:
        """Return what may be kept of *held* beside a waiter for *wanted*."""
        if int(flags) & _MAY_KEEP and COVERS[held][_PW] and self._has_cached_writer(ino):
            return _PW
        if COMPATIBLE[wanted][held]:
            return held
        if is_resource(ino):
            return _NL  # PR says nothing of file locks, and would keep every other node from deciding alone
        if not (COVERS[held][_PR] and COMPATIBLE[wanted][_PR]) or self._has_cached_writer(ino):
            # With a cached writer pages are filled under PW only, so that under PR none is there that a WRITE which
            # waits for PW could keep from being invalidated.
            return _NL
        return _PR

    def _revoke(
        self, now_ms: int, ino: int, lock: _Lock, target: LockMode, out: list[CacheEffect], hold: bool = False
    ) -> None:
        """Begin to go down to *target*, or go further down than a revocation under way."""
        revoke = self._revokes.get(ino)
        if revoke is None:
            revoke = self._revokes[ino] = _Revoke(now_ms, target)
        elif revoke.state is State.HELD:  # an older pass still runs
            revoke.target = target
        else:
            lower = MEET[revoke.target][target]
            if lower is not revoke.target:
                revoke.target = lower
                revoke.again = revoke.passing
            return
        fresh_ms = self._fresh.get(ino) if hold else None
        if fresh_ms is not None and now_ms - fresh_ms < self._min_hold_ms:
            self._move(ino, revoke, State.DEFERRED)
            out.append(Later(ino, fresh_ms + self._min_hold_ms))
        else:
            self._start(ino, revoke, out)

    def _start(self, ino: int, revoke: _Revoke, out: list[CacheEffect]) -> None:
        self._move(ino, revoke, State.DRAINING)
        self._locks[ino].usable = _NL
        self._drained(ino, revoke, out)

    def _drained(self, ino: int, revoke: _Revoke, out: list[CacheEffect]) -> None:
        """Begin a pass if nothing is in its way."""
        if revoke.state is not State.DRAINING or revoke.passing or ino in self._uses:
            return
        if revoke.wait_data and ino in self._data:
            return
        revoke.wait_data = False
        revoke.passing = True
        self._move(ino, revoke, State.INVALIDATING)
        out.append(Invalidate(ino, revoke.target))

    def _released(self, now_ms: int, ino: int, revoke: _Revoke, out: list[CacheEffect]) -> None:
        lock = self._locks[ino]
        self._move(ino, revoke, State.HELD)
        del self._revokes[ino]
        if revoke.target is _PR:
            self._lowered[ino] = now_ms
            while now_ms - next(iter(self._lowered.values())) > HOT_MS:
                del self._lowered[next(iter(self._lowered))]
        lock.mode = lock.usable = revoke.target
        out.append(SendRelease(ino, lock.seq, lock.mode, self._opens_of(ino)))
        if lock.mode is _NL and not self._implicit:
            self._drop(ino)
        self._wake_covered(ino, out)
        self._send_held_back(now_ms, ino, out)

    def _flush_forgotten(self) -> list[CacheEffect]:
        out: list[CacheEffect] = [
            SendRelease(ino, seq, _NL, self._opens_of(ino)) for ino, seq in self._forgotten.items()
        ]
        self._forgotten.clear()
        return out

    @staticmethod
    def _move(ino: int, revoke: _Revoke, state: State) -> None:
        if state not in _NEXT[revoke.state]:
            raise MisuseError(f"lock on {ino} cannot go from {revoke.state.name} to {state.name}")
        revoke.state = state
