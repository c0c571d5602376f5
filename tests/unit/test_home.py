"""Shipped operations at the home, over a real lower XFS and a real lock master."""

import asyncio
import errno
import os
import random
import stat
import time
from collections.abc import Iterator
from typing import Any

import pytest
import xfsdisk
from homekit import HOME, A, B, GatedLower, Home, fid_of, turns, until

from mxfs_proto.errors import PeerError
from mxfs_proto.ioctls import FITRIM, FSGETXATTR, FSSETXATTR, GETFLAGS, SETFLAGS
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import (
    NO_FID,
    REQUESTS,
    Fid,
    Op,
    Request,
    Valid,
    WriteFlag,
    pack_writes,
    unpack_attr,
    unpack_entries,
    unpack_reply,
)
from mxfsd.core.dlm import LockMaster
from mxfsd.core.timeouts import Timeouts
from mxfsd.home import Frozen, LowerFailed, Outcome, check_request
from mxfsd.io import libc

pytestmark = pytest.mark.needs("root", "loop", "xfs")
C = 4


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path_factory.mktemp("xfs")) as device:
        yield device


@pytest.fixture
def lower(device: str) -> Iterator[GatedLower]:
    lower = GatedLower(libc.mount_detached(device, False))
    lower.prepare()
    try:
        yield lower
    finally:
        lower.gate.open()
        for fid in lower.orphans():
            lower.reap(fid)
        lower.close()


@pytest.fixture
def home(lower: GatedLower) -> Home:
    return Home(lower)


@pytest.fixture
def base(lower: GatedLower, request: pytest.FixtureRequest) -> Fid:
    return fid_of(lower.mkdir(lower.root, request.node.name.encode()[:200], 0o755, 0, 0))


def write(fid: Fid, data: bytes, offset: int = 0, flags: int = 0) -> tuple[Any, ...]:
    return (*fid, offset, flags, data)


# -- locks -------------------------------------------------------------------------------------------------------


