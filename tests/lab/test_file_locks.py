"""flock and byte-range locks hold for the whole cluster."""

import errno
import fcntl
import json
import mailbox
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from labkit import Lab

from mxfsd import procs

pytestmark = [
    pytest.mark.needs_lab,
    pytest.mark.needs("native"),
]
Work = dict[str, Path]

CALLS = int(os.environ.get("MXFS_LOCK_CALLS", "2000"))
TRANSACTIONS = int(os.environ.get("MXFS_LOCK_TRANSACTIONS", "150"))
MAILS = int(os.environ.get("MXFS_LOCK_MAILS", "20"))
"""How much each node does: `make locks` has many."""
WAIT_S = 30.0


class Worker:
    """A process that locks one file through one node (lockworker.py)."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("lockworker.py")), str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, what: str, kind: str, start: int = 0, length: int = 0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, kind, start, length]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, what: str, kind: str, start: int = 0, length: int = 0) -> Any:
        self.tell(what, kind, start, length)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def worker(path: Path) -> Iterator[Worker]:
    one = Worker(path)
    try:
        yield one
    finally:
        one.end()


@contextmanager
def workers(work: Work, name: str, *nodes: str) -> Iterator[list[Worker]]:
    (work[nodes[0]] / name).touch()
    with ExitStack() as stack:
        yield [stack.enter_context(worker(work[node] / name)) for node in nodes]


def heard(one: Worker, answer: list[Any]) -> threading.Thread:
    """A thread that waits for the worker's answer."""
    thread = threading.Thread(target=lambda: answer.append(one.hear()), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("what", ["flock", "set"])
def test_two_nodes_exclude_each_other(lab: Lab, work: Work, what: str) -> None:
    """In each direction, readers beside readers, and again after each unlock."""
    for one, other in ((lab.home(), lab.others()[0]), (lab.others()[0], lab.home()), tuple(lab.others())):
        with workers(work, "file", one, other) as (a, b):
            for _ in range(3):
                assert a.ask(what, "w") == "ok"
                assert b.ask(what, "w") == errno.EAGAIN
                assert b.ask(what, "r") == errno.EAGAIN
                assert a.ask(what, "u") == "ok"
                assert b.ask(what, "r") == "ok"
                assert a.ask(what, "r") == "ok"
                assert a.ask(what, "w") == errno.EAGAIN
                assert b.ask(what, "u") == "ok"
                # (A flock that could not be changed is gone, flock(2); a byte-range lock stays.)
                assert b.ask(what, "w") == ("ok" if what == "flock" else errno.EAGAIN)
                assert a.ask(what, "u") == b.ask(what, "u") == "ok"


def test_ranges(lab: Lab, work: Work) -> None:
    home, other = lab.home(), lab.others()[0]
    with workers(work, "file", home, other) as (a, b):
        assert a.ask("set", "w", 100, 100) == "ok"
        assert b.ask("set", "w", 0, 100) == "ok"
        assert b.ask("set", "r", 199, 1) == errno.EAGAIN
        assert b.ask("get", "w", 150, 0) == [True, 100, 100]
        assert a.ask("set", "u", 120, 10) == "ok"
        assert b.ask("set", "w", 120, 10) == "ok"
        assert b.ask("set", "w", 119, 12) == errno.EAGAIN
        assert a.ask("get", "r", 0, 0) == [True, 0, 100]
        assert a.ask("set", "r", 130, 0) == "ok"  # to the end of the file
        assert b.ask("set", "r", 1 << 40, 5) == "ok"
        assert b.ask("set", "w", 1 << 40, 5) == errno.EAGAIN


def test_locks_are_shown(lab: Lab, work: Work) -> None:
    home, other = lab.home(), lab.others()[0]
    run_dir = lab.folder / ".lab" / home / "run"
    command = [sys.executable, "-m", "mxfsd.cli.mxfs", "locks", "--run-dir", str(run_dir)]
    with workers(work, "file", home, other, other) as (a, b, c):
        assert a.ask("set", "r", 100, 100) == b.ask("set", "r", 100, 50) == "ok"
        c.tell("wait", "w", 120, 0)

        def shown() -> dict[str, Any]:
            done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
            reply: dict[str, Any] = json.loads(done.stdout)[0]
            reply["file_locks"] = [lock for lock in reply["file_locks"] if lock["ino"] == ino]
            return reply

        ino = os.stat(work[home] / "file").st_ino
        assert procs.wait_until(lambda: any(lock["waiting"] for lock in shown()["file_locks"]), WAIT_S)
        reply = shown()
        found = sorted(
            (lock["node"], lock["pid"], lock["type"], lock["start"], lock["end"] or 0, lock["waiting"])
            for lock in reply["file_locks"]
        )
        assert found == sorted(
            [
                (home, a.process.pid, "read", 100, 199, False),
                (other, b.process.pid, "read", 100, 149, False),
                (other, c.process.pid, "write", 120, 0, True),
            ]
        )
        assert all(resource["ino"] < 1 << 63 for resource in reply["resources"])
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "read posix" in text and "100-199" in text and "120- " in text and "waits" in text
        assert a.ask("set", "u", 0, 0) == b.ask("set", "u", 0, 0) == c.hear() == "ok"


def test_a_close_of_any_descriptor_gives_byte_ranges_up(lab: Lab, work: Work) -> None:
    home, other = lab.home(), lab.others()[0]
    with workers(work, "file", home) as (far,):
        fd = os.open(work[other] / "file", os.O_RDWR)
        second = os.open(work[other] / "file", os.O_RDWR)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert far.ask("set", "w", 0, 10) == errno.EAGAIN
            assert far.ask("flock", "w") == errno.EAGAIN
        finally:
            os.close(second)
        assert far.ask("set", "w", 0, 10) == "ok", "POSIX says so: any descriptor's close"
        assert far.ask("flock", "w") == "ok"
        os.close(fd)


def test_open_file_description_locks(lab: Lab, work: Work) -> None:
    """They belong to the description: another descriptor's close leaves them, the last of their own takes them."""
    import struct

    set_ofd = 37  # F_OFD_SETLK, <linux/fcntl.h>
    home, other = lab.home(), lab.others()[0]
    with workers(work, "file", home) as (far,):
        fd = os.open(work[other] / "file", os.O_RDWR)
        copy = os.dup(fd)
        fcntl.fcntl(fd, set_ofd, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 10, 0))
        assert far.ask("set", "w", 0, 10) == errno.EAGAIN
        os.close(os.open(work[other] / "file", os.O_RDWR))
        os.close(copy)
        assert far.ask("set", "w", 0, 10) == errno.EAGAIN
        os.close(fd)
        # close(2) does not wait for RELEASE, in which the kernel says that the description is gone.
        assert procs.wait_until(lambda: far.ask("set", "w", 0, 10) == "ok", WAIT_S)


