"""When a dead child is replaced, and when there have been too many deaths for another try."""

from __future__ import annotations

from collections import Counter, deque

MOST_DEATHS = 5
WINDOW_S = 60.0
_FIRST_DELAY_S = 0.5  # before the second replacement within the window; it doubles with each further one


class RestartPolicy:
    """The first replacement comes at once, later ones after a pause.

    None after five deaths in a minute, and none when five replacements in a row have died before they were
    ready, however long that took them.
    """

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._unready: Counter[object] = Counter()
        self.verdict = ""  # why there is no further replacement

    def note_ready(self, place: object) -> None:
        self._unready.pop(place, None)

    def note_death(self, place: object, now: float) -> float | None:
        """Seconds until the replacement may be forked; None: no more. `now`: monotonic seconds.

        `place`: what the child was there for.
        """
        self._unready[place] += 1
        self._deaths.append(now)
        while self._deaths[0] <= now - WINDOW_S:
            self._deaths.popleft()
        count = len(self._deaths)
        if count >= MOST_DEATHS:
            self.verdict = f"{MOST_DEATHS} deaths within {WINDOW_S:.0f} s"
            return None
        if self._unready[place] > MOST_DEATHS:
            self.verdict = f"{MOST_DEATHS} replacements in a row died before they were ready"
            return None
        return 0.0 if count == 1 else _FIRST_DELAY_S * 2 ** (count - 2)