async def test_a_lookup_waits_for_the_lock_of_another(home: Home, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    home.run(home.master.request(0, B, 1, file.ino, LockMode.EX))
    await until(lambda: home.master.mode_of(B, file.ino) == LockMode.EX)
    home.silent = {B}
    home.basts.clear()
    lookup = home.start(A, Op.LOOKUP, *base, b"file")
    await turns()
    assert not lookup.done(), "B may have changed the file under EX"
    assert (B, file.ino) in [(bast.node, bast.ino) for bast in home.basts]
    home.answer_all()
    outcome = await lookup
    assert fid_of(outcome.values[0]) == file
    assert home.idle()


async def test_a_change_calls_back_the_others_but_not_the_requester(home: Home, base: Fid) -> None:
    for node in (A, B):
        outcome = await home.do(node, Op.READDIR, *base, b"", 10, want_lock=True)
        assert [grant.ino for grant in outcome.grants] == [base.ino]
    home.basts.clear()
    outcome = await home.do(A, Op.MKDIR, *base, b"dir", 0o755)
    assert outcome.errno == 0
    assert [bast.node for bast in home.basts if bast.ino == base.ino] == [B]
    assert home.master.mode_of(A, base.ino) == LockMode.PR
    assert home.master.mode_of(B, base.ino) == LockMode.NL


async def test_locks_ride_with_replies_where_nothing_conflicts(home: Home, base: Fid) -> None:
    outcome = await home.do(A, Op.CREATE, *base, b"file", 0o644, os.O_EXCL, want_lock=True)
    file = fid_of(outcome.values[1])
    assert {(grant.ino, grant.mode) for grant in outcome.grants} == {
        (base.ino, LockMode.PR),
        (file.ino, LockMode.EX),
    }
    assert home.master.mode_of(A, file.ino) == LockMode.EX
    outcome = await home.do(A, Op.LOOKUP, *base, b"none", want_lock=True)
    assert outcome.errno == errno.ENOENT
    assert [grant.ino for grant in outcome.grants] == [base.ino], "that a name is not there is cached too"
    outcome = await home.do(B, Op.GETATTR, *file, want_lock=False)
    assert outcome.grants == []


async def test_a_cancelled_wait_leaves_nothing(home: Home, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    for ino in (base.ino, file.ino):
        home.run(home.master.request(0, B, ino, ino, LockMode.EX))
    await until(lambda: home.master.mode_of(B, file.ino) == home.master.mode_of(B, base.ino) == LockMode.EX)
    home.silent = {B}
    waiting = [
        home.start(A, Op.GETATTR, *file),
        home.start(A, Op.GETATTR, *file, want_lock=True),
        home.start(A, Op.UNLINK, *base, b"file", *NO_FID),
        home.start(A, Op.SETATTR, *file, Valid.MODE, 0, 0, 0, 0, 0, 0),
    ]
    await turns()
    for task in waiting:
        assert not task.done()
        task.cancel()
    await asyncio.wait(waiting)
    assert home.idle()
    assert (await home.do(B, Op.GETATTR, *file)).errno == 0
    assert home.lower.names(base) == [b"file"]


async def test_a_node_that_is_gone_waits_no_more(home: Home, base: Fid) -> None:
    file = await home.make(B, base, b"file")
    home.run(home.master.request(0, B, 1, file.ino, LockMode.EX))
    await until(lambda: home.master.mode_of(B, file.ino) == LockMode.EX)
    home.silent = {B}
    tasks = [home.start(A, Op.GETATTR, *file), home.start(A, Op.GETATTR, *file, want_lock=True)]
    await turns()
    home.run(home.master.node_gone(0, A))
    async with asyncio.timeout(5):
        outcomes = [await task for task in tasks]
    assert [outcome.errno for outcome in outcomes] == [errno.ENOTCONN] * 2
    assert home.idle()


async def test_two_renames_in_opposite_directions(home: Home, base: Fid) -> None:
    one = fid_of((await home.do(A, Op.MKDIR, *base, b"one", 0o755)).values[0])
    two = fid_of((await home.do(A, Op.MKDIR, *base, b"two", 0o755)).values[0])
    await home.make(A, one, b"x")
    await home.make(B, two, b"y")
    for ino in (one.ino, two.ino):  # so that each lock takes a while
        home.run(home.master.request(0, C, ino, ino, LockMode.PR))
    async with asyncio.timeout(20):
        outcomes = await asyncio.gather(
            home.start(A, Op.RENAME, *one, b"x", *two, b"x", 0, *NO_FID),
            home.start(B, Op.RENAME, *two, b"y", *one, b"y", 0, *NO_FID),
        )
    assert [outcome.errno for outcome in outcomes] == [0, 0]
    assert (home.lower.names(one), home.lower.names(two)) == ([b"y"], [b"x"])
    assert home.idle()


@pytest.mark.parametrize("seed", range(4))
async def test_random_operations_all_end(home: Home, base: Fid, seed: int) -> None:
    """No order of operations deadlocks: 1,000 of three nodes, eighteen at a time, over few names."""
    chance = random.Random(seed)
    dirs = [base] + [fid_of(home.lower.mkdir(base, b"d%d" % n, 0o755, 0, 0)) for n in range(3)]
    files = [await home.make(A, base, b"f%d" % n) for n in range(3)]
    names = [b"f0", b"f1", b"f2", b"f3"]

    def operation() -> tuple[Op, tuple[Any, ...]]:
        parent, other, name, file = (chance.choice(row) for row in (dirs, dirs, names, files))
        return chance.choice(
            [
                (Op.RENAME, (*parent, name, *other, chance.choice(names), chance.choice([0, 0, 1, 2]), *NO_FID)),
                (Op.RENAME, (*parent, name, *other, chance.choice(names), 0, *file)),
                (Op.LINK, (*file, *parent, name)),
                (Op.UNLINK, (*parent, name, *NO_FID)),
                (Op.CREATE, (*parent, name, 0o644, chance.choice([0, os.O_EXCL]))),
                (Op.LOOKUP, (*parent, name)),
                (Op.GETATTR, file),
                (Op.READDIR, (*parent, b"", 2)),
                (Op.WRITE, write(file, b"data")),
                (Op.READ, (*file, 0, 100)),
                (Op.SETATTR, (*file, Valid.SIZE, 0, 0, 0, 9, 0, 0)),
                (Op.REAP, file),
            ]
        )

    async def node(number: int, count: int) -> None:
        for _ in range(count):
            op, values = operation()
            outcome = await home.do(number, op, *values, want_lock=chance.random() < 0.5)
            assert outcome.errno in (0, errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.EXDEV), outcome
            for grant in outcome.grants:
                assert home.master.mode_of(number, grant.ino) >= 0

    async with asyncio.timeout(60):
        await asyncio.gather(*(node(number, 56) for number in (HOME, A, B) for _ in range(6)))
    assert home.idle()


# -- durability --------------------------------------------------------------------------------------------------


async def test_a_creation_is_answered_after_the_log_force(home: Home, lower: GatedLower, base: Fid) -> None:
    lower.gate.shut()
    create = home.start(A, Op.CREATE, *base, b"file", 0o644, os.O_EXCL, want_lock=True)
    await until(lower.gate.entered.is_set)
    others = [
        home.start(B, Op.LOOKUP, *base, b"file"),
        home.start(B, Op.LOOKUP, *base, b"none"),
        home.start(B, Op.READDIR, *base, b"", 10),
        home.start(B, Op.CREATE, *base, b"file", 0o644, os.O_EXCL),
        home.start(B, Op.CREATE, *base, b"file", 0o644, 0),
    ]
    elsewhere = await home.do(B, Op.GETATTR, *lower.root)
    assert elsewhere.errno == 0, "what saw nothing new is not held up"
    await turns()
    assert lower.names(base) == [b"file"]
    assert [task.done() for task in (create, *others)] == [False] * 6
    lower.gate.open()
    assert [(await task).errno for task in others] == [0, errno.ENOENT, 0, errno.EEXIST, 0]
    assert (await create).errno == 0


@pytest.mark.parametrize("change", ["unlink", "rename", "rmdir", "setattr", "setxattr", "link", "symlink", "mknod"])
async def test_what_sees_a_change_waits_for_its_force(home: Home, lower: GatedLower, base: Fid, change: str) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.MKDIR, *base, b"dir", 0o755)
    mode = (Valid.MODE, 0o600, 0, 0, 0, 0, 0)
    operations: dict[str, tuple[Any, ...]] = {
        "unlink": (Op.UNLINK, *base, b"file", *NO_FID),
        "rename": (Op.RENAME, *base, b"file", *base, b"other", 0, *NO_FID),
        "rmdir": (Op.RMDIR, *base, b"dir"),
        "setattr": (Op.SETATTR, *file, *mode),
        "setxattr": (Op.SETXATTR, *file, b"user.a", b"1", 0),
        "link": (Op.LINK, *file, *base, b"second"),
        "symlink": (Op.SYMLINK, *base, b"link", b"x"),
        "mknod": (Op.MKNOD, *base, b"fifo", stat.S_IFIFO | 0o600, 0),
    }
    sights: dict[str, list[tuple[Any, ...]]] = {
        "unlink": [(Op.LOOKUP, *base, b"file"), (Op.UNLINK, *base, b"file", *NO_FID)],
        "rename": [(Op.LOOKUP, *base, b"other"), (Op.LOOKUP, *base, b"file"), (Op.GETATTR, *file)],
        "rmdir": [(Op.LOOKUP, *base, b"dir"), (Op.RMDIR, *base, b"dir")],
        "setattr": [(Op.GETATTR, *file), (Op.LOOKUP, *base, b"file")],
        "setxattr": [(Op.GETXATTR, *file, b"user.a"), (Op.LISTXATTR, *file)],
        "link": [(Op.GETATTR, *file), (Op.LOOKUP, *base, b"second"), (Op.MKDIR, *base, b"second", 0o755)],
        "symlink": [(Op.LOOKUP, *base, b"link"), (Op.READDIR, *base, b"", 0)],
        "mknod": [(Op.LOOKUP, *base, b"fifo"), (Op.RENAME, *base, b"fifo", *base, b"dir", 0, *NO_FID)],
    }
    lower.gate.shut()
    changer = home.start(A, *operations[change])
    await until(lower.gate.entered.is_set)
    seeing = [home.start(B, *row) for row in sights[change]]
    await turns()
    assert [task.done() for task in (changer, *seeing)] == [False] * (1 + len(seeing))
    lower.gate.open()
    async with asyncio.timeout(20):
        await asyncio.gather(changer, *seeing)
    assert (await changer).errno == 0


async def test_one_force_serves_many(home: Home, lower: GatedLower, base: Fid) -> None:
    lower.gate.shut()
    tasks = [home.start(A, Op.MKDIR, *base, b"%d" % n, 0o755) for n in range(30)]
    await until(lambda: len(lower.names(base)) == 30)
    lower.gate.open()
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)
    assert lower.gate.passed <= 2


