"""How fast a worker loads and how long it will still take, out of its reports."""

from __future__ import annotations

from engine.wire.messages import Progress

_LEAST_S = 1.0  # before a rate means anything


class LoadingPace:
    """Of one worker. The first report of a phase is where counting begins: what came before is not timed."""

    def __init__(self) -> None:
        self._phase = ""
        self._began_s = 0.0
        self._began_at = 0.0  # fraction

    def line(self, report: Progress, now_s: float) -> str:
        """What is to be logged of a report that came at `now_s`: phase and share, then rate and time left."""
        if report.phase != self._phase:
            self._phase, self._began_s, self._began_at = report.phase, now_s, report.fraction
        text = f"{report.phase} {report.fraction * 100:.0f} %"
        elapsed_s, share = now_s - self._began_s, report.fraction - self._began_at
        if elapsed_s < _LEAST_S or share <= 0:
            return text
        if report.total_bytes:
            text += f", {report.total_bytes * share / elapsed_s / 2**20:.0f} MiB/s"
        if report.fraction < 1.0:
            text += f", {elapsed_s * (1.0 - report.fraction) / share:.0f} s left"
        return text
