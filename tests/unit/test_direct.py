"""The connection over which a node's FUSE layer sends operations past its daemon: whom it belongs to, when it ends."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from twodaemons import Cluster, Quiet, cluster, until

from mxfs_fuse.direct import connect_home
from mxfs_fuse.link import OperationLink
from mxfs_fuse.main import Server
from mxfs_proto.errors import IoFailure, MxfsError, PeerError
from mxfs_proto.frames import Frame, FrameType, pack_json, unpack_json
from mxfs_proto.ops import Op, pack_reply
from mxfs_proto.records import RecoveryDone
from mxfsd.clientrole import ClientRole
from mxfsd.io.peers import PeerConnection


class Fuse:
    """The FUSE layer's end."""

    def __init__(self) -> None:
        self.frames: list[FrameType] = []
        self.lost: list[MxfsError | None] = []

    async def connect(self, fields: dict[str, Any]) -> PeerConnection:
        return await connect_home(
            fields,
            lambda _conn, frame: self.frames.append(frame.type),
            lambda _conn, error: self.lost.append(error),
        )


class Home:
    """Stands for the home's role: notes the operations, and answers them."""

    def __init__(self, both: Cluster) -> None:
        self.operations: list[tuple[int, int]] = []
        self.daemon: Any = both.home
        self.before = self.daemon.home
        self.daemon.home = self
        self.daemon.serving = True
        self.daemon.succession = Quiet()

    def on_operation(self, slot: int, frame: Frame) -> None:
        self.operations.append((slot, frame.seq))
        self.daemon._send_reply(slot, FrameType.OP_REPLY, [b""], frame.session, frame.seq)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


class Setup:
    def __init__(self, both: Cluster) -> None:
        self.home: Any = both.home
        self.node: Any = both.node
        self.role = Home(both)
        self.fuse = Fuse()

    async def join(self) -> dict[str, Any]:
        """The node's daemon joins, and has named what it holds. Return what it tells its FUSE layer."""
        if self.node.client is not None:
            self.node.client._closed = True  # when the home ends its connection, it makes no other
        self.node.client = ClientRole(self.node)
        await self.node.client.connect()
        self.node.client._conn.send(FrameType.RECLAIM_DONE, pack_json({"rows": 0}), epoch=5)
        await until(lambda: self.node.serving)
        fields: dict[str, Any] = self.node.client.direct()
        return fields

    def main(self) -> PeerConnection:
        conn: PeerConnection = self.home.peers[2]
        return conn


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    async with cluster(tmp_path) as both:
        yield Setup(both)


async def test_operations_and_their_replies_go_past_the_daemon(setup: Setup) -> None:
    conn = await setup.fuse.connect(await setup.join())
    conn.send(FrameType.OP_REQ, b"", epoch=5, session=8, seq=3)
    await until(lambda: setup.fuse.frames == [FrameType.OP_REPLY])
    assert setup.role.operations == [(2, 3)]
    assert "frame" not in setup.node.fuse.calls
    conn.abort()


async def test_only_who_has_the_token_joins(setup: Setup) -> None:
    fields = await setup.join()
    with pytest.raises(PeerError):
        await setup.fuse.connect(fields | {"token": fields["token"] ^ 2})
    assert setup.home.direct.of(setup.main()) is setup.main()


async def test_another_node_in_the_homes_place_is_not_the_home(setup: Setup) -> None:
    fields = await setup.join()
    with pytest.raises(PeerError):
        await setup.fuse.connect(fields | {"incarnation": fields["incarnation"] + 1})


async def test_it_ends_with_the_connection_of_the_daemons(setup: Setup) -> None:
    conn = await setup.fuse.connect(await setup.join())
    setup.node.client._conn.abort()
    setup.node.client._closed = True
    await until(lambda: len(setup.fuse.lost) == 1)
    conn.send(FrameType.OP_REQ, b"", epoch=5, session=8, seq=3)
    await until(lambda: 2 not in setup.home.peers)
    assert setup.role.operations == []


async def test_an_old_one_does_not_count_beside_a_new_connection_of_the_daemons(setup: Setup) -> None:
    """What was sent before the node named what it holds is said again over the new one."""
    old = await setup.join()
    conn = await setup.fuse.connect(old)
    main = setup.main()
    await setup.join()
    assert setup.main() is not main
    conn.send(FrameType.OP_REQ, b"", epoch=5, session=8, seq=3)
    await until(lambda: len(setup.fuse.lost) == 1)
    assert setup.role.operations == []
    with pytest.raises(PeerError):
        await setup.fuse.connect(old)


