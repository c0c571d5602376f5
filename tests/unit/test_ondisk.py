"""The disk records: round trip, damage, foreign records, and the tables in docs/ondisk.md."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto import ondisk
from mxfs_proto.errors import MediaError, MisuseError
from mxfs_proto.ondisk import (
    Address,
    ForeignRecord,
    HeaderRecord,
    Kind,
    LeaseRecord,
    LeaseState,
    OtherVersion,
    SlotRecord,
    SlotState,
    TornRecord,
    WrongVolume,
)
from mxfs_proto.xfs_sb import NotXfs, XfsSuper

DOC = Path(__file__).parents[2] / "docs" / "ondisk.md"
VOLUME = bytes(range(16))
OTHER = bytes(range(1, 17))

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
uuids = st.binary(min_size=16, max_size=16)
addresses = st.builds(Address, st.ip_addresses().map(str), st.integers(0, 65535))
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=64).filter(
    lambda text: len(text.encode()) <= 64
)
slots = st.builds(
    SlotRecord,
    st.integers(1, 64),
    st.sampled_from(SlotState),
    uuids,
    names,
    u64,
    u64,
    u64,
    u64,
    u64,
    u32,
    u32,
    u32,
    st.booleans(),
    st.lists(addresses, max_size=4).map(tuple),
)
leases = st.builds(
    LeaseRecord,
    u64,
    u64,
    st.sampled_from([LeaseState.HELD, LeaseState.MOVING]),
    st.integers(1, 64),
    uuids,
    u64,
    st.integers(0, 64),
    u64,
    u64,
)

HEADER = HeaderRecord(VOLUME, bytes(range(32)), "data", 1 << 30, 1 << 29, 16 << 20, 1 << 29, 1_700_000_000)
SLOT = SlotRecord(3, SlotState.ACTIVE, OTHER, "n3", 4, 5, 6, 7, 8, 9, 10, 11, True, (Address("::1", 4711),))
LEASE = LeaseRecord(9, 4, LeaseState.HELD, 3, OTHER, 4, 0, 8, 77)


@given(slots)
def test_slot_round_trip(slot: SlotRecord) -> None:
    data = slot.encode(VOLUME)
    assert len(data) == 4096
    assert SlotRecord.decode(data, VOLUME, slot.slot) == slot


@given(leases)
def test_lease_round_trip(lease: LeaseRecord) -> None:
    assert LeaseRecord.decode(lease.encode(VOLUME), VOLUME) == lease


@pytest.mark.parametrize("copy", [0, 1])
def test_header_round_trip(copy: int) -> None:
    assert HeaderRecord.decode(HEADER.encode(copy)) == HEADER


def test_key_is_not_in_the_repr() -> None:
    assert bytes(range(32)).hex() not in repr(HEADER)
    assert "cluster_key" not in repr(HEADER)


@given(st.integers(0, 4096 * 8 - 1))
def test_every_flipped_bit_is_found(bit: int) -> None:
    """Padding included: the checksums cover the whole record."""
    for data, decode in (
        (SLOT.encode(VOLUME), lambda raw: SlotRecord.decode(raw, VOLUME, 3)),
        (LEASE.encode(VOLUME), lambda raw: LeaseRecord.decode(raw, VOLUME)),
        (HEADER.encode(0), HeaderRecord.decode),
    ):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MediaError):
            decode(bytes(broken))


@given(st.integers(0, 4095))
def test_truncated(length: int) -> None:
    with pytest.raises(TornRecord):
        SlotRecord.decode(SLOT.encode(VOLUME)[:length], VOLUME, 3)


def test_trailing_data() -> None:
    with pytest.raises(TornRecord):
        SlotRecord.decode(SLOT.encode(VOLUME) + b"\0", VOLUME, 3)


@pytest.mark.parametrize("layout", [ondisk.HEADER, ondisk.LEASE, ondisk.SLOT], ids=lambda layout: layout.name)
def test_records_fit_into_one_sector(layout: ondisk.Layout) -> None:
    """Devices write 512 bytes at once or not at all, so that a torn record is rare even after a power failure."""
    assert ondisk.ENVELOPE.size + layout.size <= 512


@given(st.binary(max_size=600))
def test_noise_is_no_record(data: bytes) -> None:
    with pytest.raises(MediaError):
        LeaseRecord.decode(data.ljust(4096, b"\0"), VOLUME)


@given(st.integers(0, 511))
def test_tear_inside_the_first_sector(cut: int) -> None:
    """Some targets tear at any byte."""
    old, new = LEASE.encode(VOLUME), replace(LEASE, sequence=10, renewals=9, nonce=2**60).encode(VOLUME)
    torn = new[:cut] + old[cut:]
    if torn not in (old, new):
        with pytest.raises(TornRecord):
            LeaseRecord.decode(torn, VOLUME)


def test_wrong_volume() -> None:
    with pytest.raises(WrongVolume):
        SlotRecord.decode(SLOT.encode(OTHER), VOLUME, 3)


def test_wrong_place() -> None:
    with pytest.raises(ForeignRecord, match="slot 3 found in the place of slot 4"):
        SlotRecord.decode(SLOT.encode(VOLUME), VOLUME, 4)


def test_wrong_kind() -> None:
    with pytest.raises(ForeignRecord):
        LeaseRecord.decode(SLOT.encode(VOLUME), VOLUME)


def test_other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondisk, "VERSION", 2)
    data = LEASE.encode(VOLUME)
    monkeypatch.undo()
    with pytest.raises(OtherVersion, match="version 2"):
        LeaseRecord.decode(data, VOLUME)


def test_sealed_nonsense_is_refused() -> None:
    """A good checksum over impossible values is still no record."""
    body = bytearray(ondisk.LEASE.size)
    for offset, value in ((52, 9), (48, 65)):
        bad = bytearray(body)
        bad[offset] = value
        with pytest.raises(ForeignRecord):
            LeaseRecord.decode(ondisk.seal(Kind.LEASE, VOLUME, 1, bytes(bad)), VOLUME)
    with pytest.raises(ForeignRecord):
        SlotRecord.decode(ondisk.seal(Kind.SLOT, VOLUME, 0, bytes(ondisk.SLOT.size)), VOLUME, 1)
    header = HeaderRecord(VOLUME, bytes(32), "", 0, 4096, 1 << 20, 8192, 0)
    with pytest.raises(ForeignRecord, match="contradict"):
        HeaderRecord.decode(header.encode(0))


@pytest.mark.parametrize(
    "slot",
    [
        replace(SLOT, slot=0),
        replace(SLOT, slot=65),
        replace(SLOT, name="x" * 65),
        replace(SLOT, name="a\0b"),
        replace(SLOT, addresses=(Address("::1", 1),) * 5),
        replace(SLOT, addresses=(Address("somehost", 1),)),
        replace(SLOT, addresses=(Address("::1", 65536),)),
        replace(SLOT, node_uuid=b"short"),
    ],
)
def test_misuse(slot: SlotRecord) -> None:
    with pytest.raises(MisuseError):
        slot.encode(VOLUME)


def test_epoch_counts_more_than_sequence() -> None:
    assert LeaseRecord(sequence=5, epoch=3).order > LeaseRecord(sequence=900, epoch=2).order


def test_volume_id_is_fnv_1a() -> None:
    """Test vectors of the FNV-1a page (isthe.com/chongo/tech/comp/fnv): "" and "foobar"."""
    assert ondisk.volume_id(b"") == 0xCBF29CE484222325
    assert ondisk.volume_id(b"foobar") == 0x85944171F73967E8


def test_uuid_text() -> None:
    text = ondisk.format_uuid(VOLUME)
    assert text == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert ondisk.parse_uuid(text) == VOLUME
    for bad in ("", "xyz", text + "00"):
        with pytest.raises(MisuseError):
            ondisk.parse_uuid(bad)


def test_xfs_superblock() -> None:
    data = bytearray(4096)
    data[0:4] = b"XFSB"
    data[4:8] = (4096).to_bytes(4, "big")
    data[8:16] = (1000).to_bytes(8, "big")
    data[32:48] = VOLUME
    data[108:112] = b"data"
    assert XfsSuper.decode(bytes(data)) == XfsSuper(4_096_000, VOLUME, "data")
    for raw in (b"", bytes(4096), bytes(data[:100]), bytes(data[:4]) + b"\0\0\0\x07" + bytes(data[8:])):
        with pytest.raises(NotXfs):
            XfsSuper.decode(raw)


@pytest.mark.parametrize("layout", ondisk.LAYOUTS, ids=lambda layout: layout.name)
def test_tables_in_the_document(layout: ondisk.Layout) -> None:
    text = DOC.read_text()
    section = text.split(f"## {layout.name.capitalize()}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert rows == layout.rows()


def test_places_in_the_document() -> None:
    text = DOC.read_text()
    for number, what in (
        (str(ondisk.HEADER_RECORD), "header, first copy"),
        (f"{ondisk.LEASE_RECORDS[0]}, {ondisk.LEASE_RECORDS[1]}", "home lease"),
        (f"{ondisk.SLOT_RECORD} to {ondisk.FIXED_RECORDS - 1}", "slots 1 to 64"),
    ):
        assert f"| {number} | {what}" in text
