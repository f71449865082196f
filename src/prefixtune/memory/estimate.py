"""From options to a prediction of the peak, and to what would lower it. Knows no data and no files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefixtune.errors import OutOfMemoryError, PrefixTuneError
from prefixtune.geometry import Geometry, text_config
from prefixtune.memory.step import Setup, StepBytes, measure_step
from prefixtune.memory.stored import loading_bytes
from prefixtune.quantize import saved_bytes

__all__ = ["Advice", "Estimate", "check_fit", "estimate", "readable", "reading_bytes"]

# of what a step allocates and frees again: holes that glibc cannot use at the peak (docs/memory.md)
CPU_SLACK = 0.15
# glibc maps blocks above this one by one; below it whole matrices of attention scores leave holes, in bytes
# for each byte of such a matrix in each layer
MAPPED, SCORE_HOLES = 32 * 2**20, 2
# what the first step adds to a process for good: MKL's buffers, code that had not run yet (docs/memory.md)
CPU_FIRST_STEP = 64 * 2**20
# and what oneDNN's kernels take in 16 bits, few of which are kept (docs/memory.md)
KERNEL_BYTES = 48 * 2**20
SHORTEST = 64  # tokens: rows are not advised to be cut below this


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change and the peak that was estimated with it, which may be that of reading the weights."""

    change: str
    peak_bytes: int
    fits: bool
    while_loading: bool


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The predicted peak of a training run in bytes, and its parts.

    Attributes:
        step: what is live at the peak of a step.
        baseline: the process without a model: interpreter, libraries, rows; on CUDA what libraries keep.
        slack: what allocators and libraries hold beyond it. 0 on CUDA.
        loading: the peak while the weights are read, which may be the higher one.
        sampling: that while the base writes neutral text before the first step; 0 without.
        available: what the process may come to have.
        advice: changes that lower the peak, in the order in which we would try them.
    """

    setup: Setup
    step: StepBytes
    baseline: int
    slack: int
    loading: int
    sampling: int
    available: int
    advice: tuple[Advice, ...] = ()

    @property
    def peak(self) -> int:
        return max(self.baseline + self.step.total + self.slack, self.loading, self.sampling)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        step, setup = self.step, self.setup
        return {
            "peak_bytes": self.peak,
            "available_bytes": self.available,
            "fits": self.fits,
            "weights_bytes": step.weights,
            "prefix_bytes": step.prefix,
            "optimizer_bytes": step.optimizer,
            "gradient_bytes": step.gradients,
            "activation_bytes": step.activations,
            "logits_bytes": step.logits,
            "baseline_bytes": self.baseline,
            "slack_bytes": self.slack,
            "loading_peak_bytes": self.loading,
            "sampling_peak_bytes": self.sampling,
            "device": setup.device,
            "dtype": str(setup.dtype).removeprefix("torch."),
            "assumptions": {
                "rows_of_a_pass": len(setup.lengths),
                "tokens_of_a_pass": setup.tokens,
                "packing": setup.packing,
                "target_share": round(setup.target_share, 4),
                "gradient_checkpointing": setup.checkpointing,
                "eval_tokens_of_a_pass": setup.eval_tokens,
            },
            "advice": [dataclasses.asdict(advice) for advice in self.advice],
        }

    def summary(self) -> str:
        """The parts as a table, the verdict, and the advice."""
        step, setup = self.step, self.setup
        parts = {
            "weights": step.weights,
            "prefix": step.prefix,
            "optimizer": step.optimizer,
            "gradients": step.gradients,
            "activations": step.activations,
            "logits": step.logits,
            "the process itself": self.baseline,
            "allocators": self.slack,
            "while loading": self.loading if self.loading == self.peak else 0,
            "sampling neutral text": self.sampling if self.sampling == self.peak else 0,
        }
        dtype = str(setup.dtype).removeprefix("torch.")
        lines = [f"passes of {setup.tokens} tokens in {dtype} on {setup.device}"]
        lines += [f"  {name:<20}{readable(size):>10}" for name, size in parts.items() if size]
        lines.append(f"  {'peak':<20}{readable(self.peak):>10}")
        verdict = "it fits" if self.fits else "it DOES NOT FIT"
        lines.append(f"available: {readable(self.available)}, so {verdict}")
        return "\n".join([*lines, *([self.hint] if self.advice else [])])

    @property
    def hint(self) -> str:
        """The advice, a line for each change."""
        lines = [
            f"{item.change} needs {readable(item.peak_bytes)}"
            + ("" if item.fits else ", still too much")
            + (" while the weights are read" if item.while_loading else "")
            for item in self.advice
        ]
        return "\n".join(lines) or "no option of this run lowers it; take a smaller model"


def estimate(
    base: nn.Module,
    setup: Setup,
    *,
    available: int,
    baseline: int = 0,
    files: Sequence[Path] = (),
    while_loading: int | None = None,
    so_far: int = 0,
    advise: bool | None = None,
) -> Estimate:
    """Predict the peak of training on `base`; no weights are allocated.

    Args:
        base: the model on the meta device, see `prefixtune.load.empty_model`.
        available: bytes that the process may come to have, see `budget`.
        baseline: bytes that the process has without the model, on the device.
        files: what the weights will be read from, see `prefixtune.load.weight_files`; none where they are
            in memory already.
        while_loading: the `baseline` of that moment, which is before the tokenizer is read (CPU).
        so_far: the peak of this process until now, where the weights are loaded already.
        advise: estimate what would lower the peak; by default only where it does not fit.

    Raises:
        UnsupportedModelError: the model cannot carry a prefix.
    """
    step = measure_step(base, setup)
    on_cpu = torch.device(setup.device).type == "cpu"
    loading = so_far
    if not so_far:
        first = baseline if while_loading is None else while_loading
        loading = first + reading_bytes(
            base, setup.dtype, device=setup.device, quantize=setup.quantize, files=files
        )
    passing = step.activations + step.logits + step.gradients
    sampled = sampling_bytes(base, setup)
    found = Estimate(
        setup=setup,
        step=step,
        baseline=baseline,
        slack=_slack(base, setup, passing) if on_cpu else 0,
        loading=loading,
        sampling=baseline + step.weights + step.prefix + sampled if sampled else 0,
        available=available,
    )
    if advise is False or (advise is None and found.fits):
        return found

    def tried(changes: Sequence[Change]) -> Estimate | None:
        """With these changes; None where the model cannot have them."""
        values: dict[str, Any] = {}
        for _, changed in changes:
            values |= changed
        try:
            return estimate(
                base,
                replace(setup, **values),
                available=available,
                baseline=baseline,
                files=files,
                while_loading=while_loading,
                so_far=so_far,
                advise=False,
            )
        except PrefixTuneError:  # experts are not quantised; not all layers are checkpointed
            return None

    def advice(changes: Sequence[Change], other: Estimate) -> Advice:
        options = {name.split()[0]: name for names, _ in changes for name in names}  # each as it was last
        return Advice(
            change=" ".join(options.values()),
            peak_bytes=other.peak,
            fits=other.fits,
            while_loading=not so_far and other.peak == other.loading,
        )

    each = [(change, tried([change])) for change in (*_same_result(setup), *_other_result(setup))]
    possible = [change for change, other in each if other is not None]
    alone = [advice([change], other) for change, other in each if other and other.peak < found.peak]
    if any(one.fits for one in alone):
        return replace(found, advice=tuple(alone))
    together = _together(possible, tried)
    lowest = min((one.peak_bytes for one in alone), default=found.peak)
    best = [advice(*together)] if together and together[1].peak < lowest else []
    return replace(found, advice=(*alone, *best))


def _slack(base: nn.Module, setup: Setup, passing: int) -> int:
    """What glibc and libraries hold beyond live bytes; of scores only where attention makes them whole."""
    slack = round(CPU_SLACK * passing) + CPU_FIRST_STEP
    if setup.dtype in (torch.bfloat16, torch.float16):
        slack += KERNEL_BYTES
    config = text_config(base)
    heads = getattr(config, "num_attention_heads", None)
    whole = getattr(config, "_attn_implementation", None) == "eager" and not setup.packing
    if setup.frees_at_once or not whole or not isinstance(heads, int):
        return slack

    def scores(tokens: float) -> float:
        return len(setup.lengths) * heads * tokens * (setup.prefix.length + tokens) * torch.float32.itemsize

    if scores(setup.row_tokens) > MAPPED:
        return slack
    holes = SCORE_HOLES * len(Geometry.probe(base).layers) * scores(max(setup.lengths))
    return max(slack, round(holes) + CPU_FIRST_STEP)


def _together(
    changes: Sequence[Change], tried: Callable[[Sequence[Change]], Estimate | None]
) -> tuple[Sequence[Change], Estimate] | None:
    """As few of several changes as fit, or, where all do not, as few as bring the most.

    Those that do nothing alone count: where two peaks are alike, it takes a change for each.
    """
    plain = [change for change in changes if "quantize" not in change[1]]
    # packing weights may take more than it saves: whole ones are read before
    choices = [changes] if len(plain) == len(changes) else [changes, plain]
    made = [(some, other) for some in choices if len(some) > 1 and (other := tried(some)) is not None]
    if not made:
        return None
    some, lowest = min(made, key=lambda one: one[1].peak)
    for change in reversed(changes):  # first those that change the result
        fewer = [one for one in some if one is not change]
        other = tried(fewer) if 0 < len(fewer) < len(some) else None
        if other is not None and (other.peak <= lowest.peak or (other.fits and lowest.fits)):
            some, lowest = fewer, other
    return some, lowest


def sampling_bytes(base: nn.Module, setup: Setup) -> int:
    """Bytes beside weights and prefix while the base writes the neutral texts: their keys and values, logits
    with the probabilities that a token is drawn by, and a quantised layer that is unpacked."""
    if not setup.sampled_rows:
        return 0
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in Geometry.probe(base).layers)
    cache = setup.sampled_rows * max(setup.neutral_lengths) * numbers * setup.dtype.itemsize
    vocabulary: int = text_config(base).vocab_size
    logits = setup.sampled_rows * vocabulary * (setup.dtype.itemsize + 3 * torch.float32.itemsize)
    unpacked = 0 if setup.quantize is None else 2 * saved_bytes(base, setup.quantize, setup.dtype)[1]
    slack = CPU_SLACK if torch.device(setup.device).type == "cpu" else 0
    return round((cache + logits + unpacked) * (1 + slack))


def reading_bytes(
    base: nn.Module,
    dtype: torch.dtype,
    *,
    device: str,
    quantize: str | None = None,
    files: Sequence[Path] = (),
) -> int:
    """Bytes that the weights take on `device` at most while `load_base` reads them.

    It packs those that are quantised on the CPU, one layer after the other, and they reach a GPU packed.

    Args:
        base, files: as for `estimate`.
    """
    numbers = [parameter.numel() for parameter in base.parameters()]
    buffers = sum(buffer.nbytes for buffer in base.buffers())

    def held(dtype: torch.dtype) -> int:
        saved = 0 if quantize is None else saved_bytes(base, quantize, dtype)[0]
        return sum(numbers) * dtype.itemsize + buffers - saved

    if torch.device(device).type != "cpu":
        return held(dtype)
    if quantize is not None and dtype == torch.float32:  # then they are read as they are stored
        dtype = getattr(base.config, "dtype", None) or dtype
    whole = sum(numbers) * dtype.itemsize + buffers
    packed = 0 if quantize is None else held(dtype)
    return loading_bytes(files, whole, dtype, base=base, largest=max(numbers), packed=packed)


def check_fit(estimate: Estimate, *, force: bool) -> None:
    """Refuse a run that cannot fit.

    Raises:
        OutOfMemoryError: the estimated peak is above what is available, and it is not forced.
    """
    if estimate.fits or force:
        return
    raise OutOfMemoryError(
        f"the run would need {readable(estimate.peak)}, and {readable(estimate.available)} are available "
        f"({_largest(estimate)})",
        hint=f"{estimate.hint}\n--force begins all the same",
    )


def readable(size: int) -> str:
    """Bytes for people, in the units of the tools that show memory: 1 GiB = 2**30."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


