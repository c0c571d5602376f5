"""Files that the home's kernel serves by itself (mount option passthrough): the other nodes see the same file."""

import contextlib
import errno
import mmap
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from labkit import CHANNEL, Lab, LabError, errno_of, must, mxfs_command, running_lab

pytestmark = [
    pytest.mark.needs_lab,
    pytest.mark.timeout(240),
    pytest.mark.skipif(CHANNEL == "pyfuse3", reason="libfuse's Python binding has no passthrough"),
]
PAGE = 4096


@pytest.fixture(scope="module")
def served() -> Iterator[Lab]:
    """Two nodes that ask for passthrough."""
    with running_lab(2, options="passthrough") as lab:
        yield lab


@pytest.fixture
def both(served: Lab, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A new folder of the test, at the home and at the other node."""
    name = request.node.name.translate({ord("["): "-", ord("]"): None})
    home, other = served[served.home()], served[served.others()[0]]
    (home / name).mkdir()
    return home / name, other / name


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def until(what: Callable[[], object], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def served_by_the_kernel(lab: Lab, fd: int) -> bool:
    """Whether reads of the descriptor reach the FUSE layer of the home no more: it is stopped meanwhile."""
    done = threading.Event()

    def read() -> None:
        os.pread(fd, 16, 0)
        done.set()

    pid = lab.fuse_pid(lab.home())
    reader = threading.Thread(target=read)
    os.kill(pid, signal.SIGSTOP)
    try:
        reader.start()
        return done.wait(0.3)
    finally:
        os.kill(pid, signal.SIGCONT)
        reader.join(30)


def test_the_kernel_serves_it(served: Lab, both: tuple[Path, Path]) -> None:
    home, other = both
    (home / "file").write_bytes(b"x" * PAGE)
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
        with opened(home / "file", flags) as fd:
            assert served_by_the_kernel(served, fd)
    with opened(home / "new", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * PAGE)
        assert served_by_the_kernel(served, fd)
    with opened(other / "file", os.O_RDWR), opened(home / "file", os.O_RDWR) as fd:
        assert not served_by_the_kernel(served, fd)


def test_what_the_home_writes_is_seen_at_once(both: tuple[Path, Path]) -> None:
    home, other = both
    with opened(home / "file", os.O_RDWR | os.O_CREAT) as fd, opened(other / "file", os.O_RDONLY) as there:
        for turn in range(200):
            os.pwrite(fd, b"%08d" % turn * 512, turn * PAGE)
            assert os.stat(other / "file").st_size == os.fstat(there).st_size == (turn + 1) * PAGE
            assert os.pread(there, 8, turn * PAGE) == b"%08d" % turn
            os.pwrite(fd, b"again%03d" % turn, 0)
            assert os.pread(there, 8, 0) == b"again%03d" % turn
        os.ftruncate(fd, 10)
        assert os.stat(other / "file").st_size == 10


def test_what_the_other_node_writes_is_seen_at_once(both: tuple[Path, Path]) -> None:
    home, other = both
    with opened(home / "file", os.O_RDWR | os.O_CREAT) as fd, opened(home / "file", os.O_RDONLY) as second:
        with opened(other / "file", os.O_RDWR) as there:
            for turn in range(100):
                os.pwrite(there, b"%08d" % turn, turn * 8)
                assert os.pread(fd, 8, turn * 8) == os.pread(second, 8, turn * 8) == b"%08d" % turn
                assert os.fstat(fd).st_size == (turn + 1) * 8
            os.ftruncate(there, 4)
            assert (os.fstat(fd).st_size, os.pread(fd, 100, 0)) == (4, b"0000")
        os.truncate(other / "file", 0)
        assert os.pread(fd, 100, 0) == b""
        os.pwrite(fd, b"ok", 0)
        os.fsync(fd)
        assert (other / "file").read_bytes() == b"ok"


def test_a_file_that_the_home_reads_may_be_cached_and_written_elsewhere(both: tuple[Path, Path]) -> None:
    """An open for reading needs no lock: whatever the other node writes goes through the page cache below it."""
    home, other = both
    (other / "file").write_bytes(b"0" * PAGE)
    with opened(home / "file", os.O_RDONLY) as fd, mmap.mmap(fd, PAGE, prot=mmap.PROT_READ) as mapped:
        for turn in range(50):
            with opened(other / "file", os.O_RDWR) as there:
                os.pwrite(there, b"%08d" % turn, 0)
                assert os.pread(fd, 8, 0) == mapped[:8] == b"%08d" % turn
            with opened(other / "file", os.O_RDONLY) as there:
                assert os.pread(there, 8, 0) == b"%08d" % turn


def test_opens_of_every_kind_mix(both: tuple[Path, Path]) -> None:
    """At the home and at the other node at the same time, in any order: no open fails, and all see one file."""
    home, other = both
    kinds = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_WRONLY | os.O_APPEND]
    for first in kinds:
        for second in kinds:
            for order in ((home, other, home), (other, home, home), (home, home, other)):
                path = "file"
                (home / path).write_bytes(b"-" * 100)
                with opened(order[0] / path, first) as a, opened(order[1] / path, second) as b:
                    with opened(order[2] / path, os.O_RDWR) as c:
                        os.pwrite(c, b"C" * 10, 0)
                        for fd, flags in ((a, first), (b, second)):
                            if flags & os.O_ACCMODE != os.O_RDONLY:
                                os.write(fd, b"w" * 10)
                            if flags & os.O_ACCMODE != os.O_WRONLY:
                                assert os.pread(fd, 200, 0) == os.pread(c, 200, 0)
                assert (home / path).read_bytes() == (other / path).read_bytes()
                assert os.stat(home / path).st_size == os.stat(other / path).st_size
                os.unlink(other / path)


def test_appends_of_both_nodes_lose_nothing(both: tuple[Path, Path]) -> None:
    home, other = both
    (home / "log").touch()
    lines = 300

    def append(path: Path, name: str) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            for number in range(lines):
                os.write(fd, f"{name} {number}\n".encode())

    threads = [
        threading.Thread(target=append, args=(folder / "log", name)) for folder, name in ((home, "a"), (other, "b"))
    ]
    with opened(home / "log", os.O_RDONLY):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    found = (other / "log").read_text().splitlines()
    assert len(found) == 2 * lines
    for name in "ab":
        assert [line for line in found if line[0] == name] == [f"{name} {number}" for number in range(lines)]


def test_a_mapping_at_the_home_is_read_elsewhere(both: tuple[Path, Path]) -> None:
    """Stores are seen at once, also behind the close of the descriptor; times and sizes are those of the file."""
    home, other = both
    (home / "file").write_bytes(bytes(2 * PAGE))
    before = os.stat(other / "file").st_mtime_ns
    with opened(home / "file", os.O_RDWR) as fd:
        mapped = mmap.mmap(fd, 2 * PAGE)
    with mapped, opened(other / "file", os.O_RDONLY) as there:
        for turn in range(100):
            mapped[0:8] = b"%08d" % turn
            assert os.pread(there, 8, 0) == b"%08d" % turn
        assert os.stat(other / "file").st_mtime_ns > before
        assert os.stat(home / "file").st_mtime_ns == os.stat(other / "file").st_mtime_ns
        mapped.flush()
        with opened(other / "file", os.O_RDWR) as writer:
            os.pwrite(writer, b"from there", PAGE)
            assert mapped[PAGE : PAGE + 10] == b"from there"


def test_a_descriptor_cached_before_follows_a_mapping(both: tuple[Path, Path]) -> None:
    """Here the other node had let nobody in its way: it takes a moment, but not for ever."""
    home, other = both
    (home / "file").write_bytes(bytes(PAGE))
    with opened(home / "file", os.O_RDONLY), opened(other / "file", os.O_RDONLY) as there:
        assert os.pread(there, 8, 0) == bytes(8)
        with opened(home / "file", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as mapped:
            for turn in range(20):
                mapped[0:8] = b"%08d" % turn
                until(lambda turn=turn: os.pread(there, 8, 0) == b"%08d" % turn, 2.0)
                os.pwrite(fd, b"written!", 8)
                assert os.pread(there, 8, 8) == b"written!"


def test_unlinked_while_open(served: Lab, both: tuple[Path, Path]) -> None:
    home, other = both
    with opened(home / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"still here")
        os.unlink(other / "file")
        assert os.pread(fd, 100, 0) == b"still here" and os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"S", 0)
        with mmap.mmap(fd, 10) as mapped:
            assert mapped[:] == b"Still here"
    with opened(home / "second", os.O_RDWR | os.O_CREAT) as fd, opened(other / "second", os.O_RDWR) as there:
        os.write(fd, b"x" * 10)
        os.unlink(home / "second")
        assert os.pread(there, 10, 0) == b"x" * 10
    assert os.listdir(other) == []


def test_set_id_bits_go_at_a_write(both: tuple[Path, Path]) -> None:
    """The kernel has to do that itself: nobody else hears of the write."""
    home, other = both
    (home / "file").write_bytes(b"x")
    os.chown(home / "file", 1000, 1000)
    with opened(home / "file", os.O_RDWR) as fd:
        os.chmod(other / "file", 0o6777)
        assert os.fstat(fd).st_mode & stat.S_ISUID
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os.setgid(1000)
                os.setuid(1000)
                os._exit(os.pwrite(fd, b"evil", 0) != 4)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert stat.S_IMODE(os.stat(home / "file").st_mode) == stat.S_IMODE(os.stat(other / "file").st_mode) == 0o777


def test_the_home_stays_where_it_is_held_and_says_who_holds_it(served: Lab, both: tuple[Path, Path]) -> None:
    """By a descriptor, and by a mapping that outlives it; everything goes on meanwhile, and the home moves then."""
    home, other = both
    first, second = served.home(), served.others()[0]
    fd = os.open(home / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * PAGE)
    mapped = mmap.mmap(fd, PAGE)
    with pytest.raises(LabError, match=rf"called off: 1 files are open for passthrough: .*\b{os.getpid()} "):
        _move(served, second)
    os.pwrite(fd, b"y", 0)
    assert served.home() == first and (other / "file").read_bytes()[:2] == b"yx"
    os.close(fd)
    with pytest.raises(LabError, match=rf"called off: 1 files are open for passthrough: .*\b{os.getpid()} "):
        _move(served, second)
    mapped[0:1] = b"z"
    assert (other / "file").read_bytes()[:2] == b"zx"
    mapped.close()
    until(lambda: _moved(served, second))
    with opened(home / "file", os.O_RDWR) as fd, opened(other / "file", os.O_RDWR) as there:
        os.pwrite(fd, b"1", 0)
        assert os.pread(there, 2, 0) == b"1x"
    served.move_home(first)
    assert (home / "file").read_bytes() == (other / "file").read_bytes()


def _move(lab: Lab, target: str) -> None:
    """Ask the home itself, which knows why not."""
    (sock,) = lab.folder.glob(f".lab/{lab.home()}/run/*/control.sock")
    must([mxfs_command("mxfs"), "home", "move", target, "--run-dir", sock.parent.parent])


def _moved(lab: Lab, target: str) -> bool:
    try:
        _move(lab, target)
    except LabError:
        return False
    return True


def test_fio_verifies(both: tuple[Path, Path]) -> None:
    """Written at the home and read back there, then at the other node."""
    home, other = both
    job = ["--name=v", "--size=16m", "--bs=4k", "--verify=crc32c", "--ioengine=psync", "--verify_state_save=0"]
    must(["fio", *job, f"--filename={home}/data", "--rw=randwrite", "--do_verify=1", "--fsync=100"])
    must(["fio", *job, f"--filename={other}/data", "--rw=randwrite", "--verify_only=1"])
    mapped = [*job, "--ioengine=mmap", f"--filename={home}/mapped"]
    must(["fio", *mapped, "--rw=randwrite", "--do_verify=1"])
    must(["fio", *job, f"--filename={other}/mapped", "--rw=randwrite", "--verify_only=1"])


def test_after_a_crash_of_the_daemon_open_files_fail_and_others_go_on() -> None:
    """What had been fsynced is there. The open descriptors say EIO until they are closed; then all is as before."""
    with running_lab(2, options="passthrough") as lab:
        home, other = lab[lab.home()], lab[lab.others()[0]]
        (home / "plain").write_bytes(b"plain")
        fd = os.open(home / "file", os.O_RDWR | os.O_CREAT)
        reader = os.open(home / "file", os.O_RDONLY)
        os.write(fd, b"fsynced")
        os.fsync(fd)
        lab.crash(lab.home(), "daemon")
        for work in (lambda: os.pread(fd, 10, 0), lambda: os.pwrite(fd, b"x", 0), lambda: os.pread(reader, 10, 0)):
            until(lambda work=work: errno_of(work) == errno.EIO)
        assert errno_of(lambda: os.fsync(fd)) == errno.EIO
        with contextlib.suppress(OSError):
            os.close(fd)
        os.close(reader)
        assert (home / "plain").read_bytes() == (other / "plain").read_bytes() == b"plain"
        assert (home / "file").read_bytes() == (other / "file").read_bytes() == b"fsynced"
