"""The netlink codec: every record both ways, against pyroute2 byte for byte, and whatever a peer may send."""

import struct
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto import netlink as nl
from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.netlink import ATTRIBUTES, COMMANDS, Command, LockFlag, LockMode, NodeState, decode, encode

# The order of a message's attributes, by hand: the test of the computed layouts must not compute them the same way.
ENVELOPE = ["MXFS_ATTR_CHANNEL_SEQ", "MXFS_ATTR_CHANNEL_ACK", "MXFS_ATTR_RESOURCE"]

_u32 = st.integers(0, 2**32 - 1)
_u64 = st.integers(0, 2**64 - 1)
_BY_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(LockMode),
    "flags": st.integers(0, 255).map(LockFlag),
    "state": st.sampled_from(NodeState),
    "resend": st.booleans(),
    "uuid": st.binary(min_size=16, max_size=16),
}
_SIZES = {"B": st.integers(0, 255), "I": _u32, "Q": _u64, "QQI": _u64}


def _records() -> st.SearchStrategy[Any]:
    kinds = []
    for spec in COMMANDS.values():
        attribute = dict(spec.fields)
        kinds.append(
            st.builds(
                spec.record,
                **{
                    f.name: _BY_FIELD[f.name] if f.name in _BY_FIELD else _SIZES[ATTRIBUTES[attribute[f.name]].format]
                    for f in fields(spec.record)
                },
            )
        )
    return st.one_of(kinds)


records = _records()
EXAMPLES = [
    nl.LockReq(7, 0x123456789A, LockMode.EX, LockFlag.OPEN | LockFlag.ALT_UNCACHED, 1, 2),
    nl.LockGrant(7, 131, LockMode.PR, 9, LockFlag.OTHER_OPEN),
    nl.LockDeny(7, 131, 11),
    nl.LockRelease(131, 9, LockMode.NL, 0, 0),
    nl.LockBast(131, 9, LockMode.PR, LockFlag.MAY_KEEP),
    nl.Opens(131, 3, 0, LockFlag.NONE),
    nl.CacheInval(131, 4096, 8192),
    nl.NodeStatus(2, NodeState.SUSPECT, 5, 1, 4000),
    nl.VolumeMount(bytes(range(16)), 4711),
    nl.VolumeUmount(bytes(range(16)), 4711),
    nl.StatusReq(20, 19, True),
    nl.StatusResp(20, 19),
    nl.RecoveryStart(5, 1, 9),
    nl.RecoveryDone(6, 2),
    nl.DaemonReady(4711, 2, 6, 1, bytes(range(16))),
]


def by_pyroute2(record: Any, volume: int, seq: int, ack: int) -> bytes:
    """Encode with pyroute2's own encoder."""
    command, spec = next((c, s) for c, s in COMMANDS.items() if s.record is type(record))
    attrs: list[tuple[str, Any]] = [
        ("MXFS_ATTR_CHANNEL_SEQ", seq),
        ("MXFS_ATTR_CHANNEL_ACK", ack),
        ("MXFS_ATTR_RESOURCE", {"volume": volume, "ino": getattr(record, "ino", 0), "generation": 0}),
    ]
    for name, attribute in spec.fields:
        if attribute != "RESOURCE":
            value = getattr(record, name)
            attrs.append((f"MXFS_ATTR_{attribute}", value if isinstance(value, bytes) else int(value)))
    message = nl.MxfsMessage()
    message["cmd"] = int(command)
    message["version"] = nl.FAMILY_VERSION
    message["header"]["type"] = nl.FAMILY_ID
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data)


def test_there_is_an_example_of_every_command() -> None:
    assert {type(r) for r in EXAMPLES} == {spec.record for spec in COMMANDS.values()}
    assert set(COMMANDS) == set(Command)


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda r: type(r).__name__)
def test_our_bytes_are_pyroute2s(record: Any) -> None:
    ours = encode(record, 0xFEEDFACECAFEBEEF, 77, 66)
    assert ours == by_pyroute2(record, 0xFEEDFACECAFEBEEF, 77, 66)
    read = nl.MxfsMessage(ours)
    read.decode()
    assert read["cmd"] == next(c for c, s in COMMANDS.items() if s.record is type(record))
    assert read.get_attr("MXFS_ATTR_RESOURCE")["volume"] == 0xFEEDFACECAFEBEEF
    assert read.get_attr("MXFS_ATTR_RESOURCE")["ino"] == getattr(record, "ino", 0)
    assert [name for name, _ in read["attrs"]][:3] == ENVELOPE
    for name, attribute in COMMANDS[Command(read["cmd"])].fields:
        if attribute != "RESOURCE":
            assert read.get_attr(f"MXFS_ATTR_{attribute}") == getattr(record, name)


