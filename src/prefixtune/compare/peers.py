"""Other methods than ours: full tuning, and what PEFT has. In transformers' Trainer, with our loss and order.

Only the method differs: the rows of a step are the same in the same order, run in passes without much
padding, every target token of a step counts the same, what trains is float32, and a frozen base has its own
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from prefixtune.attachment.head import decoder_of
from prefixtune.compare.settings import PeerConfig
from prefixtune.config import TrainConfig
from prefixtune.data import Collator, Example
from prefixtune.errors import ConfigError
from prefixtune.geometry import Geometry, text_config
from prefixtune.load import LoadedBase
from prefixtune.loss import PASS_TOKENS, Passes, RowTokens, planned
from prefixtune.rotary import settle
from prefixtune.train import planned_epochs, warmup_steps_for
from prefixtune.train.sampler import LengthGroupedSampler
from prefixtune.train.step import smoothing_of
from prefixtune.train.trainer import on_one_device

__all__ = ["PeerTrainer", "lora_config", "matmul_layers", "peer_model", "peer_trainer"]

_MAKES_ITS_OWN = ("gpt_bigcode",)  # PEFT turns the prefix that it has for all heads into its cache
NARROW = ("q_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")  # queries and values


def matmul_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that multiply by a weight matrix, the head among them, by name."""
    from transformers.pytorch_utils import Conv1D

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


@torch.no_grad()
def _gives_a_tensor(layer: Any) -> bool:
    """Not so Llama 4's router, a linear layer that gives scores and logits: PEFT adds to a tensor."""
    if type(layer).forward is nn.Linear.forward:
        return True
    return isinstance(layer(layer.weight.new_zeros(1, _inputs(layer))), torch.Tensor)


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.nx)


def _text_decoder(base: nn.Module) -> nn.Module:
    """Without the tower of a model that sees images, and without the head."""
    found = decoder_of(base)
    return found.get_decoder() if hasattr(found, "get_decoder") else found  # type: ignore[no-any-return]


def lora_config(
    base: nn.Module, *, like: int, targets: str = "qv", rank: int | None = None, alpha: float | None = None
) -> Any:
    """LoRA on `targets` (see PeerConfig) with the rank whose number of parameters comes nearest to `like`."""
    from peft import LoraConfig, TaskType

    text, layers = set(_text_decoder(base).modules()), matmul_layers(base)
    linear = {
        name: layer
        for name, layer in layers.items()
        if layer in text and "lm_head" not in name and "embed_out" not in name and _gives_a_tensor(layer)
    }
    narrow = [name for name in linear if name.endswith(NARROW)]
    if targets == "qv" and not narrow:
        raise ConfigError("lora: no query and value layers were found", hint='use targets = "all-linear"')
    choices = {"qv": [narrow], "all-linear": [list(linear)], "nearest": [narrow, list(linear)]}[targets]
    found = []
    for names in filter(None, choices):
        per_rank = sum(sum(linear[name].weight.shape) for name in names)
        near = rank or max(1, round(like / per_rank))
        found.append((abs(near * per_rank - like), near, names))
    _, chosen, names = min(found, key=lambda choice: choice[0])
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=chosen, lora_alpha=alpha or 2 * chosen, target_modules=names
    )


def peer_model(
    of: str,
    base: nn.Module,
    settings: PeerConfig,
    *,
    length: int,
    like: int | None = None,
    start: Sequence[int] | None = None,
) -> nn.Module:
    """The base as the method trains it: what trains is float32 and requires gradients, nothing else does.

    Args:
        of: full, lora, prompt-tuning, p-tuning or peft-prefix.
        length: virtual tokens unless the settings say.
        like: LoRA's number of parameters; that of a prefix of `length` in all layers unless given.
        start: token ids whose embeddings or KV a prompt or a prefix starts from, with init="text".
    """
    if of == "full":
        return base.float().requires_grad_(True)
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model

    if of == "lora":
        like = like or length * Geometry.probe(base).numbers_per_token
        lora = {"targets": settings.targets, "rank": settings.rank, "alpha": settings.alpha}
        return get_peft_model(base, lora_config(base, like=like, **lora))  # type: ignore[arg-type, no-any-return]
    same = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": settings.length or length}
    same |= _sizes(of, base)
    hidden = {"encoder_hidden_size": settings.hidden_size} if settings.hidden_size else {}
    if of == "peft-prefix":
        config = PrefixTuningConfig(**same, **hidden, prefix_projection=settings.projection)
    else:
        config = (
            PromptTuningConfig(**same) if of == "prompt-tuning" else PromptEncoderConfig(**same, **hidden)
        )
    model: nn.Module = get_peft_model(base, config)
    if start and settings.init == "text" and of != "p-tuning" and not settings.projection:
        _start_from_text(of, model, base, _repeated(start, settings.length or length))
    return model


def _sizes(of: str, base: Any) -> dict[str, int]:
    """What PEFT finds by a configuration's names, which some architectures (Falcon, MPT, OPT 350M) have not.

    Raises:
        ConfigError: PEFT's prefix cannot have the keys and values of this model.
    """
    layers = Geometry.probe(base).layers
    if of != "peft-prefix":
        width = base.get_input_embeddings().weight.shape[1]
        return {"num_layers": len(layers), "num_attention_heads": 1, "token_dim": width}
    if any(layer.key_dim != layer.value_dim for layer in layers):
        raise ConfigError(
            f"peft-prefix: PEFT has keys and values of one size; {text_config(base).model_type} has "
            f"{layers[0].key_dim} and {layers[0].value_dim}",
            hint="leave the method out",
        )
    config = text_config(base)
    if "num_key_value_heads" in config.to_dict() or config.model_type in _MAKES_ITS_OWN:
        return {}  # what PEFT finds is right, and would be corrected if it were given
    heads, width = layers[0].kv_heads, layers[0].key_dim
    return {"num_layers": len(layers), "num_attention_heads": heads, "token_dim": heads * width}


