#!/usr/bin/env python3
"""Make int8 weights of a float checkpoint, laid out as MindIE and msModelSlim have them.

    python scripts/quantize.py --model models/mindie-tiny --out /tmp/tiny-w8a8d --scheme w8a8_dynamic
    python scripts/quantize.py --model MODEL --out OUT --scheme w8a8 --calibrate problems.jsonl

w8a8_dynamic  int8 weights; activations are quantised row by row while serving
w8a8          int8 weights; activations are quantised with constants, found on the texts of --calibrate: a
              line is a text, or a JSON object with "question" and "answer" that is asked in the model's chat
w8a16         int8 weights; activations stay as they are

The linear layers of the decoder are quantised, with a scale for each output; embeddings and norms are not,
the head with --head: it is the largest product of a step, and one tied to the embedding gets a copy of its
own, a byte for each of its numbers. Tensors are read, quantised and written one by one, and texts run through
one layer at a time, so that the model need not fit into memory. --check tells what it costs: the loss per
token of both on texts that the calibration has not seen. What it costs in answers: scripts/eval_accuracy.py
on both.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages beside this folder

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import StartupError
from engine.quantisation import DESCRIPTION, SCHEMES
from scripts.layerwise import Ranges, draw_progress, family_class, input_ranges, mean_loss, read_texts
from worker.config_values import ConfigValues
from worker.loader import EMBEDDING, HEAD, Checkpoint

KINDS = {"w8a8": "W8A8", "w8a8_dynamic": "W8A8_DYNAMIC", "w8a16": "W8A16"}
DIRECTORY_MODE = 0o750  # the server refuses a model directory that is wider
FILE_MODE = 0o640


# --- arithmetic -------------------------------------------------------------------------------------------


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 of its shape, float32 [out, 1]: the largest number of a row becomes 127 or -127."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (wide / scale).round_().to(torch.int8), scale


def input_constants(low: float, high: float) -> tuple[float, float]:
    """Scale and offset that spread [low, high] over int8; 0 becomes a whole number."""
    scale = max((high - low) / 255, float(torch.finfo(torch.float32).tiny))
    return scale, float(min(127, max(-128, round(-128 - low / scale))))


def static_parts(
    q: Tensor, scale: Tensor, bias: Tensor | None, bounds: tuple[float, float]
) -> dict[str, Tensor]:
    """What W8A8 stores beside a weight; see engine/quantisation.py."""
    input_scale, input_offset = input_constants(*bounds)
    deq_scale = scale.flatten() * input_scale
    folded = torch.zeros_like(deq_scale) if bias is None else bias.float() / deq_scale
    folded -= q.sum(dim=1, dtype=torch.int64) * input_offset
    return {
        "input_scale": torch.tensor([input_scale]),
        "input_offset": torch.tensor([input_offset]),
        "deq_scale": deq_scale,
        "quant_bias": folded.round_().clamp_(-(2**31), 2**31 - 128).to(torch.int32),
    }


# --- writing ----------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Gathers tensors until they make a shard; the names of the shards are known when all are written."""

    out: Path
    stem: str
    shard_bytes: int
    description: dict[str, str] = field(default_factory=dict)
    written: int = 0  # bytes
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _shards: list[list[str]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor, kind: str) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.description[name] = kind
        self.written += tensor.nbytes

    def close(self) -> int:
        """Write what is left, name the shards, and write their index; the number of files."""
        self._flush()
        total = len(self._shards)
        names = [
            f"{self.stem}.safetensors" if total == 1 else f"{self.stem}-{number:05}-of-{total:05}.safetensors"
            for number in range(1, total + 1)
        ]
        for number, name in enumerate(names):
            self._part(number).rename(self.out / name)
            (self.out / name).chmod(FILE_MODE)
        if total > 1:
            places = {
                tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard
            }
            index = {"metadata": {"total_size": self.written}, "weight_map": places}
            write_json(self.out / f"{self.stem}.safetensors.index.json", index)
        return total

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.out / f"{self.stem}.{number}.part"


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file.chmod(FILE_MODE)


