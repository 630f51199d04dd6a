"""modelInstanceType StandardMock: a worker without weights that answers every prompt with the prompt itself.

Everything around it is the real thing: processes, rings, scheduler, block accounting. So it shows what the
server does and costs without a model, on any machine, in a moment and in little memory; nothing here loads
torch.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.block_manager import BlockManager
from engine.core import EngineCore
from engine.errors import EXIT_INIT, StartupError
from engine.executor import PromptScores, Sampled
from engine.mix import make_scheduler
from engine.overlap import OverlappedCore
from engine.plan import StepPlan
from engine.sequence import Sequence
from engine.settings import ModelSettings, ScheduleSettings
from engine.swap_space import SwapSpace
from engine.wire.messages import EngineReady, Ready
from worker.config_values import ConfigValues
from worker.context import WorkerContext
from worker.hf_config import eos_token_ids
from worker.links import open_link, watched

Ids = NDArray[np.int32]

log = logging.getLogger("llm.mock")

_BYTES = 256  # the vocabulary of the endpoint's byte tokenizer, used for a model directory without one
_MOST_BLOCKS = 65536  # only counted, never filled; more would cost memory for nothing
_OTHERS = -100.0  # log-probability told for every token but the echoed one: JSON has no -inf


@dataclass(frozen=True, slots=True)
class EchoExecutor:
    """Output token i of a sequence is `prompt[i % len(prompt)]`, whatever its parameters or grammar.

    What the scheduler decides stays in force: length, EOS and stop tokens. Log-probabilities are those of a
    model that is certain.
    """

    vocab_size: int
    num_eos: int  # how many token ids end an answer

    def run(self, plan: StepPlan) -> Sampled:
        echoes = (seq.tokens[seq.num_known_output % seq.num_prompt] for seq in plan.samples)
        tokens = np.fromiter(echoes, np.int32, len(plan.samples))
        prompts = {
            seq.request_id: self._prompt_scores(seq, owed)
            for row, seq in enumerate(plan.sequences)
            if (owed := plan.owed_scores(row))
        }
        most = max((seq.params.num_top(self.num_eos) for seq in plan.samples), default=-1)
        if most < 0:
            return Sampled(tokens, prompts=prompts)
        certain = np.zeros(len(tokens), np.float32)
        if most == 0:
            return Sampled(tokens, certain, prompts=prompts)
        ids, logprobs = self._others(tokens, most - 1)
        top_ids = np.hstack((tokens[:, None], ids))
        top_logprobs = np.hstack((certain[:, None], logprobs))
        return Sampled(tokens, certain, top_ids, top_logprobs, prompts=prompts)

    def _others(self, tokens: Ids, wanted: int) -> tuple[Ids, NDArray[np.float32]]:
        """What else a ranking names: the neighbours of each id, [n, wanted] or as many as there are."""
        count = min(wanted, self.vocab_size - 1)
        ids = (tokens[:, None] + np.arange(1, count + 1, dtype=np.int32)) % np.int32(self.vocab_size)
        return ids, np.full(ids.shape, _OTHERS, np.float32)

    def _prompt_scores(self, seq: Sequence, owed: range) -> PromptScores:
        tokens = seq.tokens[owed.start : owed.stop]
        others = self._others(tokens, seq.params.prompt_logprobs)
        return PromptScores(tokens, np.zeros(len(tokens), np.float32), np.ones_like(tokens), *others)


def run_mock_worker(given: WorkerContext) -> NoReturn:
    """Serve one instance of echoes; SIGTERM ends the process by default action, as with `run_worker`."""
    if given.rank > 0:
        _stand_by(given)
    start = time.monotonic()
    model, schedule = given.model, given.schedule
    vocab_size, eos = read_vocabulary(model.weight_path)
    num_blocks = count_mock_blocks(model, schedule)
    schedule = replace(schedule, max_input_len=min(schedule.max_input_len, schedule.max_seq_len - 1))

    def greeting() -> EngineReady:
        return EngineReady(
            instance=given.wire.instance,
            vocab_size=vocab_size,
            max_prompt_tokens=schedule.max_input_len,
            max_seq_len=schedule.max_seq_len,
            num_blocks=num_blocks,
            device="mock",
            dtype="none",
        )

    blocks = BlockManager(num_blocks, schedule.block_size, prefix_cache=schedule.prefix_cache)
    core = (OverlappedCore if schedule.async_scheduling else EngineCore)(
        given.wire.instance,
        make_scheduler(schedule, blocks, eos, SwapSpace(num_blocks if schedule.max_preempt_count else 0)),
        EchoExecutor(vocab_size, len(eos)),
        open_link(given, greeting),
        watched(given),
    )
    log.warning(
        "modelInstanceType=StandardMock: %s has no weights loaded, every answer is an echo of its prompt; "
        "set it to Standard for a real model",
        model.name,
    )
    given.control.channel.send(
        Ready(
            f"{model.name} as a mock, {num_blocks} blocks of {schedule.block_size} tokens, "
            f"{time.monotonic() - start:.1f} s"
        )
    )
    core.run()


def _stand_by(given: WorkerContext) -> NoReturn:
    """A further rank: echoes are no work to be divided, but the process is there, and is watched."""
    limit_s = given.step_timeout_s
    given.control.channel.send(Ready(f"{given.model.name} as a mock, rank {given.rank}"))
    while True:
        given.pulse.expect_within(limit_s)
        time.sleep(limit_s / 4)


def read_vocabulary(folder: Path) -> tuple[int, tuple[int, ...]]:
    """Number of token ids and those that end an answer; of plain bytes where the folder names none.

    Raises StartupError for files that are there and wrong.
    """
    size = 0
    eos: tuple[int, ...] = ()
    if (folder / "config.json").exists():
        config = ConfigValues.read(folder / "config.json")
        eos = eos_token_ids(folder, config)
        size = config.optional_positive("vocab_size") or config.optional_positive("padded_vocab_size") or 0
    if not size and (folder / "tokenizer.json").exists():
        size = _tokenizer_size(folder / "tokenizer.json")
    return size or _BYTES, eos


def _tokenizer_size(file: Path) -> int:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        added = [token["id"] + 1 for token in document.get("added_tokens") or ()]
        return int(max([len(document["model"]["vocab"]), *added]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StartupError(f"{file}: is no usable tokenizer: {error}", EXIT_INIT) from None


def count_mock_blocks(model: ModelSettings, schedule: ScheduleSettings) -> int:
    """kvCacheBlockNum, else a full batch of the longest sequences. Raises StartupError for less than one."""
    per_sequence = -(-schedule.max_seq_len // schedule.block_size)
    if model.kv_block_num <= 0:
        return max(per_sequence, min(schedule.max_batch_size * per_sequence, _MOST_BLOCKS))
    if model.kv_block_num < per_sequence:
        raise StartupError(
            f"KV cache: one sequence of maxSeqLen {schedule.max_seq_len} needs {per_sequence} blocks of "
            f"{schedule.block_size} tokens, but kvCacheBlockNum is {model.kv_block_num}; lower maxSeqLen or "
            "raise kvCacheBlockNum",
            EXIT_INIT,
        )
    return model.kv_block_num
