"""Which prefix each row has, and the hooks on the model while it is attached."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefixtune.attachment.forward import forward_with_prefix
from prefixtune.attachment.head import decoder_of
from prefixtune.errors import AttachError, UnsupportedModelError
from prefixtune.geometry import Geometry, is_exact, quiet_eval, text_config
from prefixtune.prefix import PrefixKV

__all__ = ["Session", "attach", "attach_pairs", "supported"]

Pairs = Sequence[tuple[Tensor, Tensor]]
_SUPPORTED: WeakKeyDictionary[nn.Module, Geometry] = WeakKeyDictionary()
# options of generate that have no exact meaning with a prefix: values that leave them off, and why
_INEXACT: dict[str, tuple[tuple[Any, ...], str]] = {
    "guidance_scale": ((None, 1), "its second pass leaves the text out, but would keep the prefix"),
    "assistant_ensemble_weight": ((None,), "its assistant reads the text without the prefix"),
    "assistant_early_exit": ((None,), "its drafts run some of the layers, and the prefix is in all"),
}
_BATCHES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@contextmanager
def attach(base: nn.Module, prefixes: PrefixKV | Sequence[PrefixKV | None]) -> Iterator[nn.Module]:
    """Within the block, `base` answers as if each row began with its prefix: to calls of other threads, too.

    Args:
        base: a causal language model of transformers.
        prefixes: one PrefixKV for all rows of any batch, or a list with one PrefixKV or None per batch row;
            lengths may differ. `base.generate` repeats the list for its beams and return sequences.

    Raises:
        UnsupportedModelError: the model cannot carry this prefix exactly.
        AttachError: a call within the block has no exact meaning (another prefix's cache, packed rows, …).

    Example:
        >>> with attach(base, [kv_a, None, kv_b]):                             # doctest: +SKIP
        ...     base.generate(**batch, max_new_tokens=8)
    """
    rows = [prefixes] if isinstance(prefixes, PrefixKV) else prefixes
    if (
        not isinstance(rows, list | tuple)
        or not rows
        or any(row is not None and not isinstance(row, PrefixKV) for row in rows)
    ):
        raise AttachError(
            f"attach: expected a PrefixKV, or a list of PrefixKV and None; got {prefixes!r:.80}"
        )
    geometry = supported(base)
    for row in rows:
        if row is not None:
            row.check(geometry)
    distinct = {id(row): row for row in rows if row is not None}
    place = {key: index for index, key in enumerate(distinct)}
    sources = [[(layer.key, layer.value) for layer in row.layers] for row in distinct.values()]
    session = Session(
        base,
        geometry,
        sources,
        rows=[-1 if row is None else place[id(row)] for row in rows],
        names=[None if row is None else row.digest for row in rows],
        broadcast=isinstance(prefixes, PrefixKV),
    )
    with session:
        yield base


@contextmanager
def attach_pairs(base: nn.Module, pairs: Pairs, *, name: str) -> Iterator[nn.Module]:
    """`attach` for live tensors: (key, value) [H, P, D] per layer, with gradient, for all rows."""
    with Session(base, supported(base), [list(pairs)], rows=[0], names=[name], broadcast=True):
        yield base


def supported(base: nn.Module) -> Geometry:
    """The geometry of `base`, after its oracle was checked once with a few tokens.

    Raises:
        UnsupportedModelError: a layer has no key/value cache, or the oracle does not hold.
    """
    if base not in _SUPPORTED:
        geometry = Geometry.probe(base)
        _SUPPORTED[base] = geometry
        try:
            if not next(base.parameters()).is_meta:
                _check_oracle(base)
        except (LookupError, RuntimeError, AssertionError, AttachError) as error:
            del _SUPPORTED[base]
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(
                f"{type(base).__name__} ({geometry.model_type}) did not run with a prefix: {error}"
            ) from error
        except BaseException:
            del _SUPPORTED[base]
            raise
    return _SUPPORTED[base]


def _check_oracle(base: nn.Module) -> None:
    """Raise UnsupportedModelError unless a prefix does what the text does that it stands for.

    In 16 bits chance may send a token to another expert: then two more texts are tried.
    """
    for number in range(1 if is_exact(base) else 3):
        errors, allowed = _oracle_errors(base, number)
        if all(error <= allowed for error in errors):  # none of them is NaN then
            return
    raise UnsupportedModelError(
        f"{type(base).__name__}: a prefix does not reproduce the text it stands for "
        f"(relative error of the logits {', '.join(f'{error:.2g}' for error in errors)})",
        hint="this architecture is refused rather than served inexactly; please report it",
    )


@torch.no_grad()
def _oracle_errors(base: nn.Module, number: int) -> tuple[tuple[float, float], float]:
    """How far the prefix made of A's KV, applied to B, is from the bare model on [A; B], and may be.

    One row has pads on its left. In 16 bits the measure is what the bare model's own cache makes of A and B.
    """
    device = next(base.parameters()).device
    ids = (torch.arange(12, device=device) * 131 + 7 + 53 * number)[None] % text_config(base).vocab_size
    # fewer pads than A has tokens: in float64 some models give NaN where a pad sees nothing
    text, rest, pads = ids[:, :4], ids[:, 4:], 3
    with quiet_eval(base):
        whole = base(input_ids=ids, use_cache=False).logits[0, -1].float()
        joined = torch.cat([text, rest[:, pads:]], dim=1)
        short = base(input_ids=joined, use_cache=False).logits[0, -1].float()
        kv = PrefixKV.from_tokens(base, text)
        batch = torch.cat([rest, rest])
        mask = torch.ones_like(batch)
        mask[1, :pads] = 0
        with attach(base, kv):
            found = base(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, -1].float()
        errors = _relative(found[0], whole), _relative(found[1], short)
        if is_exact(base):
            return errors, 1e-3
        cache = base(input_ids=text, use_cache=True).past_key_values
        own = base(input_ids=rest, past_key_values=cache, use_cache=True).logits[0, -1].float()
    return errors, min(0.25, max(0.05, 8 * _relative(own, whole)))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm().clamp_min(1e-12))


class Session:
    """One attachment: which prefix each row has, and the hooks on the model while it lasts."""

    def __init__(
        self,
        base: nn.Module,
        geometry: Geometry,
        sources: Sequence[Pairs],
        *,
        rows: Sequence[int],
        names: Sequence[str | None],
        broadcast: bool,
    ) -> None:
        self.base: Any = base
        self.geometry, self.sources = geometry, sources
        self.decoder = decoder_of(base)
        self.rows, self.names, self.broadcast = tuple(rows), tuple(names), broadcast
        self.lengths = [source[0][0].shape[1] for source in sources]
        self.generating = False
        self.blocks: dict[Any, tuple[Tensor, Tensor]] = {}
        # of the class: a module is slow to say that it has no such attribute, and it is asked in every pass
        layers = (m for m in self.decoder.modules() if hasattr(type(m), "_can_checkpoint_with_cache"))
        self.checkpointed = list(layers)
        self.undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        if getattr(self.base, "prefixtune_attached", False):
            raise AttachError(
                "a prefix is attached to this model already",
                hint="leave the other attach(...) block first; several prefixes at once go into one list",
            )
        original = self.decoder.forward
        parameters = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return forward_with_prefix(self, original, parameters, args, kwargs)

        self._set(self.base, "prefixtune_attached", True)
        self._set(self.base, "__deepcopy__", _no_copies)
        self._set(self.decoder, "forward", forward)
        for module in self.checkpointed:
            self._set(module, "_can_checkpoint_with_cache", True)
        if hasattr(self.base, "generate"):
            self._set(self.base, "generate", self._generate(self.base.generate))
            # generate would turn masks into 4D for static caches, and compile: both in columns of text only
            self._set(self.base, "create_masks_for_generate", _keep_mask)
            self._set(self.base, "_valid_auto_compile_criteria", lambda *args, **kwargs: False)
            for name in _BATCHES:
                if hasattr(self.base, name):
                    self._set(self.base, name, _no_continuous_batching)

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        own = vars(module)
        before, had = own.get(name), name in own
        own[name] = value
        self.undo.append(lambda: own.__setitem__(name, before) if had else own.pop(name, None))

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self._check_count(_prompts(*args, **kwargs))  # the passes within have beams too, which hide it
            _check_options(getattr(self.base, "generation_config", None), *args, **kwargs)
            self.generating = True
            try:
                return original(*args, **kwargs)
            finally:
                self.generating = False

        return generate

    def _check_count(self, batch: int) -> None:
        count = len(self.rows)
        if not self.broadcast and batch != count:
            raise AttachError(
                f"{count} prefixes are attached, but the batch has {batch} rows",
                hint="give attach one PrefixKV or None per row",
            )

    def expand(self, batch: int) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
        """Source index and name of each of `batch` rows."""
        count, repeats = len(self.rows), 1
        if self.broadcast:
            repeats = batch
        elif self.generating and batch % count == 0:
            repeats = batch // count  # beams and return sequences of a prompt lie next to each other
        else:
            self._check_count(batch)
        return (
            tuple(row for row in self.rows for _ in range(repeats)),
            tuple(name for name in self.names for _ in range(repeats)),
        )

    def block(self, layer: int, rows: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """The prefixes of all rows in one layer, ends aligned: [B, H, P, D] key and value."""
        place = (layer, rows, like.dtype, like.device)
        if place in self.blocks:
            return self.blocks[place]
        pairs = [source[layer] for source in self.sources]
        if len(set(rows)) == 1:
            one = pairs[rows[0]]
            key, value = (t.to(like).expand(len(rows), *t.shape) for t in one)
        else:
            longest = max(self.lengths[row] for row in rows if row >= 0)
            used = sorted(set(rows) - {-1})
            index = torch.tensor(
                [used.index(row) if row >= 0 else len(used) for row in rows], device=like.device
            )
            key, value = (
                torch.stack(
                    [_left_pad(pairs[row][side].to(like), longest) for row in used]
                    + [like.new_zeros(like.shape[1], longest, pairs[0][side].shape[2])]
                )[index]
                for side in (0, 1)
            )
        if not any(tensor.requires_grad for pair in pairs for tensor in pair):  # those are to be read anew
            self.blocks[place] = (key, value)
        return key, value


def _prompts(inputs: Any = None, *args: Any, **kwargs: Any) -> int:
    """How many prompts a call of generate has; without any it begins one row."""
    names = ("inputs_embeds", "input_ids", "attention_mask")
    given = (value for value in (inputs, *map(kwargs.get, names)) if value is not None)
    return next((len(value) for value in given), 1)


def _check_options(own: Any, inputs: Any = None, config: Any = None, *args: Any, **kwargs: Any) -> None:
    """Refuse what `generate` would do inexactly, from its arguments, its config or the model's own."""
    configs = [given for given in (kwargs.get("generation_config", config), own) if given is not None]
    for name, (off, why) in _INEXACT.items():
        values = [kwargs.get(name), *(getattr(given, name, None) for given in configs)]
        value = next((value for value in values if value is not None), None)
        if value not in off:
            raise AttachError(
                f"generate: {name}={value} has no exact meaning with a prefix: {why}",
                hint=f"leave {name} out",
            )


def _no_continuous_batching(*args: Any, **kwargs: Any) -> None:
    raise AttachError(
        "continuous batching pages its cache, and a prefix has no place in its pages",
        hint="call generate with a batch, or serve it: prefixtune serve batches continuously",
    )


def _no_copies(memo: Any) -> None:
    raise AttachError(
        "a copy would keep the attached prefix, and run the original's layers",
        hint="copy the model before attach(...), or after it",
    )


def _keep_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def _left_pad(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[1], 0))  # [H, P', D] -> [H, P, D]
