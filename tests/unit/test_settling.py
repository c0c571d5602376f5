"""What a new home finds on the volume: records, half-done operations, damage. On a real XFS."""

import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xfsdisk

from mxfs_proto.errors import MediaError
from mxfs_proto.ioctls import GETFLAGS, SETFLAGS
from mxfs_proto.ops import NO_FID, Fid, Op, Request, WriteFlag, pack_error, pack_reply, unpack_reply
from mxfsd.core.outcomes import SHORT, Before, BeforeFlag, Record, RecordKind, pack_record
from mxfsd.core.sessions import SessionTable
from mxfsd.io.ioctls import run
from mxfsd.io.lower import Lower
from mxfsd.oprecords import NAMES, Key, OpRecords
from mxfsd.settling import Recovered, recover_sessions

pytestmark = pytest.mark.needs("root", "loop", "xfs")
VOLUME = 5
KEY = Key(7, 1)
REPLY = pack_error(2)[0]
EVERYBODY = 2**32 - 1
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, who)
    for tag, perm, who in ((1, 7, EVERYBODY), (2, 7, 1000), (4, 5, EVERYBODY), (16, 7, EVERYBODY), (32, 5, EVERYBODY))
)
"""A default ACL: owner, user 1000, group, mask, others (acl(5))."""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path_factory.mktemp("xfs")) as device:
        yield device


@pytest.fixture
def lower(device: str) -> Iterator[Lower]:
    lower = xfsdisk.mount(device)
    xfsdisk.forget_operations(lower)
    yield lower
    for fid in lower.orphans():
        lower.reap(fid)
    lower.close()


@pytest.fixture
def base(lower: Lower, tmp_path: Path) -> Fid:
    attr = lower.mkdir(lower.root, tmp_path.name.encode(), 0o755, 0, 0)
    return Fid(attr.ino, attr.gen)


def make(lower: Lower, parent: Fid, name: bytes) -> Fid:
    fd, attr = lower.create(parent, name, 0o644, 0, 0)
    os.close(fd)
    return Fid(attr.ino, attr.gen)


def request(op: Op, *values: object) -> Request:
    return Request(op, 0, 0, 0, 0, list(values))


def intended(lower: Lower, asked: Request, before: Before = Before(), seq: int = KEY.seq) -> None:  # noqa: B008
    """The home died behind the intent."""
    records = OpRecords(lower, VOLUME)
    records.load()
    records.intend(Key(KEY.session, seq), asked, before)


def used(lower: Lower) -> list[Fid]:
    """The places with a record."""
    return [fid for fid in lower.op_slots().values() if lower.listxattr(fid)]


def recover(lower: Lower) -> tuple[Recovered, SessionTable]:
    sessions = SessionTable()
    return recover_sessions(lower, sessions, VOLUME), sessions


def test_outcomes_are_restored_and_places_used_again(lower: Lower) -> None:
    first, _ = recover(lower)
    for seq in range(1, 101):
        first.records.outcome(Key(7, seq), None, REPLY)
    second, sessions = recover(lower)
    assert (second.restored, len(sessions.kept())) == (100, 100)
    sessions.begin(7, 101, 60)
    assert len(second.records) == 40
    for seq in range(101, 161):
        second.records.outcome(
            Key(7, seq), second.records.intend(Key(7, seq), request(Op.MKDIR, 1, 1, b"x", 0), Before()), REPLY
        )
    sessions.drop(7)
    assert len(second.records) == 59, "those that the table does not know stay"
    assert len(used(lower)) == 100, "the places of what was acknowledged were written over"


@pytest.mark.parametrize("name", [b"short", b"n" * 250])
def test_a_record_is_replaced_in_any_length(lower: Lower, name: bytes) -> None:
    records = recover(lower)[0].records
    for seq, what in ((1, name), (2, b"short"), (3, name)):
        asked = request(Op.MKDIR, *lower.root, what, 0o755)
        slot = records.intend(Key(7, seq), asked, Before())
        records.outcome(Key(7, seq), slot, REPLY)
        records.release(7, seq)
    (fid,) = used(lower)
    assert len(lower.listxattr(fid)) == 1
    again, sessions = recover(lower)
    assert [row[1] for row in sessions.kept()] == [3]


@pytest.mark.parametrize("with_outcome", [False, True])
def test_two_records_in_one_place(lower: Lower, with_outcome: bool) -> None:
    """A crash came before the former record was removed: the outcome follows its intent, else the intent is newer."""
    fid = lower.new_op_slot(0)
    records = OpRecords(lower, VOLUME)
    assert records.load() == []
    intent_of = request(Op.MKDIR, *lower.root, b"never made" + b"n" * 200, 0o755)
    records.intend(Key(7, 2), intent_of, Before())
    other = pack_record(VOLUME, Record(RecordKind.OUTCOME, 7, 2 if with_outcome else 1, REPLY))
    (name,) = (n.decode() for n in lower.listxattr(fid))
    os.setxattr(lower.file_fd(fid), NAMES[1 - NAMES.index(name)], other)
    recovered, sessions = recover(lower)
    assert (recovered.restored, recovered.forgotten) == ((1, 0) if with_outcome else (0, 1))
    assert len(lower.listxattr(fid)) == (1 if with_outcome else 0)


