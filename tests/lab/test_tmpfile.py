"""O_TMPFILE: files without a name, on home and node, that get one later or go with their last close."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from labkit import Lab, errno_of, must

from mxfsd import procs

pytestmark = [pytest.mark.needs_lab, pytest.mark.needs("tmpfile")]
Work = dict[str, Path]
WAIT_S = 30.0
WHERE = pytest.mark.parametrize("where", ["home", "node"])


def unnamed(folder: Path, flags: int = os.O_RDWR, mode: int = 0o640) -> int:
    return os.open(folder, os.O_TMPFILE | flags, mode)


def give_name(fd: int, path: Path) -> None:
    """linkat(2) as open(2) describes it."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


@WHERE
def test_a_file_without_a_name_gets_one(lab: Lab, work: Work, where: str) -> None:
    node = lab.at(where)
    fd = unnamed(work[node], mode=0o604)
    try:
        os.write(fd, b"data")
        found = os.fstat(fd)
        assert (found.st_nlink, found.st_size, oct(found.st_mode)) == (0, 4, "0o100604")
        assert all(os.listdir(folder) == [] for folder in work.values())
        (work[node] / "taken").touch()
        assert errno_of(lambda: give_name(fd, work[node] / "taken")) == errno.EEXIST
        give_name(fd, work[node] / "name")
        assert os.fstat(fd).st_nlink == 1
        for folder in work.values():
            assert (folder / "name").read_bytes() == b"data"
            assert (folder / "name").stat().st_ino == found.st_ino
            assert (folder / "name").stat().st_nlink == 1
        os.write(fd, b" and more")
        assert all((folder / "name").read_bytes() == b"data and more" for folder in work.values())
        give_name(fd, work[node] / "second")
        assert os.fstat(fd).st_nlink == 2
        other = next(name for name in work if name != node)
        (work[other] / "name").unlink()
        (work[other] / "second").unlink()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 99, 0) == b"data and more"
        assert errno_of(lambda: give_name(fd, work[node] / "again")) == errno.ENOENT
    finally:
        os.close(fd)


@WHERE
@pytest.mark.parametrize("flags", [os.O_RDWR | os.O_EXCL, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_SYNC])
def test_flags_of_the_open_are_kept(lab: Lab, work: Work, where: str, flags: int) -> None:
    node = lab.at(where)
    fd = unnamed(work[node], flags)
    try:
        assert os.write(fd, b"abc") == 3
        assert errno_of(lambda: os.read(fd, 1)) == (errno.EBADF if flags & os.O_ACCMODE == os.O_WRONLY else 0)
        # (O_EXCL: it must never get a name, open(2).)
        assert errno_of(lambda: give_name(fd, work[node] / "name")) == (errno.ENOENT if flags & os.O_EXCL else 0)
        os.ftruncate(fd, 1)
        assert os.fstat(fd).st_nlink == (0 if flags & os.O_EXCL else 1)
    finally:
        os.close(fd)
    assert errno_of(lambda: unnamed(work[node] / "nowhere")) == errno.ENOENT
    assert errno_of(lambda: unnamed(work[node], os.O_RDONLY)) == errno.EINVAL


@WHERE
def test_who_makes_it_owns_it_and_must_be_allowed_to(lab: Lab, work: Work, where: str) -> None:
    node = lab.at(where)
    shared = work[node] / "shared"
    shared.mkdir()
    os.chown(shared, 0, 1007)
    shared.chmod(0o2777)
    must(["setfacl", "-d", "-m", "u:1234:r", shared])
    script = (
        "import ctypes, os, sys\n"
        "os.setgid(1005)\n"
        "os.setuid(1001)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"  # PR_SET_DUMPABLE: /proc/self is its own again
        "folder = os.open(sys.argv[1], os.O_PATH)\n"
        "fd = os.open(sys.argv[1], os.O_TMPFILE | os.O_RDWR, 0o660)\n"
        "os.link(f'/proc/self/fd/{fd}', 'made', dst_dir_fd=folder, follow_symlinks=True)\n"
    )
    must([sys.executable, "-c", script, str(shared)])
    found = (shared / "made").stat()
    assert (found.st_uid, found.st_gid) == (1001, 1007)
    for folder in work.values():
        assert "user:1234:r--" in must(["getfacl", "-cpn", folder / "shared" / "made"]).stdout
    shared.chmod(0o755)
    refused = subprocess.run([sys.executable, "-c", script, str(shared)], capture_output=True, text=True)
    assert "PermissionError" in refused.stderr


