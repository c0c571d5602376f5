"""The lower XFS through handles, on a real detached mount."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xfsdisk

from mxfs_proto.errors import IoFailure
from mxfs_proto.ops import Attr, Fid, Valid
from mxfsd.io import libc
from mxfsd.io import lower as lower_module
from mxfsd.io.lower import HIDDEN, Lower, errno_of, kill_priv, orphan_name

XFS_IOC_GOINGDOWN = 0x8004587D
"""_IOR('X', 125, __u32) of <xfs/xfs_fs.h>."""

pytestmark = pytest.mark.needs("root", "loop", "xfs")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path_factory.mktemp("xfs")) as device:
        yield device


@pytest.fixture
def lower(device: str) -> Iterator[Lower]:
    lower = xfsdisk.mount(device)
    try:
        yield lower
    finally:
        for fid in lower.orphans():
            lower.reap(fid)
        lower.close()


@pytest.fixture
def base(lower: Lower, request: pytest.FixtureRequest) -> Fid:
    """A directory of the test's own."""
    return fid_of(lower.mkdir(lower.root, request.node.name.encode()[:200], 0o755, 0, 0))


def fid_of(attr: Attr) -> Fid:
    return Fid(attr.ino, attr.gen)


def make(lower: Lower, parent: Fid, name: bytes, data: bytes = b"", mode: int = 0o644) -> Fid:
    fd, attr = lower.create(parent, name, mode, 0, 0)
    os.write(fd, data)
    os.close(fd)
    return fid_of(attr)


@contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, errno.errorcode[caught.value.errno or 0]


def attr(lower: Lower, fid: Fid, valid: int, **values: int) -> Attr:
    row = {"mode": 0, "uid": 0, "gid": 0, "size": 0, "atime_ns": 0, "mtime_ns": 0} | values
    return lower.setattr(fid, valid, **row)


# -- handles -----------------------------------------------------------------------------------------------------


