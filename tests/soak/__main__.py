"""``python -m tests.soak``: the soak's command line."""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.soak.events import WEIGHTS
from tests.soak.run import Settings, Soak


def main() -> int:
    """Run a soak; 0 where nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES") or 30))
    parser.add_argument("--seed", type=int, default=None, help="of the order of events and of the load")
    parser.add_argument("--fencing", default="lease", choices=("lease", "pr"))
    parser.add_argument("--only", action="append", choices=sorted(WEIGHTS), help="this kind of event (may be repeated)")
    parser.add_argument("--folder", type=Path, default=None, help="work here (kept where something is wrong)")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 31)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mxfs-soak-", dir="/var/tmp"))
    settings = Settings(folder, arguments.minutes * 60, seed, arguments.fencing, arguments.only, arguments.keep)
    print(f"soak of {arguments.minutes:g} minutes, seed {seed}, in {folder}", flush=True)
    soak = Soak(settings, lambda line: print(line, flush=True))
    soak.run()
    for line in soak.summary():
        print(line)
    if soak.violations:
        print(f"{len(soak.violations)} violations; evidence in {folder}; the same order of events: --seed {seed}")
        return 1
    print(f"no violations; seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
