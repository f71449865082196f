"""The law of the server on a real model in float32: 64 requests at once, each what generate gives alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefixtune import PrefixKV, PrefixModel
from prefixtune.load import load_base
from serving import NAME, alone, live

LENGTHS = (1, 2, 5, 8, 13, 20, 34, 64)
REQUESTS, PREFIXES, NEW_TOKENS = 64, 16, 6


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(1000, 40_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


async def ask(url: str, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """The token ids of each answer, all asked for at once."""
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def one(body: dict[str, Any]) -> list[int]:
            response = (await client.post("/v1/completions", json=body)).raise_for_status()
            if not body["stream"]:
                return response.json()["choices"][0]["token_ids"]
            lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            return [token for line in lines for token in json.loads(line)["choices"][0]["token_ids"]]

        return list(await asyncio.gather(*map(one, bodies)))


@pytest.mark.slow
def test_64_requests_at_once_on_the_real_model_are_each_the_same_as_alone(tmp_path: Path) -> None:
    served, reference = (load_base("demo", dtype="float32") for _ in range(2))
    prefixes: list[PrefixKV | None] = [None]
    for number in range(PREFIXES):
        kv = PrefixKV.from_tokens(reference.model, torch.tensor([ids_of(LENGTHS[number % 8], number)]))
        PrefixModel(reference.model, kv).save_pretrained(tmp_path / f"p{number}")
        prefixes.append(kv)
    prompts = [ids_of(1 + (11 * number) % 60, 100 + number) for number in range(REQUESTS)]
    bodies = [
        {
            "model": NAME if number % 17 == 0 else f"{NAME}:p{number % 17 - 1}",
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": number % 2 == 0,
            "return_token_ids": True,
        }
        for number, prompt in enumerate(prompts)
    ]
    with live(served.model, tokenizer=served.tokenizer, prefix_dir=tmp_path, endless=True) as server:
        found = asyncio.run(ask(server.url, bodies))
    for number, prompt in enumerate(prompts):
        assert found[number] == alone(reference.model, prefixes[number % 17], prompt, NEW_TOKENS), number
