"""How one request wants its tokens chosen, with every default already resolved."""

from __future__ import annotations

from dataclasses import dataclass

_GOLDEN = 0x9E3779B97F4A7C15  # spreads neighbouring branches over all 64-bit seeds
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved sampling parameters; the endpoint fills in defaults and checks ranges.

    Application order: bias and penalties, min_tokens, temperature, top_k, top_p, min_p, draw
    (api.md section 3.4).
    """

    max_tokens: int  # > 0; already clamped to what fits the context
    temperature: float = 0.0  # 0 = greedy: top_k, top_p and seed are then irrelevant
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    seed: int = 0  # [0, 2**64 - 1]; always set, drawn by the endpoint when the client sent none
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    stop_token_ids: tuple[int, ...] = ()  # besides EOS
    ignore_eos: bool = False
    branches: int = 1  # sequences generated from the one prompt: best_of, or the beam width
    beam_search: bool = False  # the branches are beams; deterministic, all sampling fields are ignored
    logprobs: int = -1  # -1: none; k >= 0: of the chosen token and the k most likely ones
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_p: float = 0.0  # 0 = off; else drop tokens less likely than min_p x the best one
    min_tokens: int = 0  # EOS and stop tokens are masked until so many tokens are generated
    grammar: str = ""  # what the answer must follow, in llguidance's form; "" = anything
    reasoning_end: tuple[int, ...] = ()  # ids that end the reasoning before the answer; () = there is none
    thinking_budget: int = 0  # tokens of reasoning after which `reasoning_end` is forced; 0 = no limit
    prompt_logprobs: int = -1  # -1: none; k >= 0: of each prompt token and the k most likely
    lora: str = ""  # name of the adapter; "" = the base model
    reproducible: bool = False  # the client sent a seed: what else runs must not change a bit of its logits

    def num_top(self, num_eos: int) -> int:
        """How many of the most likely tokens a sample needs; -1: not even the chosen one's log-probability.

        `num_eos`: how many token ids end an answer; a beam needs a reserve of candidates for each.
        """
        if self.beam_search:
            return max(self.logprobs, self.branches * (1 + num_eos + len(self.stop_token_ids)))
        return self.logprobs

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        return bool(
            self.needs_penalties or self.logit_bias or self.min_tokens or self.grammar or self.thinking_budget
        )

    @property
    def needs_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def branch_seed(seed: int, branch: int) -> int:
    """Each branch draws a stream of its own; branch 0 that of `seed`."""
    return (seed + branch * _GOLDEN) & _MASK
