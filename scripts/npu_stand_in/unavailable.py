"""Why there is no stand-in on this machine."""

from __future__ import annotations


class Unavailable(Exception):
    """Something that it is made of is missing; the text is one line and says what to do."""
