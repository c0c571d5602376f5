"""The path to the disk: slow, gone for a moment, gone for long, and a target that has forgotten everything."""

import time

import pytest
from cluster import MOUNTPOINT, REPLACEMENT_S, Cluster
from test_cutoff import finish, go_on, is_out, writers

pytestmark = pytest.mark.timeout(420)

LIMIT_S = 120.0


def test_a_slow_disk_is_no_dead_node(cluster: Cluster) -> None:
    home, client = cluster.heal("n1", "n2")
    started = writers(cluster, [home, client], "slow")
    for node in (home, client):
        node.relay.delay_s = 0.1
    time.sleep(25)
    counts = {node: len(writer.lines()) for node, writer in started.items()}
    time.sleep(5)
    assert all(len(started[node].lines()) > counts[node] for node in started), "nothing is written any more"
    for node in (home, client):
        node.relay.restore()
    assert cluster.home([home, client]) is home
    assert len(cluster.keys(home)) == 2
    finish(started, [home, client], client, "slow")
    cluster.check()


def test_a_target_that_forgot_everything(cluster: Cluster) -> None:
    """tgtd is killed and started again: sessions, registrations and reservation are gone, the data is there."""
    assert cluster.storage is not None
    home, client = cluster.heal("n1", "n2")
    started = writers(cluster, [home, client], "restart")
    before = cluster.keys(home)
    cluster.storage.restart()
    took = cluster.wait(lambda: len(cluster.keys(cluster["n3"])) == 2, LIMIT_S, "both are registered again")
    cluster.note(f"target restarted: both nodes registered again after {took:.0f} s")
    assert "all registrants" in cluster.reservation(cluster["n3"])
    go_on(cluster, started, [home, client], "target restarted")
    finish(started, [home, client], client, "restart")
    assert len(before) == 2
    cluster.check()


@pytest.mark.parametrize("seconds", [3, REPLACEMENT_S + 20])
def test_the_home_loses_its_session(cluster: Cluster, seconds: int) -> None:
    """tgtd forgets the registration of a session that ends: the home is shut out in both cases, and says so."""
    home, client = cluster.heal("n1", "n2")
    started = writers(cluster, [home, client], f"session-{seconds}")
    home.relay.cut()
    time.sleep(seconds)
    home.relay.restore()
    go_on(cluster, started, [client], f"session of the home lost for {seconds} s")
    assert cluster.home([client]) is client
    is_out(cluster, home, started[home])
    finish(started, [client], client, f"session-{seconds}")
    cluster.check()
    home.mount()
    assert home.must(f"ls {MOUNTPOINT} | wc -l") == client.must(f"ls {MOUNTPOINT} | wc -l")


def test_a_client_loses_its_session(cluster: Cluster) -> None:
    home, client = cluster.heal("n1", "n2")
    started = writers(cluster, [home, client], "client-session")
    client.relay.cut()
    go_on(cluster, started, [home], "session of a client lost")
    client.relay.restore()
    assert cluster.home([home]) is home
    finish(started, [home], home, "client-session")
    cluster.check()
