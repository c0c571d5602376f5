"""docs/wire.md says what the code does."""

import re
import struct
from dataclasses import fields
from pathlib import Path

from mxfs_proto import discovery, frames, netlink, ops
from mxfsd import homerole
from mxfsd.core.nlchannel import ChannelConfig
from mxfsd.io import discovery as discovery_io

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "16 bytes": "16s"}


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, without its head."""
    section = PAGE.split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|\n").split("|")] for row in rows[0].splitlines()[2:]]


def test_commands() -> None:
    written = {(int(row[0]), row[1], tuple(row[3].split())) for row in table("### Commands")}
    declared = {
        (int(command), command.name, tuple(a for _, a in spec.fields if a != "RESOURCE"))
        for command, spec in netlink.COMMANDS.items()
    }
    assert written == declared


def test_attributes() -> None:
    written = {
        (int(row[0]), row[1], "".join(CODES[t] for t in re.findall("16 bytes|u\\d+", row[2])))
        for row in table("### Attributes")
    }
    assert written == {(a.number, name, a.format) for name, a in netlink.ATTRIBUTES.items()}


def test_netlink_numbers() -> None:
    assert f"the\ntype in `nlmsghdr` is fixed: {netlink.FAMILY_ID:#06X}".replace("0X", "0x") in PAGE
    assert f"family `{netlink.FAMILY_NAME}`, version {netlink.FAMILY_VERSION}" in PAGE
    assert "Multicast groups: " + ", ".join(f"`{n}` = {i}" for n, i in netlink.GROUPS.items()) in PAGE
    config = ChannelConfig()
    assert f"after {config.ack_delay_ms} ms, or after {config.ack_every} messages" in PAGE
    assert f"at most\n{config.window:,} messages" in PAGE
    assert f"after {config.resend_ms} ms without news" in PAGE


def test_frame_types() -> None:
    rows = table("### Frame types")
    assert {(int(row[0]), row[1]) for row in rows} == {(int(t), t.name) for t in frames.FrameType}
    assert {row[1] for row in rows if row[3] == "JSON"} == {t.name for t in frames.JSON_TYPES}
    layouts = {row[1]: "!" + "".join(CODES[t] for t in re.findall(r"u\d+", row[3])) for row in rows if "u64" in row[3]}
    assert layouts == {"LEASE": frames._LEASE.format, "LEASE_ACK": frames._LEASE_ACK.format}


def test_frame_header() -> None:
    rows = table("## Frames: daemon to daemon, and daemon.sock")
    sizes = [int(row[1]) for row in rows[:-1]]
    assert struct.calcsize("!HBBIQQQ") == sum(sizes) == frames.HEADER.size == int(rows[-1][0])
    assert [int(row[0]) for row in rows] == [sum(sizes[:n]) for n in range(len(rows))]
    assert frames.HEADER.format == "!" + "".join({1: "B", 2: "H", 4: "I", 8: "Q"}[size] for size in sizes)
    assert f"magic {frames.MAGIC:#06X}".replace("0X", "0x") in rows[0][2]
    assert f"at most {frames.MAX_PAYLOAD >> 20} MiB" in rows[3][2]
    assert f"at most {frames.MAX_JSON >> 10} KiB" in PAGE
    assert f"at most {frames.RECLAIM_MAX:,}" in PAGE
    assert f"A reclaim entry has {frames._RECLAIM.size} bytes" in PAGE


def test_lock_records() -> None:
    written = [
        (int(row[0]), row[1], "".join(CODES[t] for t in re.findall(r"u\d+", row[2])), re.findall(r"(\w+) u", row[2]))
        for row in table("### Lock records")
    ]
    assert written == [
        (spec.kind, spec.record.__name__, spec.format, [f.name for f in fields(spec.record)])
        for spec in frames.LOCK_PAYLOADS
    ]


def test_discovery() -> None:
    rows = table("## Discovery")
    sizes = [int(row[1]) for row in rows[:-1]]
    assert [int(row[0]) for row in rows] == [sum(sizes[:n]) for n in range(len(rows))]
    assert sum(sizes) == discovery._FIXED.size
    assert f"UDP, port {discovery_io.PORT}, multicast group {discovery_io.GROUP}" in PAGE
    assert f"(`{discovery.MAGIC.decode()}`, version {discovery.VERSION}, three zeroes)" in PAGE
    assert f"a random nonce of {discovery.NONCE_BYTES} bytes" in PAGE
    assert f"length of the address, at most {discovery.MAX_ADDRESS}" in PAGE


def test_operations() -> None:
    types = {"fid": "QI", "u64": "Q", "u32": "I", "i64": "q", "bytes": "v", "attr": "A"}

    def layout(cell: str) -> str:
        return "".join(types[field.split()[-1]] for field in cell.split(", ") if field)

    written = {(int(row[0]), row[1]): (layout(row[2]), layout(row[3])) for row in table("### Operations")}
    assert written == {(int(op), op.name): ("".join(ops.REQUESTS[op]), "".join(ops.REPLIES[op])) for op in ops.Op}


def test_operation_heads() -> None:
    section = PAGE.split("## Shipped operations", 1)[1].split("### Operations", 1)[0].replace("\n", " ")
    for struct_, said in (
        (ops._REQUEST, "operation u16, flags u16, uid u32, gid u32, ack u64"),
        (ops._REPLY, "errno u32, number of grants u16"),
        (ops._GRANT, "ino u64, mode u8, seq u64"),
    ):
        assert said in section
        assert struct_.format == "!" + "".join(CODES[t] for t in re.findall(r"u\d+", said))
    assert f"flag {int(ops.OpFlag.WANT_LOCK)} (WANT_LOCK)" in section
    assert f"READ and WRITE carry {ops.MAX_DATA >> 20} MiB at most" in section
    page = PAGE.replace("\n", " ")
    said = page.split("Operations that may run twice (", 1)[1].split(")", 1)[0]
    assert set(re.findall("[A-Z_]+", said)) == {op.name for op in homerole._REPEATABLE}
    assert f"flag {int(ops.WriteFlag.APPEND)} appends" in page
    assert f"flag {int(ops.WriteFlag.KILL_PRIV)} takes set-id bits away" in page
    assert f"bit {int(ops.Valid.KILL_PRIV).bit_length() - 1} takes" in page


def test_attributes_of_an_object() -> None:
    rows = table("### Attributes of an object")
    sizes = [int(row[1]) for row in rows]
    assert [int(row[0]) for row in rows] == [sum(sizes[:n]) for n in range(len(rows))]
    codes = {(4, False): "I", (8, False): "Q", (8, True): "q"}
    assert ops._ATTR.format == "!" + "".join(codes[int(row[1]), "signed" in row[2]] for row in rows)
    assert tuple(row[2].split(",")[0] for row in rows) == ops.Attr._fields
