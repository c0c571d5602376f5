"""The home moves while every node works: no application sees an error, and nothing is lost."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from labkit import Lab, kernel_wait, node_logs

pytestmark = pytest.mark.needs_lab
Work = dict[str, Path]


class Load:
    """Threads that work through one node each, and remember what the volume must hold in the end."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.stop = threading.Event()
        self.errors: list[str] = []
        self.lines = dict.fromkeys(work, 0)
        self.files: dict[str, dict[str, bytes]] = {node: {} for node in work}
        self.operations = dict.fromkeys(work, 0)
        self.longest_s = 0.0
        (work["n1"] / "log").touch()
        (work["n1"] / "shared").mkdir()
        for node in work:
            (work["n1"] / node).mkdir()

    def _forever(self, node: str, body: Callable[[str, random.Random], None]) -> None:
        rng = random.Random(f"{node} {body.__name__}")
        while not self.stop.is_set():
            begun = time.monotonic()
            try:
                body(node, rng)
            except (OSError, AssertionError) as failed:
                self.errors.append(f"{node} {body.__name__}: {type(failed).__name__}: {failed}")
                self.stop.set()
            self.operations[node] += 1
            self.longest_s = max(self.longest_s, time.monotonic() - begun)

    def append(self, node: str, _rng: random.Random) -> None:
        """One line to the common log, through a new descriptor."""
        with open(self.work[node] / "log", "ab", buffering=0) as stream:
            stream.write(f"{node} {self.lines[node]}\n".encode())
        self.lines[node] += 1

    def names(self, node: str, rng: random.Random) -> None:
        """Create, replace, rename or remove a file of the node's own; read one back."""
        mine, folder = self.files[node], self.work[node] / node
        name, other = f"f{rng.randrange(30)}", f"f{rng.randrange(30)}"
        pick = rng.random()
        if name not in mine or pick < 0.4:
            content = rng.randbytes(rng.randrange(1, 20_000))
            (folder / name).write_bytes(content)
            mine[name] = content
        elif pick < 0.6:
            os.rename(folder / name, folder / other)
            mine[other] = mine.pop(name)
        elif pick < 0.75:
            os.unlink(folder / name)
            del mine[name]
        else:
            assert (folder / name).read_bytes() == mine[name], f"{name} read back differently"

    def exclusive(self, node: str, rng: random.Random) -> None:
        """Create-or-remove a name that all nodes fight for: EEXIST and ENOENT are answers, not errors."""
        path = self.work[node] / "shared" / f"x{rng.randrange(10)}"
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            if rng.random() < 0.5:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            else:
                os.unlink(path)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the threads for the length of a with block; they have all ended after it."""
        bodies = (self.append, self.names, self.exclusive)
        threads = [
            threading.Thread(target=self._forever, args=(node, body), name=f"{node} {body.__name__}", daemon=True)
            for node in self.work
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(60)
            hanging = {thread.name: kernel_wait(thread) for thread in threads if thread.is_alive()}
            if hanging:
                self.errors.append(f"still blocked after 60 s: {hanging}")
                print(node_logs(self.work["n1"].parents[1]))

    def wait_for_work(self, each: int) -> None:
        """Wait until every node has done *each* more operations."""
        goal = {node: done + each for node, done in self.operations.items()}
        deadline = time.monotonic() + 60
        while not self.stop.is_set() and any(self.operations[node] < goal[node] for node in goal):
            assert time.monotonic() < deadline, f"no progress: {self.operations}, wanted {goal}"
            self.stop.wait(0.01)

    def check(self) -> None:
        """What every node sees is what the threads were told had been done."""
        for folder in self.work.values():
            following = dict.fromkeys(self.work, 0)
            for line in (folder / "log").read_text().splitlines():
                node, number = line.split(" ")
                assert int(number) == following[node]
                following[node] += 1
            assert following == self.lines
            for node, files in self.files.items():
                assert sorted(os.listdir(folder / node)) == sorted(files)
                for name, content in files.items():
                    assert (folder / node / name).read_bytes() == content


@pytest.mark.timeout(300)
def test_home_moves_under_load_from_all_nodes(lab: Lab, work: Work) -> None:
    """Six moves, there and back three times, while three threads a node work."""
    first = lab.home()
    second = lab.others()[0]
    epoch = int(lab.status()["epoch"])
    load = Load(work)
    with load.running():
        for turn in range(3):
            for target in (second, first):
                load.wait_for_work(20)
                lab.move_home(target)
                assert lab.home() == target, f"turn {turn}"
        load.wait_for_work(20)
    assert load.errors == []
    assert int(lab.status()["epoch"]) == epoch + 6
    load.check()


def test_descriptors_survive_a_move(lab: Lab, work: Work) -> None:
    """Descriptors of each kind, cached and not, of an unlinked file too, go on working when the home has moved."""
    home, other = lab.home(), lab.others()[0]
    fds: dict[str, int] = {}
    try:
        for node in lab.names:
            (work[node] / node).write_bytes(b"a" * 10_000)
            fds[node] = os.open(work[node] / node, os.O_RDWR)
            os.pwrite(fds[node], b"before", 0)
            fds[f"{node}-gone"] = os.open(work[node] / f"{node}-gone", os.O_RDWR | os.O_CREAT, 0o600)
            os.write(fds[f"{node}-gone"], b"unlinked, still open")
            os.unlink(work[home] / f"{node}-gone")
            fds[f"{node}-append"] = os.open(work[node] / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(fds[f"{node}-append"], b"one\n")
            fds[f"{node}-dir"] = os.open(work[node], os.O_RDONLY | os.O_DIRECTORY)
        for target in (other, home):
            lab.move_home(target)
            for node in lab.names:
                assert os.pread(fds[node], 7, 0) == b"beforea"
                os.pwrite(fds[node], target.encode(), 5000)
                assert os.pread(fds[f"{node}-gone"], 100, 0) == b"unlinked, still open"
                assert os.fstat(fds[f"{node}-gone"]).st_nlink == 0
                os.write(fds[f"{node}-append"], b"more\n")
                os.fsync(fds[node])
                assert sorted(os.listdir(fds[f"{node}-dir"])) == sorted([*lab.names, "log"])
            for folder in work.values():
                for node in lab.names:
                    assert (folder / node).read_bytes()[5000 : 5000 + len(target)] == target.encode()
        assert (work[other] / "log").read_text() == "one\n" * 3 + "more\n" * 6
    finally:
        for fd in fds.values():
            os.close(fd)


def test_a_move_to_the_home_itself_changes_nothing(lab: Lab) -> None:
    before = lab.status()
    lab.move_home(lab.home())
    after = lab.status()
    assert (after["home"], after["epoch"]) == (before["home"], before["epoch"])


def test_node_times_and_locks_hold_across_a_move(lab: Lab, work: Work) -> None:
    """What one node wrote before a move is what all see after it, attributes included."""
    for node in lab.names:
        path = work[node] / node
        path.write_bytes(node.encode() * 1000)
        os.chmod(path, 0o640)
        os.utime(path, ns=(10**18 + 1, 10**18 + 2))
        os.setxattr(path, "user.by", node.encode())
    lab.move_home(lab.others()[0])
    for folder in work.values():
        for node in lab.names:
            st = os.stat(folder / node)
            assert (st.st_mode & 0o777, st.st_mtime_ns, st.st_size) == (0o640, 10**18 + 2, 2000)
            assert os.getxattr(folder / node, "user.by") == node.encode()
            assert (folder / node).read_bytes() == node.encode() * 1000