@given(records, _u64, _u64, _u64)
def test_round_trip(record: Any, volume: int, seq: int, ack: int) -> None:
    data = encode(record, volume, seq, ack)
    assert data == by_pyroute2(record, volume, seq, ack)
    assert list(nl.iter_messages(data)) == [nl.Message(record, volume, seq, ack)]
    assert decode(memoryview(data)) == record


@given(records, st.randoms(use_true_random=False))
def test_attributes_in_any_order_and_unknown_ones(record: Any, random: Any) -> None:
    data = encode(record, 3, 4, 5)
    parts, at = [], 20
    while at < len(data):
        size = struct.unpack_from("=H", data, at)[0]
        parts.append(data[at : at + size + -size % 4])
        at += len(parts[-1])
    parts.append(struct.pack("=HH5s3x", 9, 999, b"later"))
    random.shuffle(parts)
    body = b"".join(parts)
    shuffled = struct.pack("=I", 20 + len(body)) + data[4:20] + body
    assert list(nl.iter_messages(shuffled)) == [nl.Message(record, 3, 4, 5)]


def test_several_messages_in_one_datagram() -> None:
    data = b"".join(encode(r, 1, n, 0) for n, r in enumerate(EXAMPLES, 1))
    assert [m.record for m in nl.iter_messages(data)] == EXAMPLES
    with pytest.raises(PeerError, match="15 netlink messages"):
        decode(data)


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda r: type(r).__name__)
def test_truncated_anywhere(record: Any) -> None:
    data = encode(record)
    for cut in range(len(data)):
        with pytest.raises(PeerError):
            decode(data[:cut])
        if cut >= 20:  # the header's length corrected: the attributes are short
            with pytest.raises(PeerError):
                decode(struct.pack("=I", cut) + data[4:cut])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_by_name(data: bytes) -> None:
    if data:
        with pytest.raises(PeerError):
            list(nl.iter_messages(data))


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_changed_byte_gives_a_record_or_a_peer_error(record: Any, data: st.DataObject) -> None:
    raw = bytearray(encode(record, 1, 2, 3))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        messages = list(nl.iter_messages(raw))
    except PeerError:
        return
    assert len(messages) == 1


def _patched(record: Any, offset: int, fmt: str, value: int) -> bytes:
    raw = bytearray(encode(record))
    struct.pack_into(fmt, raw, offset, value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (_patched(EXAMPLES[0], 4, "=H", 16), "family 0x10"),
        (_patched(EXAMPLES[0], 17, "=B", 2), "peer of another version"),
        (_patched(EXAMPLES[0], 16, "=B", 99), "command 99 is unknown"),
        (_patched(EXAMPLES[0], 0, "=I", 8), "message of 8 bytes"),
        (_patched(nl.LockDeny(1, 2, 3), 80 + 2, "=H", 0), "attribute ERRNO is missing"),
        (_patched(nl.LockDeny(1, 2, 3), 80, "=H", 6), "ERRNO has 2 bytes, not 4"),
        (_patched(nl.StatusResp(1, 2), 44 + 4 + 8, "=Q", 5), "STATUS_RESP names inode 5"),
        (encode(EXAMPLES[0])[:-8] + struct.pack("=HHI", 8, 6, 0), "attribute 6 twice"),
        (_patched(nl.LockRelease(1, 2, LockMode.NL, 0, 0), 68 + 12 + 4, "=B", 6), "value is out of range"),
        (_patched(nl.Opens(1, 2, 3, LockFlag.NONE), 68 + 16 + 4, "=I", 512), "value is out of range"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_peer_may_not_send(data: bytes, match: str) -> None:
    with pytest.raises(PeerError, match=match):
        decode(data)


def test_a_record_that_does_not_fit_is_our_mistake() -> None:
    with pytest.raises(MisuseError, match="does not fit"):
        encode(nl.LockDeny(-1, 2, 3))
    with pytest.raises(MisuseError, match="no record"):
        encode("nonsense")  # type: ignore[arg-type]
