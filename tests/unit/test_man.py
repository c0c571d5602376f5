"""The man pages say what the parsers take, no more and no less, and groff has nothing to complain of."""

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from mxfsd import info, options
from mxfsd.cli import adopt, fsck, grow, mkfs, mount, mxfs, mxfsd, pr
from mxfsd.lab import cli as lab

FOLDER = Path(__file__).parents[2] / "man"
PAGES = sorted(FOLDER.glob("*.8"))
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def text(name: str) -> str:
    return (FOLDER / f"{name}.8").read_text()


def tags(section: str) -> list[str]:
    """The tag of each definition (.TP and the line after it), without the macros and fonts."""
    found = re.findall(r"^\.TP\n\.(?:B|BR|BI|I|IB) (.*)$", section, re.MULTILINE)
    return [re.sub(r"\\f.", "", tag).replace("\\-", "-").replace('"', "") for tag in found]


def documented(section: str) -> set[str]:
    """The options that are defined in a section."""
    return {option for tag in tags(section) for option in _OPTION.findall(tag)}


def section(page: str, heading: str, kind: str = "SH") -> str:
    """The text from a heading to the next one."""
    match = re.search(rf"^\.{kind} {re.escape(heading)}\n(.*?)(?=^\.S[HS] |\Z)", page, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def taken(parser: argparse.ArgumentParser) -> set[str]:
    """The options that a parser takes, but for its help."""
    return {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser, those of subcommands too, by the words that are typed."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                deeper = commands(inner)
                found |= {f"{name} {more}": parsed for more, parsed in deeper.items()} if deeper else {name: inner}
    return found


def all_commands() -> dict[str, argparse.ArgumentParser]:
    """The subcommands of mxfs, with those that have a parser of their own."""
    found = commands(mxfs.parser())
    del found["lab"]
    own = {"info": info.parser(), "pr": pr.parser(), "fsck": fsck.parser("mxfs fsck"), "grow": grow.parser()}
    own |= {"adopt": adopt.parser()}
    assert own.keys() <= found.keys()
    return found | own | {f"lab {name}": parsed for name, parsed in commands(lab.parser()).items()}


@pytest.mark.parametrize(
    ("name", "parser"),
    [("mkfs.mxfs", mkfs.parser()), ("fsck.mxfs", fsck.helper_parser()), ("mxfsd", mxfsd.parser())],
)
def test_options(name: str, parser: argparse.ArgumentParser) -> None:
    assert documented(section(text(name), "OPTIONS")) == taken(parser)
    synopsis = text(name).split(".SH DESCRIPTION")[0].replace("\\-", "-")
    named = set(_OPTION.findall(synopsis.split(".SH SYNOPSIS")[1]))
    assert named <= taken(parser)
    for action in parser._actions:  # each under one of its names
        assert not taken(parser) & set(action.option_strings) or named & set(action.option_strings)


def test_subcommands() -> None:
    page = text("mxfs")
    headings = [heading.replace("\\-", "-") for heading in re.findall(r"^\.SS (.*)$", page, re.MULTILINE)]
    parsers = all_commands()
    assert len(headings) == len(set(headings))
    assert set(headings) == set(parsers)
    for heading in headings:
        body = section(page, heading.replace("-", "\\-"), "SS")
        assert documented(body) == taken(parsers[heading]), heading
        usage = re.sub(r"\\f.|[\"\\]", "", body.splitlines()[0])
        assert f"mxfs {heading}" in usage


def test_flags_and_options_of_mount() -> None:
    page = text("mount.mxfs")
    flags = {f"-{flag}" for flag in mount.FLAGS if flag != ":"}
    assert documented(section(page, "OPTIONS")) == flags
    found = [word.strip() for tag in tags(section(page, "MOUNT OPTIONS")) for word in re.split(r"[ ,]+", tag)]
    values = [re.match(r"(\w+=)", word) for word in found]
    own = {match[1] for match in values if match}
    assert own == {f"{name}=" for name in options._OWN}
    words = {word for word, match in zip(found, values, strict=True) if not match and word.islower()}
    assert words == {"ro", "rw", "localflocks", "passthrough", *options._KERNEL_FLAGS}
    for name in own:
        assert name in options.known_options()


def test_values_of_options_of_mount() -> None:
    page = section(text("mount.mxfs"), "MOUNT OPTIONS")
    for names in (options.TIMEOUT_NAMES, options.FENCING_NAMES, options.CHANNEL_NAMES, options.LOG_LEVELS):
        for name in names:
            assert re.search(rf"^\.BR? (?:.* )?{name}\b", page, re.MULTILINE), name


def test_exit_codes() -> None:
    codes = {int(tag) for tag in re.findall(r"^\.TP\n(\d+)$", section(text("fsck.mxfs"), "EXIT STATUS"), re.MULTILINE)}
    assert codes == {fsck.EXIT_CLEAN, fsck.EXIT_REPAIRED, fsck.EXIT_ERRORS, fsck.EXIT_FAILED}
    said = section(text("mount.mxfs"), "EXIT STATUS")
    for code in (mount.EXIT_USAGE, mount.EXIT_SYSTEM, mount.EXIT_INTERRUPT, mount.EXIT_MOUNT):
        assert f"{code} " in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_form(page: Path) -> None:
    source = page.read_text()
    assert source.splitlines()[0] == '.\\" Part of MXFS; put in place by mxfs install.'
    assert f".TH {page.stem.upper()} 8 " in source
    order = re.findall(r"^\.SH (.*)$", source, re.MULTILINE)
    assert order[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert order[-1] == "SEE ALSO"
    assert f"\n{page.stem} \\- " in source
    for other in re.findall(r"^\.BR (\S*mxfs\S*) \(8\)", source, re.MULTILINE):
        assert (FOLDER / f"{other}.8").exists(), other


def test_every_command_has_a_page() -> None:
    assert {page.stem for page in PAGES} == {"mkfs.mxfs", "mount.mxfs", "fsck.mxfs", "mxfs", "mxfsd"}


@pytest.mark.needs("groff")  # test_form looks at the pages in any case
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_groff_has_nothing_to_say(page: Path) -> None:
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", "-z", str(page)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.needs("groff")
def test_groff_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "bad.8").write_text(".TH BAD 8\n.SH NAME\nbad \\- x\n.NOSUCH\n")
    bad = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z", str(tmp_path / "bad.8")], capture_output=True, text=True
    )
    assert "NOSUCH" in bad.stderr
