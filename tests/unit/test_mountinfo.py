"""The mount table and processes as /proc shows them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mxfsd import mountinfo, procs

TABLE = b"""\
22 1 252:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:35 / /mnt/a\\040b rw,nosuid shared:7 master:1 - fuse.mxfs /dev/sdb rw,user_id=0
41 22 7:3 / /mnt/c\\134d rw - xfs /dev/loop3 rw
42 40 0:36 / /mnt/a\\040b rw - tmpfs none rw
this is no line of a mount table
"""


def test_records_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(TABLE)
    mounts = mountinfo.read(str(path))
    assert [mount.mountpoint for mount in mounts] == ["/", "/mnt/a b", "/mnt/c\\d", "/mnt/a b"]
    assert mounts[1] == mountinfo.Mount(40, os.makedev(0, 35), "/mnt/a b", "fuse.mxfs", "/dev/sdb")
    assert [mountinfo.is_mxfs(mount) for mount in mounts] == [False, True, False, False]


def test_the_topmost_mount_counts(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(TABLE)
    top = mountinfo.at("/mnt/a b", str(path))
    assert top is not None
    assert top.fstype == "tmpfs"
    assert mountinfo.at("/mnt", str(path)) is None


def test_this_machine_has_a_root() -> None:
    assert mountinfo.at("/") is not None


@given(st.binary(max_size=120))
def test_any_line_parses_or_is_left_out(line: bytes) -> None:
    mount = mountinfo._parse(line)
    assert mount is None or isinstance(mount.mountpoint, str)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20))
def test_the_kernels_escapes_are_undone(name: str) -> None:
    escaped = os.fsencode(name)
    for char in (b"\\", b" ", b"\t", b"\n"):  # the backslash first
        escaped = escaped.replace(char, b"\\%03o" % char[0])
    assert mountinfo._unescape(escaped) == name


def _child(code: str, **kwargs: object) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kwargs)  # type: ignore[call-overload]
    assert child.stdout is not None
    assert child.stdout.readline() == b"on\n"
    return child


WAIT = "import sys; print('on', flush=True); sys.stdin.read()"


def test_processes_by_mark_and_by_what_they_hold(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    mark = f"MXFS_TEST_MARK={tmp_path}"
    name, _, value = mark.partition("=")
    with _child(f"f = open({str(held / 'x')!r}, 'w')\n" + WAIT, env={**os.environ, name: value}) as child:
        assert procs.marked(mark) == [child.pid]
        assert procs.has_variable(child.pid, name)
        assert not procs.has_variable(child.pid, "MXFS_TEST")
        assert procs.holders(str(held)) == [child.pid]
        assert procs.holders(str(tmp_path / "hel")) == []
        assert str(child.pid) in procs.describe([child.pid])
        procs.send(child.pid, signal.SIGKILL, lambda pid: False)
        assert child.poll() is None
        procs.send(child.pid, signal.SIGKILL, lambda pid: procs.has_mark(pid, mark))
        assert child.wait(5) == -signal.SIGKILL
    assert procs.marked(mark) == []
    assert procs.holders(str(held)) == []
    assert procs.is_zombie(child.pid)


def test_an_unlinked_open_file_and_a_work_folder_count(tmp_path: Path) -> None:
    code = f"import os\nf = open({str(tmp_path / 'x')!r}, 'w'); os.unlink(f.name)\n" + WAIT
    with _child(code) as child:
        assert procs.holds(child.pid, str(tmp_path))
        assert child.stdin is not None
        child.stdin.close()
    with _child(WAIT, cwd=tmp_path) as child:
        assert procs.holds(child.pid, str(tmp_path))
        assert child.stdin is not None
        child.stdin.close()


def test_wait_until_gives_up() -> None:
    answers = iter([False, False, True])
    assert procs.wait_until(lambda: next(answers), 60, 0)
    assert not procs.wait_until(lambda: False, 0, 0)