@pytest.mark.parametrize(("what", "argument"), [("flock", 1), ("wait", 0)])
def test_a_waiter_is_served_when_the_lock_is_free(lab: Lab, work: Work, what: str, argument: int) -> None:
    nodes = [lab.home(), *lab.others()]
    with workers(work, "file", *nodes) as (a, b, c):
        for holder, waiter in ((a, b), (b, a), (b, c), (c, b)):
            first = "flock" if what == "flock" else "set"
            assert holder.ask(first, "w") == "ok"
            answer: list[Any] = []
            waiter.tell(what, "w", argument)
            thread = heard(waiter, answer)
            time.sleep(0.2)
            assert answer == []
            assert holder.ask(first, "u") == "ok"
            thread.join(WAIT_S)
            assert answer == ["ok"]
            assert waiter.ask(first, "u") == "ok"


def test_a_deadlock_between_nodes_is_seen(lab: Lab, work: Work) -> None:
    for one, other in ((lab.home(), lab.others()[0]), tuple(lab.others())):
        with workers(work, "file", one, other) as (a, b):
            assert a.ask("set", "w", 0, 1) == b.ask("set", "w", 1, 1) == "ok"
            a.tell("wait", "w", 1, 1)
            time.sleep(0.3)
            assert b.ask("wait", "w", 0, 1) == errno.EDEADLK
            assert b.ask("set", "u", 1, 1) == "ok"
            assert a.hear() == "ok"


