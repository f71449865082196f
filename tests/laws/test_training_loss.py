"""The loss of training (packed rows, target tokens only, in chunks) is the model's own cross entropy."""

from contextlib import contextmanager

import pytest
import torch
from losses import by_passes, continued, gradients, reference, rows_of
from oracle import without_dropout
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from families import EXTRA, FAMILIES, VOCAB, tiny_model
from prefixtune import PrefixConfig, PrefixKV, PrefixModel
from prefixtune.attachment import attach_pairs, packed, packs
from prefixtune.attachment.documents import Layout, _attend_at_once, attend_documents
from prefixtune.chunked import _divergence_, chunked_cross_entropy, chunked_divergence
from prefixtune.errors import AttachError, ConfigError
from prefixtune.loss import (
    PASS_TOKENS,
    Passes,
    RowTokens,
    common_start,
    default_capacity,
    first_target,
    group_rows,
    pack_rows,
)

PREFIX = 5


def live_pairs(base):
    text = torch.randint(3, VOCAB, (1, PREFIX), generator=torch.Generator().manual_seed(2))
    kv = PrefixKV.from_tokens(base, text)
    return [(layer.key.requires_grad_(), layer.value.requires_grad_()) for layer in kv.layers]


@contextmanager
def counted(base):
    """A list to which each pass in the block adds the tokens that it runs."""
    seen = []
    embedding = base.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES + EXTRA)
def test_loss_and_gradient_of_packed_rows_equal_each_row_alone_with_whole_logits(family):
    base = tiny_model(family).requires_grad_(False)
    rows = rows_of()
    expected, expected_gradient = reference(base, rows, live_pairs(base))
    for packing in (True, False):
        _, total, gradient = by_passes(base, rows, live_pairs(base), packing=packing)
        assert total == pytest.approx(expected, rel=1e-5)
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "cohere"])
def test_smoothed_targets_and_a_model_without_a_head_of_its_own_have_the_loss_of_whole_logits(
    family, smoothing
):
    base = tiny_model(family).requires_grad_(False)
    rows = rows_of()
    expected, expected_gradient = reference(base, rows, live_pairs(base), smoothing)
    for options in ({"packing": True}, {"packing": False}, {"packing": False, "split": False}):
        _, total, gradient = by_passes(base, rows, live_pairs(base), smoothing=smoothing, **options)
        assert total == pytest.approx(expected, rel=1e-5)
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("family", FAMILIES + EXTRA)
def test_what_packed_rows_begin_with_runs_once_and_changes_neither_loss_nor_gradient_nor_states(family):
    """Windows of 6 positions are shorter than the 11 common tokens, and those longer than some rows."""
    base = tiny_model(family).requires_grad_(False)
    rows = continued(rows_of(), 11)
    expected, expected_gradient = reference(base, rows, live_pairs(base))
    with counted(base) as seen:
        passes, total, gradient = by_passes(base, rows, live_pairs(base), packing=True, capacity=50)
    assert total == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
    if passes.packing:
        assert seen[-1] == 64  # 11 + 33, in a multiple of 32; as rows of their own they are 88
    pairs = live_pairs(base)
    for row, states in zip(rows, passes.aims(rows, pairs), strict=True):
        (alone,) = passes.aims([row], pairs)
        assert torch.allclose(states, alone, rtol=1e-4, atol=1e-4)


def test_a_pack_holds_as_many_rows_as_fit_beside_their_common_beginning_and_never_more_tokens():
    base = tiny_model("llama").requires_grad_(False)
    passes = Passes.of(base, capacity=64, pad_token_id=0)
    rows = continued(rows_of((9, 4, 12, 2, 7, 20, 14)), 30)
    for several in (rows, rows[:2], rows[:1], [*rows, *rows_of((5,), seed=9)]):
        plan = passes.plan(several)
        assert sorted(row for group in plan for row in group) == list(range(len(several)))
        for group in plan:
            with counted(base) as seen, torch.no_grad(), passes.loss([several[row] for row in group], None):
                assert len(seen) == 1
                assert seen[0] <= 64
    assert len(passes.plan(rows)) == 2  # of 30 + 34 tokens each; with rows whole it would be 7


