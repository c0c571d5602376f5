"""Records of shipped operations: format, and what is decided about an operation without outcome (pure)."""

import hashlib
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MediaError
from mxfs_proto.ioctls import GETFLAGS, SETFLAGS
from mxfs_proto.ops import NO_FID, Attr, Fid, Op, Request, WriteFlag, pack_reply
from mxfsd.core.outcomes import (
    BEFORE,
    HEADER,
    SHORT,
    Before,
    BeforeFlag,
    Intent,
    Now,
    Record,
    RecordKind,
    Step,
    pack_intent,
    pack_record,
    reply_values,
    settle,
    takes_intent,
    unpack_intent,
    unpack_record,
)

DOC = Path(__file__).parents[2] / "docs" / "ondisk.md"
DIR, OBJ, OTHER = Fid(128, 1), Fid(200, 7), Fid(201, 8)


def attr(fid: Fid = OBJ, mode: int = stat.S_IFREG | 0o644, nlink: int = 1, size: int = 0) -> Attr:
    return Attr(*fid, mode, nlink, 0, 0, 0, size, 0, 0, 0, 0)


def request(op: Op, *values: Any) -> Request:
    return Request(op, 1, 1000, 100, 3, list(values))


@given(st.sampled_from(RecordKind), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_record_round_trip(kind: RecordKind, session: int, seq: int, body: bytes) -> None:
    record = Record(kind, session, seq, body)
    data = pack_record(77, record)
    assert len(data) == HEADER.size + len(body)
    assert unpack_record(77, data) == record
    with pytest.raises(MediaError, match="another volume"):
        unpack_record(78, data)


def test_torn_records_are_refused() -> None:
    data = pack_record(77, Record(RecordKind.OUTCOME, 1, 2, b"the reply"))
    for size in range(len(data)):
        with pytest.raises(MediaError):
            unpack_record(77, data[:size])
    for place in range(len(data)):
        for bit in (1, 0x80):
            torn = bytearray(data)
            torn[place] ^= bit
            with pytest.raises(MediaError):
                unpack_record(77, bytes(torn))
    with pytest.raises(MediaError):
        unpack_record(77, data + b"\0")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(MediaError):
        unpack_record(77, data)
    for head in (b"", bytes(BEFORE.size)):
        try:
            intent = unpack_intent(head + data)
        except MediaError:
            continue
        assert takes_intent(intent.request)


@pytest.mark.parametrize("name", ["Operation record", "Before"])
def test_tables_in_the_document(name: str) -> None:
    layout = {"Operation record": HEADER, "Before": BEFORE}[name]
    section = DOC.read_text().split(f"## {name}\n")[1].split("\n## ")[0]
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()
    ]
    assert "<" + "".join(row[2].strip("`") for row in rows) == layout.format
    at = 0
    for row in rows:
        assert int(row[0]) == at
        at += int(row[1])
    assert at == layout.size
    assert section.startswith(f"{layout.size} bytes, ")


INTENTS: list[tuple[Request, Before]] = [
    (request(Op.CREATE, *DIR, b"name", 0o644, 0), Before()),
    (request(Op.SYMLINK, *DIR, b"name", b"target"), Before()),
    (request(Op.RENAME, *DIR, b"old", *DIR, b"new", 2, *NO_FID), Before(OBJ, OTHER, 3, BeforeFlag.KEPT)),
    (request(Op.WRITE, *OBJ, 0, WriteFlag.APPEND, b"data" * 1000), Before(number=2**40)),
    (request(Op.WRITES, *OBJ, WriteFlag.APPEND, b"data" * 1000), Before(number=5)),
    (request(Op.SETXATTR, *OBJ, b"user.a", b"v" * 1024, 0), Before()),
    (request(Op.SETXATTR, *OBJ, b"user.a", b"v" * 1025, 0), Before()),
    (request(Op.SETATTR, *OBJ, 8, 0, 0, 0, 100, 0, 0), Before()),
]


