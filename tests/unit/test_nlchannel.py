"""The netlink channel's core: exactly once and in order, over a seeded lossy, reordering, duplicating wire."""

import random
from dataclasses import dataclass, field

import pytest

from mxfs_proto.errors import MisuseError, PeerError
from mxfs_proto.records import LockDeny, Record, StatusReq, StatusResp
from mxfsd.core.nlchannel import ChannelConfig, NlChannel

CONFIG = ChannelConfig(window=16, ack_every=5, ack_delay_ms=20, resend_ms=200)
Wire = list[tuple[int, int, Record]]


def record(n: int) -> LockDeny:
    return LockDeny(n, 0, 0)


@dataclass
class End:
    """One end with what it delivered; the wire to the other end is a plain list."""

    channel: NlChannel = field(default_factory=lambda: NlChannel(CONFIG))
    got: list[int] = field(default_factory=list)
    wire: Wire = field(default_factory=list)
    submitted: int = 0

    def send(self, count: int) -> None:
        for _ in range(count):
            self.submitted += 1
            self.channel.submit(record(self.submitted))

    def flush(self, now: int, room: int = 1 << 30) -> None:
        while len(self.wire) < room and (batch := self.channel.peek(3)):
            first = self.channel.next_number
            self.wire += ((first + i, self.channel.acknowledgement, r) for i, r in enumerate(batch))
            self.channel.advance(now, len(batch))
        report = self.channel.control()
        if report is not None and len(self.wire) < room:
            self.wire.append((0, self.channel.acknowledgement, report))
            self.channel.control_sent(report, now)

    def take(self, now: int, message: tuple[int, int, Record]) -> None:
        delivered = self.channel.receive(now, *message)
        if delivered is not None:
            assert isinstance(delivered, LockDeny)
            self.got.append(delivered.req_id)

    def tick(self, now: int) -> None:
        report = self.channel.tick(now)
        if report is not None:
            self.wire.append((0, self.channel.acknowledgement, report))
            self.channel.control_sent(report, now)


def play(seed: int, end_ms: int = 60_000) -> tuple[End, End]:
    """Both ends send bursts for a second; faults stop after three, by the end everything must have arrived."""
    rng = random.Random(seed)
    a, b = End(), End()
    loss, swap, double, overrun = (rng.choice((0, 0.05, 0.4)) for _ in range(4))
    for now in range(0, end_ms, 5):
        faulty = now < 3000
        for sender, receiver in ((a, b), (b, a)):
            if now < 1000 and rng.random() < 0.1:
                sender.send(rng.choice((1, 3, 60)))
            sender.flush(now, room=rng.choice((2, 8, 64)) if faulty else 1 << 30)
            arriving, sender.wire = sender.wire, []
            if faulty and rng.random() < swap:
                rng.shuffle(arriving)
            for message in arriving:
                if faulty and rng.random() < loss:
                    if rng.random() < overrun:
                        receiver.channel.overrun()
                    continue
                receiver.take(now, message)
                if faulty and rng.random() < double:
                    receiver.take(now, message)
            assert len(sender.got) <= receiver.submitted
            if now % 20 == 0 and sender.channel.busy:
                sender.tick(now)
        if not faulty and not a.channel.busy and not b.channel.busy and not a.wire and not b.wire:
            break
    return a, b


@pytest.mark.parametrize("chunk", range(10))
def test_nothing_lost_nothing_twice_in_order(chunk: int) -> None:
    for seed in range(chunk * 30, chunk * 30 + 30):
        a, b = play(seed)
        assert a.got == list(range(1, b.submitted + 1)), f"seed {seed}"
        assert b.got == list(range(1, a.submitted + 1)), f"seed {seed}"
        assert not a.channel.busy and not b.channel.busy, f"seed {seed}: the window did not drain"


def test_the_faults_of_the_seeds_are_met() -> None:
    ends = [end for seed in range(40) for end in play(seed)]
    assert sum(e.channel.gaps for e in ends) > 100
    assert sum(e.channel.resends for e in ends) > 100
    assert sum(e.channel.duplicates for e in ends) > 100


