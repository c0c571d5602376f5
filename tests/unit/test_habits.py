"""The rules of tests/conftest.py hold: skips in CI, error logs and hung tests fail, each tried in an inner pytest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"


def _inner(tmp_path: Path, body: str, *, ci: bool = False, options: tuple[str, ...] = ()) -> tuple[int, str]:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    (tmp_path / "test_inner.py").write_text(f"import os, time, logging, pytest, structlog\n{body}")
    environment = {**os.environ, "CI": "true" if ci else ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options, "."],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


NEEDS_NOSUCH = '@pytest.mark.needs("nosuch")\ndef test_it():\n    pass\n'


def _with_capability(tmp_path: Path, required: bool) -> str:
    change = 'import conftest\nconftest.CAPABILITIES["nosuch"] = lambda: "none here"\n'
    if required:
        change += 'conftest.REQUIRED = conftest.REQUIRED | {"nosuch"}\n'
    return change + NEEDS_NOSUCH


@pytest.mark.parametrize("ci", [False, True])
def test_an_optional_capability_skips_with_its_reason(tmp_path: Path, ci: bool) -> None:
    code, out = _inner(tmp_path, _with_capability(tmp_path, required=False), ci=ci)
    assert code == 0, out
    assert "1 skipped" in out
    assert "needs nosuch: none here" in out


def test_a_required_capability_fails_in_ci_only(tmp_path: Path) -> None:
    body = _with_capability(tmp_path, required=True)
    code, out = _inner(tmp_path, body)
    assert code == 0, out
    code, out = _inner(tmp_path, body, ci=True)
    assert code == 1
    assert "CI machines must have nosuch: none here" in out


@pytest.mark.parametrize(
    "body",
    [
        "def test_it():\n    pytest.skip('not today')\n",
        "@pytest.mark.skip(reason='not today')\ndef test_it():\n    pass\n",
        "@pytest.mark.skipif(True, reason='not today')\ndef test_it():\n    pass\n",
        "@pytest.fixture\ndef f():\n    pytest.skip('not today')\ndef test_it(f):\n    pass\n",
        "pytest.skip('not today', allow_module_level=True)\n",
    ],
)
def test_any_other_skip_fails_in_ci(tmp_path: Path, body: str) -> None:
    code, out = _inner(tmp_path, body, ci=True)
    assert code == 1, out
    assert "not today" in out
    code, out = _inner(tmp_path, body)
    assert code in (0, 5), out


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    code, out = _inner(tmp_path, "@pytest.mark.xfail\ndef test_it():\n    assert False\n", ci=True)
    assert code == 0, out


@pytest.mark.parametrize("line", ["structlog.get_logger().error('lost')", "logging.error('lost')"])
def test_an_error_log_fails_the_test(tmp_path: Path, line: str) -> None:
    code, out = _inner(tmp_path, f"def test_it():\n    {line}\n")
    assert code == 1, out
    assert "unexpected error logs" in out
    code, out = _inner(tmp_path, f"@pytest.mark.error_logs\ndef test_it():\n    {line}\n")
    assert code == 0, out


def test_a_hung_test_shows_its_stack(tmp_path: Path) -> None:
    code, out = _inner(tmp_path, "def test_it():\n    stuck = True\n    while stuck: pass\n", options=("--timeout=1",))
    assert code == 1, out
    assert "while stuck: pass" in out
    assert "Timeout" in out