async def test_a_change_after_a_force_began_needs_another(home: Home, lower: GatedLower, base: Fid) -> None:
    lower.gate.shut()
    first = home.start(A, Op.MKDIR, *base, b"first", 0o755)
    await until(lower.gate.entered.is_set)
    second = home.start(A, Op.MKDIR, *base, b"second", 0o755)
    await turns()
    lower.gate.open()
    await asyncio.gather(first, second)
    assert lower.gate.passed == 2, "the first did not cover the second"


async def test_after_a_force_that_fails_nothing_is_answered(home: Home, lower: GatedLower, base: Fid) -> None:
    lower.gate.fail = OSError(errno.EIO, "no disk")
    with pytest.raises(LowerFailed):
        await home.do(A, Op.MKDIR, *base, b"dir", 0o755)
    with pytest.raises(LowerFailed):  # it saw what may be lost
        await home.do(B, Op.LOOKUP, *base, b"dir")
    lower.gate.fail = None
    with pytest.raises(LowerFailed):  # that the next force succeeds says nothing of what this one was for
        await home.do(B, Op.LOOKUP, *base, b"dir")


# -- unstable data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sight", ["read", "write", "getattr", "lookup", "truncate", "lock"])
async def test_data_is_committed_before_another_node_sees_or_changes_it(
    home: Home, lower: GatedLower, base: Fid, sight: str
) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *write(file, b"A"))
    await home.do(A, Op.WRITE, *write(file, b"AA"))
    assert lower.gate.passed == 1, "its own writer needs no commit"
    lower.gate.shut()
    task = {
        "read": lambda: home.start(B, Op.READ, *file, 0, 10),
        "write": lambda: home.start(B, Op.WRITE, *write(file, b"B")),
        "getattr": lambda: home.start(B, Op.GETATTR, *file),
        "lookup": lambda: home.start(B, Op.LOOKUP, *base, b"file"),
        "truncate": lambda: home.start(B, Op.SETATTR, *file, Valid.SIZE, 0, 0, 0, 0, 0, 0),
        "lock": lambda: home.start(B, Op.GETATTR, *file, want_lock=True),
    }[sight]()
    await until(lower.gate.entered.is_set)
    await turns()
    assert not task.done()
    assert os.pread(lower.file_fd(file), 10, 0) == b"AA", "nothing was changed before the commit"
    lower.gate.open()
    assert (await task).errno == 0
    assert lower.synced[1] == file


async def test_a_stable_write_is_durable_before_anybody_sees_it(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    lower.synced.clear()
    lower.gate.shut()
    one = home.start(A, Op.WRITE, *write(file, b"A", 0, WriteFlag.STABLE))
    await until(lower.gate.entered.is_set)
    read = home.start(B, Op.READ, *file, 0, 10)
    await turns()
    assert not one.done()
    assert not read.done()
    lower.gate.open()
    assert (await one).values == [0, 1]
    assert (await read).values == [b"A"]
    assert lower.synced[0] == file
    assert not home.service.must_commit(file.ino, B)


async def test_of_two_that_wait_for_a_commit_the_second_waits_for_the_first_too(
    home: Home, lower: GatedLower, base: Fid
) -> None:
    """At most one node has unstable data of a file."""
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *write(file, b"aaa"))
    lower.gate.shut()
    tasks = [home.start(node, Op.WRITE, *write(file, b"%d" % node, node)) for node in (B, C)]
    await until(lower.gate.entered.is_set)
    await turns()
    order: list[str] = []
    pwrite, sync = os.pwrite, lower.sync

    def note_sync(fid: Fid) -> None:
        sync(fid)
        order.append("commit")

    def note_write(fd: int, data: bytes, offset: int) -> int:
        order.append("write")
        return pwrite(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "sync", note_sync)
        patch.setattr("mxfsd.home.os.pwrite", note_write)
        lower.gate.open()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks)
    assert order[-3:] == ["write", "commit", "write"]


