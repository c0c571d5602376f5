"""What is counted of operations and locks: buckets, nodes that come and go, a home that ends, quantiles."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Op
from mxfsd.core.dlm import LockMaster
from mxfsd.figures import BUCKETS_S, TOTALS, Figures, Histogram, quantile


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.0005, 0), (0.00051, 1), (0.001, 1), (0.3, 9), (10.0, 13), (10.01, 14), (3600.0, 14)],
)
def test_a_time_goes_into_the_first_bucket_whose_bound_it_does_not_exceed(seconds: float, bucket: int) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    assert [at for at, count in enumerate(histogram.counts) if count] == [bucket]
    assert histogram.sum_s == seconds


def test_operations_are_counted_by_node_and_name() -> None:
    figures = Figures()
    figures.joined(1, "n1")
    figures.joined(2, "n2")
    for seconds in (0.0001, 0.02, 0.0002):
        figures.of(2).ended(Op.CREATE, seconds)
    figures.of(2).ended(Op.LK_CANCEL, 99.0)  # the last code
    figures.of(2).bytes_written += 7
    idle, busy = figures.nodes()
    assert (idle["node"], idle["operations"], idle["bytes_written"]) == ("n1", {}, 0)
    assert (busy["slot"], busy["node"], busy["bytes_written"]) == (2, "n2", 7)
    assert set(busy["operations"]) == {"CREATE", "LK_CANCEL"}
    assert busy["operations"]["CREATE"]["counts"] == [2, 0, 0, 0, 0, 1] + [0] * 9
    assert busy["operations"]["CREATE"]["sum_s"] == pytest.approx(0.0203)
    assert busy["operations"]["LK_CANCEL"]["counts"][-1] == 1


def test_what_is_handed_out_does_not_change_any_more() -> None:
    figures = Figures()
    figures.of(1).ended(Op.READ, 0.1)
    before = figures.nodes()
    figures.of(1).ended(Op.READ, 0.1)
    assert sum(before[0]["operations"]["READ"]["counts"]) == 1


def test_a_node_that_comes_back_goes_on_and_another_one_in_its_slot_begins_at_nothing() -> None:
    figures = Figures()
    figures.joined(2, "n2")
    figures.of(2).basts += 3
    figures.joined(2, "n2")
    assert [node["basts"] for node in figures.nodes()] == [3]
    figures.joined(2, "other")
    assert [(node["node"], node["basts"]) for node in figures.nodes()] == [("other", 0)]


def test_a_name_stands_for_one_slot() -> None:
    figures = Figures()
    figures.joined(2, "n2")
    figures.joined(3, "n2")
    assert [(node["slot"], node["node"]) for node in figures.nodes()] == [(3, "n2")]


def test_totals_do_not_go_back_when_the_home_moves_away_and_comes_back() -> None:
    figures = Figures()
    counted = dict.fromkeys(TOTALS, 5)
    assert figures.totals(counted)["grants"] == 5
    figures.home_ended(counted)
    assert figures.totals({})["grants"] == 5
    assert figures.totals(dict.fromkeys(TOTALS, 1))["grants"] == 6
    figures.put_out += 1
    assert figures.totals({})["put_out"] == 1


def test_quantiles() -> None:
    nothing = [0] * 15
    assert quantile(nothing, 0.5) is None
    one = [*nothing]
    one[3] = 10  # all between 2.5 and 5 ms
    assert quantile(one, 0.5) == pytest.approx(0.00375)
    assert quantile(one, 1.0) == 0.005
    two = [*nothing]
    two[0], two[14] = 98, 2
    assert quantile(two, 0.5) == pytest.approx(0.0005 * 50 / 98)
    assert quantile(two, 0.99) == BUCKETS_S[-1]


@given(st.lists(st.floats(0, 9.9), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_lies_in_the_bucket_of_the_value_that_it_stands_for(times: list[float], share: float) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.add(seconds)
    found = quantile(histogram.counts, share)
    assert found is not None
    exact = sorted(times)[max(0, -int(-share * len(times) // 1) - 1)]
    bounds = (0.0, *BUCKETS_S)
    at = next(at for at, bound in enumerate(BUCKETS_S) if exact <= bound)
    assert bounds[at] <= found <= bounds[at + 1] + 1e-12


_events = st.lists(
    st.tuples(
        st.sampled_from(
            ["request", "operation", "release", "ended", "gone", "opens", "reclaim", "grant", "grace", "tick"]
        ),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([LockMode.PR, LockMode.PW, LockMode.EX]),
    ),
    max_size=40,
)


@given(st.sampled_from([None, 1]), _events)
def test_the_master_counts_the_locks_that_each_node_has(
    home: int | None, events: list[tuple[str, int, int, LockMode]]
) -> None:
    dlm = LockMaster(home, SimpleNamespace(lock_wait_ms=3000, bast_ms=1000, min_hold_ms=1), linger_ms=5)
    for number, (what, node, ino, mode) in enumerate(events, 1):
        match what:
            case "request":
                dlm.request(number, node, number, ino, mode, LockFlag.OPEN, (1, 0))
            case "operation":
                dlm.op_request(number, node, number, ino, mode)
            case "ended":
                for op_id in range(number):
                    dlm.op_release(number, op_id, ino)
            case "release":
                dlm.release(number, node, ino, dlm.seq_of(node, ino), LockMode.NL, (0, 0))
            case "gone":
                dlm.node_gone(number, node)
            case "opens":
                dlm.opens_update(number, node, ino, (0, 1))
            case "reclaim":
                dlm.reclaim(number, node, ino, mode, (0, 0))
            case "grant":
                dlm.grant_with_op(number, node, ino, mode)
            case "grace":
                dlm.grace_over(number)
            case _:
                dlm.tick(number)
        views = list(dlm.snapshot(number))
        held = Counter(holder.node for view in views for holder in view.holders if not holder.op_id)
        assert {n: count for n, count in dlm.held.items() if count} == dict(held)
        assert dlm.waiting() == dict(Counter(waiter.node for view in views for waiter in view.waiters))
