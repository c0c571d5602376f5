"""A channel of netlink records between a FUSE layer and its daemon, over a real AF_NETLINK socket.

The socket has protocol NETLINK_USERSOCK, to which any local user may send: each message is accepted only with the
kernel's word (SCM_CREDENTIALS, unix(7)) that it comes from uid 0, and only from the peer's port id. A full receive
buffer makes a unicast send fail with EAGAIN at the sender, and a multicast message vanish with ENOBUFS at the
receiver (netlink(7)); the first is tried again, the second is repaired by `mxfsd.core.nlchannel`.
"""

import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError
from mxfs_proto.netlink import GROUPS, HEADER_BYTES, decode_message, encode, iter_messages
from mxfs_proto.records import Control, Record
from mxfsd.core.nlchannel import ChannelConfig, NlChannel

log = structlog.get_logger(__name__)

NETLINK_USERSOCK: Final = 2
SO_RCVBUFFORCE: Final = 33
RECEIVE_BYTES: Final = 4 * 1024 * 1024
DATAGRAM_BYTES: Final = 64 * 1024
_BATCH = 128
"""Records put into one datagram when several wait: the largest one has 112 bytes, so at most 14 KiB."""
_READS = 64
"""Datagrams taken before other work of the event loop gets its turn."""
_RETRY_S = 0.001
_LENGTH = struct.Struct("=I")  # the first field of struct nlmsghdr
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_ANCILLARY_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)


