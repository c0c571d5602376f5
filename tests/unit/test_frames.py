"""Frames: round trips, every way to cut the stream, and everything a peer may do wrong."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto import frames as fr
from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.frames import Frame, FrameDecoder, FrameType, encode_header
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.netlink import COMMANDS
from mxfs_proto.records import CacheInval, LockBast, LockDeny, LockGrant, LockRelease, LockReq, Opens

_u32 = st.integers(0, 2**32 - 1)
_u64 = st.integers(0, 2**64 - 1)
some_frames = st.lists(
    st.builds(Frame, st.sampled_from(FrameType), _u64, _u64, _u64, st.binary(max_size=9000)), max_size=6
)


def stream(frames: list[Frame]) -> bytes:
    return b"".join(encode_header(f.type, len(f.payload), f.epoch, f.session, f.seq) + f.payload for f in frames)


def cut(data: bytes, where: list[int]) -> list[bytes]:
    edges = [0, *sorted(w % (len(data) + 1) for w in where), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def test_the_bytes_of_a_header() -> None:
    assert encode_header(FrameType.PING, 3, 1, 2, 0x0102030405060708) == bytes.fromhex(
        "4d58 01 14 00000003 0000000000000001 0000000000000002 0102030405060708"
    )


@given(some_frames, st.lists(st.integers(0, 60000), max_size=8), st.sampled_from([bytes, bytearray, memoryview]))
def test_round_trip_however_the_stream_is_cut(frames: list[Frame], where: list[int], kind: Any) -> None:
    decoder, got = FrameDecoder(), []
    for chunk in cut(stream(frames), where):
        got += decoder.feed(kind(chunk))
    assert got == frames
    assert decoder.idle


def test_byte_at_a_time() -> None:
    frames = [Frame(FrameType.OP_REQ, 1, 2, 3, b"abc"), Frame(FrameType.PING, 1, 0, 9, b"")]
    decoder, got = FrameDecoder(), []
    data = stream(frames)
    for i in range(len(data)):
        got += decoder.feed(data[i : i + 1])
        assert decoder.idle == (i + 1 in (35, 67))
    assert got == frames


def test_trailing_data_begins_the_next_frame() -> None:
    decoder = FrameDecoder()
    data = stream([Frame(FrameType.PING, 0, 0, 1, b"x")])
    assert len(decoder.feed(data + data[:10])) == 1
    assert not decoder.idle
    assert len(decoder.feed(data[10:])) == 1


def test_payloads_outlive_a_reused_buffer() -> None:
    payload = bytes(range(256)) * 40
    buffer = bytearray(stream([Frame(FrameType.OP_REPLY, 1, 2, 3, payload)]))
    frame = FrameDecoder().feed(memoryview(buffer))[0]
    buffer[:] = bytes(len(buffer))
    assert frame.payload == payload


def test_a_large_payload_of_a_bytes_chunk_is_not_copied() -> None:
    data = stream([Frame(FrameType.OP_REPLY, 1, 2, 3, bytes(100_000))])
    payload = FrameDecoder().feed(data)[0].payload
    assert isinstance(payload, memoryview) and payload.obj is data


def test_the_rest_of_a_payload_is_received_in_place() -> None:
    payload = bytes(range(250)) * 400
    data = stream([Frame(FrameType.OP_REQ, 1, 2, 3, payload)])
    decoder = FrameDecoder()
    assert decoder.tail() is None
    assert decoder.feed(data[:50]) == []
    tail = decoder.tail()
    assert tail is not None and len(tail) == len(data) - 50
    tail[:1000] = data[50:1050]
    assert decoder.filled(1000) is None
    tail = decoder.tail()
    assert tail is not None
    tail[:] = data[1050:]
    frame = decoder.filled(len(tail))
    assert frame == Frame(FrameType.OP_REQ, 1, 2, 3, payload)
    assert decoder.idle and decoder.tail() is None
    assert frame is not None and isinstance(frame.payload, memoryview) and frame.payload.readonly
    with pytest.raises(MisuseError):
        decoder.filled(1)


def bad(offset: int, fmt: str, value: int) -> bytes:
    raw = bytearray(stream([Frame(FrameType.PING, 0, 0, 0, b"")]))
    struct.pack_into(fmt, raw, offset, value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (bad(0, "!H", 0x1603), "starts with 0x1603"),
        (bad(2, "!B", 2), "a peer of another version: it speaks 2, we speak 1"),
        (bad(3, "!B", 0), "frame type 0 is unknown"),
        (bad(3, "!B", 200), "frame type 200 is unknown"),
        (bad(4, "!I", fr.MAX_PAYLOAD + 1), "more than the cap"),
    ],
)
@pytest.mark.parametrize("step", [1, 31, 64])
def test_a_bad_header_is_named_and_the_decoder_stays_broken(data: bytes, match: str, step: int) -> None:
    decoder = FrameDecoder()
    with pytest.raises(PeerError, match=match):
        for i in range(0, len(data), step):
            decoder.feed(data[i : i + step])
    with pytest.raises(PeerError, match=match):
        decoder.feed(stream([Frame(FrameType.PING, 0, 0, 0, b"")]))


def test_garbage_after_a_good_frame() -> None:
    good = stream([Frame(FrameType.PING, 0, 0, 0, b"")])
    decoder = FrameDecoder()
    assert len(decoder.feed(good)) == 1
    with pytest.raises(PeerError):
        decoder.feed(b"garbage" * 10)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_arbitrary_bytes_never_do_more_than_raise_peer_error(data: bytes, where: list[int]) -> None:
    decoder = FrameDecoder()
    try:
        for chunk in cut(data, where):
            decoder.feed(chunk)
    except PeerError:
        return
    # Not refused: what there is may still become a header.
    assert len(data) < 32 or data[:3] == b"MX\x01"


def test_the_largest_payload_passes_and_one_more_byte_is_our_mistake() -> None:
    data = encode_header(FrameType.OP_REQ, fr.MAX_PAYLOAD) + bytes(fr.MAX_PAYLOAD)
    assert len(FrameDecoder().feed(data)[0].payload) == fr.MAX_PAYLOAD
    with pytest.raises(MisuseError):
        encode_header(FrameType.OP_REQ, fr.MAX_PAYLOAD + 1)
    with pytest.raises(MisuseError):
        encode_header(FrameType.OP_REQ, 0, -1)


def test_json_payloads() -> None:
    assert fr.unpack_json(fr.pack_json({"b": 1, "a": ["ä"]})) == {"a": ["ä"], "b": 1}
    assert fr.unpack_json(memoryview(b'{"a":1}')) == {"a": 1}
    for wrong in (b"", b"[1]", b"\xff", b"{", b"[" * 100_000, b" " * (fr.MAX_JSON + 1)):
        with pytest.raises(PeerError):
            fr.unpack_json(wrong)
    with pytest.raises(MisuseError):
        fr.pack_json({"a": "x" * fr.MAX_JSON})
    with pytest.raises(MisuseError):
        fr.pack_json({"a": float("nan")})
    with pytest.raises(MisuseError):
        fr.pack_json({"a": object()})


@given(st.binary(max_size=100))
def test_json_of_arbitrary_bytes(data: bytes) -> None:
    try:
        assert isinstance(fr.unpack_json(data), dict)
    except PeerError:
        pass


_mode = st.sampled_from(LockMode)
_flags = st.integers(0, 255).map(LockFlag)
lock_records = st.one_of(
    st.builds(LockReq, _u64, _u64, _mode, _flags, _u32, _u32),
    st.builds(LockGrant, _u64, _u64, _mode, _u64, _flags),
    st.builds(LockDeny, _u64, _u64, _u32),
    st.builds(LockRelease, _u64, _u64, _mode, _u32, _u32),
    st.builds(LockBast, _u64, _u64, _mode, _flags),
    st.builds(CacheInval, _u64, _u64, _u64),
    st.builds(Opens, _u64, _u32, _u32, _flags),
)


@given(lock_records)
def test_lock_records_round_trip_and_truncated(record: Any) -> None:
    data = fr.pack_lock(record)
    got = fr.unpack_lock(memoryview(data))
    assert got == record and type(got) is type(record)
    for size in range(len(data)):
        with pytest.raises(PeerError):
            fr.unpack_lock(data[:size])
    with pytest.raises(PeerError):
        fr.unpack_lock(data + b"\0")


def test_the_bytes_of_a_lock_record() -> None:
    record = LockReq(1, 2, LockMode.EX, LockFlag.OPEN, 3, 4)
    assert fr.pack_lock(record) == bytes.fromhex("01 0000000000000001 0000000000000002 05 00000002 00000003 00000004")


def test_lock_kinds_are_the_numbers_of_the_netlink_commands() -> None:
    by_record = {spec.record: int(command) for command, spec in COMMANDS.items()}
    assert {spec.record: spec.kind for spec in fr.LOCK_PAYLOADS} == {
        spec.record: by_record[spec.record] for spec in fr.LOCK_PAYLOADS
    }


@given(st.binary(max_size=40))
def test_lock_records_of_arbitrary_bytes(data: bytes) -> None:
    try:
        record = fr.unpack_lock(data)
    except PeerError:
        return
    assert fr.pack_lock(record) == data


def test_lock_values_out_of_range() -> None:
    raw = bytearray(fr.pack_lock(LockRelease(1, 2, LockMode.NL, 0, 0)))
    raw[17] = 6
    with pytest.raises(PeerError, match="out of range"):
        fr.unpack_lock(raw)
    with pytest.raises(MisuseError):
        fr.pack_lock(LockDeny(-1, 2, 3))
    with pytest.raises(MisuseError):
        fr.pack_lock(7)  # type: ignore[arg-type]


@given(st.lists(st.builds(fr.ReclaimEntry, _u64, _u32, _mode, _u32, _u32), max_size=20))
def test_reclaim_round_trip_and_truncated(entries: list[fr.ReclaimEntry]) -> None:
    data = fr.pack_reclaim(entries)
    assert len(data) == 21 * len(entries)
    assert fr.unpack_reclaim(data) == entries
    if data:
        with pytest.raises(PeerError):
            fr.unpack_reclaim(data[:-1])


def test_reclaim_caps_and_modes() -> None:
    entry = fr.ReclaimEntry(1, 2, LockMode.PR, 1, 0)
    full = fr.pack_reclaim([entry] * fr.RECLAIM_MAX)
    assert len(full) <= fr.MAX_PAYLOAD
    assert len(fr.unpack_reclaim(full)) == fr.RECLAIM_MAX
    with pytest.raises(MisuseError):
        fr.pack_reclaim([entry] * (fr.RECLAIM_MAX + 1))
    with pytest.raises(PeerError):
        fr.unpack_reclaim(full + fr.pack_reclaim([entry]))
    with pytest.raises(PeerError, match="unknown mode"):
        fr.unpack_reclaim(bytes(12) + b"\x06" + bytes(8))


@given(st.integers(0, 2**32 - 1), _u64)
def test_leases(lease_ms: int, stamp_ms: int) -> None:
    assert fr.unpack_lease(fr.pack_lease(stamp_ms)) == stamp_ms
    ack = fr.LeaseAck(lease_ms, stamp_ms)
    assert fr.unpack_lease_ack(fr.pack_lease_ack(ack)) == ack
    for wrong in (b"", fr.pack_lease(stamp_ms)[:-1], fr.pack_lease(stamp_ms) + b"\0"):
        with pytest.raises(PeerError, match="LEASE frame"):
            fr.unpack_lease(wrong)
    for wrong in (b"", fr.pack_lease_ack(ack)[:-1], fr.pack_lease_ack(ack) + b"\0"):
        with pytest.raises(PeerError, match="LEASE_ACK frame"):
            fr.unpack_lease_ack(wrong)
