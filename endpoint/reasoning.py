"""Tells a model's reasoning from its answer: `<think>...</think>` first, as Qwen3 and DeepSeek-R1 do."""

from __future__ import annotations

from enum import Enum, auto

BEGIN, END = "<think>", "</think>"
MARKERS = (BEGIN, END)
OPENER = f"{BEGIN}\n"  # what a prompt ends with that begins the reasoning itself
PROMPT_END_TOKENS = 16  # of a prompt, in which its last marker is looked for
_MAX_LEADING_SPACE = 64  # characters before `<think>`; after more of them the answer has begun


class Opening(Enum):
    """Who begins the reasoning."""

    NOBODY = auto()  # the prompt has ended it already, or it is not told apart at all
    PROMPT = auto()  # the prompt ends with `<think>`
    MODEL = auto()  # the model, if it likes


def find_opening(prompt_end: str) -> Opening:
    """`prompt_end`: the text of the prompt's last tokens, special ones written out."""
    text = prompt_end.rstrip()
    if text.endswith(BEGIN):
        return Opening.PROMPT
    return Opening.NOBODY if text.endswith(END) else Opening.MODEL


def find_opening_within(answer: str) -> Opening:
    """Of an answer the prompt has begun: it goes on with reasoning, or with what comes after it."""
    return Opening.PROMPT if answer.rfind(BEGIN) > answer.rfind(END) else Opening.NOBODY


class _State(Enum):
    BEFORE = auto()  # a marker may come
    INSIDE = auto()
    AFTER = auto()


_FIRST_STATE = {
    Opening.NOBODY: _State.AFTER,
    Opening.PROMPT: _State.INSIDE,
    Opening.MODEL: _State.BEFORE,
}


class ReasoningSplitter:
    """Splits the text of one choice as it grows; the result does not depend on where it was cut.

    Linear; holds back no more than what may become a marker. The markers, and white space behind them, belong
    to neither part. `</think>` without a beginning, and any marker after the reasoning, is the answer's.
    """

    def __init__(self, opening: Opening) -> None:
        self.tokens = 0  # pushed so far, up to and with the one that ended the reasoning
        self._state = _FIRST_STATE[opening]
        self._held = ""
        self._after_marker = opening is Opening.PROMPT
        self._pushed = 0

    @property
    def done(self) -> bool:
        """Whether what comes next is the answer's for certain."""
        return self._state is _State.AFTER

    def push(self, text: str, last: bool = False, is_token: bool = True) -> tuple[str, str]:
        """What is added to the reasoning, and to the answer. `last`: nothing follows."""
        self._pushed += is_token
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state is _State.BEFORE:
            text = self._look_for_begin(text, last)
        if self._state is _State.INSIDE:
            self.tokens = self._pushed
            reasoning, text = self._look_for_end(self._stripped(text), last)
        return reasoning, self._stripped(text)

    def _look_for_begin(self, text: str, last: bool) -> str:
        """What comes after the marker, or all of it when there is none; nothing while that is open."""
        body = text.lstrip()
        if len(text) - len(body) <= _MAX_LEADING_SPACE:
            if body.startswith(BEGIN):
                self._state, self._after_marker = _State.INSIDE, True
                return body[len(BEGIN) :]
            if BEGIN.startswith(body) and not last:
                self._held = text
                return ""
        self._state = _State.AFTER
        return text

    def _look_for_end(self, text: str, last: bool) -> tuple[str, str]:
        end = text.find(END)
        if end >= 0:
            self._state, self._after_marker = _State.AFTER, True
            return text[:end], text[end + len(END) :]
        begun = text.rfind("<", max(0, len(text) - len(END)))
        if last or begun < 0 or not END.startswith(text[begun:]):
            return text, ""
        self._held = text[begun:]
        return text[:begun], ""

    def _stripped(self, text: str) -> str:
        if self._after_marker:
            text = text.lstrip()
            self._after_marker = not text
        return text
