"""What one node does, the others see at once: data, attributes, names."""

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from labkit import Lab

from mxfsd import procs

PAIRS = [("n1", "n2"), ("n2", "n1"), ("n2", "n3"), ("n3", "n2"), ("n1", "n3"), ("n3", "n1")]
Work = dict[str, Path]

# --- attributes and data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("writer", "reader"), PAIRS[:3])
@pytest.mark.parametrize("keep_open", [True, False])
def test_stat_right_after_a_write_shows_it(work: Work, writer: str, reader: str, keep_open: bool) -> None:
    """1,000 of 1,000: the size grows by one with each write, and stat on the other node says so."""
    mine, theirs = work[writer] / "f", work[reader] / "f"
    kept = os.open(mine, os.O_WRONLY | os.O_CREAT, 0o644)
    seen = 0
    try:
        for size in range(1, 1001):
            if keep_open:
                os.pwrite(kept, b"x", size - 1)
            else:
                with open(mine, "ab", buffering=0) as stream:
                    stream.write(b"x")
            here = os.stat(mine)
            there = os.stat(theirs)
            assert there.st_mtime_ns == here.st_mtime_ns
            seen += there.st_size == size
    finally:
        os.close(kept)
    assert seen == 1000


FLAGS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR, "a": os.O_WRONLY | os.O_APPEND}


class TwoOpeners:
    """One file open on two nodes, and what it must hold."""

    def __init__(self, work: Work, name: str, size: int) -> None:
        self.paths = {node: folder / name for node, folder in work.items()}
        self.expected = bytearray(random.Random(name).randbytes(size))
        self.paths["n1"].write_bytes(self.expected)
        self.open: list[tuple[int, str]] = []
        self.salt = itertools.count(1)

    def opener(self, node: str, mode: str) -> tuple[int, str]:
        fd = os.open(self.paths[node], FLAGS[mode])
        self.open.append((fd, mode))
        return fd, mode

    def write(self, opened: tuple[int, str], offset: int, size: int) -> None:
        """Write if the mode allows it: at *offset*, or where the end is for an appender."""
        fd, mode = opened
        if mode == "r":
            return
        payload = bytes([next(self.salt) % 251 + 1]) * size
        if mode == "a":
            offset = len(self.expected)
            assert os.write(fd, payload) == size
        else:
            assert os.pwrite(fd, payload, offset) == size
        self.expected.extend(bytes(max(0, offset - len(self.expected))))
        self.expected[offset : offset + size] = payload

    def check(self) -> None:
        """Every descriptor and every node's path shows the expected content and size."""
        for fd, mode in self.open:
            assert os.fstat(fd).st_size == len(self.expected)
            if mode in ("r", "rw"):
                assert os.pread(fd, 1 << 20, 0) == self.expected
        for path in self.paths.values():
            assert path.stat().st_size == len(self.expected)

    def finish(self) -> None:
        for fd, _ in self.open:
            os.close(fd)
        for path in self.paths.values():
            assert path.read_bytes() == self.expected