@pytest.mark.parametrize("missing", ["peers", "_named"], ids=["is a peer no more", "has not named what it holds"])
async def test_the_home_serves_nobody_over_it_who(setup: Setup, log_guard: list[str], missing: str) -> None:
    conn = await setup.fuse.connect(await setup.join())
    del getattr(setup.home, missing)[2]
    conn.send(FrameType.OP_REQ, b"", epoch=5, session=8, seq=3)
    conn.send(FrameType.LOCK, b"")  # which ends it
    await until(lambda: len(setup.fuse.lost) == 1)
    assert setup.role.operations == []
    assert any("unexpected LOCK" in line for line in log_guard)
    log_guard.clear()


async def test_without_it_replies_go_through_the_daemon(setup: Setup) -> None:
    conn = await setup.fuse.connect(await setup.join())
    assert setup.home.direct.of(setup.main()) is not setup.main()
    conn.abort()
    await until(lambda: setup.home.direct.of(setup.main()) is setup.main())
    assert 2 in setup.home.peers


async def test_a_node_whose_fuse_layer_lost_it_makes_both_anew(setup: Setup) -> None:
    conn = await setup.fuse.connect(await setup.join())
    main = setup.main()
    conn.abort()
    setup.node._on_fuse_frame(Frame(FrameType.FREEZE, 0, 0, 0, pack_json({"cut": "closed"})))
    assert not setup.node.serving and setup.node.fuse.calls[-1] == "freeze"
    await until(lambda: setup.home.peers.get(2) not in (None, main))
    await asyncio.sleep(0)


async def test_a_home_that_moves_ends_it_behind_the_last_reply(setup: Setup) -> None:
    conn = await setup.fuse.connect(await setup.join())
    setup.home._send_reply(2, FrameType.OP_REPLY, [bytes(1 << 20)], 8, 3)
    main = setup.main()
    main.close()
    setup.home.direct.end(main)
    await until(lambda: len(setup.fuse.lost) == 1)
    assert setup.fuse.frames == [FrameType.OP_REPLY] and setup.fuse.lost == [None]
    conn.abort()


# -- the FUSE layer: when operations take which way --------------------------------------------------------------------


class Wire:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[FrameType, Any, int]] = []
        self.aborted = self.closed = False

    def send(self, kind: FrameType, parts: Any, epoch: int = 0, session: int = 0, seq: int = 0) -> None:
        self.sent.append((kind, parts, seq))

    def abort(self) -> None:
        self.aborted = True

    def sequences(self) -> list[int]:
        return [seq for kind, _, seq in self.sent if kind is FrameType.OP_REQ]


