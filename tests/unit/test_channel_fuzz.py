"""The FUSE channel under requests that no kernel sends: scripts of any bytes, and real operations asked anything."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import xfsdisk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mxfs_fuse.operations import Operations
from mxfs_fuse.state import State
from mxfs_proto import fuse
from mxfs_proto.fuse import Opcode
from mxfsd.io import libc
from mxfsd.io.lower import Lower
from tests.fuzz.target import OPCODES, Sent, Wire, one_input, seeds

ALL_GOOD = list(seeds())[-1]


@pytest.mark.error_logs
@settings(deadline=None)
@example(ALL_GOOD)
@given(st.lists(st.binary(min_size=4, max_size=120), max_size=6).map(b"".join))
def test_any_script(script: bytes) -> None:
    one_input(script)


@pytest.mark.error_logs
@pytest.mark.parametrize("cut", range(1, 60))
def test_good_requests_cut_short_or_with_more_behind(cut: int) -> None:
    for seed in list(seeds())[:-1]:
        size = max(0, seed[2] - cut)
        one_input(bytes((*seed[:2], size, 0)) + seed[4 : 4 + size])
        one_input(bytes((*seed[:2], seed[2] + cut, 0)) + seed[4:] + b"x" * cut)


NUMBERS = st.sampled_from((0, 1, 2, 3, 4095, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)) | st.integers(0, 64)
LARGE = NUMBERS | st.sampled_from(((1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 63) - 4096))
NAMES = st.sampled_from((b"a", b"b", b"c", b"", b".", b"..", b"a/b", b".mxfs", b"x" * 255, b"x" * 256, b"\xff\xfe"))
NODES = st.sampled_from((0, 1, 1, 1, 2, 3, 4, 1 << 40, (1 << 64) - 1))


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    """A request of the right shape whose fields are anything."""
    opcode = draw(st.sampled_from([op for op in fuse.REQUESTS if op not in (Opcode.INIT, Opcode.DESTROY)]))
    struct, names = fuse.REQUESTS[opcode]
    codes = [code for code in struct.format if code in "QqIiHh"]
    fields = [draw(LARGE if code in "Qq" else NUMBERS) for code in codes]
    fields = [value & ((1 << 16) - 1) if code in "Hh" else value for value, code in zip(fields, codes, strict=True)]
    if opcode is Opcode.WRITE:
        fields[2] = draw(st.integers(0, 64))
    elif opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
        fields[2] = min(fields[2], fuse.MAX_WRITE)  # the kernel asks for no more
    elif opcode is Opcode.FALLOCATE:
        fields[1:3] = [value & 0xFFFFF for value in fields[1:3]]  # (the disk is small)
    data = draw(st.binary(max_size=64))
    body = struct.pack(*fields) + b"".join(draw(NAMES) + b"\0" for _ in range(names)) + data
    return Sent(int(opcode), draw(NODES), body)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path_factory.mktemp("xfs")) as device:
        yield device


def operations_on(lower: Lower) -> Operations:
    def nowhere(_record: Any) -> None: ...

    state = State(lower.root, 1000, False, nowhere)
    state.locks.cache.set_implicit(True)
    state.lower, state.gate, state.lease_until_ms = lower, None, 1 << 62
    return Operations(state)


OPENED = [
    Sent(Opcode.CREATE, 1, fuse.CREATE_IN.pack(2, 0o100644, 0, 0) + b"a\0"),
    Sent(Opcode.OPENDIR, 1, fuse.OPEN_IN.pack(0, 0)),
]


@pytest.mark.error_logs
@pytest.mark.needs("root", "loop", "xfs")
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(asked=st.lists(requests(), min_size=1, max_size=25))
def test_real_operations_asked_anything(device: str, asked: list[Sent]) -> None:
    """Of inodes and files that exist, and that do not; every request is answered, and the mount goes on."""

    async def run() -> None:
        lower = Lower(libc.mount_detached(device, False))
        lower.prepare()
        operations = operations_on(lower)
        wire = Wire(operations)
        try:
            wire.send(Sent(Opcode.INIT, 0, fuse.INIT_IN.pack(7, 45, 131072, 0xFFFFFFFF) + bytes(48)))
            for sent in (*OPENED, *asked):
                wire.send(sent)
            await wire.settle()
            await wire.probe()
        finally:
            operations.io.close_lower()
            await operations.state.leave_lower()
            wire.close()

    asyncio.run(run())


def test_scripts_reach_every_request() -> None:
    """The seeds are good ones: nothing is tested by what is refused at once."""
    assert {OPCODES[seed[0]] for seed in list(seeds())[:-1]} == set(fuse.REQUESTS)