MODES = [pair for pair in itertools.product(FLAGS, FLAGS) if pair != ("r", "r")]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("warm", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize(("mine", "theirs"), MODES)
def test_open_on_one_write_on_another(work: Work, mine: str, theirs: str, warm: bool, order: str) -> None:
    """A opens before (or after) B opens and writes; both write in turn; both see all of it, from each pair of nodes."""
    for a_node, b_node in PAIRS:
        both = TwoOpeners(work, f"{a_node}-{b_node}", 3 * 4096 + 100)
        if order == "before":
            a = both.opener(a_node, mine)
            if warm:
                both.write(a, 10, 50)
                both.check()
            b = both.opener(b_node, theirs)
        else:
            b = both.opener(b_node, theirs)
            both.write(b, 5, 4096)
            if warm:
                both.paths[a_node].read_bytes()
            a = both.opener(a_node, mine)
        for offset, size in ((100, 20), (4000, 300), (12_000, 5000), (40_000, 10)):
            both.write(b, offset, size)
            both.check()
            both.write(a, offset + 7, size)
            both.check()
        both.finish()


def test_a_close_and_reopen_after_a_conflict_sees_everything(work: Work) -> None:
    for a_node, b_node in PAIRS:
        both = TwoOpeners(work, f"{a_node}-{b_node}", 5000)
        a = both.opener(a_node, "rw")
        b = both.opener(b_node, "rw")
        both.write(a, 0, 100)
        os.close(b[0])
        both.open.remove(b)
        both.write(a, 50, 100)
        both.check()
        os.close(a[0])
        both.open.remove(a)
        c = both.opener(b_node, "rw")
        both.write(c, 4000, 3000)
        both.check()
        both.finish()


def test_truncate_on_another_node_is_seen_by_open_descriptors(work: Work) -> None:
    for a_node, b_node in PAIRS:
        both = TwoOpeners(work, f"{a_node}-{b_node}", 20_000)
        both.opener(a_node, "rw")
        both.check()
        for size in (5000, 100, 9000, 0, 4096):
            os.truncate(both.paths[b_node], size)
            del both.expected[size:]
            both.expected.extend(bytes(size - len(both.expected)))
            both.check()
        both.finish()


APPENDER = """
import os, sys
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_WRONLY | os.O_APPEND)
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
for i in range(count):
    line = f"{name} {i} {'=' * (i * 37 % 200)}\\n".encode()
    assert os.write(fd, line) == len(line)
os.close(fd)
"""


def test_append_lines_from_three_nodes_stay_whole(work: Work) -> None:
    """3 x 1,000 O_APPEND lines from three processes give 3,000 whole lines, each node's in its order."""
    (work["n1"] / "log").touch()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, str(work[node] / "log"), node, "1000"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in ("n1", "n2", "n3")
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    for node in ("n1", "n2", "n3"):
        lines = (work[node] / "log").read_text().splitlines()
        assert len(lines) == 3000
        following = dict.fromkeys(("n1", "n2", "n3"), 0)
        for line in lines:
            name, number, filler = line.split(" ")
            assert int(number) == following[name], f"{name} wrote {number} out of order, twice or not at all"
            assert filler == "=" * (int(number) * 37 % 200)
            following[name] += 1


def test_appends_through_descriptors_opened_before_either_knew(work: Work) -> None:
    fds = {
        node: os.open(work[node] / "log", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644) for node in ("n1", "n2", "n3")
    }
    expected = b""
    try:
        for turn in range(100):
            for node, fd in fds.items():
                line = f"{node} {turn}\n".encode()
                assert os.write(fd, line) == len(line)
                expected += line
            for fd in fds.values():
                assert os.fstat(fd).st_size == len(expected)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda fd: [os.write(fd, b"0123456789\n") for _ in range(200)], fds.values()))
        for fd in fds.values():
            content = os.pread(fd, 1 << 20, 0)
            assert content == expected + b"0123456789\n" * 600
    finally:
        for fd in fds.values():
            os.close(fd)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 8192, 100_000])
