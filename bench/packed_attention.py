"""Attention of one pack: ours in tiles beside torch's fused kernel, with one mask and document by document.

Run: python bench/packed_attention.py [--lengths 200,110,90,60,52] [--dtype bfloat16]
Forward and backward of one layer of SmolLM2's shape (9 query heads, 3 kv heads, 64 wide) with a prefix of 10.
The contestants take turns; medians. The error is that of output and gradients against float32, relative.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import accumulate, pairwise

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attachment.documents import Layout, attend_documents

HEADS, KV_HEADS, DIM, PREFIX = 9, 3, 64, 10
Attention = Callable[..., Tensor]


def with_one_mask(
    query: Tensor, key: Tensor, value: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    keys, values = torch.cat([front[0], key], 1)[None], torch.cat([front[1], value], 1)[None]
    mask = layout.whole
    return F.scaled_dot_product_attention(query[None], keys, values, mask, enable_gqa=True)[0].transpose(0, 1)


def by_document(
    query: Tensor, key: Tensor, value: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    parts = []
    for first, last in pairwise(accumulate(layout.lengths, initial=0)):
        keys = torch.cat([front[0], key[:, first:last]], 1)[None]
        values = torch.cat([front[1], value[:, first:last]], 1)[None]
        seen = torch.ones(last - first, keys.shape[2], dtype=torch.bool).tril(PREFIX)
        part = F.scaled_dot_product_attention(query[None, :, first:last], keys, values, seen, enable_gqa=True)
        parts.append(part[0])
    return torch.cat(parts, 1).transpose(0, 1)


def in_tiles(
    query: Tensor, key: Tensor, value: Tensor, front: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    return attend_documents(query, key, value, front, layout, scale=DIM**-0.5)


CONTESTANTS: dict[str, Attention] = {
    "fused, one mask": with_one_mask,
    "fused, by document": by_document,
    "ours, in tiles": in_tiles,
}


def outcome(attention: Attention, leaves: list[Tensor], weight: Tensor, layout: Layout) -> list[Tensor]:
    query, key, value, *front = leaves
    out = attention(query, key, value, tuple(front), layout)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@click.command()
@click.option("--lengths", default="200,110,90,60,52", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=30, show_default=True)
def main(lengths: str, dtype: str, rounds: int) -> None:
    documents = tuple(int(length) for length in lengths.split(","))
    layout = Layout(documents, PREFIX, None, torch.device("cpu"))
    torch.manual_seed(0)
    shapes = [
        (HEADS, layout.positions.numel()),
        *[(KV_HEADS, layout.positions.numel())] * 2,
        *[(KV_HEADS, PREFIX)] * 2,
    ]
    leaves = [torch.randn(*shape, DIM).to(getattr(torch, dtype)).requires_grad_() for shape in shapes]
    weight = torch.randn(sum(documents), HEADS, DIM).to(leaves[0])
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = outcome(with_one_mask, exact, weight.float(), layout)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(rounds + 3):
        for name, attention in CONTESTANTS.items():
            start = time.perf_counter()
            found = outcome(attention, leaves, weight, layout)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
            if turn == 0:
                errors = [
                    float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)
                ]
                click.echo(f"{name}: largest relative error {max(errors):.4f}")
    for name, taken in seconds.items():
        click.echo(f"{name}: {1e3 * statistics.median(taken):.2f} ms")


if __name__ == "__main__":
    main()
