"""Who may own and read the files this server is given: the same rule at the start and while it runs."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

DIRECTORY_MODE = 0o750


def access_problems(path: Path, limit: int) -> list[tuple[str, str]]:
    """What is wrong with the mode and the owner of `path`, each with the command that mends it.

    A directory is judged with the files in it, which may be as wide as `limit` without the x bits. Raises
    OSError when it cannot be looked at.
    """
    return _mode_problems(path, limit) + _owner_problems(path)


def _mode_problems(path: Path, limit: int) -> list[tuple[str, str]]:
    info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        mode = info.st_mode & 0o777
        if mode & ~limit:
            return [
                (f"mode {mode:04o} is wider than {limit:04o}", f"chmod {limit:04o} {shlex.quote(str(path))}")
            ]
        return []
    wide = [name for name, mode in _modes_inside(path) if mode & ~(limit & 0o666)]
    mode = info.st_mode & 0o777
    if mode & ~limit or wide:
        what = f"mode {mode:04o}" if mode & ~limit else f"mode of {', '.join(sorted(wide)[:3])}"
        command = f"chmod -R u=rwX,g=rX,o= {shlex.quote(str(path))}"
        return [
            (
                f"{what} is wider than {limit:04o} for the directory, {limit & 0o666:04o} for its files",
                command,
            )
        ]
    return []


def _modes_inside(directory: Path) -> list[tuple[str, int]]:
    """Names and permission bits of the regular files directly inside, as far as they can be looked at."""
    found = []
    for path in directory.iterdir():
        try:
            info = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(info.st_mode):
            found.append((path.name, info.st_mode & 0o777))
    return found


def _owner_problems(path: Path) -> list[tuple[str, str]]:
    owner, wanted = path.stat().st_uid, os.geteuid()
    if owner == wanted:
        return []
    option = "-R " if path.is_dir() else ""
    return [(f"belongs to uid {owner}, not {wanted}", f"chown {option}{wanted} {shlex.quote(str(path))}")]