def copy_others(model: Path, out: Path, scheme: str) -> None:
    """The tokenizer and what else lies beside the weights; config.json gets its "quantize"."""
    for file in sorted(model.iterdir()):
        if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
            shutil.copyfile(file, out / file.name)
            (out / file.name).chmod(FILE_MODE)
    config = json.loads((model / "config.json").read_text(encoding="utf-8-sig"))
    write_json(out / "config.json", {**config, "quantize": scheme})


# --- the whole --------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What has been done, and how far the weights have moved."""

    bytes_before: int = 0
    errors: dict[str, float] = field(default_factory=dict)  # module -> |w - its int8| / |w|

    def note(self, module: str, weight: Tensor, q: Tensor, scale: Tensor) -> None:
        wide = weight.float()
        self.errors[module] = float((wide - q.float() * scale).norm() / wide.norm().clamp_min(1e-30))

    def lines(self, bytes_after: int, files: int) -> Iterator[str]:
        mean = math.fsum(self.errors.values()) / len(self.errors)
        worst = max(self.errors, key=lambda module: self.errors[module])
        yield f"{len(self.errors)} layers in int8; all other tensors as they were"
        yield f"{self.bytes_before / 2**20:.1f} MiB became {bytes_after / 2**20:.1f} MiB in {files} file(s)"
        yield (
            f"weights moved by {mean:.2%} of their norm on average, "
            f"at most {self.errors[worst]:.2%} ({worst})"
        )


# what chooses experts, and what is taken apart and multiplied into queries and values
_FLOATING = ("mlp.gate", "block_sparse_moe.gate", "kv_b_proj")


def quantised_modules(shapes: Mapping[str, tuple[int, ...]], keep: Sequence[str]) -> list[str]:
    """The decoder's linear layers, without those whose name contains one of `keep`."""
    linears = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if ".layers." in name and name.endswith(".weight") and len(shape) == 2
    ]
    return [
        module
        for module in linears
        if not module.endswith(_FLOATING) and not any(part in module for part in keep)
    ]