@pytest.mark.parametrize(("asked", "before"), INTENTS)
def test_intents_keep_what_settling_needs(asked: Request, before: Before) -> None:
    body = pack_intent(asked, before)
    assert len(body) < 1300
    intent = unpack_intent(body)
    assert intent.request[:5] == asked[:5]
    assert intent.before[:3] == before[:3]
    if asked.op is Op.SETXATTR and len(asked.values[3]) > 1024:
        assert intent.request.values[3] == hashlib.sha256(asked.values[3]).digest()
        assert intent.before.flags == BeforeFlag.DIGEST
    elif asked.op in (Op.WRITE, Op.WRITES, Op.SYMLINK):
        assert intent.request.values[:-1] == asked.values[:-1] and intent.request.values[-1] == b""
    else:
        assert intent.request.values == asked.values
    for size in range(len(body)):
        with pytest.raises(MediaError):
            unpack_intent(body[:size])


def test_what_may_be_repeated_has_no_intent() -> None:
    assert not takes_intent(request(Op.WRITE, *OBJ, 0, WriteFlag.KILL_PRIV, b"data"))
    assert not takes_intent(request(Op.WRITES, *OBJ, 0, b""))
    assert not takes_intent(request(Op.REAP, *OBJ))
    assert not takes_intent(request(Op.GETATTR, *OBJ))
    assert not takes_intent(request(Op.IOCTL, *OBJ, GETFLAGS, b""))
    with pytest.raises(MediaError):
        unpack_intent(pack_intent(request(Op.REAP, *OBJ), Before()))


CREATE = request(Op.CREATE, *DIR, b"n", 0o644, 0)
MKDIR = request(Op.MKDIR, *DIR, b"n", 0o755)
UNLINK = request(Op.UNLINK, *DIR, b"n", *NO_FID)
RENAME = request(Op.RENAME, *DIR, b"o", *DIR, b"n", 0, *NO_FID)
LONG_VALUE = request(Op.SETXATTR, *OBJ, b"user.a", hashlib.sha256(b"v").digest(), 0)
A_DIR = stat.S_IFDIR | 0o755

APPEND = request(Op.WRITE, *OBJ, 0, WriteFlag.APPEND, b"")
PLACED = Before(Fid(9, 0), NO_FID, 5, BeforeFlag.BESIDE | BeforeFlag.PLACED)

