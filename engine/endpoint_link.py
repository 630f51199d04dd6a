"""An instance's line to the endpoint: requests in, tokens out, over the link of the current generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineBug
from engine.outcome import Outcome
from engine.wire import layout
from engine.wire.channel import Channel
from engine.wire.messages import EngineReady, Message, Submit
from engine.wire.ring import RingReader, RingWriter

log = logging.getLogger("llm.link")

_FULL_S = 1.0  # between two looks at whether an endpoint that does not read still lives


@dataclass(slots=True)
class LinkEnds:
    """Our ends of one generation."""

    commands: Channel  # Submit, Abort, LoraLoad, LoraUnload
    events: Channel  # EngineReady, EngineStats, LoraDone
    prompts: RingReader
    tokens: RingWriter

    def close(self) -> None:
        self.commands.close()
        self.events.close()


class EndpointLink:
    """Closed while there is no endpoint; what is sent then is dropped, for nobody waits for it any more."""

    def __init__(self, open_ends: Callable[[int], LinkEnds], greeting: Callable[[], EngineReady]) -> None:
        """`open_ends(generation)` makes the ends; `greeting` goes out first, once the endpoint is reached."""
        self._open_ends = open_ends
        self._greeting = greeting
        self._ends: LinkEnds | None = None
        self._greeted = False
        self.generation = -1

    def open(self, generation: int) -> None:
        self._ends = self._open_ends(generation)
        self.generation = generation
        self._greeted = False
        self.greet()

    def close(self) -> None:
        if self._ends is not None:
            self._ends.close()
            self._ends = None

    def greet(self) -> bool:
        """Whether there is no greeting left to be sent."""
        if self._ends is not None and not self._greeted:
            self._greeted = self._ends.events.send(self._greeting())
        return self._ends is None or self._greeted

    def fileno(self) -> int | None:
        """Readable when `receive` may have something; see Channel.fileno."""
        return None if self._ends is None else self._ends.commands.fileno()

    def receive(self) -> Iterator[Message]:
        if self._ends is not None:
            yield from self._ends.commands.receive()

    def take_prompt(self, submit: Submit) -> NDArray[np.int32]:
        """The ids that belong to this request: its prompt, then what its branches have already.

        Raises EngineBug when they do not lie on the ring.
        """
        assert self._ends is not None
        wanted = submit.num_prompt_tokens + sum(count for count in submit.outputs if count > 0)
        pieces: list[NDArray[np.int32]] = []
        found = 0
        while found < wanted:
            slot = self._ends.prompts.take()
            if slot is None:
                raise EngineBug(f"request {submit.request_id} has no prompt on the ring")
            request_id, ids = layout.read_prompt(slot)
            self._ends.prompts.release()
            found += len(ids)
            if request_id != submit.request_id or not len(ids) or found > wanted:
                raise EngineBug(f"request {submit.request_id}: the ring holds the prompt of {request_id}")
            pieces.append(ids)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def send(self, message: Message) -> None:
        if self._ends is not None:
            self._ends.events.send(message)

    def publish(
        self,
        outcomes: Sequence[Outcome],
        step: int,
        batch_size: int,
        step_us: int,
        while_full: Callable[[], None],
    ) -> None:
        """Write one step's rows. `while_full` is called now and then while the endpoint does not read."""
        for piece in layout.token_records(outcomes):
            slot = None
            while self._ends is not None and (slot := self._ends.tokens.reserve()) is None:
                # The endpoint is behind by the whole ring: computing more would only grow the backlog.
                if not self._ends.tokens.wait_free(_FULL_S):
                    log.warning("the endpoint has not read tokens for a second; waiting")
                while_full()
            if self._ends is None or slot is None:
                return
            layout.write_tokens(slot, step, batch_size, step_us, piece)
            self._ends.tokens.commit()