async def test_a_lock_just_granted_covers_no_data_before_the_commit(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *write(file, b"A"))
    home.run(home.master.request(0, B, 1, file.ino, LockMode.EX, LockFlag.NONE))
    await until(lambda: home.master.mode_of(B, file.ino) == LockMode.EX)
    lower.gate.shut()
    tasks = [
        home.start(B, Op.WRITE, *write(file, b"B")),
        home.start(B, Op.WRITES, *file, 0, pack_writes([(0, b"B")])),
        home.start(B, Op.READ, *file, 0, 9),
    ]
    await until(lower.gate.entered.is_set)
    await turns()
    assert [task.done() for task in tasks] == [False] * 3
    assert os.pread(lower.file_fd(file), 10, 0) == b"A"
    lower.gate.open()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("op", [Op.FSYNC, Op.SYNC])
async def test_fsync_and_sync_commit(home: Home, lower: GatedLower, base: Fid, op: Op) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *write(file, b"A"))
    assert home.service.must_commit(file.ino, B)
    assert not home.service.must_commit(file.ino, A)
    outcome = await home.do(A, op, *((*file, 0) if op is Op.FSYNC else ()))
    assert outcome.errno == 0
    assert not home.service.must_commit(file.ino, B)


async def test_a_write_during_an_fsync_is_not_covered_by_it(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *write(file, b"A"))
    lower.gate.shut()
    sync = home.start(A, Op.FSYNC, *file, 0)
    await until(lower.gate.entered.is_set)
    await home.do(A, Op.WRITE, *write(file, b"more", 10))
    lower.gate.open()
    await sync
    assert home.service.must_commit(file.ino, B)


# -- unlinked and open -------------------------------------------------------------------------------------------


async def test_a_file_open_elsewhere_is_kept_until_its_last_close(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *write(file, b"content"))
    home.open_at(B, file)
    outcome = await home.do(A, Op.UNLINK, *base, b"file", *file)
    assert outcome.values == [*file, file.ino, 1, lower.getattr(base)]
    assert lower.orphans() == [file]
    assert (await home.do(B, Op.READ, *file, 0, 100)).values == [b"content"]
    assert (await home.do(B, Op.GETATTR, *file)).values[0].nlink == 0
    assert (await home.do(A, Op.LINK, *file, *base, b"again")).errno == errno.ENOENT
    await home.do(A, Op.REAP, *file)
    assert lower.orphans() == [file], "B has it open"
    home.open_at(B, file, 0, 0)
    home.service.reap_if_closed(file.ino)
    await until(lambda: not lower.orphans())
    assert (await home.do(B, Op.GETATTR, *file)).errno == errno.ESTALE


