"""SCSI commands straight to an iSCSI target, through libiscsi: where the kernel has no SCSI, and in tests.

Sources: <iscsi/iscsi.h>, <iscsi/scsi-lowlevel.h> of libiscsi 1.19 (library version 7), RFC 7143. The asynchronous
calls are used with an event loop of our own: the deadline is then on our clock, and no callback outlives its frame.
"""

import ctypes
import functools
import secrets
import select
import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from mxfs_proto.errors import MisuseError
from mxfsd.pr.errors import NotOffered, PathFailure
from mxfsd.pr.scsi import GOOD, ScsiNexus, command_name, raise_status
from mxfsd.pr.spc import CAPACITY_BYTES, compare_and_write, decode_capacity16, read16, read_capacity16, write16

SCHEME = "iscsi://"
TIMEOUT_MS = 10_000
DEFAULT_PORT = 3260
DEFAULT_INITIATOR = "iqn.2026-11.net.mxfs:libiscsi"

_SESSION_NORMAL = 2
_NO_DIGEST_FIRST = 1  # ISCSI_HEADER_DIGEST_NONE_CRC32C
_XFER_NONE, _XFER_READ, _XFER_WRITE = 0, 1, 2
_STATUS_CANCELLED = 0x0F000000  # the first of libiscsi's own codes: cancelled, error, timeout
_TM_COMPLETE, _TM_NO_LUN, _TM_NOT_SUPPORTED = 0, 2, 5  # RFC 7143 11.6.1
_SENSE_AT = 2  # RFC 7143 11.4.7.2: two bytes of length come before the sense data

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Sense(ctypes.Structure):
    """struct scsi_sense; only its size matters here, the raw bytes are decoded instead."""

    _fields_ = [
        ("error_type", ctypes.c_ubyte),
        ("key", ctypes.c_int),
        ("ascq", ctypes.c_int),
        ("bits", ctypes.c_ubyte),  # three bits, with which the next byte shares one unsigned int
        ("bit_pointer", ctypes.c_ubyte),
        ("field_pointer", ctypes.c_uint16),
    ]


class _Data(ctypes.Structure):
    """struct scsi_data: what the target sent."""

    _fields_ = [("size", ctypes.c_int), ("data", ctypes.c_void_p)]


class _Task(ctypes.Structure):
    """The beginning of struct scsi_task, up to the received data."""

    _fields_ = [
        ("status", ctypes.c_int),
        ("cdb_size", ctypes.c_int),
        ("xfer_dir", ctypes.c_int),
        ("expxferlen", ctypes.c_int),
        ("cdb", ctypes.c_ubyte * 16),
        ("residual_status", ctypes.c_int),
        ("residual", ctypes.c_size_t),
        ("sense", _Sense),
        ("datain", _Data),
    ]


if (ctypes.sizeof(_Sense), _Task.datain.offset) != (16, 64):
    raise MisuseError("struct scsi_task is laid out in another way than in libiscsi's header")


class _OutData(ctypes.Structure):
    """struct iscsi_data: what is sent."""

    _fields_ = [("size", ctypes.c_size_t), ("data", ctypes.c_void_p)]


