"""Shipped operations on the wire: one case table drives encoder and decoder of every operation and reply."""

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto import ops
from mxfs_proto.errors import PeerError
from mxfs_proto.filelocks import LAST, Held, pack_held
from mxfs_proto.ops import Attr, Entry, Grant, Op, OpFlag, Request

TOP = (1 << 64) - 1
ATTR = Attr(2**63, 7, 0o100644, 3, 1000, 100, 0x801, 2**62, 9, 1_700_000_000_123_456_789, -5, 0)
DIR_ATTR = Attr(128, 1, 0o40755, 2, 0, 0, 0, 6, 0, 1, 2, 3)
OBJ = [4711, 3]

CASES: dict[Op, tuple[list[Any], list[Any]]] = {
    Op.LOOKUP: ([*OBJ, b"name"], [ATTR]),
    Op.GETATTR: ([TOP, 0xFFFFFFFF], [ATTR]),
    Op.SETATTR: ([*OBJ, 0x4000003F, 0o4755, 1, 2, TOP, -1, 2**62], [ATTR]),
    Op.READLINK: (OBJ, [b"../target"]),
    Op.MKNOD: ([*OBJ, b"fifo", 0o10600, 0x501], [ATTR, DIR_ATTR]),
    Op.MKDIR: ([*OBJ, b"\xff\xfe", 0o1777], [ATTR, DIR_ATTR]),
    Op.SYMLINK: ([*OBJ, b"link", b"/a/b"], [ATTR, DIR_ATTR]),
    Op.LINK: ([*OBJ, 5, 6, b"second"], [ATTR, DIR_ATTR]),
    Op.UNLINK: ([*OBJ, b"n" * 255, *ops.NO_FID], [9, 1, 9, 1, DIR_ATTR]),
    Op.RMDIR: ([*OBJ, b"dir"], [DIR_ATTR]),
    Op.RENAME: ([*OBJ, b"old", 8, 9, b"new", 1, 10, 11], [1, 2, 3, 4, 5, ops.pack_attr(ATTR), DIR_ATTR, DIR_ATTR]),
    Op.CREATE: ([*OBJ, b"file", 0o644, 0o300], [1, ATTR, DIR_ATTR]),
    Op.READ: ([*OBJ, 1 << 40, 4096], [b"\0" * 4096]),
    Op.WRITE: ([*OBJ, 1 << 40, 3, b"data"], [1 << 40, 4]),
    Op.FSYNC: ([*OBJ, 1], []),
    Op.READDIR: ([*OBJ, b"", 100], [1, ops.pack_entries([Entry(b"a", ATTR)])]),
    Op.STATFS: ([], [4096, 4096, 1, 2, 3, 4, 5, 6, 255]),
    Op.SETXATTR: ([*OBJ, b"user.a", b"", 2], []),
    Op.GETXATTR: ([*OBJ, b"user.a"], [b"value"]),
    Op.LISTXATTR: (OBJ, [b"user.a\0user.b\0"]),
    Op.REMOVEXATTR: ([*OBJ, b"user.a"], []),
    Op.REAP: (OBJ, []),
    Op.SYNC: ([], []),
    Op.WRITES: ([*OBJ, 1, ops.pack_writes([(0, b"one"), (1 << 40, b""), (3, b"two")])], [6]),
    Op.LK_SET: ([5, TOP, 0, LAST, 4711, 1, 0, 7], [1]),
    Op.LK_TEST: ([5, TOP, 10, 19, 4711, 0, 1], [1, 0, LAST, 4712, 64]),
    Op.LK_ADOPT: ([5, pack_held([Held(TOP, 0, LAST, 4711, 1, True)])], []),
    Op.LK_CANCEL: ([5, 7], []),
    Op.FALLOCATE: ([*OBJ, 3, 1 << 40, TOP, 1], []),
    Op.LSEEK: ([*OBJ, TOP, 4], [1 << 40]),
    Op.COPY: ([*OBJ, 1 << 40, 5, 6, 7, TOP, 1], [1 << 24]),
    Op.IOCTL: ([*OBJ, 0x401C5820, b"\1" * 28], [b"\0" * 28]),
    Op.BTIME: (OBJ, [-5]),
    Op.TMPFILE: ([*OBJ, 0o644], [ATTR]),
    Op.LINK_UNNAMED: ([*OBJ, 5, 6, b"second"], [ATTR, DIR_ATTR]),
}
GRANTS = [Grant(4711, 3, (5 << 40) + 1), Grant(TOP, 5, TOP)]


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(Op) == set(ops.REQUESTS) == set(ops.REPLIES)


