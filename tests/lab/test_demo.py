"""The demonstration runs to its end, within the time that it promises."""

import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.needs("root", "fuse", "loop", "xfs", "netns"), pytest.mark.needs_lab]


def test_the_demo_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mxfsd.lab.demo"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(".")[0] for line in lines[:-1]] == [str(number) for number in range(1, 8)]
    total = re.match(r"done in (\d+) s", lines[-1])
    assert total is not None
    assert int(total[1]) <= 30