def quantise(
    checkpoint: Checkpoint,
    writer: Writer,
    kind: str,
    keep: Sequence[str],
    ranges: Ranges,
    head: bool = False,
) -> Summary:
    """Write every tensor of the checkpoint, quantised where it is to be; `head`: the vocabulary head too."""
    values, cls = ConfigValues.read(checkpoint.folder / "config.json"), family_class(checkpoint.folder)
    shapes = cls.tensor_shapes(cls.parse_config(values))
    modules = set(quantised_modules(shapes, keep))
    if kind == "W8A8":  # an expert that no text went to has no constants
        modules -= {module for module in modules if ranges.get(module, (0.0, 0.0)) == (0.0, 0.0)}
    if not modules:
        raise ValueError("--keep leaves no layer to be quantised")
    if head:
        modules.add(HEAD)
        # rows of int8 do not serve as an embedding: a tied head gets a copy
        shapes = {**shapes, f"{HEAD}.weight": shapes[f"{EMBEDDING}.weight"]}
    summary = Summary()
    for number, name in enumerate(shapes):
        module, _, part = name.rpartition(".")
        tensor = checkpoint.raw(name if name in checkpoint else f"{EMBEDDING}.weight")
        summary.bytes_before += tensor.nbytes if name in checkpoint else 0
        if module not in modules:
            writer.add(name, tensor, "FLOAT")
        elif part == "weight":
            q, scale = quantise_weight(tensor)
            summary.note(module, tensor, q, scale)
            bias = checkpoint.raw(f"{module}.bias") if f"{module}.bias" in shapes else None
            static = kind == "W8A8" and module != HEAD
            parts = (
                static_parts(q, scale, bias, ranges[module])
                if static
                else {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
            )
            how = kind if static or kind == "W8A16" else "W8A8_DYNAMIC"
            for key, value in {"weight": q, **parts}.items():
                writer.add(f"{module}.{key}", value, how)
        elif kind != "W8A8":  # there it is part of quant_bias
            writer.add(name, tensor.float(), kind)
        checkpoint.release()
        draw_progress("writing", number + 1, len(shapes))
    return summary


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of a float checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory to be written")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="texts, for w8a8")
    parser.add_argument("--check", type=Path, metavar="FILE", help="texts to compare both models on")
    parser.add_argument(
        "--samples", type=positive_int, default=128, help="texts of a file that are used (128)"
    )
    parser.add_argument("--max-tokens", type=positive_int, default=512, help="of each text (512)")
    parser.add_argument("--keep", action="append", default=[], metavar="PART",
                        help="leave layers as they are whose name contains this (repeatable)")  # fmt: skip
    parser.add_argument("--head", action="store_true", help="quantise the vocabulary head too")
    parser.add_argument("--shard-mib", type=positive_int, default=4096, help="size of a weight file (4096)")
    parser.add_argument("--force", action="store_true", help="replace what is in the directory")
    args = parser.parse_args(argv)
    if (args.scheme == "w8a8") != (args.calibrate is not None):
        parser.error("--calibrate FILE goes with --scheme w8a8, and only with it")
    if args.out.resolve() == args.model.resolve():
        parser.error("--out must be another directory than --model")
    return args


def run(args: argparse.Namespace) -> Iterator[str]:
    """Do it; yields the lines of the summary."""
    checkpoint = Checkpoint(args.model)
    if checkpoint.quantisation.scheme:
        raise ValueError(f"{args.model} is quantised already ({checkpoint.quantisation.scheme})")
    values = ConfigValues.read(args.model / "config.json")
    cls = family_class(args.model)
    config = cls.parse_config(values)
    checkpoint.check(cls.tensor_shapes(config), cls.ignorable_tensors(config))
    if args.out.exists() and any(args.out.iterdir()):
        if not args.force:
            raise ValueError(f"{args.out} is not empty; --force replaces what is in it")
        for file in args.out.iterdir():
            file.unlink()
    longest = min(args.max_tokens, config.usable_positions)
    unseen = read_texts(args.model, args.check, args.samples, longest) if args.check else []
    ranges: Ranges = {}
    if args.calibrate:
        texts = read_texts(args.model, args.calibrate, args.samples, longest)
        ranges = input_ranges(checkpoint, texts)
        yield f"calibrated on {len(texts)} texts, {sum(map(len, texts))} tokens, of {args.calibrate}"
    args.out.mkdir(parents=True, exist_ok=True)
    args.out.chmod(DIRECTORY_MODE)
    writer = Writer(args.out, f"quant_model_weight_{args.scheme}", args.shard_mib * 2**20)
    summary = quantise(checkpoint, writer, KINDS[args.scheme], args.keep, ranges, args.head)
    files = writer.close()
    write_json(args.out / DESCRIPTION, {"model_quant_type": KINDS[args.scheme], **writer.description})
    copy_others(args.model, args.out, args.scheme)
    yield from summary.lines(writer.written, files)
    if not unseen:
        yield "what that does to texts and answers is not known: see --check, and scripts/eval_accuracy.py"
        return
    before, after = mean_loss(checkpoint, unseen), mean_loss(Checkpoint(args.out), unseen)
    yield (
        f"loss per token on {len(unseen)} texts of {args.check}: {before:.4f} before, {after:.4f} after "
        f"({after - before:+.4f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 when written, 2 when it could not be."""
    args = parse_args(argv)
    started = time.monotonic()
    try:
        for line in run(args):
            print(line)
    except (StartupError, OSError, ValueError) as error:
        print(f"cannot quantise: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.scheme} in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