def test_others_get_their_turn_beside_a_thread_that_never_stops_writing(work: Work, size: int) -> None:
    """Closes of other descriptors, fsyncs, changes of the file, and what other nodes ask of it."""
    here, there = work["n2"] / "file", work["n3"] / "file"
    stop = threading.Event()
    written = [0]
    fd = os.open(here, os.O_RDWR | os.O_CREAT)

    def write() -> None:
        while not stop.is_set():
            os.pwrite(fd, b"w" * size, written[0] % 8 * size)
            written[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    slowest = dict.fromkeys(("close", "fsync", "chmod", "stat elsewhere", "read elsewhere"), 0.0)

    def timed(what: str, done: Callable[[], object]) -> None:
        begin = time.monotonic()
        done()
        slowest[what] = max(slowest[what], time.monotonic() - begin)

    try:
        assert procs.wait_until(lambda: written[0] > 100, 20)
        for _ in range(20):
            timed("close", lambda: os.close(os.dup(fd)))
            timed("fsync", lambda: os.fsync(fd))
            timed("chmod", lambda: here.chmod(0o600))
            timed("stat elsewhere", there.stat)
            timed("read elsewhere", there.read_bytes)
    finally:
        stop.set()
        writer.join(30)
        os.close(fd)
    assert max(slowest.values()) < 5, slowest
    assert there.read_bytes() == here.read_bytes() == b"w" * size * min(8, written[0])


def test_parallel_creators_in_one_directory(work: Work) -> None:
    """100 creators over three nodes: no name is lost, and of each clash exactly one wins."""
    nodes = ["n1", "n2", "n3"]
    clashes = [f"clash-{i}" for i in range(20)]
    start = threading.Barrier(100)

    def creator(number: int) -> list[str]:
        folder = work[nodes[number % 3]]
        order = clashes[:]
        random.Random(number).shuffle(order)
        start.wait(60)
        won = []
        for i in range(10):
            os.close(os.open(folder / f"own-{number}-{i}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        for name in order:
            try:
                os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError:
                continue
            won.append(name)
        return won

    with ThreadPoolExecutor(100) as pool:
        winners = Counter(name for won in pool.map(creator, range(100)) for name in won)
    assert winners == Counter(clashes)
    expected = sorted([f"own-{n}-{i}" for n in range(100) for i in range(10)] + clashes)
    for folder in work.values():
        assert sorted(os.listdir(folder)) == expected


@pytest.mark.timeout(300)
def test_listing_a_big_directory_while_others_change_it(lab: Lab, work: Work) -> None:
    """Entries there throughout are listed exactly once, however the directory changes around them."""
    home = lab.home()
    for i in range(20_000):
        os.close(os.open(work[home] / f"stays-{i:05}", os.O_WRONLY | os.O_CREAT, 0o644))
    stays = {f"stays-{i:05}" for i in range(20_000)}
    lister, changer = lab.others() if not lab.native else ["n2", "n3"]
    stop = threading.Event()
    changed = itertools.count()

    def change() -> None:
        for number in changed:
            if stop.is_set():
                return
            path = work[changer] / f"comes-and-goes-{number % 50}"
            path.touch()
            if number % 3:
                path.unlink()

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(change)
        try:
            for _ in range(5):
                names = Counter(os.listdir(work[lister]))
                assert {name for name in names if name in stays} == stays
                assert not [name for name, times in names.items() if times > 1]
            with os.scandir(work[lister]) as entries:
                slowly = Counter(entry.name for entry in entries)
            assert stays <= set(slowly)
            assert max(slowly.values()) == 1
        finally:
            stop.set()
            busy.result(60)
    assert next(changed) > 5, "nothing changed meanwhile"


@pytest.mark.parametrize(("actor", "observer"), PAIRS)
def test_names_change_at_once_on_other_nodes(work: Work, actor: str, observer: str) -> None:
    """Create, rename, overwriting rename and unlink are visible right after, negative entries included."""
    mine, theirs = work[actor], work[observer]
    for i in range(100):
        new, moved = f"new-{i}", f"moved-{i}"
        with pytest.raises(FileNotFoundError):
            os.stat(theirs / new)  # leaves a negative entry in the observer's kernel
        (mine / new).write_text(f"{i}")
        number = os.stat(theirs / new).st_ino
        assert (theirs / new).read_text() == f"{i}"
        os.rename(mine / new, mine / moved)
        with pytest.raises(FileNotFoundError):
            os.stat(theirs / new)
        assert os.stat(theirs / moved).st_ino == number
        (mine / new).write_text("second")
        assert os.stat(theirs / moved).st_ino == number
        os.rename(mine / new, mine / moved)
        assert (theirs / moved).read_text() == "second"
        os.unlink(mine / moved)
        with pytest.raises(FileNotFoundError):
            os.stat(theirs / moved)
        assert os.listdir(theirs) == []


def test_directory_trees_move_and_go_under_another_node(work: Work) -> None:
    for actor, observer in PAIRS:
        mine, theirs = work[actor], work[observer]
        (mine / "d" / "e").mkdir(parents=True)
        (mine / "d" / "e" / "f").write_text("deep")
        held = os.open(theirs / "d" / "e", os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert (theirs / "d" / "e" / "f").read_text() == "deep"
            os.rename(mine / "d" / "e", mine / "g")
            assert os.listdir(held) == ["f"]
            assert (theirs / "g" / "f").read_text() == "deep"
            assert not (theirs / "d" / "e").exists()
            (mine / "g" / "f").unlink()
            (mine / "g").rmdir()
            (mine / "d").rmdir()
            assert os.listdir(held) == []
            with pytest.raises(FileNotFoundError):
                os.open("x", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=held)
        finally:
            os.close(held)
        assert os.listdir(theirs) == []


def test_a_file_unlinked_elsewhere_lives_until_its_last_close(work: Work) -> None:
    for holder, remover in PAIRS:
        (work[holder] / "f").write_bytes(b"kept" * 5000)
        fd = os.open(work[holder] / "f", os.O_RDWR)
        try:
            os.unlink(work[remover] / "f")
            assert os.fstat(fd).st_nlink == 0
            assert os.pread(fd, 1 << 20, 0) == b"kept" * 5000
            assert os.pwrite(fd, b"more", 20_000) == 4
            assert os.pread(fd, 100, 19_996) == b"keptmore"
            (work[remover] / "f").write_bytes(b"another file")
            assert os.pread(fd, 4, 0) == b"kept"
        finally:
            os.close(fd)
        assert (work[holder] / "f").read_bytes() == b"another file"


def test_exclusive_create_is_decided_once(work: Work) -> None:
    """One name, three nodes, all at once: one winner and two EEXIST, every time."""
    with ThreadPoolExecutor(3) as pool:
        for i in range(100):
            start = threading.Barrier(3)

            def attempt(node: str, name: str = f"x{i}", start: threading.Barrier = start) -> int:
                start.wait(30)
                try:
                    os.mkdir(work[node] / name)
                except OSError as failed:
                    return failed.errno or -1
                return 0

            assert sorted(pool.map(attempt, ("n1", "n2", "n3"))) == [0, errno.EEXIST, errno.EEXIST]


def test_names_of_255_arbitrary_bytes(work: Work) -> None:
    rng = random.Random(7)
    allowed = [value for value in range(1, 256) if value != ord("/")]
    names = [bytes(rng.choices(allowed, k=255)) for _ in range(60)]
    names += [bytes(allowed), b"\n", b" ", b"-", b"\x01", b"\xff" * 255, b"...", b"a\\b"]
    nodes = list(work)
    for i, name in enumerate(names):
        maker, reader = nodes[i % 3], nodes[(i + 1) % 3]
        with open(os.fsencode(work[maker]) + b"/" + name, "xb") as stream:
            stream.write(name)
        with open(os.fsencode(work[reader]) + b"/" + name, "rb") as stream:
            assert stream.read() == name
    for folder in work.values():
        assert sorted(os.listdir(os.fsencode(folder))) == sorted(names)
        with pytest.raises(OSError) as caught:
            os.mkdir(os.fsencode(folder) + b"/" + b"x" * 256)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_commands_run_on_nodes_see_each_others_files(lab: Lab, work: Work) -> None:
    """What `lab exec` runs stands in the node's folder and network, and works on the same volume."""
    folder = work["n1"].name
    for writer, reader in PAIRS:
        lab.execute(writer, "sh", "-c", f"echo from {writer} > {folder}/said")
        assert lab.execute(reader, "cat", f"{folder}/said") == f"from {writer}\n"


def test_nodes_agree_on_statfs(lab: Lab, work: Work) -> None:
    replies = [os.statvfs(folder) for folder in work.values()]
    assert len({(r.f_blocks, r.f_bsize, r.f_frsize, r.f_namemax) for r in replies}) == 1
    assert replies[0].f_namemax == 255
    free = replies[0].f_bfree * replies[0].f_frsize
    with open(work["n2"] / "big", "wb") as stream:
        for _ in range(50):
            stream.write(os.urandom(1 << 20))
        stream.flush()
        os.fsync(stream.fileno())
    for folder in work.values():
        after = os.statvfs(folder)
        used = free - after.f_bfree * after.f_frsize
        # XFS preallocates behind a growing file: more than written may be taken, not less.
        assert 50 << 20 <= used < 250 << 20
