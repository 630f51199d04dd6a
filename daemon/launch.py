"""Target of the console script, and the only module known by its long name (mindie_server.daemon.launch)."""

import sys
from pathlib import Path


def main() -> int:
    """Put the application's own directory first, then run it under its short import names."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from daemon.main import main as run

    return run()
