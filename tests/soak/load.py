"""The load of one node: a process whose threads work on its mount, and one that reads through maps.

``python -m tests.soak.load '{"mount": ..., ...}'`` (fields of `Config`). A killed node takes its load with it; what it
did is in the generation's table. An error, or anything seen that the rules do not allow, goes as a line of JSON into a
file beside the table, and the thread that met it stops. SIGTERM ends the load in good order.
"""

import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.soak import oracle
from tests.soak.oracle import BLOCK, BLOCKS, FILES, LINE, LINES_AT, NAMES_AT, SLOTS, STATIC_AT, STATICS, Life, Table

LOG_BYTES = 256 << 10
"""A common log is left for the next one when it has grown so long."""
STATIC_BLOCKS = 8
NOW = "mapped.now"
"""What a load reads through a map just now: path and block, a line each. A bad page ends it without a word."""
NOW_BYTES = 512
HELD_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Config:
    """Where a load works and who it is. *base_ms*: CLOCK_MONOTONIC when the soak began."""

    mount: str
    oracle: str
    generation: str
    node: int
    seed: int
    base_ms: int
    mapped: bool = False

    def argv(self) -> list[str]:
        """The command that runs it."""
        return [sys.executable, "-m", "tests.soak.load", json.dumps(asdict(self))]


class Load:
    """What the threads of one process share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.mount)
        self.home = self.root / "g" / config.generation
        self.folder = Path(config.oracle) / config.generation
        self.table = Table(self.folder / "table")
        self.stop = threading.Event()
        self.device = os.stat(self.root).st_dev
        name = "mapped.log" if config.mapped else "load.log"
        self._journal = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._others: dict[str, Table] = {}
        self._looked = -1.0

    def now_ms(self) -> int:
        """Milliseconds since the soak began, never 0."""
        return time.monotonic_ns() // 1_000_000 - self.config.base_ms + 1

    def is_mounted(self) -> bool:
        """Whether the volume is still what is found at the mount point."""
        try:
            return os.stat(self.root).st_dev == self.device
        except OSError:
            return False

    def note(self, **fields: object) -> None:
        """Write one line for whoever runs the soak."""
        line = {"ms": self.now_ms(), "generation": self.config.generation, **fields}
        os.write(self._journal, json.dumps(line).encode() + b"\n")

    def path_of(self, generation: str, name: str) -> Path:
        """Where a name of a generation is (see oracle.names_of)."""
        return self.root / name if name.startswith("shared/") else self.root / "g" / generation / name

    def some_generation(self, rng: random.Random) -> tuple[str, Table] | None:
        """Pick a generation of another node that has not been removed yet."""
        if time.monotonic() - self._looked > 2:
            self._looked = time.monotonic()
            names = {entry.parent.name for entry in Path(self.config.oracle).glob("n*g*/table")}
            for name in names - self._others.keys():
                with suppress(OSError):
                    self._others[name] = Table(Path(self.config.oracle) / name / "table")
            for name in [name for name, table in self._others.items() if table.life is Life.REMOVED]:
                self._others.pop(name).close()
        mine = f"n{self.config.node}g"
        usable = sorted(name for name in self._others if not name.startswith(mine))
        if not usable:
            return None
        picked = rng.choice(usable)
        return picked, self._others[picked]


class Worker(threading.Thread):
    """One thread: repeats ``work`` until it is told to stop, or meets an error. ``number``: its place in the table."""

    number = 0
    pause_s = 0.03

    def __init__(self, load: Load) -> None:
        super().__init__(name=type(self).__name__.lower(), daemon=True)
        self.load = load
        self.table = load.table
        self.generation = load.config.generation
        self.rng = random.Random(f"{load.config.seed} {self.generation} {self.name}")
        self.doing = ""

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Around one operation on the volume: how long it takes is watched from outside."""
        self.doing = what
        began = self.load.now_ms()
        self.table.started(self.number, began)
        yield
        self.table.done(self.number, began)

    def prepare(self) -> None:
        """What is done once, before the work."""

    def work(self) -> None:
        """Do one thing."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close what is open."""

    def run(self) -> None:
        """Work; an error is told and ends the thread."""
        try:
            self.prepare()
            while not self.load.stop.wait(self.rng.random() * 2 * self.pause_s):
                self.work()
            self.finish()
        except OSError as failed:
            where = failed.filename or ""
            self.load.note(
                kind="error", thread=self.name, doing=self.doing, errno=failed.errno, text=f"{failed} {where}"
            )
        except oracle.Wrong as wrong:
            kind = "wrong" if self.load.is_mounted() else "error"  # below a mount that is gone there is an empty folder
            self.load.note(kind=kind, thread=self.name, doing=self.doing, errno=0, text=str(wrong))


