"""``python -m tests.fuzz [SECONDS]``: fuzz the FUSE channel with atheris; a script that breaks it is kept and named."""

import os
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["mxfs_fuse.channel", "mxfs_proto.fuse"]):
    from tests.fuzz.target import corpus, one_input


def main() -> None:
    """Fuzz. The process ends with the run: libFuzzer says what it found, and exits with 77 for a finding."""
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    folder = tempfile.mkdtemp(prefix="mxfs-fuzz-", dir="/var/tmp")
    corpus(os.path.join(folder, "corpus"))
    options = [f"-max_total_time={seconds}", "-timeout=60", "-max_len=1024", f"-artifact_prefix={folder}/"]
    print(f"fuzzing for {seconds} s in {folder}", flush=True)
    atheris.Setup([sys.argv[0], *options, os.path.join(folder, "corpus")], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