Change = tuple[tuple[str, ...], dict[str, Any]]  # options as they are written, and what they set


def _same_result(setup: Setup) -> Iterator[Change]:
    """Changes that cost time and leave the gradient as it is."""
    if not setup.checkpointing:
        yield ("--gradient-checkpointing",), {"checkpointing": True}
    if setup.tokens > setup.longest:
        capacity = max(setup.longest, setup.tokens // 2)
        yield (f"--packing-length {capacity}",), _in_passes_of(capacity, setup)


def _other_result(setup: Setup) -> Iterator[Change]:
    if setup.dtype == torch.float32:
        yield ("--dtype bfloat16",), {"dtype": torch.bfloat16}
    if setup.quantize is None:
        yield ("--quantize int8",), {"quantize": "int8"}
    if setup.quantize != "nf4":
        yield ("--quantize nf4",), {"quantize": "nf4"}
    if setup.longest > SHORTEST:
        half = setup.longest // 2
        values = _in_passes_of(half, setup) | {"longest": half}
        yield (f"--max-length {half}", f"--packing-length {half}"), values
    if setup.prefix.projection:
        direct = replace(setup.prefix, projection=False, hidden_size=None)
        yield ("--no-projection",), {"prefix": direct}
    if setup.neutral_lengths:
        yield ("--retain 0",), {"neutral_lengths": (), "sampled_rows": 0}


def _in_passes_of(capacity: int, setup: Setup) -> dict[str, Any]:
    def cut(lengths: tuple[int, ...], common: int) -> tuple[int, ...]:
        kept = [min(t, capacity) for t in lengths]
        while len(kept) > 1 and setup.tokens_of(kept, common) > capacity:
            kept.pop()
        return tuple(kept)

    commons = min(setup.common, capacity - 1), min(setup.eval_common, capacity - 1)
    lengths, eval_lengths = map(cut, (setup.lengths, setup.eval_lengths), commons)
    return {
        "lengths": lengths,
        "eval_lengths": eval_lengths,
        "common": commons[0],
        "eval_common": commons[1],
        "passes": 2,
    }


def _largest(estimate: Estimate) -> str:
    step = estimate.step
    parts = {
        "weights": step.weights,
        "optimizer": step.optimizer,
        "activations": step.activations,
        "logits": step.logits,
        "the process itself": estimate.baseline,
    }
    two = sorted(parts.items(), key=lambda part: -part[1])[:2]
    return ", ".join(f"{name} {readable(size)}" for name, size in two)