class Probe(Worker):
    """Makes and removes a folder, which the home has to do: shows when the volume serves."""

    number = 0
    pause_s = 0.025

    def work(self) -> None:
        with self.asking("mkdir"):
            os.mkdir(self.load.home / "probe")
        with self.asking("rmdir"):
            os.rmdir(self.load.home / "probe")


class Blocks(Worker):
    """Writes blocks of its files, through descriptors that stay open or new ones; syncs; reads back."""

    number = 1

    def prepare(self) -> None:
        self.fds = [-1] * FILES

    def _fd(self, file: int) -> int:
        if self.fds[file] < 0:
            with self.asking("open"):
                self.fds[file] = os.open(self.load.home / f"blocks{file}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self.fds[file]

    def work(self) -> None:
        file = self.rng.randrange(FILES)
        fd = self._fd(file)
        for _ in range(self.rng.randrange(1, 4)):
            cell = file * BLOCKS + self.rng.randrange(BLOCKS)
            data = oracle.block(self.generation, cell, self.table.begin(cell))
            with self.asking("write"):
                if os.pwrite(fd, data, cell % BLOCKS * BLOCK) != BLOCK:
                    raise oracle.Wrong(f"blocks{file}: a short write")
            self.table.ack(cell)
        if self.rng.random() < 0.3:
            cell = file * BLOCKS + self.rng.randrange(BLOCKS)
            with self.asking("read back"):
                data = os.pread(fd, BLOCK, cell % BLOCKS * BLOCK)
            what = f"blocks{file} of {self.generation}, read back"
            found = oracle.version_of(data, self.generation, cell, what)
            if found != self.table.acked(cell):
                raise oracle.Wrong(f"{what}: version {found} of block {cell % BLOCKS}, not {self.table.acked(cell)}")
        if self.rng.random() < 0.4:
            answered = self.table.answered(range(file * BLOCKS, (file + 1) * BLOCKS))
            with self.asking("fsync"):
                os.fsync(fd)
            self.table.sync(answered)
        if file >= FILES // 2 and self.rng.random() < 0.5:  # the others stay open for the life of the process
            self.fds[file] = -1
            with self.asking("close"):
                os.close(fd)

    def finish(self) -> None:
        for fd in self.fds:
            if fd >= 0:
                with self.asking("close"):
                    os.close(fd)


class Names(Worker):
    """Makes, moves, links and unlinks, among its own names and in a folder that all nodes use."""

    number = 2

    def work(self) -> None:
        slot = self.rng.randrange(SLOTS)
        cell = NAMES_AT + slot
        cycle, stage = divmod(self.table.acked(cell), oracle.STAGES)
        made, moved, linked = (
            self.load.path_of(self.generation, name) for name in oracle.names_in_cycle(self.generation, slot, cycle)
        )
        self.table.begin(cell)
        if stage == 0:
            with self.asking(f"create {made}"):
                os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        elif stage == 1:
            with self.asking(f"rename {made} {moved}"):
                os.rename(made, moved)
        elif stage == 2:
            with self.asking(f"link {moved} {linked}"):
                os.link(moved, linked)
        elif stage == 3:
            with self.asking(f"unlink {moved}"):
                os.unlink(moved)
        else:
            with self.asking(f"unlink {linked}"):
                os.unlink(linked)
        self.table.ack(cell)
        if self.rng.random() < 0.1:
            self._sync()

    def _sync(self) -> None:
        answered = self.table.answered(range(NAMES_AT, NAMES_AT + SLOTS))
        for folder in (self.load.home / "names", self.load.root / "shared"):
            with self.asking(f"fsync {folder}"):
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        self.table.sync(answered)


class Append(Worker):
    """Adds lines to logs that all nodes write to."""

    number = 3
    pause_s = 0.05

    def prepare(self) -> None:
        self.fd, self.log = -1, 0

    def work(self) -> None:
        if self.fd < 0:
            with self.asking("open log"):
                path = self.load.root / "logs" / f"log{self.log}"
                self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                full = os.fstat(self.fd).st_size >= LOG_BYTES
            if full:
                os.close(self.fd)
                self.fd, self.log = -1, self.log + 1
                return
        number = self.table.begin(LINES_AT)
        with self.asking("append"):
            if os.write(self.fd, oracle.line(self.generation, number)) != LINE:
                raise oracle.Wrong(f"log{self.log}: a short write")
        self.table.ack(LINES_AT)
        if self.rng.random() < 0.2:
            self._sync()
            if self.rng.random() < 0.2:
                self.finish()

    def _sync(self) -> None:
        answered = self.table.answered((LINES_AT,))
        with self.asking("fsync log"):
            os.fsync(self.fd)
        self.table.sync(answered)

    def finish(self) -> None:
        if self.fd >= 0:
            self._sync()
            os.close(self.fd)
            self.fd = -1


class Statics(Worker):
    """Makes files that are synced, never change, and go again; others map them meanwhile."""

    number = 4
    pause_s = 0.5

    def work(self) -> None:
        cell = STATIC_AT + self.rng.randrange(STATICS)
        old = self.table.acked(cell)
        version = self.table.begin(cell)
        with self.asking("static file"):
            fd = os.open(
                static_path(self.load.root, self.generation, cell, version), os.O_RDWR | os.O_CREAT | os.O_EXCL
            )
            try:
                for _ in range(STATIC_BLOCKS):
                    os.write(fd, oracle.block(self.generation, cell, version))
                os.fsync(fd)
            finally:
                os.close(fd)
        self.table.ack(cell)
        self.table.sync({cell: version})
        if old:
            with self.asking("unlink static file"):
                os.unlink(static_path(self.load.root, self.generation, cell, old))


def static_path(root: Path, generation: str, cell: int, version: int) -> Path:
    """Where a version of a static file is."""
    return root / "g" / generation / f"static{cell}.v{version}"


class Held(Worker):
    """Keeps files open that have no name any more, writes and reads them through changes of the home."""

    number = 5
    pause_s = 0.1

    def prepare(self) -> None:
        self.held: list[tuple[int, list[int]]] = []
        self.made = 0

    def work(self) -> None:
        if len(self.held) < 3:
            self._make()
        elif self.rng.random() < 0.02:
            fd, _versions = self.held.pop(self.rng.randrange(len(self.held)))
            with self.asking("close an unlinked file"):
                os.close(fd)
            return
        fd, versions = self.rng.choice(self.held)
        at = self.rng.randrange(HELD_BLOCKS)
        with self.asking("read an unlinked file"):
            data = os.pread(fd, BLOCK, at * BLOCK)
        found = oracle.version_of(data, self.generation, at, "an unlinked file")
        if found != versions[at]:
            raise oracle.Wrong(
                f"an unlinked file of {self.generation}: version {found} of block {at}, not {versions[at]}"
            )
        if self.rng.random() < 0.3:
            with self.asking("write an unlinked file"):
                os.pwrite(fd, oracle.block(self.generation, at, versions[at] + 1), at * BLOCK)
            versions[at] += 1

    def _make(self) -> None:
        self.made += 1
        path = self.load.home / f"held{self.made}"
        with self.asking("make a file and unlink it"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            for at in range(HELD_BLOCKS):
                os.pwrite(fd, oracle.block(self.generation, at, 1), at * BLOCK)
            os.unlink(path)
        self.held.append((fd, [1] * HELD_BLOCKS))

    def finish(self) -> None:
        for fd, _versions in self.held:
            with self.asking("close an unlinked file"):
                os.close(fd)


class Reader(Worker):
    """Looks at what other nodes do, and judges it by their tables."""

    number = 6

    def work(self) -> None:
        picked = self.load.some_generation(self.rng)
        if picked is None:
            return
        generation, table = picked
        try:
            pick = self.rng.random()
            if pick < 0.6:
                self._block(generation, table)
            elif pick < 0.9:
                self._slot(generation, table)
            else:
                self._log()
        except (OSError, oracle.Wrong):
            if table.life is not Life.REMOVED:
                raise

    def _block(self, generation: str, table: Table) -> None:
        file = self.rng.randrange(FILES)
        cell = file * BLOCKS + self.rng.randrange(BLOCKS)
        what = f"block {cell % BLOCKS} of blocks{file} of {generation}, read on n{self.load.config.node}"
        window = oracle.Window.open(table, cell)
        data = b""
        with self.asking(f"read {what}"):
            try:
                fd = os.open(self.load.root / "g" / generation / f"blocks{file}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                fd = -1
            if fd >= 0:
                try:
                    data = os.pread(fd, BLOCK, cell % BLOCKS * BLOCK)
                finally:
                    os.close(fd)
        version = oracle.version_of(data, generation, cell, what)
        window.judge(table, cell, version, what)
        if table.life is Life.LIVE:
            table.see(cell, self.load.config.node, version)

    def _slot(self, generation: str, table: Table) -> None:
        """Names say something only if their slot rested all the time."""
        slot = self.rng.randrange(SLOTS)
        cell = NAMES_AT + slot
        version = table.acked(cell)
        if table.begun(cell) != version or table.life is not Life.LIVE:
            return
        there = set()
        names = oracle.names_in_cycle(generation, slot, version // oracle.STAGES)
        for name in names:
            with self.asking(f"stat {name}"), suppress(FileNotFoundError):
                os.stat(self.load.path_of(generation, name))
                there.add(name)
        wanted = oracle.names_of(generation, slot, version)
        if there != wanted and table.begun(cell) == version and table.life is Life.LIVE:
            what = f"{generation} on n{self.load.config.node}"
            raise oracle.Wrong(f"names of {what}: {sorted(there)}, not {sorted(wanted)} (version {version})")

    def _log(self) -> None:
        with self.asking("read the logs"):
            folder = self.load.root / "logs"
            names = os.listdir(folder)
            if not names:
                return
            path = folder / max(names, key=lambda name: int(name[3:]))
            with open(path, "rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                stream.seek(max(0, size - 64 * LINE))
                data = stream.read(min(size, 64 * LINE))
        found = oracle.parse_lines(data, path.name)
        order: dict[str, int] = {}
        for generation, number in found:
            if order.setdefault(generation, number - 1) != number - 1:
                raise oracle.Wrong(f"{path.name}: line {number} of {generation} follows its {order[generation]}")
            order[generation] = number


class Mapped(Worker):
    """Reads static files of other nodes through maps. In a process of its own: a bad page is SIGBUS, and ends it."""

    number = 7
    pause_s = 0.1

    def prepare(self) -> None:
        self.maps: list[tuple[mmap.mmap, str, int, int]] = []
        self.now = os.open(self.load.folder / NOW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def work(self) -> None:
        if len(self.maps) < 4:
            self._map()
        elif self.rng.random() < 0.05:
            self.maps.pop(self.rng.randrange(len(self.maps)))[0].close()
        for mapped, generation, cell, version in self.maps:
            at = self.rng.randrange(STATIC_BLOCKS)
            what = f"static{cell}.v{version} of {generation}, mapped on n{self.load.config.node}"
            os.pwrite(
                self.now, f"{static_path(self.load.root, generation, cell, version)}\n{at}\n".ljust(300).encode(), 0
            )
            with self.asking(what):
                data = mapped[at * BLOCK : (at + 1) * BLOCK]
            found = oracle.version_of(data, generation, cell, what)
            if found != version:
                raise oracle.Wrong(f"{what}: version {found} in block {at}")

    def _map(self) -> None:
        picked = self.load.some_generation(self.rng)
        if picked is None:
            return
        generation, table = picked
        cell = STATIC_AT + self.rng.randrange(STATICS)
        version = table.synced(cell)
        if version == 0 or table.life is not Life.LIVE:
            return
        path = static_path(self.load.root, generation, cell, version)
        with self.asking(f"map {path.name}"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if table.begun(cell) == version and table.life is Life.LIVE:
                    raise
                return
            try:
                size = STATIC_BLOCKS * BLOCK
                if os.fstat(fd).st_size != size:
                    raise oracle.Wrong(f"{path.name} of {generation}: {os.fstat(fd).st_size} bytes, not {size}")
                self.maps.append((mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ), generation, cell, version))
            finally:
                os.close(fd)

    def finish(self) -> None:
        for mapped, *_rest in self.maps:
            mapped.close()


WORKERS: tuple[Callable[[Load], Worker], ...] = (Probe, Blocks, Names, Append, Statics, Held, Reader)
THREADS = ("probe", "blocks", "names", "append", "statics", "held", "reader", "mapped")
"""Their names, by number."""


def main() -> int:
    """Run until SIGTERM; 1 where a thread met an error."""
    load = Load(Config(**json.loads(sys.argv[1])))
    signal.signal(signal.SIGTERM, lambda *_: load.stop.set())
    if load.config.mapped:
        # No thread beside the one that faults: a fault that waits would keep them from /proc as well.
        Mapped(load).run()
        return 0
    try:
        (load.home / "names").mkdir(parents=True)
    except OSError as failed:
        load.note(kind="error", thread="main", doing="mkdir", errno=failed.errno, text=str(failed))
        return 1
    workers = [make(load) for make in WORKERS]
    for worker in workers:
        worker.start()
    load.note(kind="started", pid=os.getpid())
    while not load.stop.wait(0.5):
        pass
    for worker in workers:
        worker.join()
    load.note(kind="stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