def test_a_common_beginning_counts_where_rows_leave_the_model_no_position():
    """GPT-2 has 128: prefix and common tokens come before each row's own."""
    base = tiny_model("gpt2").requires_grad_(False)
    pairs, ids = live_pairs(base), torch.ones(1, 120 - PREFIX + 9, dtype=torch.long)
    with torch.no_grad(), packed(base, pairs, (120 - PREFIX, 8, 1), common=120 - PREFIX) as hidden_of:
        assert len(hidden_of(ids)) == ids.numel()
    with pytest.raises(AttachError, match="129 positions"), packed(base, pairs, (115, 9, 1), common=115):
        pass


def test_rows_of_other_tokens_run_whole():
    base = tiny_model("llama").requires_grad_(False)
    passes = Passes.of(base, capacity=512, pad_token_id=0)
    few = continued(rows_of(), 7)  # too few to gain
    targets = [RowTokens(row.input_ids, row.input_ids) for row in continued(rows_of(), 11)]  # each counts
    for rows in (rows_of(), few, targets):
        with counted(base) as seen, torch.no_grad(), passes.loss(rows, None):
            assert seen == [32 * -(-sum(len(row.input_ids) for row in rows) // 32)]


@pytest.mark.parametrize(
    ("ids", "first_targets", "expected"),
    [
        ([(*range(20), 31), (*range(20), 32)], (20, 20), 19),  # what predicts the target is each row's own
        ([(*range(20), 31), (*range(20), 32)], (20, 10), 9),
        ([(*range(20), 31, 33), (*range(20), 32, 33)], (21, 21), 20),
        ([(*range(20),), (*range(20),), (*range(15),)], (20, 20, 15), 14),  # a row keeps a token
        ([(*range(20),)] * 3, (1, 20, 20), 0),
        ([(*range(20),)] * 3, (8, 20, 20), 0),
        ([(*range(20),)] * 3, (9, 20, 20), 8),
        ([(*range(20),)], (20,), 0),
        ([], (), 0),
        ([(1,), (1,)], (1, 1), 0),
    ],
)
def test_common_start_is_of_all_rows_and_ends_before_what_predicts_a_target(ids, first_targets, expected):
    assert common_start(ids, first_targets) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [((-100, -100, 5), 2), ((5, -100, 6), 2), ((5, 6), 1), ((-100, -100), 2), ((5,), 1)],
)
def test_first_target_is_one_that_something_predicts(labels, expected):
    assert first_target(labels) == expected


def test_attention_keeps_keys_and_values_once_however_many_tiles_have_them():
    heads, kv_heads, dim, tokens = 4, 2, 8, 300
    layout = Layout((200, 100), PREFIX, None, torch.device("cpu"))
    query = torch.randn(heads, tokens, dim, requires_grad=True)
    key, value = (torch.randn(kv_heads, tokens, dim, requires_grad=True) for _ in range(2))
    prefix = tuple(torch.randn(kv_heads, PREFIX, dim, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend_documents(query, key, value, prefix, layout, scale=0.3)
    weights = sum(batch.mask.numel() for batch in layout.batches(heads, kv_heads))
    assert sum(kept) == query.numel() + 2 * kv_heads * (PREFIX + tokens) * dim + weights


@pytest.mark.parametrize("family", FAMILIES + EXTRA)
def test_divergence_from_a_teacher_equals_that_of_each_row_alone_with_whole_logits(family):
    base = tiny_model(family).requires_grad_(False)
    rows, pairs = rows_of(), live_pairs(base)
    expected = 0.0
    for row in rows:
        chosen = row.labels[1:] != -100
        bare = base(input_ids=row.input_ids[None], use_cache=False).logits[0, :-1][chosen]
        with attach_pairs(base, pairs, name="reference"):
            logits = base(input_ids=row.input_ids[None], use_cache=False).logits[0, :-1][chosen]
            ours, theirs = logits.log_softmax(dim=1), bare.log_softmax(dim=1)
            loss = F.kl_div(ours, theirs, reduction="sum", log_target=True)
            loss.backward()
        expected += loss.item()
    expected_gradient = gradients(pairs)
    assert expected > 0
    for packing in (True, False):
        passes = Passes.of(base, capacity=20, pad_token_id=0, packing=packing)
        aimed = [
            RowTokens(row.input_ids, row.labels, aims)
            for row, aims in zip(rows, passes.aims(rows), strict=True)
        ]
        _, total, gradient = by_passes(base, aimed, live_pairs(base), packing=packing)
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(family):
    base = tiny_model(family)
    common = 0 if family == "mistral-sliding" else 11  # there no target would see the prefix
    rows, found = continued(rows_of(), common), []
    for on in (False, True):
        model = without_dropout(PrefixModel(base, PrefixConfig(length=PREFIX)))
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        model.train()
        _, total, gradient = by_passes(base, rows, live_pairs(base), packing=True, capacity=50)
        found.append((total, gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)
    assert found[0][1].norm() > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding", "opt", "gpt2"])
def test_no_document_sees_its_neighbours(family):
    base = tiny_model(family).requires_grad_(False)
    pairs, lengths = live_pairs(base), (6, 9, 4)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    other = ids.clone()
    other[0, 6:15] = (other[0, 6:15] + 1) % VOCAB  # another second document
    with torch.no_grad(), packed(base, pairs, lengths) as hidden_of:
        before, after = hidden_of(ids), hidden_of(other)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[15:], after[15:])
    assert not torch.equal(before[6:15], after[6:15])


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon-alibi"])
def test_models_with_alibi_are_not_packed_for_that_reason(family):
    assert "has alibi" in packs(tiny_model(family))


@pytest.mark.parametrize("common", [0, 30, 70, 64])
@pytest.mark.parametrize("window", [None, 40, 150])
@pytest.mark.parametrize("prefix", [0, 7, 60])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"softcap": 3.0},
        {"sinks": "trained"},
        {"sinks": "frozen"},
        {"softcap": 3.0, "sinks": "frozen"},
    ],
    ids=["plain", "softcap", "trained-sinks", "frozen-sinks", "softcap-and-sinks"],
)
def test_attention_in_blocks_equals_attention_with_a_whole_mask(common, window, prefix, extra):
    """Documents longer than a block, grouped queries, values of another width than keys; a common beginning
    longer and shorter than a block and than the window."""
    generator = torch.Generator().manual_seed(3)
    lengths, (heads, kv_heads, dim, value_dim) = (300, 1, 129, 20), (6, 2, 8, 4)
    lengths = (common, *lengths) if common else lengths

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    tokens = sum(lengths)
    query, key, value = (
        random(heads, tokens, dim),
        random(kv_heads, tokens, dim),
        random(kv_heads, tokens, value_dim),
    )
    front = (random(kv_heads, prefix, dim), random(kv_heads, prefix, value_dim))
    options = dict(extra)
    if "sinks" in extra:
        options["sinks"] = random(heads).requires_grad_(extra["sinks"] == "trained")
    layout = Layout(lengths, prefix, window, torch.device("cpu"), common)
    out = attend_documents(query, key, value, front, layout, scale=0.4, **options)

    parts, before = [], front
    for q, k, v in zip(query.split(lengths, 1), key.split(lengths, 1), value.split(lengths, 1), strict=True):
        own = [torch.cat(two, 1) for two in zip(before, (k, v), strict=True)]
        if common and not parts:
            before = own
        k, v = (one.repeat_interleave(3, 0) for one in own)
        scores = 0.4 * q @ k.transpose(1, 2)
        if "softcap" in options:
            scores = 3.0 * torch.tanh(scores / 3.0)
        place = torch.arange(k.shape[1])
        distance = place[-q.shape[1] :, None] - place
        unseen = (distance < 0) | (distance >= window if window else False)
        scores = scores.masked_fill(unseen, -torch.inf)
        if "sinks" in options:
            scores = torch.cat([scores, options["sinks"][:, None, None].expand(-1, len(scores[0]), 1)], 2)
        parts.append((scores.softmax(2)[..., : k.shape[1]] @ v).transpose(0, 1))
    expected = torch.cat(parts)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    leaves = [query, key, value, *front, *([options["sinks"]] if extra.get("sinks") == "trained" else [])]
    found, wanted = (torch.autograd.grad((o * weight).sum(), leaves) for o in (out, expected))
    assert torch.allclose(out, expected, atol=1e-12)
    if not extra:  # what a GPU runs
        at_once = _attend_at_once(query, key, value, front, layout, scale=0.4, dropout=0.0)
        assert torch.allclose(at_once, expected, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunked_cross_entropy_equals_that_of_whole_logits(cap, smoothing):
    """600 targets by 30,011 tokens are more than one chunk and more than one softmax at a time."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(700, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(30_011, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 30_011, (700,), generator=generator)
    labels[torch.randperm(700, generator=generator)[:100]] = -100

    def head(rows):
        logits = rows @ weight.T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    plain = torch.ones((), dtype=torch.float64)
    found = chunked_cross_entropy(hidden, labels, head, smoothing=smoothing, plain=plain)
    assert plain.item() - 1 == pytest.approx(F.cross_entropy(head(hidden), labels, reduction="sum").item())
    whole = F.cross_entropy(head(hidden), labels, reduction="sum", label_smoothing=smoothing)
    assert found.item() == pytest.approx(whole.item(), rel=1e-12)
    by_chunks, by_whole = (torch.autograd.grad(3.0 * loss, hidden)[0] for loss in (found, whole))
    assert torch.allclose(by_chunks, by_whole, atol=1e-10)
    with torch.no_grad():
        again = chunked_cross_entropy(hidden, labels, head, smoothing=smoothing)
    assert again.item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("ruled_out", [torch.finfo(torch.float64).min, -torch.inf])
def test_no_part_of_a_target_goes_to_tokens_that_the_model_rules_out(ruled_out):
    """As Chameleon does with those of images; the others' loss is that of a vocabulary without them."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(70, 40, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 30, (70,), generator=generator)

    def head(rows):
        return torch.cat([rows[:, :30], torch.full_like(rows[:, 30:], ruled_out)], dim=1)

    found = chunked_cross_entropy(logits, labels, head, smoothing=0.2)
    expected = F.cross_entropy(logits[:, :30], labels, reduction="sum", label_smoothing=0.2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_teachers_distribution_is_not_smoothed():
    base = tiny_model("llama").requires_grad_(False)
    passes, rows = Passes.of(base, capacity=512, pad_token_id=0), rows_of()
    taught = [
        RowTokens(row.input_ids, row.labels, aims) for row, aims in zip(rows, passes.aims(rows), strict=True)
    ]
    with pytest.raises(ConfigError, match="label_smoothing_factor"), passes.loss(taught, None, smoothing=0.1):
        pass


class _Large(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that are made in the block."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def large(tree):
            tensors = [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]
            return {one.untyped_storage()._cdata for one in tensors if one.numel() >= self.numbers}

        given = large((args, kwargs))
        made = func(*args, **(kwargs or {}))
        self.count += len(large(made) - given)
        return made


def test_divergence_makes_no_new_memory_from_piece_to_piece():
    """A piece is about a million numbers: 40 tokens are two pieces here, 120 are five."""
    counts = []
    for tokens in (40, 120):
        logits, aimed = torch.randn(2, tokens, 40_000).bfloat16()
        with torch.no_grad(), _Large(10 * 40_000) as seen:
            _divergence_(logits, aimed, torch.ones(tokens, dtype=torch.bool), gradient=True)
        counts.append(seen.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunked_divergence_equals_that_of_whole_logits(cap):
    """600 tokens by 30,011 words are more than one chunk and more than one softmax at a time."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(600, 6, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(30_011, 6, generator=generator, dtype=torch.float64)

    def head(rows):
        logits = rows @ weight.T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    found = chunked_divergence(hidden, teacher, head)
    ours, theirs = (F.log_softmax(head(states), dim=1) for states in (hidden, teacher))
    whole = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    assert found.item() == pytest.approx(whole.item(), rel=1e-12)
    by_chunks, by_whole = (torch.autograd.grad(3.0 * loss, hidden)[0] for loss in (found, whole))
    assert torch.allclose(by_chunks, by_whole, atol=1e-10)
    assert chunked_divergence(teacher, teacher, head).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 1e-4])
def test_gradient_of_targets_that_the_model_is_sure_of_keeps_its_size_in_bfloat16(smoothing):
    logits = torch.full((64, 50), -8.0)
    labels = torch.arange(64) % 50
    logits[torch.arange(64), labels] = torch.linspace(0, 3, 64)  # probabilities from 0.98 to 0.9992
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype, copy=True).requires_grad_()
        chunked_cross_entropy(given, labels, lambda rows: rows * 1.0, smoothing=smoothing).backward()
        found.append(given.grad.float()[torch.arange(64), labels])
    expected, got = found
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("vocabulary", "chunks"), [(30_000, [0, 224]), (60_000, [0, 128, 96]), (200_000, [0, 128, 96])]
)
def test_head_gets_target_tokens_only_in_chunks_of_128_or_of_8_million_numbers(vocabulary, chunks):
    seen = []

    def head(rows):
        seen.append(len(rows))
        return rows @ torch.ones(2, vocabulary)

    labels = torch.tensor([-100, 5, -100] * 200)
    chunked_cross_entropy(torch.randn(600, 2), labels, head)
    assert seen == chunks  # 200 targets, filled up to a multiple of 32; none to learn the vocabulary


def test_packs_hold_every_row_once_and_never_more_than_their_capacity():
    lengths = torch.randint(1, 300, (400,), generator=torch.Generator().manual_seed(6)).tolist()
    for plan in (pack_rows(lengths, 512), group_rows(lengths, 512)):
        assert sorted(row for group in plan for row in group) == list(range(400))
    assert max(sum(lengths[row] for row in pack) for pack in pack_rows(lengths, 512)) <= 512
    assert len(pack_rows(lengths, 512)) <= 1.02 * sum(lengths) / 512 + 1
    for group in group_rows(lengths, 512):
        size = max(lengths[row] for row in group) * len(group)
        assert size <= 512
        assert sum(lengths[row] for row in group) >= 0.75 * size


def test_a_row_that_does_not_fit_is_told_with_all_its_tokens():
    base, start = tiny_model("llama"), torch.arange(60) % VOCAB
    rows = [RowTokens(ids, ids) for ids in (torch.cat([start, row.input_ids]) for row in rows_of((50, 20)))]
    for row in rows:
        row.labels[:70] = -100
    with pytest.raises(ConfigError, match="a row of 110 tokens does not fit a pack of 100"):
        Passes.of(base, capacity=100, pad_token_id=0).plan(rows)


@pytest.mark.parametrize("common", [0, 100, 420, 2000])
def test_a_pass_has_room_for_as_many_tokens_behind_a_long_beginning(common):
    start = torch.randint(3, VOCAB, (common,), generator=torch.Generator().manual_seed(4))
    own = rows_of((40, 60, 80, 100, 40, 60, 80, 100))
    rows = [
        RowTokens(torch.cat([start, row.input_ids]), torch.cat([-100 + 0 * start, row.labels])) for row in own
    ]
    ids = [tuple(row.input_ids.tolist()) for row in rows]
    capacity = default_capacity(ids, [first_target(row.labels.tolist()) for row in rows], packing=True)
    assert capacity == PASS_TOKENS + common_start(ids, [first_target(row.labels.tolist()) for row in rows])
    assert (
        len(Passes.of(tiny_model("llama"), capacity=capacity, pad_token_id=0).plan(rows)) == 2
    )  # 560 tokens
    assert default_capacity(ids, [common] * 8, packing=False) == max(PASS_TOKENS, common + 100)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16_gradient_stays_close_to_float32(family):
    """Scores and softmax are float32; what remains is the rounding of bfloat16 weights and activations."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_model(family).to(torch.bfloat16).to(dtype).requires_grad_(False)
        _, total, gradient = by_passes(
            base, rows_of((90, 60, 33)), live_pairs(base), packing=True, capacity=200
        )
        found[dtype] = (total, gradient.float())
    (exact, gradient), (rounded, coarse) = found[torch.float32], found[torch.bfloat16]
    assert rounded == pytest.approx(exact, rel=0.02)
    assert F.cosine_similarity(gradient, coarse, dim=0) > 0.97
    assert coarse.norm() == pytest.approx(gradient.norm().item(), rel=0.1)
