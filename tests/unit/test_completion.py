"""The completion for bash: sourced in a bash of its own, and asked; its tables are those of the parsers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_man import all_commands, taken
from test_mxfs_command import LOCKS, STATUS, UUID, daemon

from mxfsd.cli import fsck, mkfs
from mxfsd.cli.install import commands_folder
from mxfsd.lab import cli as lab
from mxfsd.options import RUN_ROOT_ENV

FILE = Path(__file__).parents[2] / "completion" / "mxfs.bash"
BASH = shutil.which("bash") or ""
pytestmark = pytest.mark.skipif(not BASH, reason="needs bash")

ASK = """
set -u
source "$1"; shift
function=$(complete -p "$1"); function=${function#* -F }; function=${function%% *}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
set +u
$function "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
for word in "${COMPREPLY[@]}"; do printf '%s\\n' "$word"; done
"""


def ask(*typed: str, cwd: Path | None = None, run_root: Path | str = "/nonexistent") -> set[str]:
    """Return what bash would offer for the last word that is typed."""
    environment = {
        "PATH": f"{commands_folder()}:{os.environ['PATH']}",
        RUN_ROOT_ENV: str(run_root),
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        [BASH, "--norc", "-c", ASK, "bash", str(FILE), *typed],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.splitlines())


def test_subcommands() -> None:
    parsers = all_commands()
    assert ask("mxfs", "") == {command.split()[0] for command in parsers}
    assert ask("mxfs", "st") == {"status"}
    assert ask("mxfs", "home", "") == {"move"}
    assert ask("mxfs", "lab", "") == {name.removeprefix("lab ") for name in parsers if name.startswith("lab ")}
    assert ask("mxfs", "lab", "mo") == {"move-home"}
    assert ask("mxfs", "nothing", "") == set()


@pytest.mark.parametrize("command", sorted(all_commands()))
def test_options(command: str) -> None:
    assert ask("mxfs", *command.split(), "-") == taken(all_commands()[command]) | {"--help"}


def test_options_of_the_helpers() -> None:
    assert ask("mkfs.mxfs", "-") == taken(mkfs.parser()) | {"--help"}
    assert ask("fsck.mxfs", "-") == taken(fsck.helper_parser()) | {"--help"}
    assert ask("mkfs.mxfs", "/dev/null", "--", "-") == set()
    assert ask("mkfs.mxfs", "-L", "") == set()


def test_every_option_with_a_value_is_known() -> None:
    """Else its value would be taken for an operand."""
    script = f'source {FILE}; printf "%s\\n" "${{!_mxfs_values[@]}}"'
    known = set(subprocess.run([BASH, "-c", script], capture_output=True, text=True).stdout.split())
    valued = {
        option
        for parser in all_commands().values()
        for action in parser._actions
        if action.nargs != 0
        for option in action.option_strings
    }
    assert known == valued


def test_values() -> None:
    up = next(action for action in lab.parser()._actions if action.dest == "command").choices
    assert up is not None
    for command, option in (("up", "timeouts"), ("up", "fencing"), ("crash", "process")):
        choices = next(action for action in up[command]._actions if action.dest == option).choices  # type: ignore[index]
        assert ask("mxfs", "lab", command, f"--{option}", "") == set(choices)
    assert ask("mxfs", "lab", "up", "--timeouts", "f") == {"fast"}
    assert ask("mxfs", "lab", "up", "--nodes", "") == set()
    assert ask("mxfs", "status", "--timeouts", "") == set()  # no option of that command


def test_nodes_and_volumes_are_those_of_the_status(tmp_path: Path) -> None:
    volumes = {UUID, "data", "/dev/sdb", "/mnt/shared"}
    with daemon(tmp_path / UUID / "control.sock", STATUS, LOCKS):
        for command in (("home", "move"), ("evict",)):
            assert ask("mxfs", *command, "", run_root=tmp_path) == {"alpha", "beta"}
            assert ask("mxfs", *command, "be", run_root=tmp_path) == {"beta"}
            assert ask("mxfs", *command, "beta", "", run_root=tmp_path) == set()
            assert ask("mxfs", *command, "--volume", "", run_root=tmp_path) == volumes
            # Options and their values are no operands, and a run directory that was typed is asked.
            assert ask("mxfs", *command, "--run-dir", str(tmp_path), "--volume", "data", "a") == {"alpha"}
        for name in ("status", "locks"):
            assert ask("mxfs", name, "", run_root=tmp_path) == volumes
            assert ask("mxfs", name, "--json", "/m", run_root=tmp_path) == {"/mnt/shared"}


def test_no_daemon_offers_nothing(tmp_path: Path) -> None:
    assert ask("mxfs", "home", "move", "", run_root=tmp_path) == set()


@pytest.mark.needs("loop")
def test_devices() -> None:
    loops = {str(path) for path in Path("/dev").glob("loop*") if path.is_block_device()}
    assert loops
    for command in (("mxfs", "info"), ("mxfs", "pr"), ("mxfs", "fsck", "-n"), ("mkfs.mxfs", "-f"), ("fsck.mxfs",)):
        offered = ask(*command, "/dev/loop")
        assert {path for path in offered if not path.endswith("/")} == loops
        offered = ask(*command, "")
        assert loops <= offered
        assert "/dev/null" not in offered
        assert "/dev/shm/" in offered  # on the way to a device, perhaps
    assert ask("mxfs", "fsck", "/dev/loop0", "/dev/loop") == set()


def test_folders_of_a_lab(tmp_path: Path) -> None:
    for folder in ("lab one/n1", "lab one/n2", "lab one/.lab", "other"):
        (tmp_path / folder).mkdir(parents=True)
    assert ask("mxfs", "lab", "down", "", cwd=tmp_path) == {"lab\\ one/", "other/"}
    assert ask("mxfs", "lab", "kill", "lab one", "", cwd=tmp_path) == {"n1", "n2"}
    assert ask("mxfs", "lab", "kill", "lab one", "n2", "", cwd=tmp_path) == set()
    assert ask("mxfs", "lab", "exec", "lab one", "n2", "--", "l", cwd=tmp_path) == set()


def test_the_installed_file_is_found_by_the_name_of_each_command() -> None:
    from mxfsd.cli import install

    names = {Path(place).name for place in install.files() if place.startswith(install.COMPLETION_FOLDER)}
    script = f"source {FILE}; complete -p"
    declared = subprocess.run([BASH, "--norc", "-c", script], capture_output=True, text=True, check=True).stdout
    assert names == {line.split()[-1] for line in declared.splitlines()}