def _repeated(ids: Sequence[int], length: int) -> list[int]:
    """The first `length` ids; a shorter text begins again."""
    return [ids[place % len(ids)] for place in range(length)]


@torch.no_grad()
def _start_from_text(of: str, model: Any, base: Any, ids: list[int]) -> None:
    place = torch.tensor([ids], device=next(base.parameters()).device)
    if of == "prompt-tuning":
        embeddings = base.get_input_embeddings()(place)[0]
        weight = model.prompt_encoder[model.active_adapter].embedding.weight
        weight.copy_(embeddings)
        return
    from peft import initialize_kv_prefix_from_past_key_values

    with model.disable_adapter():
        cache = model(input_ids=place, attention_mask=torch.ones_like(place), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


class PeerTrainer(Trainer):  # type: ignore[misc]
    """Trainer with the loss, the order and the passes of our own trainer on rows that are not packed.

    Args:
        pad_token_id: fills shorter rows.
        group_size: rows that are put together by length: our own trainer's, so that the order is the same.
        cast: the precision that a float32 model is run in; None for a model that has its own.
    """

    def __init__(
        self, *args: Any, pad_token_id: int, group_size: int, cast: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        self.pad_token_id, self.group_size, self.cast = pad_token_id, group_size, cast
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = [len(example.input_ids) for example in self.train_dataset]
        return LengthGroupedSampler(lengths, self.group_size, seed=self.args.seed)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, in passes of rows of similar length."""
        model.train()
        rows = RowTokens.of_batch(inputs)
        counted = num_items_in_batch or sum(int((row.labels[1:] != -100).sum()) for row in rows)
        total = torch.zeros((), device=self.args.device)
        bare = self.accelerator.unwrap_model(model)
        for group in planned(bare, [len(row.input_ids) for row in rows], PASS_TOKENS, packing=False):
            settle(bare)
            batch = Collator(self.pad_token_id)([_plain(rows[row]) for row in group])
            with self._precision():
                loss, plain = summed_losses(model, batch, smoothing=smoothing_of(self.args, self.state))
            self.accelerator.backward(loss / counted)
            total += plain / counted
        return total

    def _precision(self) -> AbstractContextManager[Any]:
        if self.cast is None or self.cast == torch.float32:
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.cast)


def _plain(row: RowTokens) -> dict[str, Any]:
    return {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}


def summed_losses(model: Any, batch: dict[str, Tensor], *, smoothing: float) -> tuple[Tensor, Tensor]:
    """Summed cross entropy (nats, float32) of a padded batch's targets, as torch smooths them; and without
    smoothing, which has no gradient.

    Logits of virtual tokens stand before the text's, and are left out.
    """
    device = next(model.parameters()).device
    ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]  # [B, T, V]
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    chosen = labels != -100
    given, targets = logits[chosen].float(), labels[chosen]
    loss = F.cross_entropy(given, targets, reduction="sum", label_smoothing=smoothing)
    plain = F.cross_entropy(given.detach(), targets, reduction="sum") if smoothing else loss.detach()
    return loss, plain


def peer_trainer(
    of: str,
    base: LoadedBase,
    examples: Sequence[Example],
    settings: PeerConfig,
    *,
    shared: TrainConfig,
    steps: int,
    output: Path,
    length: int,
    like: int | None = None,
    start: Sequence[int] | None,
    pad_token_id: int,
    precision: torch.dtype,
) -> PeerTrainer:
    """The Trainer of a method that is not ours, ready to train on the examples.

    Args:
        shared: what all methods share: epochs, rows of a step, and the seed.
        steps: optimizer steps of the run, of which the warm-up is a share.
        precision: that a full model, which is float32, is run in.
    """
    batch = shared.per_device_train_batch_size
    packs = Passes.of(base.model, capacity=PASS_TOKENS, pad_token_id=pad_token_id).packing
    model = peer_model(of, base.model, settings, length=length, like=like, start=start)
    warmup = warmup_steps_for(settings.warmup_ratio, steps)
    epochs = planned_epochs(shared, [example.target_tokens for example in examples])
    return PeerTrainer(
        model=model,
        args=_arguments(settings, shared, output, epochs=epochs, warmup_steps=warmup),
        train_dataset=list(examples),
        data_collator=Collator(pad_token_id),
        pad_token_id=pad_token_id,
        group_size=1 if packs else batch,
        cast=precision if of == "full" else None,
    )


def _arguments(
    settings: PeerConfig, shared: TrainConfig, output: Path, *, epochs: float, warmup_steps: int
) -> Any:
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=shared.per_device_train_batch_size,
        gradient_accumulation_steps=shared.gradient_accumulation_steps,
        num_train_epochs=epochs,
        max_steps=shared.max_steps or -1,
        seed=shared.seed,
        learning_rate=settings.learning_rate,
        warmup_steps=warmup_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing_factor,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return on_one_device(args)
