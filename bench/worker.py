"""The measured work, run as a process of its own: every column runs exactly this code.

``python worker.py CONFIG-JSON`` prints one JSON object: for each row a rate (operations, or MiB, a second).
Imports only the standard library, so that it starts alike everywhere.
"""

import fcntl
import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable

BLOCK = 4096
MIB = 1 << 20
PAYLOAD = bytes(range(256)) * 16
DROP_ENTRIES = 2
DROP_ALL = 3


def drop_caches(what: int) -> None:
    """Have the kernel forget clean entries and inodes (2), pages too (3), of every file system: proc_sys_vm(5)."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as control:
        control.write(f"{what}\n")


def rate(count: float, work: Callable[[], object]) -> float:
    """Run *work* once; how many of its *count* units it does in a second."""
    begun = time.perf_counter()
    work()
    return count / (time.perf_counter() - begun)


def each(items: Iterable[str], work: Callable[[str], object]) -> Callable[[], None]:
    """Return a callable that applies *work* to every item."""

    def loop() -> None:
        for item in items:
            work(item)

    return loop


def _create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def _fill(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, PAYLOAD)
    os.close(fd)


def _open_read(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    if len(os.read(fd, BLOCK)) != BLOCK:
        raise RuntimeError(f"short read of {path}")
    os.close(fd)


def _list(folder: str) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size >= 0 for entry in entries)


def names(folder: str, files: int) -> dict[str, float]:
    """Rows on many small files in one directory."""
    os.mkdir(folder)
    paths = [f"{folder}/file{i:06}" for i in range(files)]
    moved = [f"{folder}/moved{i:06}" for i in range(files)]
    out = {"create": rate(files, each(paths, _create))}
    each(paths, _fill)()
    drop_caches(DROP_ENTRIES)
    out["stat first"] = rate(files, each(paths, os.stat))
    out["stat again"] = rate(files, each(paths, os.stat))
    drop_caches(DROP_ALL)
    out["open+read first"] = rate(files, each(paths, _open_read))
    out["open+read again"] = rate(files, each(paths, _open_read))
    drop_caches(DROP_ENTRIES)
    out["list first"] = rate(files, lambda: _list(folder))
    out["list again"] = rate(files, lambda: _list(folder))
    order = list(zip(paths, moved, strict=True))
    random.Random(1).shuffle(order)

    def rename_all() -> None:
        for old, new in order:
            os.rename(old, new)

    out["rename"] = rate(files, rename_all)
    out["unlink"] = rate(files, each(moved, os.unlink))
    os.rmdir(folder)
    return out


def data(folder: str, mib: int, randoms: int, repeats: int) -> dict[str, float]:
    """Rows on one big file; each phase opens it anew, once."""
    os.mkdir(folder)
    path = f"{folder}/big"
    block = os.urandom(MIB)
    out: dict[str, float] = {}

    def write_through(fd: int) -> None:
        for i in range(mib):
            os.pwrite(fd, block, i * MIB)

    def read_through(fd: int) -> None:
        for i in range(mib):
            if len(os.pread(fd, MIB, i * MIB)) != MIB:
                raise RuntimeError("short read")

    rng = random.Random(2)
    offsets = [rng.randrange(mib * MIB // BLOCK) * BLOCK for _ in range(randoms)]

    def random_reads(fd: int) -> None:
        for offset in offsets:
            os.pread(fd, BLOCK, offset)

    def random_writes(fd: int) -> None:
        for offset in offsets:
            os.pwrite(fd, PAYLOAD, offset)

    # What earlier parts left dirty must not be written out meanwhile, and the memory that the page cache will take must
    # have been touched: a virtual machine's first use of a page is slow, whichever column it falls on.
    touched = bytearray(b"x") * (2 * mib * MIB)
    del touched
    os.sync()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    out["seq write 1 MiB"] = rate(mib, lambda: write_through(fd))
    out["seq rewrite 1 MiB"] = rate(mib, lambda: write_through(fd))
    os.close(fd)
    drop_caches(DROP_ALL)
    fd = os.open(path, os.O_RDONLY)
    out["seq read 1 MiB first"] = rate(mib, lambda: read_through(fd))
    out["seq read 1 MiB again"] = rate(mib, lambda: read_through(fd))
    os.close(fd)
    drop_caches(DROP_ALL)
    fd = os.open(path, os.O_RDONLY)
    out["rand read 4 KiB first"] = rate(randoms, lambda: random_reads(fd))
    random_reads(fd)
    out["rand read 4 KiB again"] = rate(randoms, lambda: random_reads(fd))
    os.close(fd)
    fd = os.open(path, os.O_RDWR)
    out["rand write 4 KiB"] = rate(randoms, lambda: random_writes(fd))

    def fstats() -> None:
        for _ in range(repeats):
            os.fstat(fd)

    def reads() -> None:
        for _ in range(repeats):
            os.pread(fd, BLOCK, 0)

    def flocks() -> None:
        for _ in range(repeats // 4):
            fcntl.flock(fd, fcntl.LOCK_EX)
            fcntl.flock(fd, fcntl.LOCK_UN)

    fstats()
    reads()
    flocks()
    out["fstat, open file"] = rate(repeats, fstats)
    out["read 4 KiB, open file"] = rate(repeats, reads)
    out["flock+unlock"] = rate(repeats // 4, flocks)
    os.close(fd)
    os.unlink(path)
    os.rmdir(folder)
    return out


def hand_over(mine: str, theirs: str, turns: int) -> dict[str, list[float]]:
    """Alternate between two paths of one folder; milliseconds of each turn.

    *data*: a turn opens the file on the node whose turn it is, reads the byte the other wrote (RuntimeError when it is
    not that byte), writes the next and closes. *attributes*: chmod on one node, then stat on the other shows it.
    *names*: create on one node, then stat on the other finds it. *locks*: flock and unlock, on alternating nodes.
    *to waiter*: from an unlock to the moment in which the other node's process, that waits in flock, has the lock.
    """
    os.mkdir(mine)
    rows = ("hand-over data", "hand-over attributes", "hand-over names", "hand-over locks", "hand-over to waiter")
    out: dict[str, list[float]] = {row: [] for row in rows}
    paths = (f"{mine}/byte", f"{theirs}/byte")
    _create(paths[0])
    for turn in range(turns):
        begun = time.perf_counter()
        fd = os.open(paths[turn % 2], os.O_RDWR)
        if turn and os.pread(fd, 1, 0) != bytes([(turn - 1) % 256]):
            raise RuntimeError(f"turn {turn}: the other node's byte is not there")
        os.pwrite(fd, bytes([turn % 256]), 0)
        os.close(fd)
        out["hand-over data"].append((time.perf_counter() - begun) * 1e3)
    for turn in range(turns):
        mode = 0o600 + turn % 64
        begun = time.perf_counter()
        os.chmod(paths[turn % 2], mode)
        if os.stat(paths[1 - turn % 2]).st_mode & 0o777 != mode:
            raise RuntimeError(f"turn {turn}: the other node's chmod is not seen")
        out["hand-over attributes"].append((time.perf_counter() - begun) * 1e3)
    for turn in range(turns):
        folders = (mine, theirs) if turn % 2 == 0 else (theirs, mine)
        begun = time.perf_counter()
        _create(f"{folders[0]}/n{turn}")
        os.stat(f"{folders[1]}/n{turn}")
        out["hand-over names"].append((time.perf_counter() - begun) * 1e3)
    fds = [os.open(path, os.O_RDWR) for path in paths]
    for turn in range(turns):
        begun = time.perf_counter()
        fcntl.flock(fds[turn % 2], fcntl.LOCK_EX)
        fcntl.flock(fds[turn % 2], fcntl.LOCK_UN)
        out["hand-over locks"].append((time.perf_counter() - begun) * 1e3)
    for turn in range(turns):
        out["hand-over to waiter"].append(_to_waiter(fds[turn % 2], fds[1 - turn % 2]))
    for fd in fds:
        os.close(fd)
    for name in os.listdir(mine):
        os.unlink(f"{mine}/{name}")
    os.rmdir(mine)
    return out


def _to_waiter(mine: int, theirs: int) -> float:
    """Give a flock to who waits for it; milliseconds from the unlock on."""
    got: list[float] = []

    def wait() -> None:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        got.append(time.perf_counter())
        fcntl.flock(theirs, fcntl.LOCK_UN)

    fcntl.flock(mine, fcntl.LOCK_EX)
    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.01)  # it is in the kernel, and its question at the home, long before
    if got:
        raise RuntimeError("two nodes have one lock")
    begun = time.perf_counter()
    fcntl.flock(mine, fcntl.LOCK_UN)
    waiter.join()
    return (got[0] - begun) * 1e3


def populate(folders: list[str], files: int) -> None:
    """Make *files* files below the first folder and stat them by every path given, so that all cache them."""
    top = folders[0]
    os.mkdir(top)
    for part in range(0, files, 1000):
        os.mkdir(f"{top}/d{part}")
        for i in range(part, min(part + 1000, files)):
            _create(f"{top}/d{part}/f{i}")
    for folder in folders:
        for part in range(0, files, 1000):
            for i in range(part, min(part + 1000, files)):
                os.stat(f"{folder}/d{part}/f{i}")


def main() -> None:
    """Run the part that the configuration names, in a new folder that it takes away again."""
    config = json.loads(sys.argv[1])
    gc.disable()
    roots: list[str] = config["roots"]
    folders = [f"{root}/bench-{os.getpid()}" for root in roots]
    result: object
    if config["part"] == "names":
        result = names(folders[0], config["files"])
    elif config["part"] == "data":
        result = data(folders[0], config["mib"], config["randoms"], config["repeats"])
    elif config["part"] == "hand-over":
        result = hand_over(folders[0], folders[1], config["turns"])
    else:
        populate(folders, config["files"])
        result = {}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