class Layer:
    """A FUSE layer whose connection to the home comes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.daemon, self.home = Wire(), Wire()
        self.connected: asyncio.Future[Wire] = asyncio.get_running_loop().create_future()
        self.on_lost: Any = None
        self.on_frame: Any = None
        monkeypatch.setattr("mxfs_fuse.direct.connect_home", self.connect)
        self.link = OperationLink(lambda _grants: None)
        self.link.attach(self.daemon)  # type: ignore[arg-type]
        server: Any = Server.__new__(Server)
        self.gate = "closed"
        server.state = SimpleNamespace(
            link=self.link,
            locks=MagicMock(),
            lower=None,
            nodes={},
            open_gate=lambda: setattr(self, "gate", "open"),
            close_gate=lambda: setattr(self, "gate", "closed"),
        )
        server.operations, server._conn = MagicMock(), self.daemon
        server._resumes, server._held_back, server._recorded = deque(), None, []
        server._frozen, server._lapsed, server._outage = True, False, None
        self.server = server

    async def connect(self, fields: dict[str, Any], on_frame: Any, on_lost: Any) -> Wire:
        assert fields == {"host": "h"}
        self.on_frame, self.on_lost = on_frame, on_lost
        return await asyncio.shield(self.connected)

    def resume(self, epoch: int = 3) -> None:
        payload = pack_json({"epoch": epoch, "home": 1, "implicit": False, "direct": {"host": "h"}})
        self.server._frame_came(self.daemon, Frame(FrameType.RESUME, epoch, 0, 0, payload))

    def ship(self) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self.link.ship(Op.REAP, 0, 0, (1, 2)))

    def reply(self, seq: int, epoch: int = 3) -> Frame:
        return Frame(FrameType.OP_REPLY, epoch, self.link.session, seq, b"".join(pack_reply(Op.REAP, [], [])))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    return Layer(monkeypatch)


@pytest.mark.parametrize("first", ["frame", "record"])
async def test_a_home_is_served_from_once_the_way_to_it_is_there(layer: Layer, first: str) -> None:
    """All that was not answered takes that way, and nothing the other."""
    asked = layer.ship()
    done = RecoveryDone(3, 1)
    if first == "frame":
        layer.resume()
        layer.server._on_record(done)
    else:
        layer.server._on_record(done)
        layer.resume()
    await turns()
    assert layer.gate == "closed" and layer.daemon.sequences() == []
    layer.connected.set_result(layer.home)
    await turns()
    assert layer.gate == "open" and layer.home.sequences() == [1]
    layer.on_frame(layer.home, layer.reply(1))
    assert await asked == ([], [])
    assert layer.daemon.sequences() == []


async def test_without_a_way_of_its_own_operations_go_through_the_daemon(layer: Layer) -> None:
    layer.resume()
    layer.server._on_record(RecoveryDone(3, 1))
    layer.connected.set_exception(IoFailure("no route"))
    await turns()
    layer.ship()
    await turns()
    assert layer.gate == "open" and layer.daemon.sequences() == [1]


async def test_what_was_under_way_when_it_is_lost_waits_for_the_next_resumption(layer: Layer) -> None:
    layer.resume()
    layer.server._on_record(RecoveryDone(3, 1))
    layer.connected.set_result(layer.home)
    await turns()
    asked = layer.ship()
    await turns()
    layer.on_lost(layer.home, IoFailure("reset"))
    assert layer.gate == "closed"
    kind, parts, _ = layer.daemon.sent[-1]
    assert kind is FrameType.FREEZE and unpack_json(b"".join(parts)) == {"cut": "reset"}
    layer.ship()
    await turns()
    layer.on_frame(layer.home, layer.reply(1))  # it came too late: what it grants may be another's by now
    assert layer.daemon.sequences() == [] and not asked.done()
    layer.home, layer.connected = Wire(), asyncio.get_running_loop().create_future()
    layer.resume()
    layer.server._on_record(RecoveryDone(3, 1))
    layer.connected.set_result(layer.home)
    await turns()
    assert layer.home.sequences() == [1, 2]


async def test_it_ends_when_operations_are_held_back(layer: Layer) -> None:
    layer.resume()
    layer.server._on_record(RecoveryDone(3, 1))
    layer.connected.set_result(layer.home)
    await turns()
    layer.server._freeze()
    assert layer.home.aborted
    layer.daemon.sent.clear()
    layer.on_lost(layer.home, None)  # of what is not ours any more nobody is told
    assert layer.daemon.sent == []


async def test_a_resumption_that_came_before_the_daemon_died_leaves_no_connection(layer: Layer) -> None:
    layer.resume()
    resume = layer.server._resumes[0]
    await turns()
    layer.server.state.dead = False
    layer.server._reattaching, layer.server._netlink = None, MagicMock()
    layer.server._outage = object()
    layer.server._drop_kernel_caches = lambda: None
    layer.server._reattach = lambda _outage: asyncio.sleep(0)
    layer.server._daemon_gone()
    layer.connected.set_result(layer.home)
    await turns()
    assert layer.home.aborted and resume.direct.done() and layer.gate == "closed"


async def test_one_that_is_lost_before_operations_go_on_is_made_anew(layer: Layer) -> None:
    layer.resume()
    layer.connected.set_result(layer.home)
    await turns()
    layer.home.closed = True
    layer.on_lost(layer.home, IoFailure("reset"))
    assert layer.daemon.sent == [], "no operation goes over it yet"
    layer.server._on_record(RecoveryDone(3, 1))
    await turns()
    assert layer.gate == "closed"
    kind, parts, _ = layer.daemon.sent[-1]
    assert kind is FrameType.FREEZE and "cut" in unpack_json(b"".join(parts))
