"""What every guest starts from, read-only: kernel, initramfs, and an image of the checkout and Python's library."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
_LEFT_OUT = ("mypy*", "*__mypyc*", "ruff*", "hypothesis*", "pip", "pip-*", "matplotlib*", "numpy*", "PIL", "virtme*")
_LIBRARY_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "ensurepip",
    "tkinter",
    "turtledemo",
    "site-packages",
    "config-*",
    "*.a",
)
_PARTS = ("proto", "typing", "mxfsd", "mxfs_fuse", "systemd", "tests", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Boot:
    """The files that QEMU is given."""

    kernel: Path
    initramfs: Path
    image: Path
    modules: Path
    """The folder of the kernel's modules, on this machine."""
    python: str
    """Where the image's copy of Python's library belongs in a guest."""


def kernels() -> list[Path]:
    """Return the kernels whose modules are there too, the newest last.

    The installed ones; with MXFS_VM_KERNEL=FOLDER those that are unpacked there (`scripts/backports-kernel`).
    """

    def order(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    folder = Path(os.environ.get("MXFS_VM_KERNEL") or "/") / "boot"
    found = [path for path in folder.glob("vmlinuz-*") if (_modules(path) / "modules.dep").exists()]
    return sorted(found, key=order)


def _modules(kernel: Path) -> Path:
    return kernel.parent.parent / "lib/modules" / kernel.name.removeprefix("vmlinuz-")


def prepare(folder: Path) -> Boot:
    """Make the initramfs and the image in *folder*."""
    kernel = kernels()[-1]
    initramfs = folder / "initramfs"
    tool = Path(sys.executable).parent / "virtme-run"
    words = ["--kimg", str(kernel), "--mods", "auto", "--disable-kvm", "--force-9p", "--force-initramfs", "--dry-run"]
    _run([str(tool), *words, "--save-initramfs", str(initramfs), "--script-sh", "true"])
    library = sysconfig.get_path("stdlib")
    image = folder / "guest.ext4"
    _make_image(folder / "staging", image, Path(library))
    return Boot(kernel, initramfs, image, _modules(kernel), library)


def _make_image(staging: Path, image: Path, library: Path) -> None:
    checkout = staging / "checkout"
    checkout.mkdir(parents=True)
    for name in _PARTS:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, symlinks=True, ignore=shutil.ignore_patterns(".pytest_cache"))
        else:
            shutil.copy2(source, checkout / name)
    shutil.copytree(
        Path(sys.prefix), checkout / ".venv", symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT, "include")
    )
    _install_plainly(checkout / ".venv")
    shutil.copytree(library, staging / "python", symlinks=True, ignore=shutil.ignore_patterns(*_LIBRARY_LEFT_OUT))
    # A guest imports many modules, slowly: none of them is to be compiled there, where the image is read-only.
    folders = [checkout / name for name in ("proto", "mxfsd", "mxfs_fuse")]
    _run([sys.executable, "-m", "compileall", "-q", *map(str, folders)])
    size = sum(path.lstat().st_size for path in staging.rglob("*"))
    with open(image, "wb") as file:
        file.truncate(size * 3 // 2 + (64 << 20))
    _run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", str(staging), str(image)])
    shutil.rmtree(staging)


def _install_plainly(environment: Path) -> None:
    """Have the copy of an editable install name its folders: its finder is Python that every command waits for."""
    (packages,) = environment.glob("lib/python*/site-packages")
    for pth in packages.glob("*.pth"):
        pth.unlink()
    (packages / "mxfs.pth").write_text(f"{CHECKOUT}\n{CHECKOUT}/typing\n")


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stdout}{done.stderr}")