def test_handles_survive_a_remount(device: str, lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file", b"content")
    link = fid_of(lower.symlink(base, b"link", b"file", 0, 0))
    root = lower.root
    lower.close()
    again = xfsdisk.mount(device)
    try:
        assert again.root == root
        assert again.getattr(file).size == 7
        assert os.pread(again.file_fd(file), 100, 0) == b"content"
        assert again.readlink(link) == b"file"
        assert again.names(base) == [b"file", b"link"]
    finally:
        again.close()
        lower.mount_fd = libc.mount_detached(device, False)


def test_a_removed_object_is_stale_and_so_is_its_old_generation(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file")
    lower.file_fd(file)
    lower.unlink(base, b"file", None)
    lower.forget(file.ino)
    operations = (
        lambda: lower.getattr(file),
        lambda: lower.file_fd(file),
        lambda: lower.open(file, os.O_RDONLY),
        lambda: lower.readlink(file),
        lambda: attr(lower, file, Valid.MODE),
        lambda: lower.getxattr(file, b"user.a"),
        lambda: lower.link(file, base, b"again"),
    )
    for operation in operations:
        with fails(errno.ESTALE):
            operation()
    directory = fid_of(lower.mkdir(base, b"dir", 0o755, 0, 0))
    lower.rmdir(base, b"dir")
    for operation in (lambda: lower.lookup(directory, b"x"), lambda: lower.create(directory, b"x", 0o644, 0, 0)):
        with fails(errno.ENOENT):
            operation()
    other = make(lower, base, b"other")
    with fails(errno.ESTALE):
        lower.getattr(Fid(other.ino, (other.gen + 1) & 0xFFFFFFFF))


def test_descriptors_in_the_cache_are_bounded(lower: Lower, base: Fid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_module, "_FILE_FDS", 3)
    monkeypatch.setattr(lower, "_files", lower_module._FdCache(3))
    files = [make(lower, base, b"%d" % n, b"%d" % n) for n in range(6)]
    before = len(os.listdir("/proc/self/fd"))
    for n, fid in enumerate(files):
        assert os.pread(lower.file_fd(fid), 9, 0) == b"%d" % n
        lower.file_fd(files[0])
    assert len(os.listdir("/proc/self/fd")) == before + 3
    kept = lower.file_fd(files[0])
    lower.file_fd(files[3])
    assert lower.file_fd(files[0]) == kept, "the one used last stays"
    lower.forget(files[0].ino)
    with fails(errno.EBADF):
        os.fstat(kept)
    lower._files.clear()


def test_a_second_mount_is_refused(device: str, lower: Lower) -> None:
    with fails(errno.EBUSY):
        libc.mount_detached(device, False)
    with fails(errno.EBUSY):
        libc.mount_detached(device, True)


def test_what_is_no_xfs_does_not_mount(tmp_path: Path) -> None:
    with fails(errno.ENOTBLK):
        libc.mount_detached(str(tmp_path), False)
    with fails(errno.ENOENT):
        libc.mount_detached(str(tmp_path / "none"), False)


def test_closing_unmounts(device: str, lower: Lower) -> None:
    with fails(errno.EBUSY):
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    lower.file_fd(make(lower, lower.root, b"closing"))
    lower.close()
    os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    lower.mount_fd = libc.mount_detached(device, False)


def test_a_read_only_mount_reads_and_changes_nothing(device: str, lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file", b"content")
    lower.close()
    again = xfsdisk.mount(device, readonly=True)
    try:
        assert os.pread(again.file_fd(file), 100, 0) == b"content"
        assert again.lookup(base, b"file").size == 7
        for change in (
            lambda: again.create(base, b"new", 0o644, 0, 0),
            lambda: again.mkdir(base, b"new", 0o755, 0, 0),
            lambda: again.unlink(base, b"file", None),
            lambda: again.rename(base, b"file", base, b"other", 0, None),
            lambda: attr(again, file, Valid.MODE, mode=0o600),
        ):
            with fails(errno.EROFS):
                change()
    finally:
        again.close()
        lower.mount_fd = libc.mount_detached(device, False)


# -- looking -----------------------------------------------------------------------------------------------------


def test_lookup_and_getattr_agree(lower: Lower, base: Fid) -> None:
    made = {
        b"file": make(lower, base, b"file", b"abc"),
        b"dir": fid_of(lower.mkdir(base, b"dir", 0o750, 0, 0)),
        b"link": fid_of(lower.symlink(base, b"link", b"nowhere", 0, 0)),
        b"fifo": fid_of(lower.mknod(base, b"fifo", stat.S_IFIFO | 0o600, 0, 0, 0)),
        b"null": fid_of(lower.mknod(base, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), 0, 0)),
        b"sock": fid_of(lower.mknod(base, b"sock", stat.S_IFSOCK | 0o666, 0, 0, 0)),
    }
    for name, fid in made.items():
        found = lower.lookup(base, name)
        assert fid_of(found) == fid
        assert lower.getattr(fid) == found
    assert lower.getattr(made[b"null"]).rdev == os.makedev(1, 3)
    assert stat.S_ISLNK(lower.getattr(made[b"link"]).mode)
    with fails(errno.ENOENT):
        lower.lookup(base, b"none")
    with fails(errno.ENOTDIR):
        lower.lookup(made[b"file"], b"x")
    with fails(errno.ENAMETOOLONG):
        lower.lookup(base, b"n" * 256)
    with fails(errno.ENOENT):
        lower.readlink(made[b"file"])


def test_device_files_do_not_open_on_the_home(lower: Lower, base: Fid) -> None:
    null = fid_of(lower.mknod(base, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), 0, 0))
    with fails(errno.EACCES):
        lower.open(null, os.O_RDONLY)
    lower.sync(null)
    lower.sync(fid_of(lower.mknod(base, b"fifo", stat.S_IFIFO | 0o666, 0, 0, 0)))
    lower.sync(fid_of(lower.symlink(base, b"link", b"null", 0, 0)))
    lower.sync(Fid(null.ino, null.gen + 1))


def test_readdir_pages_while_entries_come_and_go(lower: Lower, base: Fid) -> None:
    stay = {b"s%03d" % n for n in range(0, 100, 2)}
    for name in stay | {b"s%03d" % n for n in range(1, 100, 8)}:
        make(lower, base, name)
    seen: list[bytes] = []
    after, whole, page = b"", False, 0
    while not whole:
        entries, whole = lower.readdir(base, after, 7)
        assert len(entries) <= 7
        seen += [entry.name for entry in entries]
        after = seen[-1]
        for entry in entries:
            assert fid_of(entry.attr) == fid_of(lower.lookup(base, entry.name))
        page += 1
        for n in range(1, 100, 8):
            if n % 3 == page % 3 and b"s%03d" % n in lower.names(base):
                lower.unlink(base, b"s%03d" % n, None)
        make(lower, base, b"a%d" % page)
        make(lower, base, b"s0%d+" % page)
    assert page > 7
    assert seen == sorted(set(seen)), "nothing twice, in order"
    assert stay <= set(seen), "what was there throughout is listed"
    assert lower.readdir(base, b"zzz", 5) == ([], True)
    assert lower.readdir(base)[1] is True
    lower.unlink(base, after, None)
    assert lower.readdir(base, after, 5) == ([], True), "the name to go on behind may be gone"


def test_statfs(lower: Lower) -> None:
    bsize, _frsize, blocks, bfree, bavail, _files, _ffree, _favail, namemax = lower.statfs()
    assert (bsize, namemax) == (4096, 255)
    assert blocks * bsize > 200 << 20
    assert 0 < bavail <= bfree < blocks


# -- making ------------------------------------------------------------------------------------------------------


def test_ids_of_what_is_made(lower: Lower, base: Fid) -> None:
    fd, file = lower.create(base, b"file", 0o4711, 1000, 2000)
    os.close(fd)
    assert (file.uid, file.gid, file.mode) == (1000, 2000, stat.S_IFREG | 0o4711)
    rows = [
        lower.mkdir(base, b"dir", 0o1777, 1000, 2000),
        lower.symlink(base, b"link", b"x", 1000, 2000),
        lower.mknod(base, b"fifo", stat.S_IFIFO | 0o666, 0, 1000, 2000),
    ]
    assert [(row.uid, row.gid) for row in rows] == [(1000, 2000)] * 3
    assert stat.S_IMODE(rows[0].mode) == 0o1777, "no umask on the home"
    assert stat.S_IMODE(rows[2].mode) == 0o666
    status = Path("/proc/thread-self/status").read_text()
    assert [line.split()[4] for line in status.splitlines() if line[:4] in ("Uid:", "Gid:")] == ["0", "0"]
    mine = make(lower, base, b"root's")
    assert lower.getattr(mine)[4:6] == (0, 0), "the ids are put back"
    with fails(errno.EEXIST):
        lower.create(base, b"file", 0o644, 1000, 2000)
    assert lower.getattr(make(lower, base, b"root's too"))[4:6] == (0, 0), "after a failure as well"


def test_a_user_makes_files_where_only_root_may(lower: Lower, base: Fid) -> None:
    """The node of the caller has checked the permissions: the home does not check them again."""
    closed = fid_of(lower.mkdir(base, b"closed", 0o700, 0, 0))
    fd, file = lower.create(closed, b"file", 0o600, 1000, 1000)
    os.close(fd)
    assert file.uid == 1000


def test_a_setgid_directory_gives_its_group(lower: Lower, base: Fid) -> None:
    shared = fid_of(lower.mkdir(base, b"shared", 0o755, 0, 3000))
    attr(lower, shared, Valid.MODE | Valid.GID, mode=0o2775, gid=3000)
    fd, file = lower.create(shared, b"file", 0o644, 1000, 2000)
    os.close(fd)
    sub = lower.mkdir(shared, b"sub", 0o755, 1000, 2000)
    assert (file.gid, sub.gid) == (3000, 3000)
    assert sub.mode & stat.S_ISGID
    assert lower.symlink(shared, b"link", b"x", 1000, 2000).gid == 3000


def test_making_fails_as_the_system_call(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file")
    for make_it in (
        lambda name: lower.create(base, name, 0o644, 0, 0),
        lambda name: lower.mkdir(base, name, 0o755, 0, 0),
        lambda name: lower.symlink(base, name, b"x", 0, 0),
        lambda name: lower.mknod(base, name, stat.S_IFIFO, 0, 0, 0),
        lambda name: lower.link(file, base, name),
    ):
        with fails(errno.EEXIST):
            make_it(b"file")
        with fails(errno.ENAMETOOLONG):
            make_it(b"n" * 256)
    with fails(errno.ENOTDIR):
        lower.mkdir(file, b"x", 0o755, 0, 0)
    with fails(errno.EPERM):
        lower.link(base, base, b"second name of a directory")


def test_links_are_counted(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file")
    assert lower.link(file, base, b"two").nlink == 2
    assert fid_of(lower.lookup(base, b"two")) == file
    link = fid_of(lower.symlink(base, b"link", b"file", 0, 0))
    assert stat.S_ISLNK(lower.link(link, base, b"link2").mode), "the link itself, not what it points to"
    lower.unlink(base, b"file", None)
    assert lower.getattr(file).nlink == 1


# -- the hidden folder -------------------------------------------------------------------------------------------


def test_the_hidden_folder_is_never_shown_nor_touched(lower: Lower, base: Fid) -> None:
    root = lower.root
    assert os.stat(HIDDEN, dir_fd=lower.mount_fd).st_mode == stat.S_IFDIR | 0o700
    with fails(errno.ENOENT):
        lower.lookup(root, HIDDEN)
    assert HIDDEN not in lower.names(root)
    assert HIDDEN not in [entry.name for entry in lower.readdir(root)[0]]
    file = make(lower, base, b"file")
    directory = fid_of(lower.mkdir(base, b"dir", 0o755, 0, 0))
    for operation in (
        lambda: lower.create(root, HIDDEN, 0o644, 0, 0),
        lambda: lower.mkdir(root, HIDDEN, 0o755, 0, 0),
        lambda: lower.mknod(root, HIDDEN, stat.S_IFIFO, 0, 0, 0),
        lambda: lower.symlink(root, HIDDEN, b"x", 0, 0),
        lambda: lower.link(file, root, HIDDEN),
        lambda: lower.unlink(root, HIDDEN, None),
        lambda: lower.unlink(root, HIDDEN, file),
        lambda: lower.rmdir(root, HIDDEN),
        lambda: lower.rename(root, HIDDEN, base, b"out", 0, None),
        lambda: lower.rename(base, b"dir", root, HIDDEN, 0, None),
        lambda: lower.rename(base, b"dir", root, HIDDEN, 2, None),
    ):
        with fails(errno.EPERM):
            operation()
    assert lower.getattr(directory).nlink == 2
    fine = lower.mkdir(base, HIDDEN, 0o755, 0, 0)
    assert lower.lookup(base, HIDDEN) == fine, "elsewhere the name is a name like any other"
    assert HIDDEN in lower.names(base)


def test_an_empty_hidden_folder_could_be_replaced_but_for_the_guard(lower: Lower, base: Fid) -> None:
    lower.mkdir(base, b"dir", 0o755, 0, 0)
    with fails(errno.EPERM):
        lower.rename(base, b"dir", lower.root, HIDDEN, 0, None)
    assert os.stat(HIDDEN + b"/orphans", dir_fd=lower.mount_fd)


# -- removing and renaming ---------------------------------------------------------------------------------------


def test_orphans_are_kept_until_reaped(device: str, lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file", b"still here")
    lower.unlink(base, b"file", file)
    assert lower.names(base) == []
    assert lower.is_orphan(file)
    assert lower.orphans() == [file]
    lower.close()
    again = xfsdisk.mount(device)
    try:
        assert again.orphans() == [file], "the next home finds it"
        assert os.pread(again.file_fd(file), 100, 0) == b"still here"
        again.reap(file)
        assert again.orphans() == []
        assert not again.is_orphan(file)
        with fails(errno.ESTALE):
            again.getattr(file)
        again.reap(file)
    finally:
        again.close()
        lower.mount_fd = libc.mount_detached(device, False)


def test_rename_over_what_is_kept(lower: Lower, base: Fid) -> None:
    victim = make(lower, base, b"new", b"victim")
    source = make(lower, base, b"old", b"source")
    lower.rename(base, b"old", base, b"new", 0, victim)
    assert fid_of(lower.lookup(base, b"new")) == source
    assert os.pread(lower.file_fd(victim), 100, 0) == b"victim"
    assert lower.orphans() == [victim]
    lower.reap(victim)
    other = make(lower, base, b"other")
    with fails(errno.ENOENT):
        lower.rename(base, b"none", base, b"other", 0, other)
    assert lower.orphans() == [], "a rename that failed leaves no orphan"
    assert lower.getattr(other).nlink == 1


def test_rename_flags_and_errors(lower: Lower, base: Fid) -> None:
    one, two = make(lower, base, b"one"), make(lower, base, b"two")
    sub = fid_of(lower.mkdir(base, b"sub", 0o755, 0, 0))
    lower.mkdir(sub, b"deep", 0o755, 0, 0)
    lower.rename(base, b"one", base, b"two", 2, None)
    assert (fid_of(lower.lookup(base, b"two")), fid_of(lower.lookup(base, b"one"))) == (one, two)
    cases = [
        (errno.EEXIST, b"one", base, b"two", 1),
        (errno.EISDIR, b"one", base, b"sub", 0),
        (errno.ENOTDIR, b"sub", base, b"one", 0),
        (errno.EINVAL, b"sub", sub, b"inside", 0),
        (errno.ENOENT, b"none", base, b"two", 0),
        (errno.EINVAL, b"one", base, b"two", 3),
    ]
    for code, old, parent, new, flags in cases:
        with fails(code):
            lower.rename(base, old, parent, new, flags, None)
    lower.mkdir(base, b"empty", 0o755, 0, 0)
    with fails(errno.EEXIST):  # XFS; POSIX allows that or ENOTEMPTY
        lower.rename(base, b"empty", base, b"sub", 0, None)
    with fails(errno.ENOTEMPTY):
        lower.rmdir(base, b"sub")
    with fails(errno.ENOTDIR):
        lower.rmdir(base, b"one")
    with fails(errno.EISDIR):
        lower.unlink(base, b"sub", None)
    lower.rmdir(base, b"empty")
    with fails(errno.ENOENT):
        lower.rmdir(base, b"empty")


def test_orphan_names_are_inode_and_generation() -> None:
    assert orphan_name(Fid(0x1234, 0xFFFFFFFF)) == b"1234.ffffffff"


# -- attributes --------------------------------------------------------------------------------------------------


def test_setattr_changes_what_is_named_and_nothing_else(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file", b"0123456789")
    values = {"mode": 0o600, "uid": 11, "gid": 12, "size": 4, "atime_ns": 5_000_000_001, "mtime_ns": -7_000_000_003}
    fields = {
        Valid.MODE: "mode",
        Valid.UID: "uid",
        Valid.GID: "gid",
        Valid.SIZE: "size",
        Valid.ATIME: "atime_ns",
        Valid.MTIME: "mtime_ns",
    }
    for bit, name in fields.items():
        before = lower.getattr(file)
        after = attr(lower, file, bit, **values)
        assert after == lower.getattr(file)
        want = stat.S_IFREG | values[name] if name == "mode" else values[name]
        assert getattr(after, name) == want
        untouched = {"mode", "uid", "gid", "size", "atime_ns", "mtime_ns"} - {name}
        if bit is Valid.SIZE:
            untouched -= {"mtime_ns"}
        for field in untouched:
            assert getattr(after, field) == getattr(before, field), (name, field)
    after = attr(lower, file, Valid.SIZE | Valid.MTIME, size=100, mtime_ns=42)
    assert (after.size, after.mtime_ns) == (100, 42), "the size first, so that it does not move the time"
    link = fid_of(lower.symlink(base, b"link", b"file", 0, 0))
    assert attr(lower, link, Valid.UID, uid=99).uid == 99
    assert lower.getattr(file).uid == 11, "the link, not its target"
    with fails(errno.EISDIR):
        attr(lower, base, Valid.SIZE, size=0)


def test_chown_takes_set_id_bits_away_and_a_mode_beside_it_gives_them(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file", mode=0o6755)
    assert stat.S_IMODE(attr(lower, file, Valid.UID, uid=5).mode) == 0o755
    assert stat.S_IMODE(attr(lower, file, Valid.UID | Valid.MODE, uid=6, mode=0o4755).mode) == 0o4755


@pytest.mark.parametrize(("before", "after"), [(0o6755, 0o755), (0o4644, 0o644), (0o2644, 0o2644), (0o755, 0o755)])
def test_kill_priv(lower: Lower, base: Fid, before: int, after: int) -> None:
    """As file_remove_privs() of the kernel: a set-group-id bit without execution for the group means locking."""
    file = make(lower, base, b"file%o" % before, mode=before)
    assert stat.S_IMODE(attr(lower, file, Valid.KILL_PRIV).mode) == after
    other = make(lower, base, b"fd%o" % before, mode=before)
    kill_priv(lower.file_fd(other))
    assert stat.S_IMODE(lower.getattr(other).mode) == after


def test_xattrs(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file")
    for fid in (file, base):
        lower.setxattr(fid, b"user.a", b"1", 0)
        lower.setxattr(fid, b"trusted.b", b"\0\xff" * 500, os.XATTR_CREATE)
        assert lower.getxattr(fid, b"user.a") == b"1"
        assert lower.getxattr(fid, b"trusted.b") == b"\0\xff" * 500
        assert sorted(lower.listxattr(fid)) == [b"trusted.b", b"user.a"]
        with fails(errno.EEXIST):
            lower.setxattr(fid, b"user.a", b"2", os.XATTR_CREATE)
        with fails(errno.ENODATA):
            lower.setxattr(fid, b"user.none", b"2", os.XATTR_REPLACE)
        with fails(errno.ENODATA):
            lower.getxattr(fid, b"user.none")
        lower.removexattr(fid, b"user.a")
        with fails(errno.ENODATA):
            lower.removexattr(fid, b"user.a")
        with fails(errno.EOPNOTSUPP):
            lower.setxattr(fid, b"nospace.a", b"2", 0)
        assert lower.listxattr(fid) == [b"trusted.b"]
    link = fid_of(lower.symlink(base, b"link", b"file", 0, 0))
    lower.setxattr(link, b"trusted.c", b"mine", 0)
    assert lower.listxattr(link) == [b"trusted.c"], "a link has its own"


# -- durability --------------------------------------------------------------------------------------------------


def test_sync_survives_a_crash_of_the_file_system(device: str, lower: Lower, base: Fid) -> None:
    """XFS_IOC_GOINGDOWN without a log flush, as in the loss of the home: what was synced is there afterwards."""
    make(lower, base, b"synced")
    lower.sync(base)
    for n in range(50):
        make(lower, base, b"after%d" % n)
    fcntl.ioctl(lower.mount_fd, XFS_IOC_GOINGDOWN, (2).to_bytes(4, "little"))
    with fails(errno.EIO):
        lower.create(base, b"dead", 0o644, 0, 0)
    with fails(errno.EIO):
        lower.sync(base)
    lower.close()
    again = xfsdisk.mount(device)
    try:
        assert b"synced" in again.names(base)
        assert b"after49" not in again.names(base), "so the crash was one"
    finally:
        again.close()
        lower.mount_fd = libc.mount_detached(device, False)


@pytest.mark.parametrize("way", ["sync", "syncfs"])
def test_a_force_during_a_shutdown_is_no_success(
    device: str, lower: Lower, base: Fid, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """XFS throws the log away and unpins the inode: an fsync that passed its first check then returns 0."""
    assert not lower.is_shut_down()

    def dies(_fd: int) -> None:
        fcntl.ioctl(lower.mount_fd, XFS_IOC_GOINGDOWN, (2).to_bytes(4, "little"))

    monkeypatch.setattr(os, "fsync", dies)
    monkeypatch.setattr(libc, "syncfs", dies)
    with fails(errno.EIO):
        lower.sync(base) if way == "sync" else lower.syncfs()
    assert lower.is_shut_down()
    monkeypatch.undo()
    lower.close()
    lower.mount_fd = libc.mount_detached(device, False)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.EBADE, "reservation conflict"), errno.EIO),
        (OSError("no number"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (IoFailure("reserved", errno.EBADE), errno.EIO),
    ],
)
def test_what_programs_see_of_an_error(error: OSError | IoFailure, seen: int) -> None:
    assert errno_of(error) == seen
