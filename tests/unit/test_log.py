"""The log: form by kind of stream, and volume, node and epoch in each line."""

import io
import json
import logging
import subprocess
import sys

import pytest

from mxfsd import log


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_when_not_a_terminal() -> None:
    out = io.StringIO()
    source = log.LogContext(volume="v1", node="n2", epoch=3)
    log.configure(out, source=source)
    log.get_logger("lease", slot=4).info("took the lease", counter=9)
    line = json.loads(out.getvalue())
    del line["timestamp"]
    assert line == {
        "event": "took the lease",
        "level": "info",
        "part": "lease",
        "slot": 4,
        "counter": 9,
        "volume": "v1",
        "node": "n2",
        "epoch": 3,
    }


def test_key_value_on_a_terminal() -> None:
    out = _Terminal()
    log.configure(out, source=log.LogContext(volume="v1", node="n2"))
    log.get_logger("dlm").warning("waits long", waited_ms=30000)
    line = out.getvalue()
    assert "level=warning" in line
    assert 'event="waits long"' in line
    assert "node=n2" in line
    assert "waited_ms=30000" in line
    assert "epoch" not in line
    assert line.count("\n") == 1


def test_the_epoch_is_the_one_of_the_moment() -> None:
    out = io.StringIO()
    source = log.LogContext(epoch=1)
    log.configure(out, source=source)
    logger = log.get_logger("x")
    logger.info("a")
    source.epoch = 2
    logger.info("b")
    logger.info("c", epoch=7)
    assert [json.loads(line)["epoch"] for line in out.getvalue().splitlines()] == [1, 2, 7]


def test_level_filters() -> None:
    out = io.StringIO()
    log.configure(out, level="warning")
    log.get_logger("x").info("hidden")
    assert out.getvalue() == ""
    with pytest.raises(KeyError):
        log.configure(out, level="loud")


def test_a_logger_made_before_configure_follows_it() -> None:
    logger = log.get_logger("early")
    out = io.StringIO()
    log.configure(out)
    logger.info("late")
    assert json.loads(out.getvalue())["part"] == "early"


@pytest.mark.error_logs
def test_tracebacks_and_stdlib_records_come_out_as_one_json_line() -> None:
    out = io.StringIO()
    log.configure(out)
    log.configure(out)  # a second call must not double the lines
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("asyncio").exception("task died")
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    line = json.loads(lines[0])
    assert (line["part"], line["level"], line["event"]) == ("asyncio", "error", "task died")
    assert line["exception"][0]["exc_value"] == "boom"


def test_import_does_not_load_structlog() -> None:
    code = "import sys, mxfsd.log; sys.exit('structlog' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
