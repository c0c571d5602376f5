"""Ownership, permissions, ACLs, extended attributes, times and sparse files, set on one node and true on all."""

import errno
import os
import random
import stat
from pathlib import Path

import pytest
from labkit import Lab, must

Work = dict[str, Path]
UID, GID, EXTRA = 12_345, 12_346, 12_347


def as_user(code: str, *args: str | Path, groups: tuple[int, ...] = ()) -> str:
    """Run Python *code* as uid UID, gid GID and *groups*; what it hands to say(), or the errno's name if it failed.

    In a forked child: another uid may not be able to reach the interpreter's own files.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setresgid(GID, GID, GID)
            os.setresuid(UID, UID, UID)
            os.umask(0o022)
            said: list[str] = []
            argv = list(map(str, args))
            try:
                exec(code, {"os": os, "arg": argv[0], "say": lambda *words: said.append(" ".join(map(str, words)))})
            except OSError as failed:
                said = [errno.errorcode[failed.errno or 0]]
            os.write(writer, "".join(said).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as stream:
        answer = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"the child broke in: {code}"
    return answer


READ = "with open(arg) as f: say(f.read())"
WRITE = "with open(arg, 'w') as f:\n    f.write('changed')\nsay('written')"
CREATE = "fd = os.open(arg, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)\ns = os.fstat(fd)\nsay(s.st_uid, s.st_gid)"


def test_permissions_are_enforced_for_another_uid(work: Work) -> None:
    """A chmod or chown on one node decides on the next access from every other (default_permissions)."""
    nodes = list(work)
    for i, (setter, user) in enumerate([(a, b) for a in nodes for b in nodes]):
        path, theirs = work[setter] / f"f{i}", work[user] / f"f{i}"
        path.write_text("secret")
        path.chmod(0o600)
        assert as_user(READ, theirs) == "EACCES"
        path.chmod(0o604)
        assert as_user(READ, theirs) == "secret"
        assert as_user(WRITE, theirs) == "EACCES"
        path.chmod(0o600)
        assert as_user(READ, theirs) == "EACCES"
        os.chown(path, UID, 0)
        assert as_user(WRITE, theirs) == "written"
        os.chown(path, 0, 0)
        assert as_user(WRITE, theirs) == "EACCES"
        assert as_user("os.unlink(arg); say('gone')", theirs) == "EACCES"
        assert as_user("os.chmod(arg, 0o777)", theirs) == "EPERM"
        assert as_user(CREATE, work[user] / "mine") == "EACCES"


def test_supplementary_groups_count(work: Work) -> None:
    path = work["n1"] / "shared"
    path.write_text("for the group")
    os.chown(path, 0, EXTRA)
    path.chmod(0o640)
    for folder in work.values():
        assert as_user(READ, folder / "shared") == "EACCES"
        assert as_user(READ, folder / "shared", groups=(EXTRA,)) == "for the group"
    team = work["n1"] / "team"
    team.mkdir()
    os.chown(team, 0, EXTRA)
    team.chmod(0o770)
    for node, folder in work.items():
        assert as_user(CREATE, folder / "team" / node) == "EACCES"
        assert as_user(CREATE, folder / "team" / node, groups=(EXTRA,)) == f"{UID} {GID}"
        # chgrp to a group of one's own needs the supplementary groups at the place where it is decided.
        chgrp = f"os.chown(arg, -1, {EXTRA}); say(os.stat(arg).st_gid)"
        assert as_user(chgrp, folder / "team" / node, groups=(EXTRA,)) == str(EXTRA)


def test_new_objects_belong_to_the_caller(work: Work) -> None:
    top = work["n1"] / "open"
    top.mkdir()
    top.chmod(0o777)
    code = """
