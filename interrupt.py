"""Import this first: Ctrl-C while the other imports run is one line instead of a traceback."""

import sys
from pathlib import Path


def report(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: stopped by SIGINT", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report
