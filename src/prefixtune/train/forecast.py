"""How much memory a run will take: before its model is loaded, and when all is ready. Knows no disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from prefixtune.attachment import packs, splits
from prefixtune.config import DataConfig, PrefixConfig, TrainConfig
from prefixtune.data import Example, build_examples, check_splits, load_rows, parse_fields
from prefixtune.errors import ConfigError, OutOfMemoryError
from prefixtune.load import LoadedBase, empty_model, load_tokenizer, placement, weight_files
from prefixtune.loss import (
    GPU_PASS_TOKENS,
    PASS_TOKENS,
    common_start,
    default_capacity,
    first_target,
    share_passes,
)
from prefixtune.memory import (
    Estimate,
    Setup,
    budget,
    check_fit,
    estimate,
    measured_peak,
    pass_tokens,
    readable,
    reading_bytes,
    resident,
    take_workspaces,
    without_weights,
)
from prefixtune.model import PrefixModel
from prefixtune.progress import note
from prefixtune.train.defaults import (
    AUTO,
    LONGEST_LENGTH,
    SHORTEST_LENGTH,
    check_lengths,
    length_for,
    packing_length_for,
    planned_steps,
    positions_of,
)
from prefixtune.train.retention import BATCH, PER_STEP, TOKENS
from prefixtune.train.sampler import LengthGroupedSampler

__all__ = ["advice_for", "check_weights", "forecast", "forecast_for", "pass_tokens_for", "setup_of"]


LOOKED_AT = 10_000  # batches
MARGIN = 1.15  # an estimate may be so much too low
SIZES = ("length", "projection", "hidden_size", "layers")  # options of the prefix that decide its bytes


def setup_of(
    config: TrainConfig,
    prefix: PrefixConfig,
    examples: Sequence[Example],
    eval_examples: Sequence[Example] = (),
    *,
    packing: bool,
    dtype: torch.dtype,
    device: str,
    texts_kept: bool = False,
) -> Setup:
    """What `prefixtune.memory` has to know of a run.

    Args:
        packing: whether its rows can be packed.
        texts_kept: its folder has the neutral texts already, so that none are sampled.
    """
    rows = _Rows(examples, packing=packing)
    lengths = rows.lengths
    room = config.packing_length or default_capacity(rows.ids, rows.first_targets, packing=packing)
    capacity = max(*lengths, room)
    passes, several = _passes(rows, config, capacity)
    largest = max(passes, key=rows.size)
    common = rows.common(largest)
    eval_rows = _Rows(eval_examples, packing=packing)
    groups = eval_rows.plan(range(len(eval_examples)), max(capacity, *eval_rows.lengths, 1))
    eval_largest = max(groups, key=eval_rows.size, default=[])
    return Setup(
        prefix=prefix,
        lengths=tuple(lengths[row] for row in largest),
        packing=packing,
        passes=2 if several else 1,
        common=common,
        target_share=sum(examples[row].target_tokens for row in largest)
        / sum(lengths[row] - common for row in largest),
        longest=max(lengths),
        row_tokens=sum(lengths) / len(lengths),
        checkpointing=config.gradient_checkpointing,
        quantize=config.quantize,
        dtype=dtype,
        device=device,
        eval_lengths=tuple(eval_rows.lengths[row] for row in eval_largest),
        eval_common=eval_rows.common(eval_largest),
        aims=examples[0].aims is not None,
        neutral_lengths=(TOKENS,) * PER_STEP if config.retain else (),
        sampled_rows=BATCH if config.retain and not texts_kept else 0,
    )


class _Rows:
    """What decides how rows share passes."""

    def __init__(self, examples: Sequence[Example], *, packing: bool) -> None:
        self.ids = [example.input_ids for example in examples]
        self.first_targets = [first_target(example.labels) for example in examples]
        self.lengths, self.packing = [len(ids) for ids in self.ids], packing
        self.targets = [example.target_tokens for example in examples]

    def common(self, rows: Sequence[int]) -> int:
        if not self.packing:
            return 0
        return common_start([self.ids[row] for row in rows], [self.first_targets[row] for row in rows])

    def size(self, rows: Sequence[int]) -> int:
        return pass_tokens([self.lengths[row] for row in rows], self.common(rows), packing=self.packing)

    def plan(self, rows: Sequence[int], capacity: int) -> list[list[int]]:
        """As `Passes.plan`, for a model whose rotary never changes."""
        lengths = [self.lengths[row] for row in rows]
        groups = share_passes(lengths, capacity, packing=self.packing, common=self.common(rows))
        return [[rows[place] for place in group] for group in groups]


def _passes(rows: _Rows, config: TrainConfig, capacity: int) -> tuple[list[list[int]], bool]:
    """Row numbers of each pass of a run on one process, and whether an optimizer step has several.

    Where a run is longer than LOOKED_AT batches, it is as its beginning is.
    """
    batch = config.per_device_train_batch_size
    several = config.gradient_accumulation_steps > 1
    left = min(LOOKED_AT, planned_steps(config, rows.targets) * config.gradient_accumulation_steps)
    sampler = LengthGroupedSampler(rows.lengths, 1 if rows.packing else batch, seed=config.seed)
    passes: list[list[int]] = []
    while left > 0:
        order = list(sampler)
        for first in range(0, min(len(order), left * batch), batch):
            groups = rows.plan(order[first : first + batch], capacity)
            passes += groups
            several = several or len(groups) > 1
            left -= 1
        sampler.set_epoch(sampler.epoch + 1)
    return passes, several


def forecast_for(
    model: str,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    prefix_options: Mapping[str, Any] | None = None,
    data_config: DataConfig | None = None,
    config: TrainConfig | None = None,
    device: str | None = None,
) -> Estimate:
    """The estimate for `train` with the same arguments, without the model's weights.

    This process has imported what a training run imports, so its own size is the baseline.

    Args:
        model: as for `train`, or a config.json file.
        data: rows, for their lengths; unless given, all are taken to be `data_config.max_length` long.

    Raises:
        DataError, ModelError, ConfigError: the input cannot be used.
        UnsupportedModelError: the model cannot carry a prefix.
    """
    data_config, config = data_config or DataConfig(), config or TrainConfig()
    sizes = {k: v for k, v in (prefix_options or {}).items() if k in SIZES and v != AUTO}
    dtype, place = placement(config.dtype, device)
    files = weight_files(model)
    fields = parse_fields(data_config.fields)
    split, eval_split = data_config.split, data_config.evaluated_split
    if data is not None and eval_data is not None:
        check_splits(data, eval_data, split=split, eval_split=eval_split)
    sources = ((data, split, data_config.limit), (eval_data, eval_split, None))
    rows = [
        load_rows(source, fields=fields, split=part, limit=limit) if source is not None else []
        for source, part, limit in sources
    ]
    while_loading = resident(place)  # a run reads its tokenizer after the weights
    tokenizer = load_tokenizer(model) if data or eval_data or files else None
    found = [build_examples(part, tokenizer, data_config)[0] if part else [] for part in rows]
    base = empty_model(model)
    if found[0] and "length" not in sizes:
        longest = max((*found[0], *found[1]), key=lambda example: len(example.input_ids))
        sizes["length"] = length_for(base, found[0], longest)
    elif "length" not in sizes:
        positions = positions_of(base)
        left = LONGEST_LENGTH if positions is None else positions - data_config.max_length
        sizes["length"] = length = max(SHORTEST_LENGTH, min(LONGEST_LENGTH, left))
        note(f"a prefix of {length} virtual tokens is counted, the most that train takes by itself")
    prefix = PrefixConfig(**sizes)
    if found[0]:  # what a run would refuse
        empty = LoadedBase(model=base, tokenizer=tokenizer, name=model, dtype_reason="")
        check_lengths(empty, prefix, [*found[0], *found[1]])
        packing_length_for(config, found[0], base)
    assumed = 0 if found[0] else _assumed(data_config, config, positions_of(base), prefix.length)
    examples = found[0] or [_longest(assumed)] * config.per_device_train_batch_size
    packing = config.packing and not packs(base)
    take_workspaces(place, dtype)

    def estimated(tokens: int, *, advise: bool | None = False) -> Estimate:
        room = config.packing_length
        if found[0]:
            room = packing_length_for(config, examples, base, pass_tokens=tokens)
        given = replace(config, packing_length=room or tokens)
        setup = setup_of(given, prefix, examples, found[1], packing=packing, dtype=dtype, device=place)
        if not found[0] and setup.packing:  # of unknown rows, some will fill a pass
            full = min(room or tokens, setup.longest * config.per_device_train_batch_size)
            whole, rest = divmod(max(full, setup.longest), setup.longest)
            setup = replace(setup, lengths=(setup.longest,) * whole + ((rest,) if rest else ()))
        return estimate(
            base,
            setup,
            available=budget(place),
            baseline=resident(place),
            files=files,
            while_loading=while_loading,
            advise=advise,
        )

    on_gpu = torch.device(place).type == "cuda" and config.packing_length is None
    return estimated(_most_that_fit(estimated) if on_gpu else PASS_TOKENS, advise=None)


def _assumed(data: DataConfig, config: TrainConfig, positions: int | None, length: int) -> int:
    """Tokens of a row where no rows are known: the most that a run with these options takes."""
    room = {"max_length has": data.max_length, "packing_length has": config.packing_length}
    room["the prefix leaves of the model's positions"] = None if positions is None else positions - length
    why, tokens = min(((why, t) for why, t in room.items() if t is not None), key=lambda one: one[1])
    if tokens < 2:
        raise ConfigError(
            f"length: a prefix of {length} virtual tokens leaves no row in the model's {positions} positions",
            hint="use a shorter one",
        )
    if tokens < data.max_length:
        note(f"rows of {tokens} tokens are counted, as many as {why}")
    return tokens


def _longest(tokens: int) -> Example:
    """A row of the most tokens, all of them targets."""
    return Example(input_ids=(0,) * tokens, labels=(0,) * tokens, origin="assumed", truncated=0)


def check_weights(model: str, config: TrainConfig, *, force: bool) -> None:
    """Refuse a model whose weights alone do not fit, before they are loaded.

    Raises:
        OutOfMemoryError: they do not, and it is not forced.
    """
    if force:
        return
    dtype, device = placement(config.dtype)
    files = weight_files(model) if config.quantize is not None else []
    weights = reading_bytes(empty_model(model), dtype, device=device, quantize=config.quantize, files=files)
    room = budget(device)
    if weights + resident(device) > room:
        hint = "--dtype bfloat16 halves the weights" if dtype == torch.float32 else "take a smaller model"
        kind = config.quantize or str(dtype).removeprefix("torch.")
        raise OutOfMemoryError(
            f"{model}: the weights take {readable(weights)} in {kind}, and {readable(room)} are available",
            hint=f"{hint}; --force begins all the same",
        )


def forecast(model: PrefixModel, setup: Setup, *, force: bool) -> Estimate | None:
    """The estimate for a model that is loaded and has run once, so that its weights are resident.

    None, and a note, where the model does not run without weights; with them it trains all the same.

    Raises:
        OutOfMemoryError: training cannot fit, and it is not forced.
    """
    try:
        found = _estimate(model, setup, advise=None, so_far=measured_peak(setup.device))
    except Exception as error:  # the model's own code reads values that are not there
        note(f"the memory of this run is not estimated: {type(error).__name__}: {error}")
        return None
    check_fit(found, force=force)
    return found


def pass_tokens_for(
    model: PrefixModel,
    config: TrainConfig,
    *,
    examples: Sequence[Example],
    eval_examples: Sequence[Example] = (),
) -> int:
    """Tokens that a pass has room for unless someone says: PASS_TOKENS, and on a GPU more where they fit.

    Where they cannot be estimated they are taken not to fit, and a note says so.
    """
    base: Any = model.base_model
    if config.packing_length is not None or base.device.type != "cuda" or not splits(base):
        return PASS_TOKENS
    packing = config.packing and not packs(base)
    setups = {}
    for tokens in GPU_PASS_TOKENS[:-1]:
        room = packing_length_for(config, examples, base, pass_tokens=tokens)
        setups[tokens] = setup_of(
            replace(config, packing_length=room),
            model.prefix.config,
            examples,
            eval_examples,
            packing=packing,
            dtype=base.dtype,
            device=str(base.device),
        )
    try:
        return _most_that_fit(lambda tokens: _estimate(model, setups[tokens], advise=False, so_far=0))
    except Exception as error:  # the model's own code reads values that are not there
        told = f"{type(error).__name__}: {error}"
        note(f"passes of {PASS_TOKENS} tokens: the memory of larger ones is not estimated: {told}")
        return PASS_TOKENS


def _most_that_fit(estimated: Callable[[int], Estimate]) -> int:
    """Tokens of a pass on a GPU, by the estimate for so many."""
    for tokens in GPU_PASS_TOKENS[:-1]:
        found = estimated(tokens)
        if MARGIN * found.peak <= found.available:
            return tokens
    return GPU_PASS_TOKENS[-1]


def advice_for(model: PrefixModel, setup: Setup, before: Estimate | None = None) -> str:
    """What to do when the memory was full in spite of the estimate `before` the training, if there was one.

    The peak of this process is that of the run that failed, and no floor for another one; what is resident
    has its optimizer's state.
    """
    baseline = before.baseline if before is not None else None
    again = (
        "--resume goes on from the last checkpoint, where there is one; with it --gradient-checkpointing and "
        "--packing-length may be others"
    )
    try:
        return f"{_estimate(model, setup, advise=True, so_far=0, baseline=baseline).hint}\n{again}"
    except Exception as error:  # starved code fails anywhere, torch's dispatch with a SystemError
        told = f"(no estimate: {type(error).__name__})"
        return f"--gradient-checkpointing, a smaller batch or shorter rows need less {told}\n{again}"


def _estimate(
    model: PrefixModel, setup: Setup, *, advise: bool | None, so_far: int, baseline: int | None = None
) -> Estimate:
    if baseline is None:
        tensors = {id(t): t.nbytes for part in (model.parameters(), model.buffers()) for t in part}
        take_workspaces(setup.device, setup.dtype)
        baseline = max(0, resident(setup.device) - sum(tensors.values()))
    return estimate(
        without_weights(model.base_model),
        setup,
        available=budget(setup.device),
        baseline=baseline,
        so_far=so_far,
        advise=advise,
    )
