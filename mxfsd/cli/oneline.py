"""The parser of commands that refuse in one line."""

import argparse
import sys
from typing import ClassVar, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """One line, and the exit code that the command has for every other refusal."""

    refused: ClassVar[int] = 1

    def error(self, message: str) -> NoReturn:
        """See the class."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(self.refused)