@pytest.mark.parametrize("damage", ["torn", "volume", "junk"])
def test_damage_is_refused_and_changes_nothing(lower: Lower, damage: str) -> None:
    records = recover(lower)[0].records
    records.outcome(KEY, None, REPLY)
    (fid,) = used(lower)
    data = os.getxattr(lower.file_fd(fid), NAMES[0])
    bad = {
        "torn": data[:-1] + b"\xff",
        "volume": pack_record(VOLUME + 1, Record(RecordKind.OUTCOME, 7, 1, REPLY)),
        "junk": b"junk",
    }[damage]
    os.setxattr(lower.file_fd(fid), NAMES[0], bad)
    with pytest.raises(MediaError):
        recover(lower)
    assert os.getxattr(lower.file_fd(fid), NAMES[0]) == bad


@pytest.mark.parametrize("op", [Op.CREATE, Op.MKDIR, Op.MKNOD])
@pytest.mark.parametrize("acl", [False, True])
def test_what_may_lack_its_acl_is_made_again(lower: Lower, base: Fid, op: Op, acl: bool) -> None:
    if acl:
        lower.setxattr(base, b"system.posix_acl_default", ACL, 0)
    values = {Op.CREATE: [0o644, 0], Op.MKDIR: [0o755], Op.MKNOD: [stat.S_IFIFO | 0o600, 0]}[op]
    intended(lower, request(op, *base, b"new", *values))
    if op is Op.MKDIR:
        lower.mkdir(base, b"new", 0o755, 0, 0)
    elif op is Op.MKNOD:
        lower.mknod(base, b"new", stat.S_IFIFO | 0o600, 0, 0, 0)
    else:
        make(lower, base, b"new")
    recovered, sessions = recover(lower)
    assert (recovered.executed, recovered.forgotten) == ((0, 1) if acl else (1, 0))
    for _session, _seq, reply in sessions.kept():
        code, grants, said = unpack_reply(op, reply)
        assert (code, grants, said[-2:]) == (0, [], [lower.lookup(base, b"new"), lower.getattr(base)])
    assert lower.names(base) == ([] if acl else [b"new"])
    assert recover(lower)[0].restored == recovered.executed, "settled once and for all"


@pytest.mark.parametrize("done", [False, True])
def test_a_name_for_a_file_without_one(lower: Lower, base: Fid, done: bool) -> None:
    fd, attr = lower.tmpfile(base, 0o640, 0, 0)
    os.close(fd)
    file = Fid(attr.ino, attr.gen)
    intended(lower, request(Op.LINK_UNNAMED, *file, *base, b"new"))
    if done:
        lower.name_orphan(file, base, b"new")
    recovered, sessions = recover(lower)
    assert (recovered.executed, recovered.forgotten) == ((1, 0) if done else (0, 1))
    for _session, _seq, reply in sessions.kept():
        assert unpack_reply(Op.LINK_UNNAMED, reply)[2] == [lower.lookup(base, b"new"), lower.getattr(base)]
    assert (lower.names(base), lower.orphans()) == (([b"new"], []) if done else ([], [file]))
    lower.reap(file)


def test_a_half_done_rename_leaves_no_orphan(lower: Lower, base: Fid) -> None:
    """Also one of the home's own FUSE layer, which writes no intents."""
    source, victim = make(lower, base, b"source"), make(lower, base, b"victim")
    asked = request(Op.RENAME, *base, b"source", *base, b"victim", 0, *NO_FID)
    intended(lower, asked, Before(source, victim, 1, BeforeFlag.KEPT))
    orphan = b".mxfs/orphans/%x.%x" % victim
    fd = lower.dir_fd(base)
    os.link(b"victim", orphan, src_dir_fd=fd, dst_dir_fd=lower.mount_fd)
    recovered, _ = recover(lower)
    assert (recovered.forgotten, recovered.named_again) == (1, 1)
    assert lower.orphans() == [] and lower.lookup(base, b"victim").nlink == 1
    lower.rename(base, b"source", base, b"victim", 0, victim)
    assert recover(lower)[0].named_again == 0
    assert lower.orphans() == [victim]


@pytest.mark.parametrize("present", [False, True])
def test_an_attribute_that_is_gone_was_removed_only_if_it_was_there(lower: Lower, base: Fid, present: bool) -> None:
    flags = BeforeFlag.PRESENT if present else BeforeFlag.NONE
    intended(lower, request(Op.REMOVEXATTR, *make(lower, base, b"file"), b"user.a"), Before(flags=flags))
    recovered, _ = recover(lower)
    assert (recovered.executed, recovered.forgotten) == ((1, 0) if present else (0, 1))