CASES: list[tuple[Request, Before, Now, Step, list[Any] | None]] = [
    (CREATE, Before(), Now(), Step.FORGET, None),
    (CREATE, Before(), Now(attr()), Step.KEEP, [0, attr()]),
    (CREATE, Before(), Now(attr(), inherits=True), Step.UNDO, None),
    (CREATE, Before(), Now(attr(size=1), inherits=True), Step.KEEP, [0, attr(size=1)]),
    (CREATE, Before(), Now(attr(nlink=2), inherits=True), Step.KEEP, [0, attr(nlink=2)]),
    (MKDIR, Before(), Now(attr(mode=A_DIR, nlink=2)), Step.KEEP, [attr(mode=A_DIR, nlink=2)]),
    (MKDIR, Before(), Now(attr(mode=A_DIR, nlink=2, size=6), inherits=True), Step.UNDO, None),
    (MKDIR, Before(), Now(attr(mode=A_DIR, nlink=3), inherits=True), Step.KEEP, [attr(mode=A_DIR, nlink=3)]),
    (request(Op.LINK, *OBJ, *DIR, b"n"), Before(), Now(), Step.FORGET, None),
    (request(Op.LINK, *OBJ, *DIR, b"n"), Before(), Now(attr(nlink=2)), Step.KEEP, [attr(nlink=2)]),
    (request(Op.LINK_UNNAMED, *OBJ, *DIR, b"n"), Before(), Now(), Step.FORGET, None),
    (request(Op.LINK_UNNAMED, *OBJ, *DIR, b"n"), Before(), Now(attr()), Step.KEEP, [attr()]),
    (UNLINK, Before(OBJ, NO_FID, 1), Now(attr()), Step.FORGET, None),
    (UNLINK, Before(OBJ, NO_FID, 1), Now(), Step.KEEP, [0, 0, 200, 1]),
    (UNLINK, Before(OBJ, NO_FID, 1, BeforeFlag.KEPT), Now(), Step.KEEP, [200, 7, 200, 1]),
    (request(Op.RMDIR, *DIR, b"n"), Before(OBJ), Now(attr(mode=A_DIR)), Step.FORGET, None),
    (request(Op.RMDIR, *DIR, b"n"), Before(OBJ), Now(), Step.KEEP, []),
    (RENAME, Before(OBJ), Now(attr()), Step.FORGET, None),
    (RENAME, Before(OBJ), Now(None, attr()), Step.KEEP, [0, 0, 200, 0, 0, b""]),
    (RENAME, Before(OBJ, OTHER, 1), Now(attr(), attr(OTHER)), Step.FORGET, None),
    (RENAME, Before(OBJ, OTHER, 1), Now(None, attr()), Step.KEEP, [0, 0, 200, 201, 1, b""]),
    (RENAME, Before(OBJ, OTHER, 1, BeforeFlag.KEPT), Now(None, attr()), Step.KEEP, [201, 8, 200, 201, 1, b""]),
    (RENAME, Before(OBJ, OTHER, 1, BeforeFlag.KEPT), Now(attr(), attr(OTHER, nlink=2)), Step.FORGET, None),
    (RENAME, Before(OBJ, OTHER, 2), Now(attr(OTHER), attr()), Step.KEEP, [0, 0, 200, 201, 2, b""]),  # exchanged
    (RENAME, Before(OBJ, OBJ, 2), Now(attr(nlink=2), attr(nlink=2)), Step.FORGET, None),  # two names of one
    (request(Op.SETATTR, *OBJ, 1, 0, 0, 0, 0, 0, 0), Before(), Now(), Step.REDO, None),
    (request(Op.SETXATTR, *OBJ, b"user.a", b"v", 0), Before(), Now(), Step.REDO, None),
    (request(Op.REMOVEXATTR, *OBJ, b"user.a"), Before(), Now(), Step.REDO, None),
    (request(Op.FALLOCATE, *OBJ, 3, 0, 9, 0), Before(), Now(), Step.REDO, None),
    (request(Op.COPY, *OBJ, 0, *OTHER, 0, 9, 0), Before(), Now(), Step.REDO, None),
    (request(Op.IOCTL, *OBJ, SETFLAGS, bytes(4)), Before(), Now(), Step.REDO, None),
    (LONG_VALUE, Before(flags=BeforeFlag.DIGEST), Now(), Step.FORGET, None),
    (LONG_VALUE, Before(flags=BeforeFlag.DIGEST), Now(digest=hashlib.sha256(b"w").digest()), Step.FORGET, None),
    (LONG_VALUE, Before(flags=BeforeFlag.DIGEST), Now(digest=hashlib.sha256(b"v").digest()), Step.KEEP, []),
    (request(Op.WRITE, *OBJ, 0, WriteFlag.APPEND, b""), Before(number=5), Now(), Step.UNDO, None),
    (request(Op.WRITES, *OBJ, WriteFlag.APPEND, b""), Before(number=5), Now(), Step.UNDO, None),
    (APPEND, Before(flags=BeforeFlag.BESIDE), Now(size=99), Step.FORGET, None),
    (APPEND, PLACED, Now(size=5), Step.UNDO, None),
    (APPEND, PLACED, Now(size=9), Step.UNDO, None),
    (APPEND, PLACED, Now(size=10), Step.FORGET, None),  # somebody else wrote behind it
]


@pytest.mark.parametrize(("asked", "before", "now", "step", "values"), CASES)
def test_settle(asked: Request, before: Before, now: Now, step: Step, values: list[Any] | None) -> None:
    intent = Intent(before, asked)
    directory = attr(DIR, A_DIR, 2)
    parents = {Op.RENAME: 2, Op.SETXATTR: 0}.get(asked.op, 1)
    now = now._replace(parents=(directory,) * parents)
    assert settle(intent, now) is step
    if values is not None:
        values = [*values, *now.parents]
        assert list(reply_values(intent, now)) == values
        reply = b"".join(pack_reply(asked.op, [], values))
        assert len(pack_record(1, Record(RecordKind.OUTCOME, 1, 1, reply))) <= SHORT, "it must stay in its inode"
