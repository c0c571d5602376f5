"""The control socket: both halves against each other over a real Unix socket."""

import asyncio
import errno
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure, MisuseError, PeerError
from mxfsd import control
from mxfsd.control import ControlServer, NotRunning, RequestFailed


async def _echo(fields: dict[str, Any]) -> dict[str, Any]:
    return {"got": fields}


async def _refuse(fields: dict[str, Any]) -> dict[str, Any]:
    raise MisuseError("no such node: n9", errno.ENOENT)


async def _bug(fields: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError("oops")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "control.sock"
    running = ControlServer(path, {"echo": _echo, "refuse": _refuse, "bug": _bug})
    await running.start()
    yield path
    await running.close()
    assert not path.exists()


async def _ask(path: Path, cmd: str, **arguments: Any) -> dict[str, Any]:
    return await asyncio.to_thread(control.request, path, cmd, 5.0, **arguments)


async def test_request_and_reply(server: Path) -> None:
    assert (await _ask(server, "echo", node="n1"))["got"] == {"cmd": "echo", "node": "n1"}
    assert (await _ask(server, "ping"))["ok"] is True
    assert server.stat().st_mode & 0o777 == 0o600


async def test_errors_reach_the_client_with_their_errno(server: Path) -> None:
    with pytest.raises(RequestFailed, match="no such node: n9") as caught:
        await _ask(server, "refuse")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(RequestFailed, match="unknown command dance; known are bug, echo, ping, refuse"):
        await _ask(server, "dance")


@pytest.mark.error_logs
async def test_a_bug_in_a_handler_is_logged_and_answered(server: Path, log_guard: list[str]) -> None:
    with pytest.raises(RequestFailed, match="internal error: ZeroDivisionError: oops"):
        await _ask(server, "bug")
    assert any("control request failed" in line for line in log_guard)
    assert (await _ask(server, "ping"))["ok"] is True


async def _raw(path: Path, data: bytes, *, eof: bool = False) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    if eof:
        writer.write_eof()
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"{\n", "the request is not JSON"),
        (b"\xff\xfe\n", "the request is not JSON"),
        (b"[1]\n", "the request is not an object with a cmd"),
        (b'{"cmd": 3}\n', "the request is not an object with a cmd"),
        (b"x" * (control.REQUEST_MAX + 1), f"a request of more than {control.REQUEST_MAX} bytes"),
    ],
)
async def test_bad_requests_are_answered_with_the_reason(server: Path, data: bytes, error: str) -> None:
    assert json.loads(await _raw(server, data))["error"] == error


async def test_half_a_request_gets_no_answer_and_harms_nobody(server: Path) -> None:
    assert await _raw(server, b'{"cmd": "ping"', eof=True) == b""
    assert (await _ask(server, "ping"))["ok"] is True


async def test_several_requests_in_order_byte_by_byte(server: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server))
    for byte in b'{"cmd": "echo", "n": 1}\n{"cmd": "echo", "n": 2}\n':
        writer.write(bytes([byte]))
        await writer.drain()
    assert [json.loads(await reader.readline())["got"]["n"] for _ in range(2)] == [1, 2]
    writer.close()
    await writer.wait_closed()


async def test_a_live_socket_is_not_taken_and_a_stale_one_is(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert not control.answers(path)
    first = ControlServer(path, {})
    await first.start()
    second = ControlServer(path, {})

    def try_second() -> None:
        asyncio.run(second.start())

    with pytest.raises(MisuseError, match="another daemon is running"):
        await asyncio.to_thread(try_second)
    assert (await _ask(path, "ping"))["ok"] is True
    await first.close()


async def test_close_from_within_a_handler(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def stop(fields: dict[str, Any]) -> dict[str, Any]:
        await server.close()
        return {"stopped": True}

    server = ControlServer(path, {"stop": stop})
    await server.start()
    assert (await _ask(path, "stop"))["stopped"] is True
    assert not path.exists()


async def test_paths_longer_than_a_socket_address(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    server = ControlServer(folder / "control.sock", {})
    await server.start()
    assert (await _ask(folder / "control.sock", "ping"))["ok"] is True
    assert control.find_sockets(tmp_path) == [folder / "control.sock"]
    await server.close()


def _canned(path: Path, answer: bytes) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "kind", "error"),
    [
        (b"", IoFailure, "closed the connection"),
        (b'{"ok": true}', IoFailure, "closed the connection"),
        (b"nonsense\n", PeerError, "is not JSON"),
        (b"[]\n", PeerError, "not a reply object"),
        (b'{"ok": 1}\n', PeerError, "not a reply object"),
    ],
)
def test_bad_replies(tmp_path: Path, answer: bytes, kind: type[Exception], error: str) -> None:
    thread = _canned(tmp_path / "s", answer)
    with pytest.raises(kind, match=error):
        control.request(tmp_path / "s", "status")
    thread.join()


def test_a_reply_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REPLY_MAX", 1000)
    thread = _canned(tmp_path / "s", b"x" * 1001)
    with pytest.raises(PeerError, match="control reply of more than 1000 bytes"):
        control.request(tmp_path / "s", "status")
    thread.join()


def test_a_socket_that_cannot_be_reached() -> None:
    with pytest.raises(IoFailure, match=r"^/dev/null/s: Not a directory$") as caught:
        control.request("/dev/null/s", "status")
    assert caught.value.errno == errno.ENOTDIR


def test_silence_times_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(IoFailure, match=r"no answer to status within 0\.05 s") as caught:
            control.request(tmp_path / "s", "status", 0.05)
        assert caught.value.errno == errno.ETIMEDOUT
        # Too busy to answer is still running.
        assert control.answers(tmp_path / "s", 0.05)


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no daemon is running"):
        control.request(tmp_path / "absent", "status")
    assert control.find_sockets(tmp_path) == []