@pytest.mark.parametrize(("before", "after"), [(3, 3), (8, 8), (20, 8)])
def test_appended_data_is_cut_off_and_nothing_else(lower: Lower, base: Fid, before: int, after: int) -> None:
    """Also where unwritten data before it was lost: then the file is shorter than it was."""
    file = make(lower, base, b"file")
    os.pwrite(lower.file_fd(file), b"12345678", 0)
    asked = request(Op.WRITE, *file, 0, WriteFlag.APPEND, b"678")
    intended(lower, asked, Before(number=before))
    recover(lower)
    assert lower.getattr(file).size == after


@pytest.mark.parametrize(("flags", "end", "after"), [(8, 0, 8), (24, 8, 5), (24, 7, 8), (24, 20, 5)])
def test_what_was_appended_beside_others_is_cut_off_where_nothing_stands_behind(
    lower: Lower, base: Fid, flags: int, end: int, after: int
) -> None:
    file = make(lower, base, b"file")
    os.pwrite(lower.file_fd(file), b"12345678", 0)
    asked = request(Op.WRITE, *file, 0, WriteFlag.APPEND | WriteFlag.BESIDE, b"678")
    intended(lower, asked, Before(Fid(end, 0), NO_FID, 5, BeforeFlag(flags)))
    recovered, _ = recover(lower)
    assert (recovered.forgotten, lower.getattr(file).size) == (1, after)


def test_what_was_begun_on_ranges_and_flags_is_done_again(lower: Lower, base: Fid) -> None:
    """Nobody can have changed anything since: the locks were held, and what was copied was durable before."""
    source, target = make(lower, base, b"source"), make(lower, base, b"target")
    os.pwrite(lower.file_fd(source), b"12345678", 0)
    os.pwrite(lower.file_fd(target), b"abc", 0)
    intended(lower, request(Op.FALLOCATE, *source, 3, 2, 3, 0))
    assert recover(lower)[0].executed == 1
    assert os.pread(lower.file_fd(source), 9, 0) == b"12\0\0\x00678"
    intended(lower, request(Op.COPY, *source, 4, *target, 1, 100, 0), seq=8)
    recovered, sessions = recover(lower)
    assert recovered.executed == 1
    (copied,) = [reply for _session, seq, reply in sessions.kept() if seq == 8]
    assert unpack_reply(Op.COPY, copied)[2] == [4]
    assert os.pread(lower.file_fd(target), 9, 0) == b"a\x00678"
    intended(lower, request(Op.IOCTL, *target, SETFLAGS, (1 << 7).to_bytes(4, "little")), seq=9)
    assert recover(lower)[0].executed == 1
    assert run(lower.file_fd(target), GETFLAGS, b"") == (1 << 7).to_bytes(4, "little")


def test_what_cannot_be_done_again_is_forgotten(lower: Lower, base: Fid) -> None:
    file = make(lower, base, b"file")
    lower.unlink(base, b"file", None)
    lower.forget(file.ino)
    intended(lower, request(Op.SETATTR, *file, 1, 0o600, 0, 0, 0, 0, 0))
    assert recover(lower)[0].forgotten == 1


def test_a_full_volume_takes_records(lower: Lower, base: Fid) -> None:
    """Else nothing could be removed from it."""
    records = recover(lower)[0].records
    fd = lower.file_fd(make(lower, base, b"fill"))
    size = 64 << 20
    while size >= 4096:
        try:
            os.posix_fallocate(fd, os.fstat(fd).st_size, size)
        except OSError:
            size //= 2
    for n in range(200):
        asked = request(Op.UNLINK, *base, b"%d" % n + b"n" * (n % 200), *NO_FID)
        try:
            slot = records.intend(Key(7, n), asked, Before())
        except OSError:
            pytest.fail(f"no room for record {n}")
        records.outcome(Key(7, n), slot, REPLY)
        records.release(7, n)
    os.ftruncate(fd, 0)


def test_records_of_ordinary_operations_stay_in_their_inode_and_are_cheap(lower: Lower, base: Fid) -> None:
    """Two setxattr of 3 µs and what Python adds; the limit is loose, since the machine may be busy."""
    records = recover(lower)[0].records
    asked = request(Op.RENAME, *base, b"o" * 40, *base, b"n" * 40, 0, *NO_FID)
    attr = lower.getattr(base)
    reply = b"".join(pack_reply(Op.RENAME, [], [0, 0, 1, 2, 3, b"", attr, attr]))
    assert len(reply) + 40 <= SHORT
    best = 1e9
    for n in range(300):
        began = time.perf_counter()
        slot = records.intend(Key(7, n), asked, Before())
        assert slot.size <= SHORT
        records.outcome(Key(7, n), slot, reply)
        records.release(7, n)
        best = min(best, time.perf_counter() - began)
    print(f"records of one operation: {best * 1e6:.1f} µs")
    assert best < 100e-6
    assert len(used(lower)) == 1