def test_a_receiver_that_took_records_twice_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = NlChannel.receive

    def forgetful(self: NlChannel, now_ms: int, number: int, ack: int, item: Record) -> Record | None:
        got = honest(self, now_ms, number, ack, item)
        return item if got is None and number else got

    monkeypatch.setattr(NlChannel, "receive", forgetful)
    with pytest.raises(AssertionError):
        for seed in range(20):
            a, b = play(seed, 5000)
            assert a.got == list(range(1, b.submitted + 1))


def test_the_window_caps_what_is_on_the_wire() -> None:
    a, b = End(), End()
    a.send(40)
    a.flush(0)
    assert len(a.wire) == 16 and a.channel.pending == 40
    for message in a.wire:
        b.take(0, message)
    b.flush(0)  # 16 > ack_every: the acknowledgement does not wait
    assert b.wire == [(0, 16, StatusResp(0, 16))]
    a.wire = []
    a.take(0, b.wire[0])
    a.flush(0)
    assert [number for number, _, _ in a.wire] == list(range(17, 33))


def test_an_idle_receiver_acknowledges_after_the_delay_only() -> None:
    a, b = End(), End()
    a.send(1)
    a.flush(0)
    b.take(5, a.wire[0])
    assert b.channel.control() is None
    assert b.channel.tick(24) is None
    assert b.channel.tick(25) == StatusResp(0, 1)
    assert b.channel.busy
    b.tick(25)
    assert not b.channel.busy
    a.take(26, b.wire[0])
    assert not a.channel.busy


def test_an_acknowledgement_rides_on_a_record() -> None:
    a, b = End(), End()
    a.send(1)
    a.flush(0)
    b.take(0, a.wire[0])
    b.send(1)
    b.flush(1)
    assert b.wire[0][:2] == (1, 1)
    assert b.channel.tick(100) is None  # nothing owed any more, and the peer is not late yet
    a.take(1, b.wire[0])
    assert a.channel.pending == 0


def test_a_lost_last_record_is_found_by_asking() -> None:
    a, b = End(), End()
    a.send(1)
    a.flush(0)
    a.wire.clear()  # lost
    assert a.channel.tick(199) is None
    a.tick(200)
    assert a.wire == [(0, 0, StatusReq(1, 0, False))]
    b.take(201, a.wire.pop())
    b.flush(201)
    assert b.wire == [(0, 0, StatusReq(0, 0, True))]
    a.take(202, b.wire.pop())
    a.flush(202)
    b.take(203, a.wire[0])
    assert b.got == [1]


def test_a_gap_is_reported_once_until_it_is_old() -> None:
    a, b = End(), End()
    a.send(4)
    a.flush(0)
    for message in a.wire[1:]:
        b.take(10, message)
    assert b.got == []
    b.flush(10)
    assert b.wire == [(0, 0, StatusReq(0, 0, True))]
    b.take(30, a.wire[3])
    b.flush(30)
    assert len(b.wire) == 1
    assert b.channel.tick(210) == StatusReq(0, 0, True)


def test_a_failed_send_is_made_again() -> None:
    a = End()
    a.send(1)
    assert a.channel.peek() == a.channel.peek() == [record(1)]
    assert a.channel.next_number == 1
    a.channel.overrun()
    assert a.channel.control() == a.channel.control() == StatusReq(0, 0, True)


def test_what_a_peer_may_not_do() -> None:
    channel = NlChannel(CONFIG)
    with pytest.raises(PeerError, match="was acknowledged"):
        channel.receive(0, 1, 1, record(1))
    with pytest.raises(PeerError, match="was acknowledged"):
        channel.receive(0, 0, 0, StatusResp(0, 5))
    with pytest.raises(PeerError, match="without a channel sequence"):
        channel.receive(0, 0, 0, record(1))


def test_limits_that_would_stall_are_refused() -> None:
    with pytest.raises(MisuseError):
        ChannelConfig(window=8, ack_every=8)
    with pytest.raises(MisuseError):
        ChannelConfig(ack_delay_ms=300)