@pytest.mark.parametrize("op", Op)
def test_request_round_trip(op: Op) -> None:
    values = CASES[op][0]
    payload = b"".join(ops.pack_request(op, OpFlag.WANT_LOCK, 1000, 0xFFFFFFFF, 77, values))
    assert ops.unpack_request(payload) == Request(op, 1, 1000, 0xFFFFFFFF, 77, values)
    assert ops.unpack_request(memoryview(payload)).values == values


@pytest.mark.parametrize("op", Op)
def test_reply_round_trip(op: Op) -> None:
    values = CASES[op][1]
    payload = b"".join(ops.pack_reply(op, GRANTS, values))
    code, grants, got = ops.unpack_reply(op, payload)
    assert (code, grants, got) == (0, GRANTS, values)
    assert [type(value) for value in got] == [type(value) for value in values]


@pytest.mark.parametrize("op", Op)
def test_cut_or_lengthened_is_refused(op: Op) -> None:
    request = b"".join(ops.pack_request(op, 0, 0, 0, 0, CASES[op][0]))
    reply = b"".join(ops.pack_reply(op, GRANTS, CASES[op][1]))
    for size in range(len(request)):
        with pytest.raises(PeerError):
            ops.unpack_request(request[:size])
    for size in range(len(reply)):
        with pytest.raises(PeerError):
            ops.unpack_reply(op, reply[:size])
    with pytest.raises(PeerError, match="1 bytes too many"):
        ops.unpack_request(request + b"\0")
    with pytest.raises(PeerError, match="1 bytes too many"):
        ops.unpack_reply(op, reply + b"\0")


def test_large_data_is_not_copied_into_the_head() -> None:
    data = b"x" * ops.MAX_DATA
    assert ops.pack_request(Op.WRITE, 0, 0, 0, 0, [*OBJ, 0, 0, data])[-1] is data
    assert ops.pack_reply(Op.READ, [], [data])[-1] is data


def test_errors_carry_grants_and_no_values() -> None:
    payload = b"".join(ops.pack_error(errno.ENOENT, GRANTS))
    assert ops.unpack_reply(Op.LOOKUP, payload) == (errno.ENOENT, GRANTS, [])
    with pytest.raises(PeerError, match="too many after an error"):
        ops.unpack_reply(Op.LOOKUP, payload + b"\0")
    for size in range(len(payload)):
        with pytest.raises(PeerError):
            ops.unpack_reply(Op.LOOKUP, payload[:size])


@pytest.mark.parametrize("code", [0, 99, 0xFFFF])
def test_unknown_operation(code: int) -> None:
    payload = b"".join(ops.pack_request(Op.SYNC, 0, 0, 0, 0, []))
    with pytest.raises(PeerError, match=f"unknown operation {code}"):
        ops.unpack_request(code.to_bytes(2, "big") + payload[2:])


@pytest.mark.parametrize("size", [64 << 10, (64 << 10) + 1])
def test_much_data_is_not_copied_out_of_its_frame(size: int) -> None:
    data = b"d" * size
    request = b"".join(ops.pack_request(Op.WRITE, 0, 0, 0, 0, [*OBJ, 0, 0, data]))
    reply = b"".join(ops.pack_reply(Op.READ, [], [data]))
    for found in (ops.unpack_request(request).values[-1], ops.unpack_reply(Op.READ, reply)[2][0]):
        assert found == data
        assert type(found) is (bytes if size == 64 << 10 else memoryview)


