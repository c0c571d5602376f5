"""Bytes of persistent reservations: commands, parameter data, sense data, keys. Layouts as in SPC-4 and SBC-3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError
from mxfsd.pr import keys as pr_keys
from mxfsd.pr import spc
from mxfsd.pr.errors import BadReply
from mxfsd.pr.sense import NOTHING, Sense, SenseKey, decode_sense
from mxfsd.pr.spc import (
    Capabilities,
    FullStatus,
    Held,
    InAction,
    Keys,
    NeedMore,
    OutAction,
    PrOut,
    PrType,
    Registrant,
    ReservationData,
)

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
ROOM = 60_000


# --- commands ---


def test_persistent_reserve_in() -> None:
    assert spc.pr_in(InAction.READ_KEYS, 0x1234) == bytes.fromhex("5e00 0000000000 1234 00")
    assert spc.pr_in(InAction.READ_FULL_STATUS, 8) == bytes.fromhex("5e03 0000000000 0008 00")
    for length in (0, 65536):
        with pytest.raises(MisuseError):
            spc.pr_in(InAction.READ_KEYS, length)


def test_persistent_reserve_out() -> None:
    """The register with APTPL and the preempt that sg_persist sends, byte for byte."""
    cdb, parameters = PrOut(OutAction.REGISTER, 0, 0x123ABC, aptpl=True).encode()
    assert cdb == bytes.fromhex("5f 00 00 0000 00000018 00")
    assert parameters == bytes.fromhex("0000000000000000 0000000000123abc 00000000 01 00 0000")
    cdb, parameters = PrOut(OutAction.PREEMPT_AND_ABORT, 0xA, 0xB, 8).encode()
    assert cdb == bytes.fromhex("5f 05 08 0000 00000018 00")
    assert parameters == bytes.fromhex("000000000000000a 000000000000000b 00000000 00 00 0000")


@given(st.sampled_from(OutAction), u64, u64, st.integers(0, 15), st.booleans())
def test_persistent_reserve_out_round_trip(action: OutAction, key: int, other: int, kind: int, aptpl: bool) -> None:
    command = PrOut(action, key, other, kind, aptpl)
    assert PrOut.decode(*command.encode()) == command


@pytest.mark.parametrize("bad", [PrOut(OutAction.REGISTER, 1 << 64), PrOut(OutAction.RESERVE, 1, type=16)])
def test_values_that_do_not_fit(bad: PrOut) -> None:
    with pytest.raises(MisuseError):
        bad.encode()


def test_block_commands() -> None:
    assert spc.read16(0x0102030405060708, 3) == bytes.fromhex("88 00 0102030405060708 00000003 00 00")
    assert spc.write16(5, 1) == bytes.fromhex("8a 00 0000000000000005 00000001 00 00")
    assert spc.compare_and_write(5, 2) == bytes.fromhex("89 00 0000000000000005 000000 02 00 00")
    assert spc.read_capacity16() == bytes.fromhex("9e 10 0000000000000000 00000020 00 00")
    assert spc.decode_capacity16(bytes.fromhex("0000000000007fff 00000200") + bytes(20)) == (0x8000, 512)
    for data in (bytes(31), bytes(32), bytes.fromhex("0000000000007fff 00000201") + bytes(20)):
        with pytest.raises(BadReply):
            spc.decode_capacity16(data)
    for count in (0, 256):
        with pytest.raises(MisuseError):
            spc.compare_and_write(0, count)


# --- parameter data ---


@given(u32, st.lists(u64, max_size=200).map(tuple))
def test_keys(generation: int, keys: tuple[int, ...]) -> None:
    answer = Keys(generation, keys)
    data = answer.encode()
    assert data[:8] == generation.to_bytes(4) + (8 * len(keys)).to_bytes(4)
    assert Keys.decode(data, ROOM) == answer
    assert Keys.decode(data + b"rest", ROOM) == answer


@given(st.integers(0, 23))
def test_keys_that_did_not_fit_are_asked_for_again(asked: int) -> None:
    """Never a shorter list: a key that was not seen must not count as absent."""
    data = Keys(1, (10, 11)).encode()
    with pytest.raises((NeedMore, BadReply)) as caught:
        Keys.decode(data[:asked], asked)
    assert asked < 8 or (isinstance(caught.value, NeedMore) and caught.value.length == 24)


@given(st.integers(0, 23))
def test_keys_cut_off(length: int) -> None:
    with pytest.raises(BadReply):
        Keys.decode(Keys(1, (10, 11)).encode()[:length], ROOM)


def test_keys_that_are_no_whole_ones() -> None:
    with pytest.raises(BadReply, match="no whole keys"):
        Keys.decode(bytes.fromhex("00000001 00000009") + bytes(9), ROOM)


@given(u32, st.none() | st.tuples(u64, st.integers(0, 15)))
def test_reservation(generation: int, held: tuple[int, int] | None) -> None:
    answer = ReservationData(generation, None if held is None else Held(generation, *held))
    assert ReservationData.decode(answer.encode(), ROOM) == answer


def test_reservation_bytes() -> None:
    data = bytes.fromhex("00000004 00000010 000000000000000a 00000000 00 08 0000")
    held = ReservationData.decode(data, ROOM).held
    assert held == Held(4, 10, PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS)
    assert held.ours
    assert not Held(4, 10, PrType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY).ours
    for length in range(len(data)):
        with pytest.raises(BadReply):
            ReservationData.decode(data[:length], ROOM)
    with pytest.raises(BadReply):
        ReservationData.decode(bytes.fromhex("00000004 00000008") + bytes(8), ROOM)


@given(st.booleans(), st.booleans(), st.none() | st.frozensets(st.sampled_from(list(PrType))))
def test_capabilities(capable: bool, active: bool, types: frozenset[int] | None) -> None:
    answer = Capabilities(capable, active, types)
    assert Capabilities.decode(answer.encode()) == answer


def test_capabilities_bytes() -> None:
    """As LIO answers: all types, APTPL possible and in force."""
    answer = Capabilities.decode(bytes.fromhex("0008 15 81 ea01 0000"))
    assert answer == Capabilities(True, True, frozenset(PrType))
    for data in (bytes(7), bytes.fromhex("0004 15 81 ea01 0000")):
        with pytest.raises(BadReply):
            Capabilities.decode(data)


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200)
registrants = st.builds(
    lambda key, holder, port, name: Registrant(key, holder, 8 if holder else 0, port, name),
    u64,
    st.booleans(),
    st.integers(0, 65535),
    names,
)


@given(u32, st.lists(registrants, max_size=20).map(tuple))
def test_full_status(generation: int, found: tuple[Registrant, ...]) -> None:
    body = b"".join(map(spc.encode_registrant, found))
    data = generation.to_bytes(4) + len(body).to_bytes(4) + body
    assert FullStatus.decode(data, ROOM) == FullStatus(generation, found)


def test_full_status_cut_off() -> None:
    body = spc.encode_registrant(Registrant(5, True, 8, 1, "iqn.2026-11.net.mxfs:a"))
    for length in range(1, len(body)):
        with pytest.raises(BadReply):
            FullStatus.decode(bytes(4) + length.to_bytes(4) + body[:length], ROOM)


def test_transport_names() -> None:
    assert (
        spc.transport_name(bytes.fromhex("00000000 00000000 50014380231c0bd2 0000000000000000")) == "50014380231c0bd2"
    )
    assert spc.transport_name(bytes.fromhex("06000000 5000c50012345678") + bytes(12)) == "5000c50012345678"
    assert spc.transport_name(bytes.fromhex("45000014") + b"iqn.x:a,i,0x1\0\0\0") == "iqn.x:a,i,0x1"
    assert spc.transport_name(bytes.fromhex("05000008") + b"a\x1b[2Jb\0\0") == "a?[2Jb"
    assert spc.transport_name(b"\x05") == ""


@given(st.binary(max_size=200), st.integers(0, ROOM))
def test_garbage_never_crashes(data: bytes, asked: int) -> None:
    for decode in (Keys.decode, ReservationData.decode, FullStatus.decode):
        try:
            decode(data, asked)
        except (NeedMore, BadReply):
            continue
    try:
        Capabilities.decode(data)
    except BadReply:
        pass
    spc.transport_name(data)


# --- sense data ---

FIXED = bytes.fromhex("70 00 05 00000000 0a 00000000 24 00 00 0000 00")
DESCRIPTOR = bytes.fromhex("72 06 2a 05 00000000")


def test_sense() -> None:
    assert decode_sense(FIXED) == Sense(SenseKey.ILLEGAL_REQUEST, 0x24, 0)
    assert str(decode_sense(FIXED)) == "ILLEGAL REQUEST 5/2400 (invalid field in CDB)"
    assert decode_sense(FIXED).refused
    assert decode_sense(DESCRIPTOR) == Sense(SenseKey.UNIT_ATTENTION, 0x2A, 5)
    assert str(decode_sense(DESCRIPTOR)) == "UNIT ATTENTION 6/2a05 (registrations preempted)"
    assert not decode_sense(DESCRIPTOR).refused
    assert decode_sense(b"\xf1" + FIXED[1:]).key is SenseKey.ILLEGAL_REQUEST  # deferred, with the valid bit
    assert str(Sense(SenseKey.HARDWARE_ERROR, 0x99, 1)) == "HARDWARE ERROR 4/9901"


def test_sense_that_says_it_is_shorter_is_not_read_further() -> None:
    assert decode_sense(FIXED[:7] + b"\x04" + FIXED[8:]) == Sense(SenseKey.ILLEGAL_REQUEST, 0, 0)


@pytest.mark.parametrize("whole", [FIXED, DESCRIPTOR])
def test_sense_cut_off(whole: bytes) -> None:
    for length in range(len(whole)):
        assert decode_sense(whole[:length]).key in (SenseKey.NO_SENSE, decode_sense(whole).key)


@given(st.binary(max_size=40))
def test_any_sense(data: bytes) -> None:
    assert str(decode_sense(data))


def test_no_sense() -> None:
    assert decode_sense(b"") == decode_sense(b"\x7f" + bytes(17)) == NOTHING


# --- keys ---


@given(st.integers(1, 64), st.integers(1, 2**40 - 1))
def test_key(slot: int, random: int) -> None:
    key = pr_keys.make_key(slot, random)
    assert pr_keys.slot_of(key) == slot
    assert key & (1 << 40) - 1 == random
    assert pr_keys.key_text(key) == f"0x4d58{slot:02x}{random:010x}"


@pytest.mark.parametrize(("slot", "random"), [(0, 1), (65, 1), (1, 0), (1, 1 << 40)])
def test_bad_key(slot: int, random: int) -> None:
    with pytest.raises(MisuseError):
        pr_keys.make_key(slot, random)


@pytest.mark.parametrize("key", [0, 0xA, 0x4D58_00_0000000001, 0x4D58_41_0000000001, 0x4D58_01_0000000000, 1 << 63])
def test_keys_of_others(key: int) -> None:
    assert pr_keys.slot_of(key) is None
