"""Target of the console script, and the only module known by its long name (mindie_server.daemon.launch)."""

import signal
import sys
from pathlib import Path


def main() -> int:
    """Put the application's own directory first, then run it under its short import names.

    Signals wait until there is somebody to handle them: imports take a tenth of a second, and Ctrl+C in the
    middle of them would be a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from daemon.main import main as run

    return run()