d = arg
os.mkdir(d + '-dir'); os.symlink('x', d + '-link'); os.mkfifo(d + '-fifo')
os.close(os.open(d + '-file', os.O_CREAT, 0o666))
say(*{(s.st_uid, s.st_gid) for s in map(os.lstat, (d + '-dir', d + '-link', d + '-fifo', d + '-file'))})
"""
    for node, folder in work.items():
        assert as_user(code, folder / "open" / node) == f"({UID}, {GID})"
        for other in work.values():
            for kind, mode in (("dir", 0o755), ("fifo", 0o644), ("file", 0o644)):
                st = (other / "open" / f"{node}-{kind}").lstat()
                assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (UID, GID, mode)


def test_setgid_directory_gives_its_group(work: Work) -> None:
    top = work["n1"] / "team"
    top.mkdir()
    os.chown(top, 0, EXTRA)
    top.chmod(0o2777)
    for node, folder in work.items():
        assert as_user(CREATE, folder / "team" / f"{node}-file") == f"{UID} {EXTRA}"
        as_user("os.mkdir(arg)", folder / "team" / f"{node}-dir")
    for folder in work.values():
        for node in work:
            below = (folder / "team" / f"{node}-dir").stat()
            assert below.st_gid == EXTRA
            assert below.st_mode & stat.S_ISGID


def test_sticky_directory_protects_others_files(work: Work) -> None:
    top = work["n1"] / "tmp"
    top.mkdir()
    top.chmod(0o1777)
    (top / "roots").write_text("x")
    for node, folder in work.items():
        assert as_user("os.unlink(arg)", folder / "tmp" / "roots") == "EPERM"
        assert as_user(CREATE, folder / "tmp" / node) == f"{UID} {GID}"
        assert as_user("os.unlink(arg); say('gone')", folder / "tmp" / node) == "gone"


def test_a_write_by_another_uid_clears_setuid(work: Work) -> None:
    for writer in work:
        for reader in work:
            path = work[writer] / f"{writer}-{reader}"
            path.write_text("program")
            path.chmod(0o4777)
            assert (work[reader] / path.name).stat().st_mode & stat.S_ISUID
            assert as_user(WRITE, path) == "written"
            assert not (work[reader] / path.name).stat().st_mode & stat.S_ISUID


def _acl(path: Path) -> list[str]:
    text = must(["getfacl", "--numeric", "--absolute-names", "--omit-header", path]).stdout
    return [line.split("\t")[0] for line in text.splitlines() if line]


def test_acl_set_on_one_node_holds_on_the_others(work: Work) -> None:
    nodes = list(work)
    for i, (setter, user) in enumerate([(a, b) for a in nodes for b in nodes]):
        path, theirs = work[setter] / f"f{i}", work[user] / f"f{i}"
        path.write_text("secret")
        path.chmod(0o600)
        assert as_user(READ, theirs) == "EACCES"
        must(["setfacl", "-m", f"u:{UID}:r", path])
        assert _acl(theirs) == ["user::rw-", f"user:{UID}:r--", "group::---", "mask::r--", "other::---"]
        assert as_user(READ, theirs) == "secret"
        assert as_user(WRITE, theirs) == "EACCES"
        must(["setfacl", "-m", f"u:{UID}:rw", path])
        assert as_user(WRITE, theirs) == "written"
        must(["setfacl", "-b", path])
        assert as_user(READ, theirs) == "EACCES"
        assert _acl(theirs) == ["user::rw-", "group::---", "other::---"]


def test_default_acl_is_inherited_on_every_node(lab: Lab, work: Work) -> None:
    top = work["n1"] / "d"
    top.mkdir()
    must(["setfacl", "-d", "-m", f"u:{UID}:rwx,g::rx,o::-,m::rwx", top])
    for node, folder in work.items():
        # A default ACL replaces the umask (acl(5)); through FUSE the umask counts all the same (docs/limits.md).
        umask = os.umask(0o077 if lab.native else 0)
        try:
            (folder / "d" / f"{node}-dir").mkdir()
            (folder / "d" / f"{node}-file").write_text("text")
        finally:
            os.umask(umask)
    for folder in work.values():
        for node in work:
            made = _acl(folder / "d" / f"{node}-file")
            assert made == ["user::rw-", f"user:{UID}:rwx", "group::r-x", "mask::rw-", "other::---"]
            inherited = _acl(folder / "d" / f"{node}-dir")
            assert f"default:user:{UID}:rwx" in inherited
            assert f"user:{UID}:rwx" in inherited


def test_chmod_changes_the_mask_of_an_acl(work: Work) -> None:
    path = work["n1"] / "f"
    path.write_text("text")
    must(["setfacl", "-m", f"u:{UID}:rw", path])
    os.chmod(work["n2"] / "f", 0o640)
    for folder in work.values():
        assert "mask::r--" in _acl(folder / "f")
        assert as_user(READ, folder / "f") == "text"
        assert as_user(WRITE, folder / "f") == "EACCES"


def test_xattrs_are_the_same_everywhere(work: Work) -> None:
    nodes = list(work)
    rng = random.Random(3)
    path = {node: folder / "f" for node, folder in work.items()}
    path["n1"].touch()
    kept: dict[str, bytes] = {}
    for i in range(60):
        setter, reader = nodes[i % 3], nodes[(i + 1) % 3]
        name = f"{rng.choice(['user', 'trusted'])}.attribute{rng.randrange(12)}"
        if name in kept and rng.random() < 0.3:
            os.removexattr(path[setter], name)
            del kept[name]
            with pytest.raises(OSError) as caught:
                os.getxattr(path[reader], name)
            assert caught.value.errno == errno.ENODATA
        else:
            kept[name] = rng.randbytes(rng.choice([0, 1, 255, 4000]))
            os.setxattr(path[setter], name, kept[name])
            assert os.getxattr(path[reader], name) == kept[name]
        assert sorted(os.listxattr(path[reader])) == sorted(kept)
    big = rng.randbytes(65_536)
    os.setxattr(path["n2"], "user.big", big)
    assert os.getxattr(path["n3"], "user.big") == big


TIMES_NS = [
    0,
    1,
    999_999_999,
    1_700_000_000_123_456_789,
    2_500_000_000 * 10**9 + 7,
    4_294_967_300 * 10**9 + 999_999_999,
]


@pytest.mark.parametrize("moment", [*TIMES_NS, -1, -315_619_200 * 10**9 + 123_456_789])
def test_nanosecond_times(work: Work, moment: int) -> None:
    """Times keep every nanosecond, after 2038 and before 1970 too."""
    nodes = list(work)
    for i, setter in enumerate(nodes):
        for make in ("file", "dir", "link"):
            path = work[setter] / f"{make}{i}"
            if make == "file":
                path.touch()
            elif make == "dir":
                path.mkdir()
            else:
                path.symlink_to("nowhere")
            os.utime(path, ns=(moment, moment + 1), follow_symlinks=False)
            for folder in work.values():
                st = os.lstat(folder / path.name)
                assert (st.st_atime_ns, st.st_mtime_ns) == (moment, moment + 1)


def test_write_advances_times_and_chmod_only_ctime(work: Work) -> None:
    path = {node: folder / "f" for node, folder in work.items()}
    path["n1"].write_text("x")
    for changer in work:
        for observer in work:
            os.utime(path[changer], ns=(10**18, 10**18))
            before = os.stat(path[observer])
            os.chmod(path[changer], 0o600 if before.st_mode & 0o077 else 0o644)
            after = os.stat(path[observer])
            assert (after.st_mtime_ns, after.st_atime_ns) == (10**18, 10**18)
            assert after.st_ctime_ns >= before.st_ctime_ns
            with open(path[changer], "r+b", buffering=0) as stream:
                stream.write(b"y")
            assert os.stat(path[observer]).st_mtime_ns > 10**18


def test_sparse_files_stay_sparse(work: Work) -> None:
    for writer, folder in work.items():
        with open(folder / writer, "wb", buffering=0) as stream:
            os.pwrite(stream.fileno(), b"end" + bytes(4093), 100 << 20)
            os.pwrite(stream.fileno(), b"middle", 50 << 20)
            os.fsync(stream.fileno())
        for other in work.values():
            st = os.stat(other / writer)
            assert st.st_size == (100 << 20) + 4096
            assert 0 < st.st_blocks * 512 < 2 << 20
            with open(other / writer, "rb", buffering=0) as stream:
                assert os.pread(stream.fileno(), 10_000, 10 << 20) == bytes(10_000)
                assert os.pread(stream.fileno(), 10, (50 << 20) - 2) == b"\0\0middle\0\0"
                assert os.pread(stream.fileno(), 3, 100 << 20) == b"end"
        os.truncate(folder / writer, 1 << 40)
        assert {os.stat(other / writer).st_size for other in work.values()} == {1 << 40}


def test_special_files_and_links_look_the_same_everywhere(work: Work) -> None:
    for maker, folder in work.items():
        os.mkfifo(folder / f"{maker}-fifo", 0o640)
        os.mknod(folder / f"{maker}-chr", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(folder / f"{maker}-blk", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
        os.mknod(folder / f"{maker}-sock", stat.S_IFSOCK | 0o600)
        os.symlink("x" * 1000, folder / f"{maker}-link")
        for other in work.values():
            assert stat.S_ISFIFO(os.lstat(other / f"{maker}-fifo").st_mode)
            assert stat.S_ISSOCK(os.lstat(other / f"{maker}-sock").st_mode)
            assert os.lstat(other / f"{maker}-chr").st_rdev == os.makedev(1, 3)
            assert os.lstat(other / f"{maker}-blk").st_rdev == os.makedev(259, 70_000)
            assert os.readlink(other / f"{maker}-link") == "x" * 1000


def test_a_fifo_joins_processes_of_one_node(work: Work) -> None:
    """A fifo is a name on disk and a pipe in one kernel: on each node it works for that node's processes."""
    os.mkfifo(work["n1"] / "pipe")
    for folder in work.values():
        reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(folder / "pipe", os.O_WRONLY)
        try:
            os.write(writer, b"through")
            assert os.read(reader, 100) == b"through"
        finally:
            os.close(writer)
            os.close(reader)


def test_hard_links_share_everything(work: Work) -> None:
    nodes = list(work)
    (work["n1"] / "first").write_text("one")
    for i in range(1, 10):
        os.link(work[nodes[i % 3]] / "first", work[nodes[i % 3]] / f"link{i}")
        for folder in work.values():
            st = os.stat(folder / f"link{i}")
            assert (st.st_nlink, st.st_ino) == (i + 1, os.stat(folder / "first").st_ino)
    (work["n2"] / "link3").write_text("two, by another name")
    os.chmod(work["n3"] / "link4", 0o600)
    for folder in work.values():
        assert (folder / "link9").read_text() == "two, by another name"
        assert stat.S_IMODE(os.stat(folder / "first").st_mode) == 0o600
