"""Puts prefixes into a model's forward pass. The only room that knows transformers' internals.

The caller, `generate` included, goes on counting text tokens only: its ids, masks, positions and caches hold
T tokens. Inside the decoder each row becomes what the bare model would see amid [pads; prefix; text]:

    column   0 ........ s ............ P+n ......... P+T    P  longest prefix of the batch
             [ masked  ][ row's prefix ][ row's text ]      n  left pads of the row, s = P + n - its length

Text keeps its columns; a shorter prefix, or one before left pads, moves right until it touches its text. So
index distances (sliding windows, chunks, alibi by index), mask counts (alibi by mask) and positions are the
bare model's own, on every architecture. Axes: B batch, H kv heads, P prefix, T text, D head dim.

Reading order: `session` (what is attached, and the hooks), `forward` (one pass of the decoder), `view` (the
cache, mask and positions that the decoder sees). For training there are also `head` (the model in two
halves), and `packed` with `documents` (several documents in one row without padding), whose layers `quicker`
fuses (`lean`, `liger`) or compiles once `trial` has tried that; for serving there are `rows` (a batch whose
rows join and leave) and `flat` (their next tokens and prompts in one pass).
"""

from prefixtune.attachment.experts import aligned_experts
from prefixtune.attachment.flat import Piece, flat_runner, no_flat
from prefixtune.attachment.forward import position_limit
from prefixtune.attachment.head import head_of, last_hidden, multiply_once, splits
from prefixtune.attachment.liger import check_liger
from prefixtune.attachment.packed import packed
from prefixtune.attachment.quicker import uncompile_layers, use_no_liger
from prefixtune.attachment.rows import Rows, empty_rows, most_positions, row_runner
from prefixtune.attachment.session import attach, attach_pairs, supported
from prefixtune.attachment.trial import compile_layers, packs, use_liger

__all__ = [
    "Piece",
    "Rows",
    "aligned_experts",
    "attach",
    "attach_pairs",
    "check_liger",
    "compile_layers",
    "empty_rows",
    "flat_runner",
    "head_of",
    "last_hidden",
    "most_positions",
    "multiply_once",
    "no_flat",
    "packed",
    "packs",
    "position_limit",
    "row_runner",
    "splits",
    "supported",
    "uncompile_layers",
    "use_liger",
    "use_no_liger",
]
