"""Time, processes, tasks and the network of the failover simulator.

A process may be dead or paused: what was to happen in it is then dropped, or happens when it goes on. Connections keep
the order of what they carry, and break when the network loses anything of it, as TCP does.
"""

import heapq
import random
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from simnode import Future

Steps = Generator[Any, Any, Any]


class Proc:
    """A process, or all of a machine that stops and dies together."""

    __slots__ = ("alive", "life", "name", "paused_until")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.life = 0
        self.paused_until = 0

    def kill(self) -> None:
        self.alive = False
        self.life += 1

    def start(self) -> None:
        self.life += 1
        self.alive = True


class Engine:
    """The event queue."""

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.rng = random.Random(seed)
        self.verbose = verbose
        self.now = 0
        self.steps = 0
        self._serial = 0
        self._queue: list[Any] = []
        self._tasks: set[Steps] = set()

    def serial(self) -> int:
        """Return a number above all those before."""
        self._serial += 1
        return self._serial

    def at(
        self, delay: int, what: Callable[..., None], *args: Any, proc: Proc | None = None, life: int | None = None
    ) -> None:
        """Call *what* after *delay*; with *proc*, only if that process lives then, in this *life* or the one it has."""
        self._serial += 1
        if life is None:
            life = proc.life if proc is not None else 0
        heapq.heappush(self._queue, (self.now + max(0, delay), self._serial, what, args, proc, life))

    def step(self) -> bool:
        """Let the next event happen; return False when there is none."""
        if not self._queue:
            return False
        event = heapq.heappop(self._queue)
        when, serial, what, args, proc, life = event
        self.now = when
        if proc is not None:
            if proc.life != life or not proc.alive:
                return True
            if proc.paused_until > when:
                heapq.heappush(self._queue, (proc.paused_until, serial, what, args, proc, life))
                return True
        self.steps += 1
        what(*args)
        return True

    def spawn(self, steps: Steps, proc: Proc, delay: int = 0) -> None:
        """Run a task in *proc*: it yields milliseconds to sleep, or a Future to wait for its value.

        A task ends with the life of its process, and nothing of it happens after that: it is kept until the world ends,
        because what frees a generator also runs its `finally`, at a moment that the garbage collector chooses.
        """
        value: Any = None
        waiting: Future | None = None
        life = proc.life
        self._tasks.add(steps)

        def resume() -> None:
            nonlocal waiting, value
            value, waiting = (waiting.value if waiting is not None else None), None
            while True:
                try:
                    what = steps.send(value)
                except StopIteration:
                    self._tasks.discard(steps)
                    return
                if not isinstance(what, Future):
                    self.at(what, resume, proc=proc, life=life)
                    return
                if not what.done:
                    waiting = what
                    what.task = lambda: self.at(0, resume, proc=proc, life=life)
                    return
                value = what.value

        self.at(delay, resume, proc=proc, life=life)

    def close(self) -> None:
        """End the tasks that are left; what they do then counts for nothing."""
        while self._tasks:
            with suppress(Exception):
                self._tasks.pop().close()

    def note(self, who: str, what: Any) -> None:
        if self.verbose:
            print(f"{self.now:6d} {who:>6}: {what}")


class Link:
    """One connection between a client's daemon and a home's; its two channels keep their order each."""

    def __init__(self, client: int, home: int) -> None:
        self.client = client
        self.home = home
        self.broken = False
        self.last: dict[tuple[int, str], int] = {}


class Network:
    """Who reaches whom, one way and the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cut: set[tuple[int, int]] = set()
        self.slow = engine.rng.choice((0.0, 0.02, 0.1))
        self.on_break: Callable[[Link], None] = lambda link: None

    def reaches(self, source: int, target: int) -> bool:
        return (source, target) not in self.cut

    def delay(self) -> int:
        rng = self.engine.rng
        return rng.randrange(20, 120) if rng.random() < self.slow else rng.choice((0, 1, 1, 2))

    def send(self, link: Link, source: int, channel: str, proc: Proc, what: Callable[..., None], *args: Any) -> None:
        """Carry something to *proc* at the other end, in order, or break the connection."""
        if link.broken:
            return
        local = link.client == link.home
        target = link.home if source == link.client else link.client
        if not local and not self.reaches(source, target):
            self.lose(link)
            return
        key = (source, channel)
        when = max(self.engine.now + (0 if local else self.delay()), link.last.get(key, 0))
        link.last[key] = when
        self.engine.at(when - self.engine.now, self._arrive, link, source, target, what, args, proc=proc)

    def _arrive(self, link: Link, source: int, target: int, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        if link.broken:
            return
        if link.client != link.home and not self.reaches(source, target):
            self.lose(link)
            return
        what(*args)

    def lose(self, link: Link) -> None:
        """The connection breaks; both ends notice after a while."""
        if not link.broken:
            link.broken = True
            self.on_break(link)
