"""Real work: a repository cloned on one node, read and checked on the second, built and tested on the third."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from labkit import Lab, must, run

SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clone(lab: Lab) -> dict[str, Path]:
    """This repository, cloned through the first node, as each node sees it."""
    if run(["git", "-C", SOURCE, "rev-parse", "HEAD"]).returncode != 0:
        pytest.skip("needs a git checkout with a commit")
    target = lab["n1"] / "repository"
    must(["git", "clone", "--quiet", "--no-hardlinks", SOURCE, target], timeout_s=280)
    return {node: root / "repository" for node, root in lab.nodes.items()}


def test_log_status_and_fsck_on_another_node(clone: dict[str, Path]) -> None:
    wanted = must(["git", "-C", SOURCE, "log", "--format=%H %s"]).stdout
    assert must(["git", "-C", clone["n2"], "log", "--format=%H %s"]).stdout == wanted
    checked = must(["git", "-C", clone["n2"], "fsck", "--full", "--strict", "--no-dangling"], timeout_s=280)
    assert "error" not in checked.stdout + checked.stderr
    assert must(["git", "-C", clone["n2"], "status", "--porcelain"]).stdout == ""
    tracked = must(["git", "-C", clone["n2"], "ls-files", "-z"]).stdout.split("\0")[:-1]
    head = must(["git", "-C", SOURCE, "ls-tree", "-r", "-z", "--name-only", "HEAD"]).stdout.split("\0")[:-1]
    assert sorted(tracked) == sorted(head)


def test_a_commit_on_one_node_is_there_on_another(clone: dict[str, Path]) -> None:
    me = ["-c", "user.name=lab", "-c", "user.email=lab@example.invalid", "-c", "core.hooksPath=/dev/null"]
    for number, (actor, observer) in enumerate([("n2", "n3"), ("n3", "n1"), ("n1", "n2")]):
        (clone[actor] / f"new{number}.txt").write_text(actor)
        must(["git", "-C", clone[actor], "add", f"new{number}.txt"])
        must(["git", "-C", clone[actor], *me, "commit", "--quiet", "-m", f"From {actor}"])
        seen = must(["git", "-C", clone[observer], "log", "-1", "--format=%s"]).stdout
        assert seen == f"From {actor}\n"
        assert must(["git", "-C", clone[observer], "status", "--porcelain"]).stdout == ""
    must(["git", "-C", clone["n3"], "gc", "--quiet"], timeout_s=280)
    must(["git", "-C", clone["n1"], "fsck", "--full"], timeout_s=280)


@pytest.mark.timeout(300)
def test_unit_tests_build_and_run_from_the_third_node(clone: dict[str, Path]) -> None:
    """The packages are built and installed on the volume, then some unit tests run there against that copy."""
    here = clone["n3"].resolve()
    site = here / ".site"
    if not list((here / "tests" / "unit").glob("test_*.py")):
        pytest.skip("the checked-out commit has no unit tests")
    must(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, here],
        timeout_s=280,
    )
    # The editable installation of the checkout under test must not answer for this copy.
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": ""}
    probe = "import mxfs_proto.modes, mxfsd; print(mxfs_proto.modes.__file__); print(mxfsd.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=site, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert all(line.startswith(str(site)) for line in found.stdout.splitlines()), found.stdout
    wanted = [here / "tests" / "unit" / f"test_{name}.py" for name in ("options", "frames", "nlchannel")]
    chosen = [str(path) for path in wanted if path.exists()]
    assert chosen, "none of the chosen unit tests exists in this commit"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
