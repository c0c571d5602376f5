"""Bytes of the notifications to the kernel, against the structures of <linux/fuse.h>."""

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxfs_fuse.kernel import KernelNotifier

HEADER = Path("/usr/include/linux/fuse.h")
TYPES = {"uint32_t": ctypes.c_uint32, "int32_t": ctypes.c_int32, "uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64}


class OutHeader(ctypes.Structure):
    """struct fuse_out_header"""

    _fields_ = [("len", ctypes.c_uint32), ("error", ctypes.c_int32), ("unique", ctypes.c_uint64)]


class InvalInodeOut(ctypes.Structure):
    """struct fuse_notify_inval_inode_out"""

    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("len", ctypes.c_int64)]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Messages stay apart: a pipe in packet mode."""
    ends = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize("structure", [OutHeader, InvalInodeOut])
def test_the_structures_are_the_header_s(structure: type[ctypes.Structure]) -> None:
    if not HEADER.exists():
        pytest.skip("no kernel headers here")
    name = (structure.__doc__ or "").split()[1]
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", HEADER.read_text(), re.MULTILINE | re.DOTALL)
    assert body is not None
    assert [(n, TYPES[t]) for t, n in re.findall(r"(\w+)\s+(\w+);", body[1])] == structure._fields_
    numbers = dict(re.findall(r"(FUSE_NOTIFY_\w+) = (\d+)", HEADER.read_text()))
    assert numbers["FUSE_NOTIFY_INVAL_INODE"] == "2"
    assert numbers.get("FUSE_NOTIFY_INC_EPOCH", "8") == "8"


def test_messages(pipe: tuple[int, int]) -> None:
    rfd, wfd = pipe
    notifier = KernelNotifier(wfd)
    assert notifier.has_epoch
    probe = os.read(rfd, 4096)
    head = OutHeader.from_buffer_copy(probe)
    assert (head.len, head.error, head.unique, len(probe)) == (16, 8, 0, 16), "FUSE_NOTIFY_INC_EPOCH"
    assert notifier.inc_epoch() == 0
    assert os.read(rfd, 4096) == probe
    for send, expected in (
        (lambda: notifier.inval_pages(2**63 + 1, 4096, 8192), (2**63 + 1, 4096, 8192)),
        (lambda: notifier.inval_pages(5, 0, 0), (5, 0, 0)),
        (lambda: notifier.inval_attributes(1), (1, -1, 0)),
    ):
        assert send() == 0
        message = os.read(rfd, 4096)
        head = OutHeader.from_buffer_copy(message)
        assert (head.len, head.error, head.unique, len(message)) == (40, 2, 0, 40)
        body = InvalInodeOut.from_buffer_copy(message, 16)
        assert (body.ino, body.off, body.len) == expected


@pytest.mark.parametrize(
    ("code", "answer"), [(errno.ENOENT, 0), (errno.EINVAL, errno.EINVAL), (errno.ENOTCONN, errno.ENOTCONN)]
)
def test_what_the_kernel_answers(monkeypatch: pytest.MonkeyPatch, code: int, answer: int) -> None:
    def writev(fd: int, parts: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "writev", writev)
    notifier = KernelNotifier(-1)
    assert notifier.inval_pages(5, 0, 0) == answer
    assert notifier.inval_attributes(5) == answer
    assert notifier.has_epoch == (answer == 0)