@functools.cache
def _library() -> Any:
    try:
        lib = ctypes.CDLL("libiscsi.so.7")
    except OSError as error:
        raise NotOffered(f"libiscsi is not installed (Debian: libiscsi7): {error}") from error
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, arguments in (
        ("iscsi_create_context", pointer, [text]),
        ("iscsi_destroy_context", number, [pointer]),
        ("iscsi_set_targetname", number, [pointer, text]),
        ("iscsi_set_initiator_username_pwd", number, [pointer, text, text]),
        ("iscsi_set_session_type", number, [pointer, number]),
        ("iscsi_set_header_digest", number, [pointer, number]),
        ("iscsi_set_isid_random", number, [pointer, ctypes.c_uint32, ctypes.c_uint32]),
        ("iscsi_set_timeout", number, [pointer, number]),
        ("iscsi_set_noautoreconnect", None, [pointer, number]),
        ("iscsi_full_connect_async", number, [pointer, text, number, _Callback, pointer]),
        ("iscsi_get_fd", number, [pointer]),
        ("iscsi_which_events", number, [pointer]),
        ("iscsi_service", number, [pointer, number]),
        ("iscsi_get_error", text, [pointer]),
        ("scsi_create_task", pointer, [number, text, number, number]),
        ("scsi_free_scsi_task", None, [pointer]),
        ("iscsi_scsi_command_async", number, [pointer, number, pointer, _Callback, pointer, pointer]),
        ("iscsi_task_mgmt_lun_reset_async", number, [pointer, ctypes.c_uint32, _Callback, pointer]),
        ("iscsi_logout_async", number, [pointer, _Callback, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@dataclass(frozen=True, slots=True)
class IscsiUrl:
    """Where a logical unit is: portal ``host:port``, target name, number of the unit."""

    portal: str
    target: str
    lun: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Return the parts of ``iscsi://HOST[:PORT]/TARGET/LUN``. Raises MisuseError."""
        wanted = f"{url!r} is no address like iscsi://HOST[:PORT]/TARGET/LUN"
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise MisuseError(wanted) from error
        words = parts.path.split("/")
        # isdecimal would take digits of other scripts.
        number = words[2] if len(words) == 3 and words[2].isascii() and words[2].isdecimal() else ""
        if parts.scheme != "iscsi" or not parts.hostname or not number or not words[1] or parts.query or parts.fragment:
            raise MisuseError(wanted)
        if parts.username is not None:
            raise MisuseError(f"{url!r}: a user name and password are not supported")
        if int(number) > 0xFF:
            raise MisuseError(f"{url!r}: unit numbers above 255 are not supported")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(f"{host}:{port}", words[1], int(number))


class _Broken(PathFailure):
    """The connection ended before the answer came."""


class _Session:
    """One login. A context of libiscsi and the loop that runs it until a call has its answer."""

    def __init__(
        self,
        url: IscsiUrl,
        name: str,
        initiator: str,
        isid: int,
        credentials: tuple[str, str] | None,
        timeout_ms: int,
    ) -> None:
        self._lib = _library()
        self._name = name
        self._lun = url.lun
        self._timeout_ms = timeout_ms
        self._keep: list[object] = []  # buffers of the command under way: libiscsi has their addresses
        self._outcome: tuple[int, int] | None = None
        self._old_error = ""
        self._callback = _Callback(self._done)
        context = self._lib.iscsi_create_context(initiator.encode())
        if not context:
            raise PathFailure(f"{name}: libiscsi gave no context for the initiator name {initiator!r}")
        self._context: int | None = context
        lib = self._lib
        lib.iscsi_set_targetname(context, url.target.encode())
        if credentials is not None:
            lib.iscsi_set_initiator_username_pwd(context, credentials[0].encode(), credentials[1].encode())
        lib.iscsi_set_session_type(context, _SESSION_NORMAL)
        lib.iscsi_set_header_digest(context, _NO_DIGEST_FIRST)
        lib.iscsi_set_isid_random(context, isid & 0xFFFFFF, 0)
        # A silent reconnect would send commands again, behind our back and under another session.
        lib.iscsi_set_noautoreconnect(context, 1)
        # The library's own limit only backs ours up: after it the session is given up anyway.
        lib.iscsi_set_timeout(context, 2 * (timeout_ms // 1000 + 1))
        self._wait(
            lib.iscsi_full_connect_async(context, url.portal.encode(), url.lun, self._callback, None), "connecting"
        )

    def command(self, cdb: bytes, data_out: bytes, alloc_in: int) -> tuple[int, bytes]:
        """Run one command; return (SCSI status, received data or sense data). Raises PathFailure."""
        length = len(data_out) or alloc_in
        direction = _XFER_WRITE if data_out else _XFER_READ if alloc_in else _XFER_NONE
        task = self._lib.scsi_create_task(len(cdb), cdb, direction, length)
        if not task:
            raise PathFailure(f"{self._name}: out of memory")
        data: Any = None
        if data_out:
            buffer = ctypes.create_string_buffer(data_out, len(data_out))
            out = _OutData(len(data_out), ctypes.addressof(buffer))
            self._keep = [buffer, out]
            data = ctypes.addressof(out)
        try:
            queued = self._lib.iscsi_scsi_command_async(self._context, self._lun, task, self._callback, data, None)
            status = self._wait(queued, command_name(cdb))[0]
            got = _Task.from_address(task).datain
            raw = ctypes.string_at(got.data, got.size) if got.data and got.size > 0 else b""
        finally:
            # Where the wait failed the context is gone already, and with it its use of the task.
            self._lib.scsi_free_scsi_task(task)
        return status, raw[_SENSE_AT:] if status != GOOD else raw[:alloc_in]

    def lun_reset(self) -> None:
        """Send LOGICAL UNIT RESET. Raises PathFailure, NotOffered."""
        what = "LOGICAL UNIT RESET"
        queued = self._lib.iscsi_task_mgmt_lun_reset_async(self._context, self._lun, self._callback, None)
        status, response = self._wait(queued, what)
        if status != GOOD:
            self.drop()
            raise PathFailure(f"{self._name}: {what} failed ({status:#x})")
        if response == _TM_NOT_SUPPORTED:
            raise NotOffered(f"{self._name}: the target has no {what}")
        if response != _TM_COMPLETE:
            raise PathFailure(f"{self._name}: {what}: response {response}")

    def logout(self) -> None:
        """End the session politely, then drop it. No exception: there is nothing left to lose."""
        if self._context is None:
            return
        try:
            self._wait(self._lib.iscsi_logout_async(self._context, self._callback, None), "logout")
        except PathFailure:
            return
        self.drop()

    def drop(self) -> None:
        """Cut the connection. Commands under way get their callback in here, never later."""
        context, self._context = self._context, None
        if context is not None:
            self._lib.iscsi_destroy_context(context)
        self._keep = []

    def _done(self, _context: object, status: int, data: int | None, _private: object) -> None:
        # A task management answer is a number; for commands the data is the task, which the caller reads itself.
        response = ctypes.c_uint32.from_address(data).value if data and status == GOOD else 0
        self._outcome = (status, response)

    def _wait(self, queued: int, what: str) -> tuple[int, int]:
        """Serve the connection until the call is answered; return (status, first 32 bits of the answer).

        Raises PathFailure after the time limit or when the connection breaks; the session is then gone.
        """
        try:
            if queued != 0:
                raise PathFailure(f"{self._name}: {what}: {self._error()}")
            deadline = time.monotonic() + self._timeout_ms / 1000
            poll = select.poll()
            while self._outcome is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PathFailure(f"{self._name}: {what}: no answer within {self._timeout_ms} ms")
                fd, events = self._lib.iscsi_get_fd(self._context), self._lib.iscsi_which_events(self._context)
                if fd < 0:
                    raise PathFailure(f"{self._name}: {what}: {self._error()}")
                poll.register(fd, events)
                ready = poll.poll(min(left, 0.5) * 1000)
                poll.unregister(fd)
                if self._lib.iscsi_service(self._context, ready[0][1] if ready else 0) != 0 and self._outcome is None:
                    raise _Broken(f"{self._name}: {what}: {self._error()}")
            outcome = self._outcome
            if outcome[0] >= _STATUS_CANCELLED:
                raise _Broken(f"{self._name}: {what}: {self._error()}")
        except PathFailure:
            self.drop()
            raise
        finally:
            self._outcome = None
        self._keep = []
        self._old_error = self._last_error()
        return outcome

    def _error(self) -> str:
        text = self._last_error()
        # The library keeps the text of an earlier command's error.
        return text if text and text != self._old_error else "the connection broke"

    def _last_error(self) -> str:
        text = self._lib.iscsi_get_error(self._context) if self._context else None
        return " ".join(text.decode(errors="replace").split()) if text else ""


class Iscsi:
    """One I_T nexus to a logical unit, see ``mxfsd.pr.scsi.Transport``. One thread at a time.

    After a failure the next command logs in anew, as the same initiator port (name and ISID), so that a target which
    keeps its registrations finds them.
    """

    def __init__(
        self,
        url: str,
        *,
        initiator: str | None = None,
        isid: int | None = None,
        credentials: tuple[str, str] | None = None,
        timeout_ms: int = TIMEOUT_MS,
    ) -> None:
        """Log in to the target. *isid* (24 bits) random by default; *credentials*: name and secret for CHAP.

        Raises MisuseError, PathFailure, NotOffered.
        """
        self.name = url
        self._url = IscsiUrl.parse(url)
        self._initiator = initiator or DEFAULT_INITIATOR
        self._isid = secrets.randbits(24) if isid is None else isid
        self._credentials = credentials
        self._timeout_ms = timeout_ms
        self._session: _Session | None = self._login()
        self._block: int | None = None

    def _login(self) -> _Session:
        return _Session(self._url, self.name, self._initiator, self._isid, self._credentials, self._timeout_ms)

    def _live(self) -> _Session:
        if self._session is None:
            self._session = self._login()
        return self._session

    def execute(self, cdb: bytes, data_out: bytes, alloc_in: int) -> bytes:
        """See ``Transport``."""
        if data_out and alloc_in:
            raise MisuseError("a command either sends or receives")
        try:
            status, data = self._once(cdb, data_out, alloc_in)
        except _Broken:
            # A connection that broke while nobody looked shows at its next use. What only reads may be sent again.
            if data_out:
                raise
            status, data = self._once(cdb, data_out, alloc_in)
        raise_status(self.name, command_name(cdb), status, data)
        return data

    def _once(self, cdb: bytes, data_out: bytes, alloc_in: int) -> tuple[int, bytes]:
        session = self._live()
        try:
            return session.command(cdb, data_out, alloc_in)
        except PathFailure:
            self._session = None
            raise

    def lun_reset(self) -> None:
        """See ``Transport``."""
        session = self._live()
        try:
            session.lun_reset()
        except PathFailure:
            self._session = None
            session.drop()
            raise

    def spare(self) -> "Iscsi":
        """See ``Transport``: a session of its own, so under another ISID."""
        return Iscsi(self.name, initiator=self._initiator, credentials=self._credentials, timeout_ms=self._timeout_ms)

    def close(self) -> None:
        """Log out; more than once is allowed."""
        session, self._session = self._session, None
        if session is not None:
            session.logout()

    # --- plain block access (a node without kernel SCSI, and the tests that show a fence) ----------------------

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        if self._block is None:
            _, self._block = decode_capacity16(self._run(read_capacity16(), alloc_in=CAPACITY_BYTES))
        return self._block

    def read(self, block: int, count: int = 1) -> bytes:
        """Return *count* blocks from *block* on."""
        return self._run(read16(block, count), alloc_in=count * self.block_bytes)

    def write(self, block: int, data: bytes) -> None:
        """Write whole blocks; they may still be in the write cache of the disk."""
        self._run(write16(block, self._blocks(data)), data)

    def compare_and_write(self, block: int, expected: bytes, data: bytes) -> None:
        """Write *data* if *expected* is there, in one step; CheckCondition with MISCOMPARE if not."""
        if len(expected) != len(data):
            raise MisuseError("both halves of COMPARE AND WRITE have the same length")
        self._run(compare_and_write(block, self._blocks(data)), expected + data)

    def _blocks(self, data: bytes) -> int:
        count, rest = divmod(len(data), self.block_bytes)
        if rest or not count:
            raise MisuseError(f"{len(data)} bytes are no whole blocks of {self.block_bytes}")
        return count

    def _run(self, cdb: bytes, data_out: bytes = b"", alloc_in: int = 0) -> bytes:
        return ScsiNexus(self).run(cdb, data_out, alloc_in)
