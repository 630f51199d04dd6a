"""The table of what is in the engines: by request id, and how their token records find their flights."""

from __future__ import annotations

import time

from endpoint.flights import Flight, Part, PromptRow, Token
from endpoint.instance_link import InstanceLink, LinkEnds
from engine import errors
from engine.errors import EngineFailed, ServerError
from engine.outcome import FinishCode
from engine.wire import layout
from engine.wire.messages import Abort

_ERRORS: dict[int, type[ServerError]] = {
    cls.number: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ServerError)
}
_REFUSALS: dict[type[ServerError], str] = {
    errors.GenerationRefused: "the engine's cache cannot hold this request: prompt, answer and number of "
    "choices together; lower one of them, or give the server more cache (npuMemSize, kvCacheMemMiB)",
    errors.GrammarFailed: "the answer could not go on in the format asked for (response_format, "
    "structured_outputs, guided_*, tools): no token was legal, or finding one took too much; simplify it",
    EngineFailed: "the model produced no usable result for this request (its logits were not numbers, "
    "or there was no memory for it alone; the server log tells)",
    errors.InvalidRequest: "the adapter of this request was unloaded before the request began; "
    "GET /v1/models lists the loaded ones",
}
_FINISH_CODES = tuple(FinishCode)  # FinishCode(number) takes 1 us


class InFlight:
    """Every part that an engine has got and that is not over there."""

    def __init__(self) -> None:
        self.last_token_at = 0.0  # monotonic seconds; of any request
        self._parts: dict[int, Part] = {}  # by request id

    def add(self, part: Part, request_id: int, link: InstanceLink) -> None:
        part.request_id, part.link = request_id, link
        self._parts[request_id] = part

    def forget(self, part: Part) -> bool:
        """Take it out of its instance; whether it was in one."""
        if part.link is None:
            return False
        del self._parts[part.request_id]
        part.leave_place()
        part.link = None
        return True

    def forget_all(self, link: InstanceLink) -> list[Part]:
        """Take out what is in this instance, in the order it went there."""
        parts = [part for part in self._parts.values() if part.link is link]
        for part in parts:
            self.forget(part)
        return parts

    def close(self, part: Part) -> None:
        """Nobody waits for it any more; what of it still runs in its instance is aborted."""
        link, request_id = part.link, part.request_id
        if self.forget(part) and link is not None:
            link.send(Abort(request_id, branch=-1))

    def end_branch(self, flight: Flight, branch: int) -> None:
        """No further tokens of this branch are wanted."""
        part = flight.parts[branch // flight.branches]
        branch -= part.first
        if branch in part.ended:
            return
        part.ended.add(branch)
        if part.all_ended:
            self.close(part)
        elif part.link is not None:
            part.link.send(Abort(part.request_id, branch))

    def read_record(self, ends: LinkEnds) -> bool:
        """Hand the rows of the oldest token record out; False when there is none.

        Raises whatever a record raises that cannot be understood: nobody knows then what belongs to whom.
        """
        slot = ends.tokens.take()
        if slot is None:
            return False
        batch_size, rows = layout.read_tokens(slot)
        ends.tokens.release()
        now = self.last_token_at = time.monotonic()
        for row in rows:
            part = self._parts.get(row.request_id)
            if part is None or row.branch in part.ended:
                continue  # aborted; the step was already under way
            flight = part.flight
            if row.rank:
                part.prompt_rows.append(PromptRow(row.token, row.logprob, row.rank, row.top))
                continue
            if (place := part.place) is not None and place.owed_tokens:
                place.note_begun()
            if row.preemptions != part.preemptions:
                flight.note_preemptions(part, row.preemptions, row.queue_wait_us)
            if row.cached_tokens:
                part.cached_tokens = row.cached_tokens
            if row.finish:
                part.ended.add(row.branch)
                if part.all_ended:
                    self.forget(part)
                elif row.error:
                    self.close(part)  # nobody waits for its other branches any more
            if row.error:
                cls = _ERRORS[row.error]
                flight.fail(cls(_REFUSALS.get(cls, "the engine ended this request")))
                continue
            part.outputs[row.branch].append(row.token)
            flight.push(
                Token(
                    part.first + row.branch,
                    row.token,
                    _FINISH_CODES[row.finish],
                    batch_size,
                    row.queue_wait_us,
                    now,
                    row.logprob,
                    row.top,
                )
            )
        return True
