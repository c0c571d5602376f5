"""Names that the home's own FUSE layer takes away, on its lower XFS: what becomes of a file that is open elsewhere."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Iterator
from typing import Any, cast

import pytest
import xfsdisk

from mxfs_fuse.operations import Operations
from mxfs_fuse.state import State
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid
from mxfs_proto.records import LockGrant, Record
from mxfsd.io import libc
from mxfsd.io.lower import Lower

pytestmark = pytest.mark.needs("root", "loop", "xfs")
CTX = cast(Any, type("Context", (), {"uid": 0, "gid": 0, "pid": 0}))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path_factory.mktemp("xfs")) as device:
        yield device


@pytest.fixture
async def here(device: str) -> Any:
    """Operations of the home, on an empty lower mount."""
    lower = Lower(libc.mount_detached(device, False))
    lower.prepare()
    state = State(lower.root, 1000, False, _nowhere)
    state.locks.cache.set_implicit(True)
    state.lower, state.gate = lower, None
    operations = Operations(state)
    for name in (b"file", b"other"):
        fid_of(lower, name, make=True)
    yield operations
    for name in (b"file", b"other"):
        try:
            lower.unlink(lower.root, name, None)
        except FileNotFoundError:
            pass
    await state.leave_lower()


def _nowhere(_record: Record) -> None:
    pass


def fid_of(lower: Lower, name: bytes, *, make: bool = False) -> Fid:
    attr = lower.mknod(lower.root, name, 0o100644, 0, 0, 0) if make else lower.lookup(lower.root, name)
    return Fid(attr.ino, attr.gen)


def open_elsewhere(here: Operations, name: bytes) -> None:
    lower = here.state.lower
    assert lower is not None
    flags = LockFlag.RECLAIM | LockFlag.OTHER_OPEN
    here.state.locks.on_record(LockGrant(0, fid_of(lower, name).ino, LockMode.EX, 50, flags))


async def is_shipped(here: Operations, work: Awaitable[None]) -> bool:
    """Whether the operation is left to the home's daemon, which knows who has what open."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task,), timeout=0.05)
    shipped = not task.done() and here.state.link.pending == 1
    task.cancel()
    await asyncio.wait((task,))
    return shipped


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_a_file_that_another_node_has_open_is_not_freed_here(here: Operations, elsewhere: bool) -> None:
    lower = here.state.lower
    assert lower is not None
    if elsewhere:
        open_elsewhere(here, b"file")
    assert await is_shipped(here, here.unlink(cast(Any, 1), b"file", CTX)) == elsewhere
    if elsewhere:
        fid_of(lower, b"file")
    else:
        with pytest.raises(FileNotFoundError):
            fid_of(lower, b"file")


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_nor_where_another_takes_its_name(here: Operations, elsewhere: bool) -> None:
    lower = here.state.lower
    assert lower is not None
    before, moved = fid_of(lower, b"file"), fid_of(lower, b"other")
    if elsewhere:
        open_elsewhere(here, b"file")
    root = cast(Any, 1)
    assert await is_shipped(here, here.rename(root, b"other", root, b"file", 0, CTX)) == elsewhere
    assert fid_of(lower, b"file") == (before if elsewhere else moved)


async def test_a_file_without_a_name_is_made_here_and_named_by_the_daemon(here: Operations) -> None:
    lower, state = here.state.lower, here.state
    assert lower is not None
    info, _entry = await here.tmpfile(cast(Any, 1), 0o640, os.O_RDWR | os.O_TMPFILE, CTX)
    node = here.io.handles[info.fh].node
    assert lower.orphans() == [node.fid] and node.unnamed
    assert (await here._attr(node))[0].nlink == 0
    assert await is_shipped(here, here.link(cast(Any, node.fid.ino), cast(Any, 1), b"name", CTX))
    assert node.unnamed, "nobody has said that it has a name"
    await here.release(info.fh)
    assert lower.orphans() == []
    await here.forget([(cast(Any, node.fid.ino), 1)])
    assert node.fid.ino not in state.nodes


async def test_one_that_was_freed_before_it_was_open_is_made_again(
    here: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = here.state.lower
    assert lower is not None
    made: list[Fid] = []
    open_new = here.io.open_new

    async def freed_first(node: Any, flags: int, fd: int, uid: int) -> Any:
        made.append(node.fid)
        if len(made) == 1:
            os.close(fd)
            lower.reap(node.fid)
            raise OSError(errno.ESTALE, "freed")
        return await open_new(node, flags, fd, uid)

    monkeypatch.setattr(here.io, "open_new", freed_first)
    info, _entry = await here.tmpfile(cast(Any, 1), 0o640, os.O_RDWR | os.O_TMPFILE, CTX)
    assert lower.orphans() == [made[1]] == [here.io.handles[info.fh].node.fid]
    await here.release(info.fh)
    assert lower.orphans() == []
