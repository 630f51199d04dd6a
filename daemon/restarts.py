"""When a dead child is replaced, and when there have been too many deaths for another try."""

from __future__ import annotations

from collections import deque

MOST_DEATHS = 5
WINDOW_S = 60.0
_FIRST_DELAY_S = 0.5  # before the second replacement within the window; it doubles with each further one


class RestartPolicy:
    """The first replacement comes at once, later ones after a pause, none after five deaths in a minute."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()

    def note_death(self, now: float) -> float | None:
        """Seconds until the replacement may be forked; None: no more. `now`: monotonic seconds."""
        self._deaths.append(now)
        while self._deaths[0] <= now - WINDOW_S:
            self._deaths.popleft()
        count = len(self._deaths)
        if count >= MOST_DEATHS:
            return None
        return 0.0 if count == 1 else _FIRST_DELAY_S * 2 ** (count - 2)
