"""ModelRunner: one rank's model, cache and attention; a StepPlan goes in, logits come out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import EXIT_INIT, StartupError
from engine.plan import StepKind, StepPlan, build_plan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.settings import ModelSettings, ScheduleSettings
from engine.wire.keepsake import Keepsake
from worker.attention.base import AttentionBackend, AttentionSpec
from worker.attention.registry import make_attention
from worker.batch import Batch, make_batch, split_by_arithmetic, split_plan
from worker.cache_size import activation_bytes, count_blocks, count_host_blocks, holds_int8
from worker.config_values import ConfigValues
from worker.device_draw import DeviceDraw
from worker.hf_config import eos_token_ids
from worker.kv_cache import KvCache, KvSpec
from worker.loader import Checkpoint
from worker.lora_table import LoraTable
from worker.models.registry import model_class
from worker.parallel import Alone, ParallelGroup, join_group
from worker.platforms.base import StepGraphs
from worker.platforms.registry import select_platform
from worker.prompt_logprobs import PromptScorer
from worker.shard import Shard, check_divides

log = logging.getLogger("llmmodels.runner")

_WARM_UP_TOKENS = 256  # enough for every kernel of a prefill, short enough to cost nothing
_WARM_UP_ROWS = (1, 2, 4, 8, 16, 32)  # decode batches; the products are prepared per row count


class ModelRunner:
    """Used in this order: join (of several ranks), load, size_kv_cache, allocate, warm_up, forward...

    All ranks of a group go through it together: from the warm-up on each call is one on every rank.
    """

    def __init__(
        self,
        settings: ModelSettings,
        schedule: ScheduleSettings,
        device_id: int,
        progress: Callable[[str, float], None],
        num_workers: int = 1,
        keepsake: Keepsake | None = None,
    ) -> None:
        """`progress(phase, fraction)` is called while loading. `num_workers` share this machine.

        `keepsake`: what another worker has found out about the machine, or a place for it.
        """
        self._settings = settings
        self._schedule = schedule
        self._progress = progress
        self._num_workers = num_workers
        self._keepsake = keepsake or Keepsake()
        self._platform = select_platform(settings.device_type)
        self._platform.set_up(device_id, num_workers, settings.cpu_threads)
        self.group: ParallelGroup = Alone()

    def set_up_thread(self) -> None:
        """To be called by another thread that is to compute from now on."""
        self._platform.set_up_thread()

    def join(self, shard: Shard, meeting_file: Path, timeout_s: float) -> None:
        """Become one of the ranks that divide the model, before it is loaded; see `join_group`."""
        backend = self._platform.collectives
        self.group = join_group(shard, self._platform.device, backend, meeting_file, timeout_s)

    def load(self) -> None:
        """Read configuration and weights; StartupError says in one line what is wrong with them.

        From here on `max_seq_len` is the length in force: maxSeqLen, or less where the model ends earlier.
        """
        folder = self._settings.weight_path
        raw = ConfigValues.read(folder / "config.json")
        cls = model_class(raw)
        config = cls.parse_config(raw)
        shard = self.group.shard
        shapes = cls.tensor_shapes(config)
        check_divides(config, shard, folder, has_own_family=shapes is not None)
        checkpoint = Checkpoint(folder)
        if shapes is not None:
            checkpoint.check(shapes, cls.ignorable_tensors(config))
        dtype = self._platform.weight_dtype(self._settings.dtype, checkpoint.stored_dtype)

        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        # beyond the positions it was made for a model's text is noise; the validator has warned about it
        self.max_seq_len = min(self._schedule.max_seq_len, config.usable_positions)
        self._schedule = replace(
            self._schedule,
            max_seq_len=self.max_seq_len,
            max_input_len=min(self._schedule.max_input_len, self.max_seq_len - 1),
        )
        # an id beyond the vocabulary, which some models declare, ends nothing and masks nothing
        self.eos_token_ids = tuple(token for token in eos_token_ids(folder, raw) if token < self.vocab_size)
        self.dtype = dtype
        self.weight_bytes = checkpoint.bytes_held(shapes or checkpoint.names(), dtype.itemsize) // shard.size
        self._kv_spec = KvSpec(
            config.num_layers,
            self._schedule.block_size,
            shard.count(config.num_kv_heads),
            config.head_dim,
            dtype,
            int8=holds_int8(self._settings, checkpoint.quantisation),
            shared=config.shares_pages,
        )
        self.block_bytes = self._kv_spec.block_bytes
        self._activation_bytes = activation_bytes(config, self._schedule)
        self.num_host_blocks = count_host_blocks(
            self.block_bytes, self._settings, self._schedule, self._schedule.block_size
        )
        self._check_memory()
        if self._settings.linear_dtype == "fp8":
            if shapes is None:
                raise StartupError(
                    "linearDtype 'fp8': not for models run by transformers' modules; set it to 'auto'",
                    EXIT_INIT,
                )
            self._platform.use_fp8(dtype)
        exact_router = config.experts is not None and config.experts.exact
        self._choose_kernels(
            {dtype, torch.float32} if exact_router else {dtype}, bool(checkpoint.quantisation.types)
        )
        within = config.window is None or config.window >= self.max_seq_len
        spec = AttentionSpec(
            shard.count(config.num_heads),
            shard.count(config.num_kv_heads),
            config.head_dim,
            dtype,
            int8_cache=self._kv_spec.int8,
            window=None if within else config.window,
        )
        usual, invariant = (
            self._platform.attention_backend(spec),
            self._platform.invariant_attention_backend(spec),
        )
        self._attention = make_attention(usual, spec)
        self._invariant_attention = self._attention if usual == invariant else make_attention(invariant, spec)
        self._model = cls(
            config,
            checkpoint,
            self._platform,
            dtype,
            self.max_seq_len,
            lambda fraction: self._progress("weights", fraction),
            self.group,
        )
        self._platform.give_back_memory()
        # where there is only one way, nothing is cut for the sake of another
        only_way = self._platform.independent_rows and self._invariant_attention is self._attention
        self._all_invariant = only_way or self._settings.batch_invariant
        log.info("%s, %s, weights %d MiB", self._platform.describe(), dtype, self.weight_bytes >> 20)
        self.adapters = LoraTable(
            self._model.projections, self._model.step_adapters, dtype, self._platform, self._settings.lora
        )
        self.adapters.load_static(self._settings.lora.modules)

    def _choose_kernels(self, dtypes: set[torch.dtype], quantised: bool) -> None:
        """As the others have, or for them: not at the same time, which would disturb the measuring too."""
        with self._keepsake.alone():
            if left := self._keepsake.read():
                self._platform.adopt(left)
            else:
                for dtype in dtypes:
                    self._platform.choose_kernels(dtype)
                if quantised:
                    self._platform.choose_int8_kernels(self.dtype)
                self._keepsake.leave(self._platform.findings())

    def _check_memory(self) -> None:
        """Refuse a cache that cannot fit before minutes are spent on weights.

        All workers start together and none holds anything yet, so each may count on an equal share of a
        memory that all take from.
        """
        sharers = self._num_workers if self._platform.shares_memory else 1
        share = self._platform.memory().available // sharers
        self._count_blocks(available_bytes=share - self.weight_bytes - self._other_bytes())

    @property
    def device_draw(self) -> DeviceDraw | None:
        """How tokens are drawn where the logits are; None: that is no gain here."""
        keep = self._platform.top_k_top_p
        return None if keep is None else DeviceDraw(keep)

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        return self._platform.device

    @property
    def device_name(self) -> str:
        return self._platform.name

    @property
    def enough_prefill_tokens(self) -> int:
        """Prompt tokens beyond which a step takes longer and computes no faster."""
        return self._platform.enough_rows

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a failed `forward` would do with less to compute at once."""
        return self._platform.is_out_of_memory(error)

    def size_kv_cache(self) -> int:
        """Blocks every rank can hold; StartupError when that is less than one sequence of maxSeqLen.

        No share of the memory any more: the other workers hold theirs by now, and `load` counted all of them.
        """
        own = self._count_blocks(available_bytes=self._platform.memory().available - self._other_bytes())
        return self.group.least(own)

    def _other_bytes(self) -> int:
        """What the device's memory has to hold besides weights and cache."""
        in_this_memory = self.num_host_blocks if self._platform.shares_memory else 0
        return self._activation_bytes + in_this_memory * self.block_bytes

    def _count_blocks(self, available_bytes: int) -> int:
        return count_blocks(
            self._kv_spec,
            self._settings,
            self._schedule,
            automatic_bytes=self._platform.kv_budget(self._num_workers, self._settings.memory_fraction),
            available_bytes=available_bytes,
        )

    def allocate(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._graphs = self._platform.step_graphs(
            self._schedule.max_batch_size, self.max_seq_len, self._schedule.block_size
        )
        spare = self._graphs.spare_blocks if self._graphs else 0
        self._cache = KvCache(self._kv_spec, num_blocks + spare, self._platform.device)
        self._host_cache = KvCache(self._kv_spec, self.num_host_blocks, torch.device("cpu"))

    def swap(self, plan: StepPlan) -> None:
        """Make the plan's moves between cache and host memory; to be done once, before `forward`."""
        if plan.swap_out:
            self._host_cache.fetch(self._cache, plan.swap_out)
        if plan.swap_in:
            self._cache.fetch(self._host_cache, plan.swap_in)

    def warm_up(self) -> None:
        """Run every kind of step once, so that no request pays for kernels prepared on first use.

        Scribbles over the cache: nothing may be in it yet.
        """
        room = self._num_blocks * self._schedule.block_size
        longest = max(
            1, min(_WARM_UP_TOKENS, self._schedule.max_prefill_tokens, self._schedule.max_input_len, room)
        )
        rows = [n for n in _WARM_UP_ROWS if n <= min(self._schedule.max_batch_size, self._num_blocks)]
        self.forward(build_plan(StepKind.PREFILL, [self._dummy(longest, 0)], self._schedule.block_size))
        for step, batch_size in enumerate(rows):
            self._progress("warm-up", (step + 1) / (len(rows) + 1))
            sequences = [self._dummy(1, first_block=row) for row in range(batch_size)]
            self.forward(build_plan(StepKind.DECODE, sequences, self._schedule.block_size))
        for reproducible in (self._dummy(longest, 0), self._dummy(1, 0)):
            reproducible.params = replace(reproducible.params, reproducible=True)
            self.forward(build_plan(StepKind.PREFILL, [reproducible], self._schedule.block_size))
        if self._graphs is not None:
            self._capture(self._graphs)
        self._progress("warm-up", 1.0)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, prompts: PromptScorer | None = None) -> Tensor:
        """Logits of each row's last query token, [R, vocab] in the model's dtype, in the plan's order.

        [R, 0] where nothing is sampled.

        `prompts`: where the scores of prompt tokens go.

        Logits and cache of a row that is to be reproducible are the same bits in every step that computes
        them, alone or in company, whole or token by token. Which kernels another row meets depends on its own
        length alone, but their order of summation may follow the number of tokens in the step: its logits
        equal those of the row alone to rounding.
        """
        if plan.copies:
            self._cache.copy_blocks(plan.copies)
        logits = []
        for part, invariant in split_by_arithmetic(plan, all_invariant=self._all_invariant):
            pieces = [part] if invariant else split_plan(part, self._platform.wide_rows)
            self._platform.arithmetic.invariant = invariant
            attention = self._invariant_attention if invariant else self._attention
            logits += [self._forward(piece, attention, prompts) for piece in pieces]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @torch.inference_mode()
    def _capture(self, graphs: StepGraphs) -> None:
        def compute(batch: Batch) -> Tensor:
            return self._model.logits(self._model.forward(batch, self._attention, self._cache))

        graphs.capture(compute, self._attention, self._platform.device, spare_from=self._num_blocks)

    def _forward(self, plan: StepPlan, attention: AttentionBackend, prompts: PromptScorer | None) -> Tensor:
        if self._graphs is not None and prompts is None and self._graphs.serves(plan):
            return self._graphs.forward(plan)
        batch = make_batch(plan, self._platform.device)
        attention.begin_step(batch, self._schedule.block_size)
        self.adapters.begin_step(plan, batch)
        hidden = self._model.forward(batch, attention, self._cache)
        if prompts is not None:
            prompts.add(plan, batch, hidden, self._model.logits)
        if not plan.samples:  # reading the vocabulary head takes longer than many a layer
            return hidden.new_zeros(plan.num_rows, 0)
        if batch.last_tokens is not None:
            hidden = hidden.index_select(0, batch.last_tokens)
        return self._model.logits(hidden)

    def _dummy(self, num_tokens: int, first_block: int) -> Sequence:
        """A sequence of token 0 of which nothing is computed, in blocks from `first_block` on.

        With one token it is what a decode step sees, and fits the smallest block.
        """
        sequence = Sequence(0, np.zeros(num_tokens, np.int32), SamplingParams(max_tokens=1))
        blocks = -(-num_tokens // self._schedule.block_size)
        sequence.block_table = list(range(first_block, first_block + blocks))
        return sequence