async def test_the_closing_node_reaps(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    home.open_at(B, file)
    await home.do(A, Op.UNLINK, *base, b"file", *NO_FID)
    assert (await home.do(B, Op.REAP, *file)).errno == 0
    assert lower.orphans() == []
    assert (await home.do(B, Op.REAP, *file)).errno == 0, "twice is nothing"
    other = await home.make(A, base, b"other")
    await home.do(B, Op.REAP, *other)
    assert lower.names(base) == [b"other"], "what is no orphan is not freed"


def open_here(lower: GatedLower, fid: Fid) -> bool:
    """Whether this process has a descriptor of the file."""
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.stat(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if (found.st_ino, found.st_dev) == (fid.ino, os.fstat(lower.mount_fd).st_dev):
            return True
    return False


async def test_no_descriptor_stays_of_what_the_home_may_free(home: Home, lower: GatedLower, base: Fid) -> None:
    """Its FUSE layer unlinks without a word what nobody else has a lock on."""
    file = await home.make(B, base, b"file")
    assert (await home.do(B, Op.WRITE, *file, 0, 0, b"data")).errno == 0
    for node in (HOME, B):
        await home.do(node, Op.GETATTR, *file, want_lock=True)
        assert (await home.do(node, Op.READ, *file, 0, 9)).values == [b"data"]
        assert open_here(lower, file) == (node == B)
    home.run(home.master.release(0, B, file.ino, home.master.seq_of(B, file.ino), LockMode.NL, (0, 0)))
    assert file.ino not in home.master
    assert not open_here(lower, file)


async def test_a_file_without_a_name_lives_as_long_as_it_is_open(home: Home, lower: GatedLower, base: Fid) -> None:
    outcome = await home.do(A, Op.TMPFILE, *base, 0o640, want_lock=True)
    (attr,) = outcome.values
    file = fid_of(attr)
    assert (attr.nlink, attr.mode, lower.orphans(), lower.names(base)) == (0, 0o100640, [file], [])
    assert [(grant.ino, grant.mode) for grant in outcome.grants] == [(file.ino, LockMode.EX)]
    changed = (await home.do(A, Op.SETATTR, *file, Valid.SIZE, 0, 0, 0, 99, 0, 0)).values[0]
    seen = (await home.do(A, Op.GETATTR, *file)).values[0]
    assert [(each.nlink, each.size) for each in (changed, seen)] == [(0, 99)] * 2
    assert (await home.do(A, Op.LINK, *file, *base, b"name")).errno == errno.ENOENT
    home.open_at(A, file)
    home.service.reap_all()
    await until(home.idle)
    assert lower.orphans() == [file]
    home.open_at(A, file, 0, 0)
    home.service.reap_all()
    await until(lambda: lower.orphans() == [])
    assert (await home.do(A, Op.LINK_UNNAMED, *file, *base, b"name")).errno == errno.ENOENT
    await until(home.idle)


async def test_a_file_without_a_name_gets_one(home: Home, lower: GatedLower, base: Fid) -> None:
    file = fid_of((await home.do(A, Op.TMPFILE, *base, 0o640)).values[0])
    home.open_at(A, file, 0, 1)
    await home.make(B, base, b"taken")
    assert (await home.do(A, Op.LINK_UNNAMED, *file, *base, b"taken")).errno == errno.EEXIST
    assert (await home.do(A, Op.LINK_UNNAMED, *file, *lower.root, b".mxfs")).errno != 0
    assert lower.orphans() == [file]
    attr, directory = (await home.do(A, Op.LINK_UNNAMED, *file, *base, b"name")).values
    assert (fid_of(attr), attr.nlink, directory.ino) == (file, 1, base.ino)
    assert (await home.do(B, Op.LOOKUP, *base, b"name")).values[0].nlink == 1
    assert lower.orphans() == []
    home.open_at(A, file, 0, 0)
    home.service.reap_if_closed(file.ino)
    await turns()
    assert lower.names(base) == [b"name", b"taken"]
    assert home.idle()


async def test_in_the_grace_period_no_orphan_is_freed(home: Home, lower: GatedLower, base: Fid) -> None:
    file = fid_of((await home.do(A, Op.CREATE, *base, b"file", 0o644, 0)).values[1])
    lower.unlink(base, b"file", file)
    fresh = Home(lower)
    fresh.master = fresh.service.master = LockMaster(HOME, Timeouts.named("fast"))
    fresh.service.reap_all()
    await turns()
    assert lower.orphans() == [file], "nobody has said yet what it has open"
    fresh.run(fresh.master.reclaim(0, C, lower.root.ino, LockMode.PR, (0, 0)))
    fresh.service.reap_all()
    await turns()
    fresh.run(fresh.master.reclaim(0, B, file.ino, LockMode.NL, (1, 0)))
    assert lower.orphans() == [file]
    fresh.run(fresh.master.grace_over(0))
    fresh.service.reap_all()
    await until(fresh.idle)
    assert lower.orphans() == [file], "B said that it has it open"
    fresh.open_at(B, file, 0, 0)
    fresh.service.reap_all()
    await until(lambda: not lower.orphans())


@pytest.mark.parametrize(("known", "keeps"), [("promised", False), ("unknown", True), ("another", True)])
async def test_the_promise_of_the_requester(home: Home, lower: GatedLower, base: Fid, known: str, keeps: bool) -> None:
    """A node that holds a lock may have the file open without having said so, unless it says that it has not."""
    file = await home.make(A, base, b"file")
    home.run(home.master.request(0, A, 1, file.ino, LockMode.PR))
    await until(lambda: home.master.mode_of(A, file.ino) >= LockMode.PR)
    victim = {"promised": file, "unknown": NO_FID, "another": Fid(file.ino, file.gen + 1)}[known]
    outcome = await home.do(A, Op.UNLINK, *base, b"file", *victim)
    assert (lower.orphans() == [file]) == keeps
    assert outcome.values[:2] == ([*file] if keeps else [0, 0])


async def test_opens_under_a_lock_of_another_node_are_asked_for(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    home.run(home.master.request(0, B, 1, file.ino, LockMode.EX))
    await until(lambda: home.master.mode_of(B, file.ino) == LockMode.EX)
    home.opens[B, file.ino] = (0, 1)  # said in the answer to the BAST, not before
    await home.do(A, Op.UNLINK, *base, b"file", *file)
    assert lower.orphans() == [file]


async def test_a_name_that_changed_during_the_wait_is_looked_at_again(home: Home, lower: GatedLower, base: Fid) -> None:
    """The locks must be those of what stands under the name when the operation runs."""
    file, other = await home.make(A, base, b"file"), await home.make(A, base, b"other")
    parents = (fid_of(lower.mkdir(base, b"d%d" % n, 0o755, 0, 0)) for n in range(64))
    parent = next(fid for fid in parents if fid.ino > file.ino)  # so that the file is locked first
    lower.link(file, parent, b"name")
    for held in (file, other):
        home.run(home.master.request(0, B, held.ino, held.ino, LockMode.EX))
        await until(lambda held=held: home.master.mode_of(B, held.ino) == LockMode.EX)
    home.silent = {B}
    home.opens[B, other.ino] = (0, 1)  # said only in the answer to a BAST
    unlink = home.start(A, Op.UNLINK, *parent, b"name", *NO_FID)
    await turns()
    lower.rename(base, b"other", parent, b"name", 0, None)
    home.answer_all()
    assert (await unlink).values == [*other, other.ino, 1, lower.getattr(parent)]
    assert lower.orphans() == [other]


async def test_rename_over_a_file_open_elsewhere(home: Home, lower: GatedLower, base: Fid) -> None:
    victim, source = await home.make(A, base, b"new"), await home.make(A, base, b"old")
    await home.do(B, Op.WRITE, *write(victim, b"victim"))
    home.open_at(B, victim, 0, 1)
    outcome = await home.do(A, Op.RENAME, *base, b"old", *base, b"new", 0, *victim)
    directory = lower.getattr(base)
    assert outcome.values == [*victim, source.ino, victim.ino, 1, b"", directory, directory]
    assert lower.orphans() == [victim]
    assert (await home.do(B, Op.READ, *victim, 0, 9)).values == [b"victim"]
    assert fid_of((await home.do(B, Op.LOOKUP, *base, b"new")).values[0]) == source


async def test_rename_tells_what_is_known_of_the_object_under_the_lock_that_comes_with_it(
    home: Home, lower: GatedLower, base: Fid
) -> None:
    source = await home.make(A, base, b"old")
    outcome = await home.do(A, Op.RENAME, *base, b"old", *base, b"new", 0, *NO_FID, want_lock=True)
    assert unpack_attr(outcome.values[5]) == lower.getattr(source)
    assert {base.ino, source.ino} == {grant.ino for grant in outcome.grants}
    kept = unpack_reply(Op.RENAME, outcome.to_keep())[2]
    assert kept == [*outcome.values[:5], b"", *outcome.values[6:]]


async def test_other_names_and_directories_are_not_kept(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.LINK, *file, *base, b"second")
    home.open_at(B, file)
    assert (await home.do(A, Op.UNLINK, *base, b"file", *NO_FID)).values[:-1] == [0, 0, file.ino, 2]
    directory = fid_of((await home.do(A, Op.MKDIR, *base, b"dir", 0o755)).values[0])
    home.open_at(B, directory)
    assert (await home.do(A, Op.RMDIR, *base, b"dir")).errno == 0
    assert lower.orphans() == []
    assert (await home.do(A, Op.RENAME, *base, b"second", *base, b"x", 0, *NO_FID)).values[0] == 0


# -- freezing ----------------------------------------------------------------------------------------------------


async def test_freeze_drops_what_was_not_executed_and_ends_the_rest(home: Home, lower: GatedLower, base: Fid) -> None:
    file = await home.make(A, base, b"file")
    home.run(home.master.request(0, B, 1, file.ino, LockMode.EX))
    await until(lambda: home.master.mode_of(B, file.ino) == LockMode.EX)
    home.silent = {B}
    waiting = [
        home.start(A, Op.SETATTR, *file, Valid.MODE, 0o600, 0, 0, 0, 0, 0),
        home.start(A, Op.UNLINK, *base, b"file", *NO_FID),
        home.start(A, Op.GETATTR, *file, want_lock=True),
    ]
    lower.gate.shut()
    executed = home.start(A, Op.MKDIR, *lower.root, b"frozen%d" % file.ino, 0o755)
    await until(lower.gate.entered.is_set)
    seeing = home.start(B, Op.LOOKUP, *lower.root, b"frozen%d" % file.ino)
    await turns()
    freeze = asyncio.get_running_loop().create_task(home.service.freeze())
    await turns()
    for task in (*waiting, seeing):
        with pytest.raises(Frozen):
            await task
    assert not executed.done() and not freeze.done()
    with pytest.raises(Frozen):
        await home.do(A, Op.STATFS)
    lower.gate.open()
    assert (await executed).errno == 0
    await freeze
    assert home.idle()
    assert stat.S_IMODE(lower.getattr(file).mode) == 0o644
    assert lower.names(base) == [b"file"]
    home.service.replace_lower(lower)
    assert (await home.do(A, Op.STATFS)).errno == 0


# -- operations --------------------------------------------------------------------------------------------------


async def test_appends_are_placed_by_the_home(home: Home, base: Fid) -> None:
    file = await home.make(A, base, b"log")
    rows = await asyncio.gather(
        *(home.start(node, Op.WRITE, *write(file, b"%d" % node * 10, 0, WriteFlag.APPEND)) for node in (A, B) * 5)
    )
    assert sorted(row.values[0] for row in rows) == [10 * n for n in range(10)]
    (data,) = (await home.do(A, Op.READ, *file, 0, 1000)).values
    for row, node in zip(rows, (A, B) * 5, strict=True):
        assert data[row.values[0] : row.values[0] + 10] == b"%d" % node * 10


@pytest.mark.parametrize("op", [Op.READ, Op.GETATTR, Op.LOOKUP, Op.LSEEK])
async def test_what_the_home_writes_under_a_lock_that_it_keeps_is_durable_before_another_node_sees_it(
    home: Home, lower: GatedLower, base: Fid, op: Op
) -> None:
    """The home has a cached writer: called back for a read elsewhere, it keeps PW."""
    file = await home.make(A, base, b"log")
    os.pwrite(lower.file_fd(file), b"some", 0)
    home.silent.add(HOME)
    values: dict[Op, tuple[Any, ...]] = {
        Op.READ: (*file, 0, 10),
        Op.GETATTR: (*file,),
        Op.LOOKUP: (*base, b"log"),
        Op.LSEEK: (*file, 0, os.SEEK_HOLE),
    }

    async def ask() -> Outcome:
        """The home answers each BAST as its cached writer has it."""
        task = home.start(A, op, *values[op], want_lock=True)
        async with asyncio.timeout(20):
            while not task.done():
                basts, home.basts = home.basts, []
                for bast in basts:
                    keeps = bast.ino == file.ino and bast.flags & LockFlag.MAY_KEEP
                    mode = LockMode.PW if keeps else LockMode.NL
                    home.run(home.master.release(0, bast.node, bast.ino, bast.seq, mode, (0, 1)))
                await asyncio.sleep(0)
        return await task

    lower.synced.clear()
    assert (await ask()).errno == 0
    assert file in lower.synced
    lower.gate.fail = OSError(errno.EIO, "the disk is gone")
    with pytest.raises(LowerFailed):
        await ask()


async def pinned(home: Home, lower: GatedLower, base: Fid) -> Fid:
    """A file that the home's kernel may write by itself, in which a program of the home has written."""
    file = await home.make(A, base, b"mapped")
    home.opens[HOME, file.ino] = (0, 2)
    home.open_at(A, file)
    home.run(home.master.opens_update(0, HOME, file.ino, (0, 2), pinned=True))
    lower.synced.clear()
    return file


@pytest.mark.parametrize("op", [Op.READ, Op.GETATTR, Op.LOOKUP, Op.LSEEK])
async def test_what_the_homes_kernel_wrote_is_durable_before_another_node_sees_it(
    home: Home, lower: GatedLower, base: Fid, op: Op
) -> None:
    file = await pinned(home, lower, base)
    values: dict[Op, tuple[Any, ...]] = {
        Op.READ: (*file, 0, 10),
        Op.GETATTR: (*file,),
        Op.LOOKUP: (*base, b"mapped"),
        Op.LSEEK: (*file, 0, os.SEEK_HOLE),
    }
    outcome = await home.do(A, op, *values[op], want_lock=True)
    assert file in lower.synced and file.ino not in [grant.ino for grant in outcome.grants]
    lower.synced.clear()
    await home.do(HOME, op, *values[op])
    assert file not in lower.synced
    lower.gate.fail = OSError(errno.EIO, "the disk is gone")
    with pytest.raises(LowerFailed):
        await home.do(A, op, *values[op])


async def test_appends_beside_the_homes_kernel_overwrite_nothing(home: Home, lower: GatedLower, base: Fid) -> None:
    """The place is found by the system call that writes: a program of the home appends in the moment before it."""
    file = await pinned(home, lower, base)
    opened = lower.open

    def sneaks_in(fid: Fid, flags: int) -> int:
        fd = os.open(f"/proc/self/fd/{lower.file_fd(fid)}", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"home.")
        os.close(fd)
        lower.forget(fid.ino)
        return opened(fid, flags)

    lower.open = sneaks_in  # type: ignore[method-assign]
    done = [(await home.do(A, Op.WRITE, *write(file, b"node", 0, WriteFlag.APPEND))).values for _ in range(2)]
    assert done == [[5, 4], [14, 4]]
    (data,) = (await home.do(A, Op.READ, *file, 0, 100)).values
    assert data == b"home.nodehome.node"
    home.opens[HOME, file.ino] = (0, 0)
    home.run(home.master.opens_update(0, HOME, file.ino, (0, 0)))
    done = [(await home.do(HOME, Op.WRITE, *write(file, b"own", 0, WriteFlag.APPEND | WriteFlag.BESIDE))).values]
    assert done == [[23, 3]], "its own FUSE layer says so itself"


async def test_no_descriptor_for_writing_stays_of_what_the_homes_kernel_writes(
    home: Home, lower: GatedLower, base: Fid
) -> None:
    file = await pinned(home, lower, base)
    await home.do(A, Op.WRITE, *write(file, b"x", 0, WriteFlag.STABLE))
    await home.do(A, Op.READ, *file, 0, 10)
    assert lower._files.get(file) is None


async def test_every_operation_answers(home: Home, base: Fid) -> None:
    """The values of each reply fit its declaration: the reply is packed."""
    file = await home.make(A, base, b"file")
    other = await home.make(A, base, b"other")
    link = fid_of((await home.do(A, Op.SYMLINK, *base, b"link", b"target")).values[0])
    rows: list[tuple[Any, ...]] = [
        (Op.LOOKUP, *base, b"file"),
        (Op.GETATTR, *file),
        (Op.SETATTR, *file, Valid.MODE, 0o4755, 0, 0, 0, 0, 0),
        (Op.READLINK, *link),
        (Op.MKNOD, *base, b"fifo", stat.S_IFIFO | 0o600, 0),
        (Op.MKDIR, *base, b"dir", 0o755),
        (Op.LINK, *file, *base, b"second"),
        (Op.CREATE, *base, b"new", 0o644, 0),
        (Op.WRITE, *write(file, b"data", 0, WriteFlag.KILL_PRIV)),
        (Op.READ, *file, 0, 10),
        (Op.FSYNC, *file, 0),
        (Op.READDIR, *base, b"", 0),
        (Op.STATFS,),
        (Op.SETXATTR, *file, b"user.a", b"1", 0),
        (Op.GETXATTR, *file, b"user.a"),
        (Op.LISTXATTR, *file),
        (Op.REMOVEXATTR, *file, b"user.a"),
        (Op.RENAME, *base, b"second", *base, b"third", 0, *NO_FID),
        (Op.UNLINK, *base, b"third", *NO_FID),
        (Op.RMDIR, *base, b"dir"),
        (Op.REAP, *file),
        (Op.SYNC,),
        (Op.WRITES, *file, 0, pack_writes([(0, b"DATA"), (2, b"xx")])),
        (Op.LK_SET, file.ino, 77, 0, 9, 4711, 1, 0, 0),
        (Op.LK_TEST, file.ino, 78, 0, 9, 4712, 1, 0),
        (Op.LK_ADOPT, file.ino, b""),
        (Op.LK_CANCEL, file.ino, 5),
        (Op.FALLOCATE, *file, 3, 1, 2, 0),
        (Op.LSEEK, *file, 0, os.SEEK_HOLE),
        (Op.COPY, *file, 0, *other, 3, 1 << 30, 1),
        (Op.IOCTL, *file, GETFLAGS, b""),
        (Op.IOCTL, *file, SETFLAGS, (1 << 7).to_bytes(4, "little")),  # NOATIME
        (Op.IOCTL, *file, FSGETXATTR, b""),
        (Op.IOCTL, *base, FITRIM, bytes(8) + b"\xff" * 8 + bytes(8)),
        (Op.BTIME, *file),
    ]
    unnamed = fid_of((await home.do(A, Op.TMPFILE, *base, 0o644)).values[0])
    rows.append((Op.LINK_UNNAMED, *unnamed, *base, b"unnamed"))
    assert {row[0] for row in rows} | {Op.SYMLINK, Op.TMPFILE} == set(Op)
    got = {}
    for op, *values in rows:
        outcome = await home.do(A, op, *values, want_lock=True)
        assert outcome.errno == 0, (op, outcome)
        assert outcome.parts()
        got[op] = outcome.values
    assert got[Op.READLINK] == [b"target"]
    assert got[Op.READ] == [b"data"]
    assert os.pread(home.lower.file_fd(file), 9, 0) == b"D\0\0x"
    assert os.pread(home.lower.file_fd(other), 9, 0) == b"\0\0\0D\0\0x"
    assert (got[Op.COPY], got[Op.LSEEK]) == ([4], [4])
    assert (await home.do(A, Op.IOCTL, *file, GETFLAGS, b"")).values == [(1 << 7).to_bytes(4, "little")]
    assert abs(got[Op.BTIME][0] - time.time_ns()) < 3600 * 10**9
    listed = [entry.name for entry in unpack_entries(got[Op.READDIR][1])]
    assert (got[Op.READDIR][0], listed) == (1, [b"dir", b"fifo", b"file", b"link", b"new", b"other", b"second"])
    assert got[Op.GETXATTR] == [b"1"]
    assert got[Op.LISTXATTR] == [b"user.a\0"]
    assert stat.S_IMODE((await home.do(A, Op.GETATTR, *file)).values[0].mode) == 0o755, "KILL_PRIV"


@pytest.mark.parametrize(
    "row",
    [
        (Op.READ, 1 << 63, 10),
        (Op.SETXATTR, b"user.\0", b"", 0),
        (Op.SETATTR, Valid.SIZE, 0, 0, 0, 1 << 63, 0, 0),
        (Op.WRITE, 1 << 63, 0, b"x"),
        (Op.WRITES, 0, b"x"),
        (Op.WRITES, 0, pack_writes([(1 << 63, b"x")])),
    ],
)
async def test_values_that_no_system_call_takes(home: Home, base: Fid, row: tuple[Any, ...]) -> None:
    file = await home.make(A, base, b"file")
    assert (await home.do(A, row[0], *file, *row[1:])).errno in (errno.EINVAL, errno.EFBIG, errno.EPROTO)
    assert home.idle()


@pytest.mark.parametrize(
    ("code", "op", "values"),
    [
        (errno.EOPNOTSUPP, Op.FALLOCATE, (8, 0, 4096, 0)),  # COLLAPSE_RANGE
        (errno.EINVAL, Op.FALLOCATE, (0, 0, 0, 0)),
        (errno.EINVAL, Op.LSEEK, (0, os.SEEK_END)),
        (errno.ENXIO, Op.LSEEK, (9, os.SEEK_DATA)),
        (errno.ENOTTY, Op.IOCTL, (0x5401, b"")),
        (errno.EINVAL, Op.IOCTL, (SETFLAGS, b"x")),
        (errno.EOPNOTSUPP, Op.IOCTL, (SETFLAGS, (0x10).to_bytes(4, "little"))),
        (errno.EOPNOTSUPP, Op.IOCTL, (FSSETXATTR, (0x10).to_bytes(28, "little"))),
    ],
)
async def test_what_is_not_offered_is_refused(home: Home, base: Fid, code: int, op: Op, values: Any) -> None:
    file = await home.make(A, base, b"file")
    await home.do(A, Op.WRITE, *file, 0, 0, b"data")
    assert (await home.do(A, op, *file, *values)).errno == code
    assert os.pread(home.lower.file_fd(file), 9, 0) == b"data"
    assert home.idle()


async def test_a_copy_shows_what_another_node_wrote_and_nobody_else_changes_it_meanwhile(
    home: Home, lower: GatedLower, base: Fid
) -> None:
    source, target = await home.make(A, base, b"source"), await home.make(A, base, b"target")
    await home.do(B, Op.WRITE, *source, 0, 0, b"unstable")
    lower.synced.clear()
    lower.gate.shut()
    copying = home.start(A, Op.COPY, *source, 2, *target, 0, 100, 0)
    await until(lower.gate.entered.is_set)
    changing = home.start(B, Op.SETATTR, *target, Valid.SIZE, 0, 0, 0, 1, 0, 0)
    await turns()
    assert os.pread(home.lower.file_fd(target), 9, 0) == b"", "what is copied is durable first"
    lower.gate.open()
    assert (await copying).values == [6]
    assert source in lower.synced and target in lower.synced
    await changing
    assert os.pread(home.lower.file_fd(target), 9, 0) == b"s"
    assert (await home.do(A, Op.COPY, *target, 0, *target, 10, 1, 0)).values == [1], "within one file"


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc/passwd", b"../x", b"a\0b"])
def test_names_that_lead_elsewhere_are_refused(name: bytes) -> None:
    samples = {"Q": 1, "I": 1, "q": 1, "v": b"fine"}
    named = {Op.LOOKUP, Op.MKNOD, Op.MKDIR, Op.SYMLINK, Op.LINK, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.CREATE}
    for op in named:
        values: list[Any] = [samples[field] for field in REQUESTS[op]]
        check_request(Request(op, 0, 0, 0, 0, values))
        places = [n for n, field in enumerate(REQUESTS[op]) if field == "v"]
        for place in places[:1] if op is Op.SYMLINK else places:
            with pytest.raises(PeerError, match=op.name):
                check_request(Request(op, 0, 0, 0, 0, [*values[:place], name, *values[place + 1 :]]))
    check_request(Request(Op.SYMLINK, 0, 0, 0, 0, [1, 1, b"link", b"/etc/passwd"]))
    check_request(Request(Op.READDIR, 0, 0, 0, 0, [1, 1, b"", 0]))


def test_too_much_data_is_refused() -> None:
    with pytest.raises(PeerError, match="WRITE carries"):
        check_request(Request(Op.WRITE, 0, 0, 0, 0, [1, 1, 0, 0, b"x" * ((1 << 20) + 1)]))


async def test_freeze_does_not_wait_for_a_lock_that_goes_with_a_reply(home: Home, lower: GatedLower, base: Fid) -> None:
    # Seen: the home's own FUSE layer was killed, and answered no blocking AST: the home could not leave for 10 s.
    assert (await home.do(A, Op.LOOKUP, *base, b"none", want_lock=True)).grants  # its own lock on the folder is gone
    home.silent = {HOME}
    made = home.start(A, Op.MKDIR, *base, b"made", 0o755, want_lock=True)
    await until(lambda: home.service._req_waits)
    async with asyncio.timeout(20):
        await home.service.freeze()
    outcome = await made
    assert outcome.errno == 0 and [grant.ino for grant in outcome.grants] == [base.ino]
    assert home.idle()
