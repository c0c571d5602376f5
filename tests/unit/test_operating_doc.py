"""docs/operating.md explains every warning and error that the code can log, and says what versions really say."""

import ast
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxfs_proto import frames, netlink
from mxfs_proto.errors import MxfsError
from mxfs_proto.ondisk import HeaderRecord
from mxfsd.cli import fsck
from mxfsd.fencing import LeaseFencing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operating.md").read_text()
LEVELS = {"warning": "warning", "error": "error", "exception": "error", "critical": "error"}
NO_CONSTANT = {"self.fencing.warning", "record.levelno"}
"""What is logged under a text that is made elsewhere: that of a fencing agent, and the records of Python's logging."""


def logged() -> Iterator[tuple[str, str, str]]:
    """Each call that logs a warning or an error: its event (an expression, if it is no text), level and place."""
    for folder in ("mxfsd", "mxfs_fuse"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if "log" not in ast.unparse(node.func.value).lower() or node.func.attr not in (*LEVELS, "log"):
                    continue
                event = node.args[0]
                text = event.value if isinstance(event, ast.Constant) else ast.unparse(event)
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield str(text), LEVELS.get(node.func.attr, "any"), where


def explained() -> list[tuple[str, str]]:
    """Event and level of each row in the tables about the log."""
    section = PAGE.split("\n## The log\n", 1)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert all(len(row) == 4 for row in rows)
    return [(row[0], row[1]) for row in rows if row[0] not in ("event", "---")]


def test_every_warning_and_error_is_explained() -> None:
    known = set(explained())
    calls = list(logged())
    assert len(calls) > 70  # the search finds what there is
    missing = [call for call in calls if call[0] not in NO_CONSTANT and call[:2] not in known]
    assert missing == []


def test_nothing_is_explained_that_is_never_logged() -> None:
    real = {call[:2] for call in logged()} | {("fencing by deadlines only (…)", "warning")}
    rows = explained()
    assert [row for row in rows if row not in real] == []
    assert len(rows) == len(set(rows))
    assert {text for text, _, _ in logged()} >= NO_CONSTANT


def test_the_warning_of_an_agent() -> None:
    assert LeaseFencing("a reason").warning.startswith("fencing by deadlines only (a reason)")


def other_header() -> None:
    data = bytearray(HeaderRecord(b"v" * 16, b"k" * 32, "", 1 << 30, 1 << 29, 1 << 29, 1 << 28, 1).encode(0))
    data[8:10] = (2).to_bytes(2, "little")
    data[44:48] = zlib.crc32(data[:44]).to_bytes(4, "little")
    HeaderRecord.decode(bytes(data))


def other_frame() -> None:
    data = bytearray(frames.encode_header(frames.FrameType.HELLO, 2) + b"{}")
    data[2] = 2
    frames.FrameDecoder().feed(bytes(data))


@pytest.mark.parametrize("provoke", [other_header, other_frame])
def test_what_another_version_says(provoke: Callable[[], None]) -> None:
    with pytest.raises(MxfsError) as caught:
        provoke()
    assert f"`{caught.value}`" in PAGE


def test_what_another_version_says_on_the_node() -> None:
    source = (ROOT / "proto" / "netlink.py").read_text()
    assert 'f"netlink message of version {version}: a peer of another version"' in source
    assert f"netlink message of version {netlink.FAMILY_VERSION + 1}: a peer of another version" in PAGE


def test_exit_codes_and_states_of_fsck() -> None:
    codes = (fsck.EXIT_CLEAN, fsck.EXIT_REPAIRED, fsck.EXIT_ERRORS, fsck.EXIT_FAILED)
    words = ("clean", "repaired", "errors left", "not checked")
    said = "Exit codes: " + ", ".join(f"{code} {word}" for code, word in zip(codes, words, strict=True))
    assert said in PAGE
    for state in ("dirty log", "corrupt", "unreadable"):
        text = fsck.render(fsck.Result("/dev/x", "u", xfs=state))
        assert f"XFS: {state}" in text
        assert f"| XFS: {state} |" in PAGE


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    assert "](docs/operating.md)" in (ROOT / "README.md").read_text()
