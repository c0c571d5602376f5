"""A full disk: who writes learns of it in time, what was acknowledged stays, and removing files mends it."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from labkit import Lab

LAB_SIZE = "512M"
MIB = 1 << 20
Work = dict[str, Path]


def block(number: int) -> bytes:
    """One MiB that tells which it is."""
    return hashlib.sha256(b"%d" % number).digest() * (MIB // 32)


def fill(folder: Path, limit: int = 600) -> list[int]:
    """Write files of 1 MiB until ENOSPC; return the numbers of those that were written, synced and closed.

    ENOSPC may come from open, write, fsync or close: whichever, that file counts as not written.
    """
    kept: list[int] = []
    for number in range(limit):
        try:
            fd = os.open(folder / f"f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                content = memoryview(block(number))
                while content:
                    content = content[os.write(fd, content) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as failed:
            assert failed.errno == errno.ENOSPC
            return kept
        kept.append(number)
    pytest.fail(f"{limit} MiB went into a volume of {LAB_SIZE}")


@pytest.mark.parametrize("filler", ["n2", "n1"])
def test_fill_remove_and_go_on(lab: Lab, work: Work, filler: str) -> None:
    kept = fill(work[filler])
    assert len(kept) > 200
    observer = "n3"
    assert os.statvfs(work[observer]).f_bavail * os.statvfs(work[observer]).f_frsize < 20 * MIB
    for number in kept:
        assert (work[observer] / f"f{number}").read_bytes() == block(number)
    # Another node meets the full disk too, and gets no other error.
    with pytest.raises(OSError) as caught:
        for number in range(40):
            with open(work[observer] / f"more{number}", "wb", buffering=0) as stream:
                assert stream.write(bytes(MIB)) == MIB or os.write(stream.fileno(), b"rest")
                os.fsync(stream.fileno())
    assert caught.value.errno == errno.ENOSPC
    # Reads, listings and removals still work.
    assert set(os.listdir(work["n1"])) >= {f"f{number}" for number in kept}
    for name in os.listdir(work["n1"]):
        if name not in ("f0", "f1"):
            os.unlink(work["n1"] / name)
    for node in lab.names:
        (work[node] / f"again-{node}").write_bytes(block(7) * 20)
        with open(work[node] / f"again-{node}", "rb+") as stream:
            os.fsync(stream.fileno())
    for folder in work.values():
        assert (folder / "f1").read_bytes() == block(1)
        for node in lab.names:
            assert (folder / f"again-{node}").read_bytes() == block(7) * 20
    for name in os.listdir(work["n2"]):
        os.unlink(work["n2"] / name)


def test_overwriting_in_place_needs_no_space(work: Work) -> None:
    target = {node: folder / "kept" for node, folder in work.items()}
    target["n1"].write_bytes(block(1))
    (work["n1"] / "filling").mkdir()
    fill(work["n2"] / "filling")
    for number, node in enumerate(work):
        fd = os.open(target[node], os.O_RDWR)
        try:
            assert os.pwrite(fd, block(number)[:5000], 10_000) == 5000
            os.fsync(fd)
        finally:
            os.close(fd)
        for other in target.values():
            assert other.read_bytes()[10_000:15_000] == block(number)[:5000]
    for name in os.listdir(work["n3"] / "filling"):
        os.unlink(work["n3"] / "filling" / name)


def test_many_small_appends_until_full_lose_nothing_before(work: Work) -> None:
    """An append either is whole or did not happen: the file ends with the last line that was acknowledged."""
    (work["n1"] / "filling").mkdir()
    fill(work["n1"] / "filling")
    line = b"x" * 8191 + b"\n"
    written = 0
    log = os.open(work["n2"] / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for _ in range(20_000):
            assert os.write(log, line) == len(line)
            os.fsync(log)
            written += 1
    except OSError as failed:
        assert failed.errno == errno.ENOSPC
    finally:
        os.close(log)
    for folder in work.values():
        content = (folder / "log").read_bytes()
        assert content[: written * len(line)] == line * written
        assert len(content) < (written + 1) * len(line)
    for name in os.listdir(work["n2"] / "filling"):
        os.unlink(work["n2"] / "filling" / name)
    os.unlink(work["n3"] / "log")
