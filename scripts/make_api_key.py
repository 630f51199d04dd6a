#!/usr/bin/env python3
"""Make an API key, and the entry for it in BackendConfig.runtimeConfig.apiKeys.

    python scripts/make_api_key.py alice --tokens-per-minute 60000

The key is shown once and stored nowhere: the configuration holds its SHA-256. --stdin takes the key from the
first line of the standard input instead, for one that exists already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys
from collections.abc import Sequence

_BYTES = 32
_LEAST_CHARACTERS = 16  # of a key that is brought along: SHA-256 is fast, so a short one can be guessed


def entry(key: str, args: argparse.Namespace) -> dict[str, str | int]:
    limits = {
        "maxRunning": args.max_running,
        "maxQueued": args.max_queued,
        "tokensPerMinute": args.tokens_per_minute,
    }
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {"name": args.name, "sha256": digest, **{name: value for name, value in limits.items() if value}}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", help="who the key is for: A-Z a-z 0-9 _ . -, at most 64")
    parser.add_argument("--max-running", type=int, default=0, help="requests served at once (0: no limit)")
    parser.add_argument("--max-queued", type=int, default=0, help="requests waiting (0: no limit)")
    parser.add_argument("--tokens-per-minute", type=int, default=0, help="prompt and generated (0: no limit)")
    parser.add_argument("--stdin", action="store_true", help="read the key instead of making one")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}", args.name):
        parser.error("name: 1 to 64 of A-Z a-z 0-9 _ . -, first a letter or digit")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 when the key on the standard input is too short."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    key = sys.stdin.readline().strip() if args.stdin else secrets.token_urlsafe(_BYTES)
    if len(key) < _LEAST_CHARACTERS:
        print(f"the key has {len(key)} characters; use {_LEAST_CHARACTERS} or more", file=sys.stderr)
        return 2
    if not args.stdin:
        print(f"key for the client, shown only here: {key}", file=sys.stderr)
    print(json.dumps(entry(key, args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
