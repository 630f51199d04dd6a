"""Who may own and read the files this server is given: the same rule at the start and while it runs."""

from __future__ import annotations

import functools
import operator
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
    mode, place = info.st_mode & 0o777, shlex.quote(str(path))
    excess = mode & ~limit
    if not stat.S_ISDIR(info.st_mode):
        wrong = f"mode {mode:04o} is wider than {limit:04o} ({_too_many(excess)})"
        return [(wrong, f"chmod {limit:04o} {place}")] if excess else []
    of_files = limit & 0o666
    wide = {name: bits for name, inside in _modes_inside(path) if (bits := inside & ~of_files)}
    if not excess and not wide:
        return []
    what = f"mode {mode:04o}" if excess else f"mode of {', '.join(sorted(wide)[:3])}"
    bits = excess or functools.reduce(operator.or_, wide.values())
    wrong = f"{what} is wider than {limit:04o} for the directory, {of_files:04o} for its files"
    return [(f"{wrong} ({_too_many(bits)})", f"chmod -R u=rwX,g=rX,o= {place}")]


def _too_many(bits: int) -> str:
    """What the bits allow, in words: `group may write; others may read, write`."""
    found = []
    for who, shift in (("the owner", 6), ("group", 3), ("others", 0)):
        may = [word for word, bit in (("read", 4), ("write", 2), ("execute", 1)) if bits >> shift & bit]
        if may:
            found.append(f"{who} may {', '.join(may)}")
    return "; ".join(found)


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
