"""The benchmark's verdicts and table, from made-up figures."""

from pathlib import Path

from bench.report import ROWS, Figures, save_json, table

TITLES = {"native": "native XFS", "passthrough": "passthroughfs", "home": "MXFS home", "node": "MXFS node"}


def made_up(home: float = 90.0, node: float = 50.0) -> Figures:
    """Native 100, passthroughfs 100, and the given rates for the rest."""
    rates = {
        key: {row: [value * 0.9, value, value * 1.1] for row in ROWS}
        for key, value in (("native", 100.0), ("passthrough", 100.0), ("home", home), ("node", node))
    }
    return Figures(rates=rates, hand_over={key: {"hand-over data": [1.0, 2.0, 9.0]} for key in TITLES})


def test_every_row_has_the_targets_of_its_class() -> None:
    figures = made_up()
    wanted = {row: {column: v.target for column, v in figures.row_targets(row).items()} for row in ROWS}
    assert wanted["create"] == {"home": 0.8, "node": 0.25}
    assert wanted["stat first"] == {"home": 0.8}
    assert wanted["rand read 4 KiB first"] == {"home": 0.8, "node": 0.4}
    assert wanted["fstat, open file"] == {"home": 0.8, "node": 0.8}


def test_the_kernels_own_speed_is_compared_with_native() -> None:
    figures = made_up()
    figures.rates["kernel"] = {row: [79.0, 81.0, 82.0] for row in ROWS}
    assert figures.row_targets("rand write 4 KiB")["kernel"].met
    assert "kernel" not in figures.row_targets("create")
    figures.rates["kernel"]["rand write 4 KiB"] = [79.0]
    assert not figures.row_targets("rand write 4 KiB")["kernel"].met


def test_verdicts_say_which_side_was_missed() -> None:
    figures = made_up(home=79.0, node=30.0)
    assert not figures.row_targets("create")["home"].met
    assert figures.row_targets("create")["node"].met
    assert figures.row_targets("seq write 1 MiB")["node"].word == "MISS"
    figures.second_mount_s = [1.0, 1.4, 9.0]
    figures.lock_from_cache_us = 20.5
    figures.memory = {"n1": {"mxfsd (1)": {"rss": 150.0, "pss": 100.0}, "mxfs_fuse (2)": {"rss": 150.0, "pss": 95.0}}}
    by_name = {verdict.name: verdict.met for verdict in figures.verdicts()}
    assert by_name["second mount, s"]
    assert not by_name["lock from cache, µs"]
    assert by_name["hand-over data, median ms"]
    assert not by_name["memory of n1 with many cached inodes, MiB PSS"], "195 MiB are more than 200 MB"


def test_table_and_json_are_made(tmp_path: Path) -> None:
    figures = made_up()
    text = table(figures, TITLES)
    assert all(row in text for row in ROWS)
    assert "home ≥0.8 ok, node ≥0.25 ok" in text
    assert "node ≤3 ok\ntargets met: " in text
    save_json(figures, tmp_path / "bench.json")
    assert '"met": false' in (tmp_path / "bench.json").read_text()