@WHERE
def test_its_space_is_free_after_the_last_close(lab: Lab, work: Work, where: str) -> None:
    node = lab.at(where)
    free = os.statvfs(work[node])
    fd = unnamed(work[node])
    copy = os.dup(fd)
    os.write(fd, b"x" * (32 << 20))
    os.fsync(fd)
    os.ftruncate(fd, 31 << 20)
    os.close(fd)
    assert os.statvfs(work[node]).f_bfree < free.f_bfree - (24 << 20) // free.f_bsize
    os.close(copy)

    def is_free() -> bool:
        now = os.statvfs(work[node])
        return now.f_bfree > free.f_bfree - (8 << 20) // free.f_bsize and now.f_ffree >= free.f_ffree - 8

    assert procs.wait_until(is_free, WAIT_S)


def test_it_survives_moves_and_the_death_of_the_home(lab: Lab, work: Work) -> None:
    """Where the home made it for itself, that is no home any more, and where another node made it."""
    home, (one, other) = lab.home(), lab.others()
    fds = {node: unnamed(work[node]) for node in (home, one)}
    for node, fd in fds.items():
        os.write(fd, node.encode())
    lab.move_home(other)
    for node, fd in fds.items():
        assert os.pread(fd, 9, 0) == node.encode()
        os.pwrite(fd, b" moved", 2)
    lab.kill(other)
    for node, fd in fds.items():
        assert os.pread(fd, 9, 0) == node.encode() + b" moved"
        assert os.fstat(fd).st_nlink == 0
        give_name(fd, work[node] / node)
        os.close(fd)
    lab.start(other)
    for folder in work.values():
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            node: node.encode() + b" moved" for node in fds
        }


MAKER = """
import os, sys
folder, count = sys.argv[1], int(sys.argv[2])
place = os.open(folder, os.O_PATH)
for number in range(count):
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o644)
    os.write(fd, b"%d" % number * 100)
    os.link(f"/proc/self/fd/{fd}", str(number), dst_dir_fd=place, follow_symlinks=True)
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)
    if number + 1 == count // 2:
        print("half", flush=True)
"""


def test_each_name_is_given_once_while_the_home_dies(lab: Lab, work: Work) -> None:
    """A link that was repeated would say EEXIST, a file that was made twice would leave one behind."""
    home, others = lab.home(), lab.others()
    count = 200
    for node in others:
        (work[node] / node).mkdir()
    before = os.statvfs(work[others[0]]).f_ffree
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MAKER, work[node] / node, str(count)], stdout=subprocess.PIPE, text=True
        )
        for node in others
    ]
    try:
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == "half\n"
        lab.kill(home)
        for one in started:
            one.communicate(timeout=120)
    finally:
        for one in started:
            one.kill()
            one.communicate()
    assert [one.returncode for one in started] == [0, 0]
    lab.start(home)
    for folder in work.values():
        for node in others:
            found = {path.name: path.read_bytes() for path in (folder / node).iterdir()}
            assert found == {str(number): b"%d" % number * 100 for number in range(count)}
    made = 2 * count + 70  # (and some records of operations)
    assert procs.wait_until(lambda: before - os.statvfs(work[others[0]]).f_ffree <= made, WAIT_S)


def test_many_threads(lab: Lab, work: Work) -> None:
    """Made, named and unnamed again at the same time on three nodes."""
    failed: list[BaseException] = []

    def run(node: str) -> None:
        try:
            for number in range(60):
                fd = unnamed(work[node])
                os.write(fd, b"%d" % number)
                give_name(fd, work[node] / f"{node}.{number}")
                if number % 2:
                    (work[node] / f"{node}.{number}").unlink()
                assert os.pread(fd, 9, 0) == b"%d" % number
                os.close(fd)
        except BaseException as exc:  # noqa: BLE001 (told below)
            failed.append(exc)

    threads = [threading.Thread(target=run, args=(node,)) for node in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not failed
    for folder in work.values():
        assert sorted(os.listdir(folder)) == sorted(f"{node}.{number}" for node in work for number in range(0, 60, 2))