class NetlinkEndpoint:
    """One end of a channel. *on_record* gets each record of the peer once and in order.

    *on_lost* is told, once, that the peer's socket is gone or that it broke the protocol; the endpoint is closed
    then. The owner calls `open`, tells the other side its port id, then `connect` with the other's; nothing is
    read before, so nothing can be lost between.
    """

    def __init__(
        self,
        on_record: Callable[[Record], None],
        volume_id: int,
        *,
        on_lost: Callable[[MxfsError], None] | None = None,
        config: ChannelConfig | None = None,
        receive_bytes: int = RECEIVE_BYTES,
    ) -> None:
        self._on_record = on_record
        self._on_lost = on_lost
        self._volume = volume_id
        self._config = config or ChannelConfig()
        self._receive_bytes = receive_bytes
        self._sock: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel = NlChannel(self._config)
        self._buffer = bytearray(DATAGRAM_BYTES)
        self._inbox: deque[Record] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.portid = 0
        self.peer_portid = 0
        self.refused = 0
        """Datagrams of other users or other sockets, dropped."""
        self.overruns = 0
        """Times that the kernel said it dropped messages for us (ENOBUFS)."""

    # -- life ---------------------------------------------------------------------------------------------------

    def open(self) -> int:
        """Make the socket and return the port id that the kernel gave it. Raises IoFailure."""
        if self._sock is not None:
            raise MisuseError("the netlink endpoint is open")
        try:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_USERSOCK)
        except OSError as err:
            raise IoFailure(f"no netlink socket: {err}", err.errno) from err
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self._receive_bytes)
            except PermissionError:
                # Without CAP_NET_ADMIN the limit of net.core.rmem_max holds; that costs speed, not messages.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
            sock.bind((0, 0))
        except OSError as err:
            sock.close()
            raise IoFailure(f"netlink socket: {err}", err.errno) from err
        self._sock = sock
        self.portid = sock.getsockname()[0]
        return self.portid

    def connect(self, peer_portid: int) -> None:
        """Exchange records with *peer_portid* from now on; what was sent before goes there now.

        From here the kernel refuses other senders' unicast messages, so no user can fill our buffer. A peer that
        starts anew gets a new endpoint: it would be refused by this one. Raises MisuseError, IoFailure.
        """
        if self._sock is None:
            raise MisuseError("the netlink endpoint is not open")
        if peer_portid <= 0 or peer_portid == self.portid:
            raise MisuseError(f"{peer_portid} is no port id of a peer")
        if self.peer_portid:
            raise MisuseError(f"the netlink endpoint is connected to port {self.peer_portid}")
        try:
            self._sock.connect((peer_portid, 0))
        except OSError as err:
            raise IoFailure(f"netlink port {peer_portid}: {err}", err.errno) from err
        self.peer_portid = peer_portid
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._flush()

    def close(self) -> None:
        """Give the socket back. Records that were not acknowledged may not have arrived. Can be repeated."""
        for handle in (self._timer, self._retry):
            if handle is not None:
                handle.cancel()
        self._timer = self._retry = None
        if self._sock is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
        self._inbox.clear()

    @property
    def is_open(self) -> bool:
        """Whether it was opened and not closed, nor its peer lost."""
        return self._sock is not None

    @property
    def pending(self) -> int:
        """Records sent that the peer has not acknowledged."""
        return self._channel.pending

    # -- sending ------------------------------------------------------------------------------------------------

    def send(self, record: Record) -> None:
        """Send *record* now, or as soon as the peer's buffer has room. Never blocks. Raises MisuseError."""
        if self._sock is None:
            raise MisuseError("the netlink endpoint is closed")
        self._channel.submit(record)
        if self._retry is None and self.peer_portid:
            self._flush()

    def publish(self, record: Record, group: str) -> None:
        """Send *record* to whoever listens to multicast *group* (`locks`, `status`); it may get lost."""
        if self._sock is None:
            raise MisuseError("the netlink endpoint is closed")
        try:
            self._sock.sendto(encode(record, self._volume), (0, 1 << (GROUPS[group] - 1)))
        except OSError as err:
            # After the group the kernel tries port 0, where nobody is: ECONNREFUSED says nothing about the group.
            if err.errno not in (errno.ECONNREFUSED, errno.ESRCH, errno.EAGAIN, errno.ENOBUFS):
                raise IoFailure(f"netlink group {group}: {err}", err.errno) from err

    def _flush(self) -> None:
        """Send what the window and the peer's buffer take, several records in a datagram when several wait."""
        channel, volume = self._channel, self._volume
        while batch := channel.peek(_BATCH):
            number, ack = channel.next_number, channel.acknowledgement
            if len(batch) == 1:
                data = encode(batch[0], volume, number, ack)
            else:
                data = b"".join([encode(r, volume, number + i, ack) for i, r in enumerate(batch)])
            if not self._transmit(data):
                return
            channel.advance(self._now_ms(), len(batch))
        if self._timer is None and channel.busy:
            self._arm()

    def _report(self, report: Control | None) -> None:
        if report is not None and self._transmit(encode(report, self._volume, 0, self._channel.acknowledgement)):
            self._channel.control_sent(report, self._now_ms())

    def _transmit(self, data: bytes) -> bool:
        """Return whether the datagram is in the peer's buffer; if not, a later try is arranged."""
        if self._sock is None:
            return False
        try:
            self._sock.send(data)
            return True
        except BlockingIOError:
            pass
        except OSError as err:
            if err.errno != errno.ENOBUFS:
                self._lose(IoFailure(f"netlink port {self.peer_portid}: {err}", err.errno))
                return False
        # A netlink socket is always writable for epoll(7), whatever the receiver's buffer looks like.
        if self._retry is None and self._loop is not None:
            self._retry = self._loop.call_later(_RETRY_S, self._try_again)
        return False

    def _try_again(self) -> None:
        self._retry = None
        self._settle()

    # -- receiving ----------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            self._read()
        except PeerError as err:
            self._lose(err)
        finally:
            self._settle()

    def _read(self) -> None:
        buffer, channel, inbox = self._buffer, self._channel, self._inbox
        now = self._now_ms()
        for _ in range(_READS):
            if self._sock is None:
                return  # closed by a record's receiver
            try:
                size, ancillary, flags, address = self._sock.recvmsg_into((buffer,), _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError as err:
                if err.errno != errno.ENOBUFS:
                    raise PeerError(f"netlink socket: {err}", err.errno) from err
                self.overruns += 1
                channel.overrun()
                continue
            if address[0] != self.peer_portid or not _from_root(ancillary):
                self._refuse(address, ancillary)
                continue
            if flags & socket.MSG_TRUNC:
                raise PeerError(f"a netlink datagram of more than {DATAGRAM_BYTES} bytes")
            if size >= HEADER_BYTES and size == _LENGTH.unpack_from(buffer)[0]:
                messages = [decode_message(buffer, 0, size)]
            else:
                messages = list(iter_messages(memoryview(buffer)[:size]))
            for record, volume, number, ack in messages:
                if volume != self._volume:
                    raise PeerError(f"a message about volume {volume:#x} on the channel of {self._volume:#x}")
                delivered = channel.receive(now, number, ack, record)
                if delivered is not None:
                    inbox.append(delivered)
            self._deliver()

    def _deliver(self) -> None:
        """Hand the records out; what is left when a receiver raises is handed out at the next wake-up."""
        inbox, on_record = self._inbox, self._on_record
        while inbox:
            on_record(inbox.popleft())

    def _settle(self) -> None:
        """After every wake-up: send what can be sent now, and be woken for what is due later."""
        if self._sock is None or self._loop is None:
            return
        if self._inbox:
            self._loop.call_soon(self._deliver_rest)
        if self._retry is None:
            self._flush()
            self._report(self._channel.control())
        if self._timer is None and self._channel.busy:
            self._arm()

    def _deliver_rest(self) -> None:
        try:
            self._deliver()
        finally:
            self._settle()

    def _refuse(self, address: Any, ancillary: list[tuple[int, int, bytes]]) -> None:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:  # 1, 2, 4, 8 ...: a flood does not fill the log
            log.warning("netlink_refused", port=address[0], credentials=_credentials(ancillary), count=self.refused)

    # -- time ---------------------------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000) if self._loop is not None else 0

    def _arm(self) -> None:
        if self._loop is not None:
            self._timer = self._loop.call_later(self._config.ack_delay_ms / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._sock is not None and self._retry is None:
            self._report(self._channel.tick(self._now_ms()))
        self._settle()

    def _lose(self, err: MxfsError) -> None:
        self.close()
        log.warning("netlink_lost", port=self.peer_portid, reason=str(err))
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None and self._loop is not None:
            self._loop.call_soon(on_lost, err)  # not from inside the owner's own call of `send`


def _credentials(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, int, int] | None:
    """Return (pid, uid, gid) as the kernel attached them, or None."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) >= _CREDENTIALS.size:
            pid, uid, gid = _CREDENTIALS.unpack_from(data)
            return pid, uid, gid
    return None


def _from_root(ancillary: list[tuple[int, int, bytes]]) -> bool:
    credentials = _credentials(ancillary)
    return credentials is not None and credentials[1] == 0
