"""The one setting of the host that a home changes."""

from pathlib import Path

from mxfsd.io.xfsknobs import bound_replay


def test_a_long_interval_is_shortened_and_a_short_one_kept(tmp_path: Path) -> None:
    knob = tmp_path / "xfssyncd_centisecs"
    for before, after in (("3000\n", "100"), ("100\n", "100"), ("50\n", "50")):
        knob.write_text(before)
        bound_replay(str(knob))
        assert knob.read_text().strip() == after.strip()


def test_a_host_without_it_does_not_fail(tmp_path: Path) -> None:
    bound_replay(str(tmp_path / "none"))
    knob = tmp_path / "odd"
    knob.write_text("what?\n")
    bound_replay(str(knob))
    assert knob.read_text() == "what?\n"