def test_names_of_a_long_listing_are_bytes() -> None:
    """A page of entries with long names is longer than any data; names are keys, and a view cannot be one."""
    entries = [ops.Entry(b"%0255d" % number, Attr(*range(12))) for number in range(4096)]
    blob = ops.pack_entries(entries)
    assert len(blob) > ops.MAX_DATA
    frame = memoryview(bytearray(b"".join(ops.pack_reply(Op.READDIR, [], [1, blob])))).toreadonly()  # as it comes
    found = ops.unpack_reply(Op.READDIR, frame)[2][1]
    assert ops.unpack_entries(found) == entries
    assert len({entry.name for entry in ops.unpack_entries(found)}) == 4096


def test_a_length_beyond_the_end_is_refused() -> None:
    payload = bytearray(b"".join(ops.pack_request(Op.LOOKUP, 0, 0, 0, 0, [*OBJ, b"name"])))
    payload[-8:-4] = (0xFFFFFFFF).to_bytes(4, "big")
    with pytest.raises(PeerError, match="exceeds the 4 that came"):
        ops.unpack_request(bytes(payload))


_U64 = st.integers(0, TOP)
_U32 = st.integers(0, 0xFFFFFFFF)
_I64 = st.integers(-(2**63), 2**63 - 1)
_ATTRS = st.builds(Attr, _U64, _U32, _U32, _U32, _U32, _U32, _U64, _I64, _U64, _I64, _I64, _I64)
_FIELDS: dict[str, st.SearchStrategy[Any]] = {"Q": _U64, "I": _U32, "q": _I64, "v": st.binary(max_size=64), "A": _ATTRS}
_GRANTS = st.lists(st.builds(Grant, _U64, st.integers(0, 255), _U64), max_size=3)


@given(st.data(), st.sampled_from(Op), _GRANTS, _U64)
def test_any_values_round_trip(data: st.DataObject, op: Op, grants: list[Grant], ack: int) -> None:
    values = data.draw(st.tuples(*(_FIELDS[field] for field in ops.REQUESTS[op])))
    request = ops.unpack_request(b"".join(ops.pack_request(op, 3, 1, 2, ack, values)))
    assert request == Request(op, 3, 1, 2, ack, list(values))
    values = data.draw(st.tuples(*(_FIELDS[field] for field in ops.REPLIES[op])))
    assert ops.unpack_reply(op, b"".join(ops.pack_reply(op, grants, values))) == (0, grants, list(values))


@given(st.binary(max_size=300), st.sampled_from(Op))
def test_junk_is_decoded_whole_or_refused(junk: bytes, op: Op) -> None:
    for head in (b"", int(op).to_bytes(2, "big")):
        try:
            request = ops.unpack_request(head + junk)
        except PeerError:
            continue
        assert b"".join(ops.pack_request(*request)) == head + junk
    for head in (b"", bytes(6)):
        try:
            code, grants, values = ops.unpack_reply(op, head + junk)
        except PeerError:
            continue
        again = ops.pack_error(code, grants) if code else ops.pack_reply(op, grants, values)
        assert b"".join(again) == head + junk


@given(st.lists(st.builds(Entry, st.binary(max_size=255), _ATTRS), max_size=5))
def test_entries_round_trip_and_no_cut_is_taken(entries: list[Entry]) -> None:
    packed = ops.pack_entries(entries)
    assert ops.unpack_entries(packed) == entries
    ends = {len(ops.pack_entries(entries[:count])) for count in range(len(entries) + 1)}
    for size in range(len(packed)):
        if size in ends:
            assert ops.unpack_entries(packed[:size]) == entries[: sorted(ends).index(size)]
        else:
            with pytest.raises(PeerError, match="cut short"):
                ops.unpack_entries(packed[:size])


def test_a_batch_of_writes_keeps_order_and_refuses_what_is_cut() -> None:
    pieces = [(5, b"abc"), (0, b""), (1 << 62, b"x" * 300)]
    blob = ops.pack_writes(pieces)
    assert [(offset, bytes(data)) for offset, data in ops.unpack_writes(blob)] == pieces
    ends = {0}
    for _offset, data in pieces:
        ends.add(max(ends) + ops.PIECE_BYTES + len(data))
    for size in range(len(blob)):
        if size in ends:
            assert len(ops.unpack_writes(blob[:size])) < len(pieces)
        else:
            with pytest.raises(PeerError):
                ops.unpack_writes(blob[:size])
