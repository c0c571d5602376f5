"""What is fuzzed: the channel that speaks the FUSE protocol, from a request's bytes to its answer.

A script is any bytes: requests one behind the other, each of an opcode, a length and a body (`split`). Whatever they
are, each request that is owed an answer gets one, with an errno the kernel takes, and the mount goes on.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

from pyfuse3 import FileInfo, StatvfsData

from mxfs_fuse.channel.native import NativeChannel
from mxfs_fuse.channel.replies import Listing, NativeReplies
from mxfs_proto import fuse
from mxfs_proto.filelocks import Held
from mxfs_proto.fuse import Opcode
from mxfs_proto.ops import Attr

OPCODES = (*Opcode, 0, 7, 53, 4096, 1 << 31)
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
_ATTR = Attr(7, 3, 0o100644, 1, 1000, 1001, 0, 5, 8, 1_000_000_001, -2_500_000_000, 3_000_000_003)
_SEND_BUFFER = 4 << 20
_END_S = 5.0


class Sent(NamedTuple):
    """One request of a script. *length*: what its header says of it, None: the truth."""

    opcode: int
    nodeid: int
    body: bytes
    length: int | None = None


def split(script: bytes) -> Iterator[Sent]:
    """Take a script apart."""
    at = 0
    while at + 4 <= len(script):
        opcode, nodeid, size, lie = script[at : at + 4]
        body = script[at + 4 : at + 4 + size]
        at += 4 + size
        length = None if lie < 230 else lie - 230
        yield Sent(int(OPCODES[opcode % len(OPCODES)]), nodeid, body, length)


class AnyOperations:
    """Operations that answer everything at once, as the real ones may."""

    local_locks = False

    def __init__(self) -> None:
        self._replies = NativeReplies()

    def use(self, _replies: NativeReplies) -> None:
        """They have their own."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def answer(*args: Any) -> Any:
            return self._answer(name, args)

        return answer

    def _answer(self, name: str, args: tuple[Any, ...]) -> Any:
        match name:
            case "lookup" | "symlink" | "mknod" | "mkdir" | "link" | "getattr" | "setattr":
                return self._replies.entry(7, _ATTR, 1.25, 0.5)
            case "create" | "tmpfile":
                return FileInfo(fh=1), self._replies.entry(7, _ATTR, 1.25, 0.5)
            case "open":
                return FileInfo(fh=1)
            case "opendir":
                return 1
            case "readdir":
                for index in range(args[1] & 3, 3):
                    if not self._replies.add(args[2], b"n%d" % index, self._replies.entry(7, _ATTR, 1, 1), index + 1):
                        break
                assert isinstance(args[2], Listing)
                return None
            case "read" | "readlink" | "getxattr" | "ioctl":
                return b"value"
            case "listxattr":
                return [b"user.a", b"user.b"]
            case "write":
                return len(args[2])
            case "lseek" | "copy_file_range" | "btime":
                return 5
            case "access":
                return True
            case "statfs":
                return StatvfsData()
            case "getlk":
                return Held(1, 0, 9, 1, 2, False)
        return None


class Wire:
    """A channel whose kernel is this program. *operations*: `AnyOperations`, or real ones."""

    def __init__(self, operations: Any) -> None:
        ours, self._kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kernel.setblocking(False)
        for end in (ours, self._kernel):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.channel = NativeChannel(ours.detach())
        self.channel._serve_with(operations)
        self._unique = 0
        self.opcodes: dict[int, int] = {}
        """Of the requests that are owed an answer."""

    def send(self, sent: Sent) -> int:
        """Hand a request over as if it had been read from /dev/fuse; return its number."""
        self._unique += 2
        size = fuse.IN_HEADER.size + len(sent.body)
        length = size if sent.length is None else sent.length
        head = fuse.IN_HEADER.pack(length, sent.opcode, self._unique, sent.nodeid, 10, 20, 0, 0, 0)
        if sent.opcode not in UNANSWERED:
            self.opcodes[self._unique] = sent.opcode
        self.channel._take(memoryview(bytearray(head + sent.body)))
        return self._unique

    def take(self) -> dict[int, tuple[int, bytes]]:
        """Return the answers that have come, checked: errno and body by number."""
        found = {}
        while True:
            try:
                data = self._kernel.recv(_SEND_BUFFER)
            except BlockingIOError:
                return found
            length, error, unique = fuse.OUT_HEADER.unpack_from(data)
            opcode = self.opcodes.pop(unique, None)
            assert opcode is not None, f"answer {unique} to nothing, or a second one"
            assert length == len(data), f"{opcode}: {length} bytes told, {len(data)} sent"
            assert -4096 < error <= 0, f"{opcode}: the kernel takes no error {error}"
            assert not error or length == fuse.OUT_HEADER.size, f"{opcode}: an error with a body"
            found[unique] = (-error, data[fuse.OUT_HEADER.size :])

    async def settle(self) -> None:
        """Wait for every answer that is owed. What waits for a file lock is interrupted."""
        async with asyncio.timeout(_END_S):
            while True:
                self.take()
                if not self.opcodes:
                    return
                for unique, opcode in list(self.opcodes.items()):
                    if opcode == Opcode.SETLKW:
                        self.send(Sent(Opcode.INTERRUPT, 0, fuse.INTERRUPT_IN.pack(unique)))
                await asyncio.sleep(0.001)

    async def probe(self) -> None:
        """The mount goes on: a good request is answered."""
        unique = self.send(Sent(Opcode.STATFS, 1, b""))
        async with asyncio.timeout(_END_S):
            while unique not in (found := self.take()):
                await asyncio.sleep(0.001)
        assert found[unique][0] == 0, errno.errorcode.get(found[unique][0])

    def close(self) -> None:
        """Both ends."""
        self._kernel.close()
        self.channel.close()


async def run(script: bytes) -> None:
    """Feed a script to a channel over operations that answer anything. Raises AssertionError, TimeoutError."""
    wire = Wire(AnyOperations())
    try:
        wire.send(Sent(Opcode.INIT, 0, fuse.INIT_IN.pack(7, 45, 131072, 0xFFFFFFFF) + bytes(48)))
        for sent in split(script):
            wire.send(sent)
        await wire.settle()
        await wire.probe()
    finally:
        wire.close()


def one_input(script: bytes) -> None:
    """One input of a fuzzer."""
    asyncio.run(run(script))


def seeds() -> Iterator[bytes]:
    """A good request of each kind, alone, and all of them: where a fuzzer begins."""
    good = []
    for index, opcode in enumerate(OPCODES):
        shape = fuse.REQUESTS.get(opcode)  # type: ignore[call-overload]
        if shape is not None:
            body = bytes([1] * shape[0].size) + b"name\0" * shape[1]
            good.append(bytes((index, 1, len(body), 0)) + body)
    yield from good
    yield b"".join(good)


def corpus(folder: str) -> None:
    """Write the seeds where a fuzzer finds them."""
    os.makedirs(folder, exist_ok=True)
    for number, seed in enumerate(seeds()):
        with open(os.path.join(folder, f"seed{number}"), "wb") as stream:
            stream.write(seed)