@pytest.mark.parametrize("what", [fcntl.flock, fcntl.lockf])
def test_a_signal_ends_a_wait(lab: Lab, work: Work, what: Any) -> None:
    """And leaves no waiter: the next in the queue is served."""
    home, other = lab.home(), lab.others()[0]
    with workers(work, "file", home, home) as (a, b):
        kind = "flock" if what is fcntl.flock else "set"
        assert a.ask(kind, "w") == "ok"
        script = (
            "import fcntl, os, signal, sys\n"
            "def stop(*_): raise InterruptedError\n"
            "signal.signal(signal.SIGALRM, stop)\n"
            "fd = os.open(sys.argv[1], os.O_RDWR)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.5)\n"
            "try:\n"
            f"    fcntl.{what.__name__}(fd, fcntl.LOCK_EX)\n"
            "except InterruptedError:\n"
            "    print('interrupted')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(work[other] / "file")], capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.stdout == "interrupted\n", done.stderr
        assert a.ask(kind, "u") == "ok"
        assert b.ask(kind, "w") == "ok"


@pytest.mark.parametrize("kind", ["flock", "set"])
def test_the_locks_of_a_killed_process_are_free(lab: Lab, work: Work, kind: str) -> None:
    home, other = lab.home(), lab.others()[0]
    with workers(work, "file", other, home) as (a, b):
        assert a.ask(kind, "w") == "ok"
        assert b.ask(kind, "w") == errno.EAGAIN
        a.process.send_signal(signal.SIGKILL)
        a.process.wait()
        assert procs.wait_until(lambda: b.ask(kind, "w") == "ok", WAIT_S)


def test_locks_hold_across_a_move_and_the_death_of_the_home(lab: Lab, work: Work) -> None:
    """A survivor's lock stays its own, one that waits goes on waiting, and those of a dead node are free."""
    home, (one, other) = lab.home(), lab.others()
    with workers(work, "file", one, other, one, other) as (a, b, c, d):
        assert a.ask("set", "w", 0, 10) == a.ask("flock", "w") == "ok"
        lab.move_home(other)
        assert b.ask("set", "w", 0, 10) == b.ask("flock", "w") == errno.EAGAIN
        lab.move_home(home)
        assert b.ask("set", "w", 0, 10) == errno.EAGAIN
        with workers(work, "file", home) as (dying,):
            assert dying.ask("set", "w", 50, 10) == "ok"
            answer: list[Any] = []
            d.tell("wait", "w", 50, 10)
            thread = heard(d, answer)
            lab.kill(home)
            assert b.ask("set", "w", 0, 10) == b.ask("flock", "w") == errno.EAGAIN
            thread.join(60)
            assert answer == ["ok"]
        assert c.ask("set", "w", 5, 1) == errno.EAGAIN
        assert a.ask("set", "u", 0, 10) == a.ask("flock", "u") == "ok"
        assert b.ask("set", "w", 0, 10) == b.ask("flock", "w") == "ok"
    lab.start(home)


def test_locks_hold_across_the_crash_of_a_daemon(lab: Lab, work: Work) -> None:
    home, other = lab.home(), lab.others()[0]
    with workers(work, "file", other, home) as (a, b):
        for victim in (other, home):
            assert a.ask("set", "w", 0, 10) == a.ask("flock", "w") == "ok"
            lab.crash(victim, "daemon")
            assert b.ask("set", "w", 0, 10) == b.ask("flock", "w") == errno.EAGAIN
            assert a.ask("set", "u", 0, 10) == a.ask("flock", "u") == "ok"
            assert b.ask("set", "w", 0, 10) == b.ask("flock", "w") == "ok"
            assert b.ask("set", "u", 0, 10) == b.ask("flock", "u") == "ok"


def test_the_lock_of_a_dead_node_goes_to_a_waiter(lab: Lab, work: Work) -> None:
    victim, other = lab.others()
    with workers(work, "file", victim, other) as (a, b):
        assert a.ask("set", "w", 0, 10) == a.ask("flock", "w") == "ok"
        answer: list[Any] = []
        b.tell("wait", "w", 0, 10)
        thread = heard(b, answer)
        lab.kill(victim)
        thread.join(60)
        assert answer == ["ok"]
        assert b.ask("flock", "w") == "ok"
    lab.start(victim)


# -- against a model ---------------------------------------------------------------------------------------------------

SPAN = 24


class Model:
    """Who has which byte of a small file, as POSIX says."""

    def __init__(self, owners: int) -> None:
        self.held: list[list[str]] = [[""] * SPAN for _ in range(owners)]

    def conflicts(self, owner: int, kind: str, start: int, end: int) -> list[int]:
        return [
            at
            for other, row in enumerate(self.held)
            if other != owner
            for at in range(start, end)
            if row[at] == "w" or (row[at] and kind == "w")
        ]

    def put(self, owner: int, kind: str, start: int, end: int) -> None:
        self.held[owner][start:end] = ["" if kind == "u" else kind] * (end - start)


@pytest.mark.timeout(600)
def test_random_calls_agree_with_a_model(lab: Lab, work: Work) -> None:
    """Lock, unlock and test, of six processes on three nodes, on two files; every answer is what POSIX says."""
    rng = random.Random(20)
    owners = [name for name in lab.names for _ in range(2)]
    with workers(work, "one", *owners) as first, workers(work, "two", *owners) as second:
        files = [(first, Model(6)), (second, Model(6))]
        granted = 0
        for call in range(CALLS):
            # Runs of one node on one file, and then of all: so the right to decide moves, and stays a while too.
            if call % 40 == 0:
                some = rng.choice([range(6), range(2), range(2, 4), range(4, 6), range(4)])
            ones, model = rng.choice(files)
            owner = rng.choice(some)
            start = rng.randrange(SPAN)
            end = rng.randrange(start + 1, SPAN + 1)
            what, kind = rng.choice(
                [("set", "r"), ("set", "w"), ("set", "u"), ("set", "u"), ("get", "w"), ("get", "r")]
            )
            answer = ones[owner].ask(what, kind, start, end - start)
            told = f"call {call}: {owners[owner]}/{owner} {what} {kind} [{start}, {end}) said {answer}: {model.held}"
            conflicts = model.conflicts(owner, kind, start, end) if kind != "u" else []
            if what == "get":
                assert (answer == "free") == (not conflicts), told
                if conflicts:
                    assert any(answer[1] <= at < answer[1] + answer[2] for at in conflicts), told
            elif conflicts:
                assert answer == errno.EAGAIN, told
            else:
                assert answer == "ok", told
                model.put(owner, kind, start, end)
                granted += 1
    assert granted > CALLS // 4


def run_all(started: list[subprocess.Popen[str]], at_half: Callable[[], None] | None = None) -> None:
    """Wait for programs that say "half" when they have done half; *at_half* is done when the first one says so."""
    try:
        if at_half is not None:
            assert started[0].stdout is not None
            assert started[0].stdout.readline() == "half\n"
            at_half()
        for one in started:
            one.communicate(timeout=900)
    finally:
        for one in started:
            one.kill()
            one.communicate()
    assert [one.returncode for one in started] == [0] * len(started)


def program(text: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


SQL = """
import sqlite3, sys
path, node, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = 0
while done < count:
    base = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        while done < count:
            base.execute("BEGIN IMMEDIATE")
            base.execute("UPDATE counter SET n = n + 1")
            base.execute("INSERT INTO row VALUES (?, ?, hex(randomblob(50)))", (node, done))
            base.execute("COMMIT")
            done += 1
            if done == count // 2:
                print("half", flush=True)
    except sqlite3.OperationalError as exc:
        if "locked" not in str(exc):
            raise
        if base.in_transaction:
            base.execute("ROLLBACK")
    finally:
        base.close()
"""


def prepare_base(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("PRAGMA journal_mode=DELETE")
        base.execute("CREATE TABLE counter (n INTEGER)")
        base.execute("CREATE TABLE row (node TEXT, number INTEGER, filler TEXT)")
        base.execute("INSERT INTO counter VALUES (0)")
    base.close()


def check_base(work: Work, writers: list[str]) -> None:
    """Every node sees every transaction of every writer, once."""
    wanted = sorted((node, number) for node in writers for number in range(TRANSACTIONS))
    for folder in work.values():
        with sqlite3.connect(folder / "base") as base:
            assert base.execute("SELECT n FROM counter").fetchone() == (len(wanted),)
            assert base.execute("SELECT node, number FROM row ORDER BY node, number").fetchall() == wanted
            assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        base.close()


@pytest.mark.timeout(1200)
def test_sqlite_on_two_nodes(lab: Lab, work: Work) -> None:
    """In rollback-journal mode, which is nothing but file locks: no update is lost."""
    nodes = [lab.home(), lab.others()[0]]
    prepare_base(work[nodes[0]] / "base")
    run_all([program(SQL, work[node] / "base", node, TRANSACTIONS) for node in nodes])
    check_base(work, nodes)


@pytest.mark.timeout(1200)
def test_sqlite_while_the_home_dies(lab: Lab, work: Work) -> None:
    """Two survivors go on: they see a pause, and no update is lost."""
    home, nodes = lab.home(), lab.others()
    prepare_base(work[nodes[0]] / "base")
    run_all([program(SQL, work[node] / "base", node, TRANSACTIONS) for node in nodes], lambda: lab.kill(home))
    lab.start(home)
    check_base(work, nodes)


MAIL = """
import mailbox, sys
kind, path, node, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
for number in range(count):
    box = getattr(mailbox, kind)(path)
    while True:
        try:
            box.lock()
            break
        except mailbox.ExternalClashError:
            pass
    message = mailbox.Message()
    message["Subject"] = f"{node} {number}"
    message.set_payload("x" * 200)
    box.add(message)
    box.flush()
    box.unlock()
    box.close()
    if number + 1 == count // 2:
        print("half", flush=True)
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["mbox", "MH"])
@pytest.mark.parametrize("dying", [False, True], ids=["lives", "dies"])
def test_mailbox_on_two_nodes(lab: Lab, work: Work, kind: str, dying: bool) -> None:
    """Python's mailbox locks with fcntl and a dot file; no message is lost, also where the home dies."""
    home, others = lab.home(), lab.others()
    nodes = others if dying else [home, others[0]]
    if kind == "mbox":
        (work[nodes[0]] / "box").touch()
    else:
        mailbox.MH(work[nodes[0]] / "box").close()
    started = [program(MAIL, kind, work[node] / "box", node, MAILS) for node in nodes]
    run_all(started, (lambda: lab.kill(home)) if dying else None)
    if dying:
        lab.start(home)
    for folder in work.values():
        box: Any = getattr(mailbox, kind)(folder / "box")
        assert sorted(message["Subject"] for message in box) == sorted(
            f"{node} {number}" for node in nodes for number in range(MAILS)
        )
        box.close()
