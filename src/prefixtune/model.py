"""`PrefixModel`: a frozen base and its trainable prefix as one module that Trainer and generate accept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from prefixtune.attachment import attach_pairs, multiply_once, supported
from prefixtune.config import PrefixConfig
from prefixtune.errors import AttachError, ConfigError, StorageError, UnsupportedModelError
from prefixtune.fingerprint import Fingerprint
from prefixtune.geometry import Geometry, compute_dtype, text_config
from prefixtune.prefix import Prefix, PrefixKV, fit_length, measured_noise, start_ids
from prefixtune.quantize import count_numbers, quantization, refuse_lost_gradient
from prefixtune.storage import check_base, load_prefix, save_prefix

__all__ = ["PrefixModel"]


class PrefixModel(nn.Module):
    """A base model with a prefix before every row. Only the prefix trains, and only it is in the state_dict.

    Args:
        base: a causal language model of transformers; its parameters are frozen here.
        prefix: a PrefixConfig for a new prefix, or a PrefixKV to go on from.
        tokenizer: for `init="text"`; by default the one that belongs to the base's name.

    Raises:
        UnsupportedModelError: the base cannot carry a prefix exactly.

    Example:
        >>> model = PrefixModel(base, PrefixConfig(length=10))                 # doctest: +SKIP
        >>> model(input_ids=ids, labels=ids).loss.backward()                   # doctest: +SKIP
        >>> model.save_pretrained("my-prefix")                                 # doctest: +SKIP
    """

    main_input_name = "input_ids"
    loss_type = "ForCausalLM"  # so that Trainer, when it counts targets, counts no label of a first token
    accepts_loss_kwargs = (
        True  # the base weighs the loss by num_items_in_batch, so Trainer must not scale it again
    )

    def __init__(
        self, base: nn.Module, prefix: PrefixConfig | PrefixKV, *, tokenizer: Any | None = None
    ) -> None:
        super().__init__()
        geometry = supported(base)
        refuse_lost_gradient(base)
        if isinstance(prefix, PrefixKV):
            config, start = PrefixConfig(length=prefix.length), prefix
        elif isinstance(prefix, PrefixConfig):
            config, start = prefix, _start(base, geometry, prefix, tokenizer)
        else:
            raise ConfigError(f"prefix: expected a PrefixConfig or a PrefixKV; got {type(prefix).__name__}")
        limit = geometry.learned_positions
        if limit is not None and start.length >= limit:
            raise ConfigError(
                f"prefix: {start.length} virtual tokens leave no room in the {limit} positions of "
                f"{geometry.model_type}"
            )
        device = next(base.parameters()).device
        self._put_together(base, Prefix(config, geometry, start.to(device)), geometry)

    def _put_together(self, base: nn.Module, prefix: Prefix, geometry: Geometry) -> None:
        base.requires_grad_(False)
        multiply_once(base)
        self.base_model = base
        self.prefix = prefix
        self.geometry = geometry
        # what prefix.json tells beyond the tensors: template, training, …
        self.record: dict[str, Any] = {"quantization": quantization(base)}
        self._name = _new_name()
        self.register_forward_pre_hook(_refuse_fused_head, with_kwargs=True)
        self.register_state_dict_post_hook(_keep_prefix_only)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_base_is_not_missing)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._name = _new_name()  # a copy trains on its own, so the original's caches are not its own

    # --- forward and generate

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward with the prefix before every row; ids, masks, positions, caches are the text's.

        Args:
            input_ids: [B, T] token ids (or inputs_embeds [B, T, hidden]).
            attention_mask: [B, T] or [B, 1, T, T], over the text (cached and new).
            position_ids: [B, T], counted from the text's first token.
            past_key_values: the cache that an earlier pass with this prefix returned.
            labels: [B, T] target tokens, -100 elsewhere.

        Returns:
            The base's ModelOutput: loss, logits [B, T, vocabulary], past_key_values (of the text), …

        Raises:
            AttachError: the arguments have no exact meaning with a prefix.
        """
        given = {  # by name, because Trainer drops the columns that forward does not name
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if labels is not None and self.training:
            kwargs.setdefault("use_cache", False)
        pairs = self.prefix()
        cached = kwargs.get("use_cache") is not False or past_key_values is not None
        with self._attached(pairs, cached=cached):
            return self.base_model(input_ids=input_ids, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's generate, in every mode that the base has; the prefix is baked once per call."""
        with torch.no_grad():
            pairs = self.prefix()
        with self._attached(pairs, cached=True):
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _attached(self, pairs: Sequence[tuple[Tensor, Tensor]], *, cached: bool) -> Iterator[None]:
        name = self._name
        if cached:
            # A cache from before an optimizer step was computed behind another prefix. The numbers tell, and
            # not the parameters' versions: fused optimizers do not count them up.
            made = [tensor.detach().float() for pair in pairs for tensor in pair]
            sums = [each for tensor in made for each in (tensor.sum(), tensor.square().sum())]
            name += str(torch.stack(sums).tolist())
        with attach_pairs(self.base_model, pairs, name=name):
            yield

    # --- the habits of a PreTrainedModel

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def generation_config(self) -> Any:
        return getattr(self.base_model, "generation_config", None)

    def _get_name(self) -> str:
        """From it Trainer's label smoothing knows that labels are to be shifted."""
        return type(self.base_model).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    @property
    def device(self) -> torch.device:
        return next(self.prefix.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The base's precision; the prefix is fp32."""
        return compute_dtype(self.base_model)

    @property
    def is_gradient_checkpointing(self) -> bool:
        newer = hasattr(type(self.base_model), "is_activation_checkpointing")
        name = "is_activation_checkpointing" if newer else "is_gradient_checkpointing"
        return bool(getattr(self.base_model, name, False))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass; not re-entrant, which loses the prefix's gradient.

        Args:
            activation_checkpointing_kwargs: for torch.utils.checkpoint.
            options: every_n_layers and offload, where the installed transformers knows them.
        """
        function = dict(activation_checkpointing_kwargs or {})
        if function.get("use_reentrant"):
            raise AttachError(
                "re-entrant checkpointing gives a prefix no gradient", hint="use_reentrant=False"
            )
        function["use_reentrant"] = False
        base: Any = self.base_model
        if not getattr(base, "supports_gradient_checkpointing", True):
            raise UnsupportedModelError(
                f"{base.config.model_type} models cannot recompute activations",
                hint="leave gradient checkpointing out",
            )
        if hasattr(base, "activation_checkpointing_enable"):  # renamed within transformers 5
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=function, **options)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=function, **options)
        # transformers lets the embeddings carry a gradient, which only the re-entrant kind needs: every layer
        # below the lowest one that trains would run backward for nothing
        base.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        self.gradient_checkpointing_disable()

    def gradient_checkpointing_disable(self) -> None:
        base: Any = self.base_model
        newer = getattr(base, "activation_checkpointing_disable", None)
        (newer or base.gradient_checkpointing_disable)()

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.base_model.get_input_embeddings()  # type: ignore[operator]
        return module

    def get_output_embeddings(self) -> nn.Module:
        module: nn.Module = self.base_model.get_output_embeddings()  # type: ignore[operator]
        return module

    def enable_input_require_grads(self) -> None:
        """Nothing to do: the prefix itself carries the gradient."""

    def add_model_tags(self, tags: Any) -> None:
        """Nothing to do: a prefix folder's card has its own. TRL asks for it."""

    def can_generate(self) -> bool:
        return bool(self.base_model.can_generate())  # type: ignore[operator]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable numbers, all numbers), base included."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(p.numel() for p in self.prefix.parameters()) + count_numbers(self.base_model)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's form."""
        trainable, everything = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {everything:,} || "
            f"trainable%: {100 * trainable / everything:.4f}"
        )

    # --- disk and hub

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the prefix folder: the baked KV, and the projection's weights so that training can go on."""
        prefix = self.prefix
        save_prefix(
            save_directory,
            prefix.bake(),
            config=prefix.config,
            geometry=self.geometry,
            fingerprint=Fingerprint.of(self.base_model),
            base_name=self.base_name,
            trainable=prefix.state_dict() if prefix.config.projection else None,
            extra=self.record,
        )

    @property
    def base_name(self) -> str:
        """The hub name or path that the base was loaded from; its class where it has none."""
        return str(getattr(self.config, "_name_or_path", "") or type(self.base_model).__name__)

    @classmethod
    def from_pretrained(cls, base: nn.Module, folder: str | Path, is_trainable: bool = False) -> PrefixModel:
        """A saved prefix on its base model: from a folder, or from the hub by name.

        Args:
            is_trainable: go on training; the projection is restored where the folder has it. Its record of
                steps and losses is left out, as it will not be true of what is saved.

        Raises:
            StorageError: the folder is damaged, or belongs to another base model.
        """
        stored = load_prefix(_fetch(folder))
        geometry = supported(base)
        name = str(getattr(text_config(base), "_name_or_path", "") or type(base).__name__)
        check_base(stored, geometry=geometry, fingerprint=Fingerprint.of(base), name=name)
        config = stored.config
        if (
            not is_trainable and config.projection
        ):  # to serve, the baked tensors are enough, and exact to the bit
            config = replace(config, projection=False, hidden_size=None)
        prefix = Prefix(config, geometry, stored.kv)
        if is_trainable and stored.trainable is not None:
            _restore(prefix, stored.trainable, folder)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._put_together(base, prefix.to(next(base.parameters()).device), geometry)
        model.record["template"] = stored.info.get("template")
        if is_trainable:
            refuse_lost_gradient(base)
        else:  # what it was trained on, whatever it is served on
            model.record |= {key: stored.info.get(key) for key in ("training", "quantization")}
        model.prefix.requires_grad_(is_trainable)
        return model.train(is_trainable)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the prefix folder; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "prefix")
            api.upload_folder(repo_id=address.repo_id, folder_path=Path(folder) / "prefix")
        return str(address)


def _start(base: nn.Module, geometry: Geometry, config: PrefixConfig, tokenizer: Any | None) -> PrefixKV:
    """The KV that the prefix begins as: of the text's first P tokens; a shorter text is repeated.

    What the tokenizer puts before every text (a BOS) stays once, at the front, and what it ends every text
    with is left out: the rows go on.
    """
    if config.init == "random":
        return measured_noise(base, geometry, config.length)
    front, ids = 0, list(config.init_tokens or ())
    if config.init == "text":
        front, ids = start_ids(tokenizer if tokenizer is not None else _tokenizer_of(base), config.init_text)
    vocabulary = text_config(base).vocab_size
    if any(not 0 <= token < vocabulary for token in ids):
        raise ConfigError(f"the start has token ids outside the model's vocabulary of {vocabulary}")
    ids = [*ids[:front], *fit_length(ids[front:], config.length)][: config.length]
    return PrefixKV.from_tokens(base, torch.tensor([ids]))


def _tokenizer_of(base: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(base.config, "_name_or_path", "")
    try:
        if name:
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        pass
    raise ConfigError(
        f"init=text needs a tokenizer, and none was found for {name or type(base).__name__!r}",
        hint="give PrefixModel(..., tokenizer=...), or init='tokens' with init_tokens",
    )


def _restore(prefix: Prefix, state: Mapping[str, Tensor], folder: str | Path) -> None:
    try:
        prefix.load_state_dict(dict(state))
    except RuntimeError as error:
        raise StorageError(f"{folder}: the projection's weights do not fit ({error})") from None


def _fetch(folder: str | Path) -> Path:
    """A local folder as it is; else a hub name, downloaded."""
    path = Path(folder)
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=["prefix.*", "trainable.safetensors"]))
    except Exception as error:  # the hub client raises dozens of kinds, from httpx's to its own
        raise StorageError(
            f"{folder}: no such folder, and the hub did not give it ({type(error).__name__}: {error})",
            hint="check the path or the name, and the connection",
        ) from None


def _new_name() -> str:
    return f"model-{uuid4().hex}"


def _refuse_fused_head(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """TRL puts a forward of its own in place of ours, which runs `base_model`, without the prefix."""
    if kwargs.get("fused_lm_head"):
        raise AttachError(
            "the loss of TRL's trainers runs the base without the prefix",
            hint="use a subclass of SFTTrainer in which compute_loss = transformers.Trainer.compute_loss",
        )


def _keep_prefix_only(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}base_model.")]:
        del state[name]


def _base_is_not_missing(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if "base_model." not in name]
