"""The kernel's own target (LIO) as the shared disk: it aborts what a fenced node sent, and remembers who was let in."""

import pytest
from cluster import DEVICE, FRESH_MS, Cluster, Node
from storage import DISK_BYTES, Lio
from test_cutoff import finish, go_on, is_out, writers

pytestmark = pytest.mark.timeout(420)

LIMIT_S = 120.0
FREE_BLOCK = (DISK_BYTES - (8 << 20)) // 4096
"""A block of the lockspace that has no record: nobody reads or writes it."""


def target(cluster: Cluster) -> Lio:
    """Return the target's guest."""
    assert isinstance(cluster.storage, Lio)
    return cluster.storage


def kernel_log(node: Node, since: int) -> str:
    """Return what a node's kernel has said after its first *since* lines."""
    return node.must(f"dmesg | tail -n +{since + 1}")


def kernel_lines(node: Node) -> int:
    """Return how many lines a node's kernel has said."""
    return int(node.must("dmesg | wc -l"))


def test_a_fenced_home_s_late_write_is_refused(lio: Cluster) -> None:
    """What it had sent is on its way when the other fences it: PREEMPT AND ABORT, and then it arrives."""
    home, other = lio.heal("n1", "n2")
    assert len(set(lio.keys(other))) == 2
    status = target(lio).state()
    assert status["res_aptpl_active"] == "APTPL Bit Status: Activated"
    assert status["res_pr_type"] == "SPC-3 Reservation Type: Exclusive Access, All Registrants"
    started = writers(lio, [home, other], "late")
    lines, others_lines = kernel_lines(home), kernel_lines(other)
    home.relay.silence()
    late = home.start(
        f"tr '\\0' L </dev/zero | dd of={DEVICE} bs=4096 count=1 seek={FREE_BLOCK} oflag=direct iflag=fullblock"
    )
    go_on(lio, started, [other], "disk of the home silent")
    assert lio.home([other]) is other
    assert len(lio.keys(other)) == 1
    assert not late.ended.is_set(), late.err
    home.relay.restore()
    done = late.wait(LIMIT_S)
    assert done.code != 0, "the write of a fenced node arrived"
    assert "reservation conflict" in kernel_log(home, lines)
    # A target without PREEMPT AND ABORT is fenced with a reset, which every initiator is told of.
    assert "device reset" not in kernel_log(other, others_lines)
    with open(target(lio).image, "rb") as image:
        image.seek(FREE_BLOCK * 4096)
        assert image.read(4096) == bytes(4096)
    is_out(lio, home, started[home])
    finish(started, [other], other, "late")
    assert len(lio.keys(other)) == 1, "it has registered again by itself"
    lio.check()


def test_the_target_restarts_and_remembers(lio: Cluster) -> None:
    """Keys and reservation are there before any node has spoken; nobody has to let himself in again."""
    home, other = lio.heal("n1", "n2")
    started = writers(lio, [home, other], "restart")
    keys = set(lio.keys(other))
    seen = {node: len(node.log()) for node in (home, other)}
    took = lio.restart_target()
    assert set(target(lio).registered()) == keys
    lio.note(f"the target forgot its sessions, and was back after {took:.1f} s")
    go_on(lio, started, [other], "target restarted")
    # Away for longer than the lease it costs the home its XFS, and the home's daemon begins anew, with a new key.
    assert set(lio.keys(other)) & keys
    for node in (home, other):
        assert "lost the reservation" not in node.log()[seen[node] :]
    # With its XFS the home loses what its programs had not synced, and says so to the one that does next.
    started[home].signal(15)
    done = started[home].wait(90)
    assert done.code == 0 or "Input/output error" in done.err, done.err
    finish(started, [other], other, "restart")
    lio.check()


def test_a_session_that_comes_back_in_time(lio: Cluster) -> None:
    """Some seconds without a session cost nobody anything: the target keeps the registration."""
    home, client = lio.heal("n1", "n2")
    started = writers(lio, [home, client], "short")
    keys, lines = set(lio.keys(home)), kernel_lines(client)
    client.relay.cut()
    lio.wait(lambda: "conn error" in kernel_log(client, lines), 30.0, "the kernel sees the end of the session")
    client.relay.restore()
    go_on(lio, started, [home, client], "session lost and back")
    assert set(lio.keys(home)) == keys
    finish(started, [home, client], home, "short")
    lio.check()


def test_a_client_goes_on_without_its_session(lio: Cluster) -> None:
    """What it does goes through the home: it needs the disk to show that it lives, and the network shows that too."""
    home, client = lio.heal("n1", "n2")
    started = writers(lio, [home, client], "client-gone")
    keys, lines = set(lio.keys(home)), kernel_lines(client)
    client.replacement(5)
    client.relay.cut()
    lio.wait(lambda: "session recovery timed out" in kernel_log(client, lines), 60.0, "the kernel gives the disk up")
    lio.wait(lambda: _slot_age_ms(home, client) > 20_000, LIMIT_S, "the slot stands still for longer than a dead one's")
    go_on(lio, started, [home, client], "session of a client lost for long")
    client.relay.restore()
    lio.wait(lambda: _slot_age_ms(home, client) < FRESH_MS, LIMIT_S, "the slot moves again")
    assert set(lio.keys(home)) == keys
    finish(started, [home, client], home, "client-gone")
    lio.check()


def _slot_age_ms(observer: Node, node: Node) -> int:
    """How long the slot of a node has stood still for another one."""
    (row,) = [one for one in observer.status()["nodes"] if one["name"] == node.name]
    return int(row["age_ms"])


def test_a_home_whose_session_stays_away_is_replaced(lio: Cluster) -> None:
    """Longer away than the kernel waits and than a dead node's time: fenced, and out also when the session is back."""
    home, other = lio.heal("n1", "n2")
    started = writers(lio, [home, other], "home-gone")
    home.replacement(5)
    home.relay.cut()
    took = lio.wait(lambda: len(lio.keys(other)) == 1, LIMIT_S, "the home is fenced")
    lio.note(f"session of the home lost: fenced after {took:.0f} s")
    home.relay.restore()
    is_out(lio, home, started[home])
    go_on(lio, started, [other], "session of the home lost")
    assert lio.home([other]) is other
    assert len(lio.keys(other)) == 1, "it has registered again by itself"
    finish(started, [other], other, "home-gone")
    lio.check()
