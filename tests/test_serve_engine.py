"""Laws of the engine: an answer is what it would be alone, and what ends a row ends it alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from prefixtune import PrefixKV, attach
from prefixtune.serve.engine import Engine
from prefixtune.serve.job import Job, OverloadedError, Step
from prefixtune.serve.layout import lay_out
from prefixtune.serve.passes import Flat, Padded, Passes
from prefixtune.serve.sampling import Chooser, Sampling
from prefixtune.serve.selftest import batch_error, check_batches
from serving import alone, random_ids, served_base

GREEDY = Sampling(temperature=0.0)
LENGTHS = (1, 3, 5, 8, 13, 21, 34, 40)
WAYS: dict[str, Callable[[Any], Passes]] = {"flat": Flat, "padded": Padded}


class Heard:
    """Collects what a job is told."""

    def __init__(self, answers: int = 1, on_step: Callable[[Step], bool] = lambda step: False) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(answers)]
        self.ended: list[str] = []
        self.choices: list[Any] = []
        self.done = threading.Event()
        self._answers, self._on_step = answers, on_step

    def __call__(self, step: Step) -> bool:
        if step.choice is not None:
            self.tokens[step.answer].append(step.choice.token)
            self.choices.append(step.choice)
        if step.ended or step.failure:
            self.ended.append(step.ended or step.failure or "")
        stop = self._on_step(step)
        if stop or step.failure or len(self.ended) == self._answers:
            self.done.set()
        return stop


def job_of(heard: Heard, ids: Sequence[int], prefix: PrefixKV | None = None, **options: Any) -> Job:
    settings: dict[str, Any] = {"samplings": [GREEDY], "max_tokens": 8, "ends": frozenset()}
    deadline = time.monotonic() + options.pop("seconds", 60)
    return Job(ids=ids, prefix=prefix, listener=heard, deadline=deadline, **settings | options)


def prefix_of(base: Any, length: int, seed: int) -> PrefixKV:
    return PrefixKV.from_tokens(base, torch.tensor([random_ids(length, seed)]))


@pytest.fixture
def base() -> Any:
    return served_base()


@pytest.fixture(params=WAYS)
def way(request: Any) -> Callable[[Any], Passes]:
    return WAYS[request.param]


@pytest.fixture
def engine(base: Any, way: Callable[[Any], Passes]) -> Any:
    made = Engine(base, passes=way(base), rows=24, chunk=16)
    made.start()
    yield made
    made.close(0)
    made.join(10)
    assert not made.is_alive


def run(engine: Engine, *jobs: Job) -> None:
    engine.submit(*jobs)
    for job in jobs:
        assert job.listener.done.wait(60)  # type: ignore[attr-defined]


FLAT = ("llama", "gpt2", "gemma3", "opt", "mistral-sliding", "gemma2", "gpt-oss", "mixtral")
PADDED = ("llama", "bloom", "gpt2", "gemma3", "opt", "mpt", "mistral-sliding")


@pytest.mark.parametrize(
    ("family", "name"), [*((family, "flat") for family in FLAT), *((family, "padded") for family in PADDED)]
)
def test_64_jobs_at_once_are_each_the_same_as_alone(family: str, name: str) -> None:
    base = served_base(family)
    prefixes = [*(prefix_of(base, LENGTHS[i % 8], seed=i) for i in range(16)), None]
    asked = [(prefixes[i % 17], random_ids(1 + (7 * i) % 45, seed=100 + i)) for i in range(64)]
    made = Engine(base, passes=WAYS[name](base), rows=24, chunk=16)
    made.start()
    heard = [Heard() for _ in asked]
    jobs = [
        job_of(h, ids, kv, max_tokens=4 + i % 9)
        for i, (h, (kv, ids)) in enumerate(zip(heard, asked, strict=True))
    ]
    run(made, *jobs)
    made.close(0)
    for job, found, (kv, ids) in zip(jobs, heard, asked, strict=True):
        assert found.tokens[0] == alone(base, kv, ids, job.max_tokens)
        assert found.ended == ["length"]


def test_check_finds_a_prefix_that_is_a_position_off(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixtune.attachment import Rows
    from prefixtune.errors import UnsupportedModelError

    assert check_batches(base).together
    right = Rows.positions
    monkeypatch.setattr(
        Rows, "positions", lambda rows: right(rows) + (torch.tensor(rows.lengths)[:, None] > 9)
    )
    for way in WAYS.values():
        assert batch_error(base, way(base), together=True) > 0.01
    with pytest.raises(UnsupportedModelError, match="engine's logits differ"):
        check_batches(base)


def test_check_falls_back_to_one_row_where_only_that_is_exact(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune.attachment import Rows
    from prefixtune.serve import selftest

    right = Rows.mask
    monkeypatch.setattr(
        Rows, "mask", lambda rows: right(rows) if len(rows.lengths) == 1 else right(rows) * 0 + 1
    )
    assert check_batches(base).together  # flat passes have masks of their own
    monkeypatch.setattr(selftest, "no_flat", lambda base: "it has none")
    way = check_batches(base)
    assert not way.together
    assert [note.rpartition(": ")[2] for note in way.notes] == ["it has none", "one at a time"]


@pytest.mark.parametrize(
    "family", ["gpt2", "mistral-sliding", "gpt-oss", "bloom", "falcon", "gptj", "llama4"]
)
def test_check_takes_flat_passes_where_the_model_has_them_and_says_why_not_elsewhere(family: str) -> None:
    way, is_flat = check_batches(served_base(family)), family in ("gpt2", "mistral-sliding", "gpt-oss")
    assert isinstance(way.passes, Flat if is_flat else Padded)
    assert way.together
    assert [note.partition(":")[0] for note in way.notes] == [
        "prompts are read in passes of their own, not beside answers"
    ] * (not is_flat)


def test_flat_passes_bound_the_scores_where_the_model_does() -> None:
    bounded, free = (served_base("gemma2", attn_logit_softcapping=bound) for bound in (0.3, None))
    ids = torch.tensor([random_ids(9, 1)])
    assert (bounded(ids).logits - free(ids).logits).abs().max() > 0.01
    assert batch_error(bounded, Flat(bounded), together=True) < 1e-5


def test_check_falls_back_to_padded_passes_where_flat_ones_are_not_exact(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune.attachment import flat

    right = flat._attend
    monkeypatch.setattr(
        flat,
        "_attend",
        lambda query, key, value, mask, **options: right(
            query, key, value, mask if query.shape[2] > 1 else None, **options
        ),
    )
    way = check_batches(base)
    assert isinstance(way.passes, Padded)
    assert "their logits differ by" in way.notes[0]
    ids = random_ids(9, 2)
    heard, made = Heard(), Engine(base, passes=way.passes)
    made.start()
    run(made, job_of(heard, ids, prefix_of(base, 5, 1)))
    assert heard.tokens[0] == alone(base, prefix_of(base, 5, 1), ids, 8)
    made.close(0)


def test_layer_that_attends_without_the_rows_is_found(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefixtune.attachment import Piece, empty_rows, flat_runner
    from prefixtune.errors import UnsupportedModelError

    run_flat, rows = flat_runner(base), empty_rows(base).fresh([None])
    monkeypatch.setattr(base.model, "layers", base.model.layers[:1])
    with pytest.raises(UnsupportedModelError, match="of 2 layers those that attended are"):
        run_flat(empty_rows(base), [], [Piece(rows=rows, ids=[5, 6], ends=True)])
    assert rows.lengths == [0]


def test_seeded_answer_is_the_same_whatever_else_is_in_the_batch(base: Any, engine: Engine) -> None:
    kv, ids = prefix_of(base, 5, 1), random_ids(9, 2)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=11)
    lonely = Heard()
    run(engine, job_of(lonely, ids, kv, samplings=[sampling], max_tokens=20))
    crowd = [Heard() for _ in range(12)]
    among = Heard()
    others = [
        job_of(h, random_ids(3 + i, i), samplings=[Sampling(temperature=1.5, seed=i)], max_tokens=15)
        for i, h in enumerate(crowd)
    ]
    run(engine, *others[:6], job_of(among, ids, kv, samplings=[sampling], max_tokens=20), *others[6:])
    assert among.tokens == lonely.tokens
    other = Heard()
    run(engine, job_of(other, ids, kv, samplings=[Sampling(seed=12)], max_tokens=20))
    assert other.tokens != lonely.tokens


def test_several_answers_to_one_prompt_are_those_of_their_own_seeds(base: Any, engine: Engine) -> None:
    kv, ids = prefix_of(base, 4, 1), random_ids(7, 2)
    settings = [Sampling(seed=seed) for seed in (3, 4, 5)]
    together = Heard(answers=3)
    run(engine, job_of(together, ids, kv, samplings=settings))
    for answer, sampling in enumerate(settings):
        single = Heard()
        run(engine, job_of(single, ids, kv, samplings=[sampling]))
        assert together.tokens[answer] == single.tokens[0]


def test_prefix_that_is_no_number_ends_its_own_answer_only(base: Any, engine: Engine) -> None:
    broken = prefix_of(base, 6, 1)
    broken.layers[0].key.fill_(float("nan"))
    ids = random_ids(9, 2)
    bad, good = Heard(), Heard()
    run(engine, job_of(bad, ids, broken), job_of(good, ids, max_tokens=12))
    assert bad.ended == ["broken"]
    assert bad.tokens == [[]]
    assert good.tokens[0] == alone(base, None, ids, 12)


def test_failing_pass_ends_what_ran_and_nothing_else(base: Any, engine: Engine) -> None:
    ids, own = random_ids(9, 2), base.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    hit, after = Heard(on_step=lambda step: setattr(base, "forward", fail) or False), Heard()
    run(engine, job_of(hit, ids))
    assert hit.ended == ["broken"]
    base.forward = own
    run(engine, job_of(after, ids))
    assert after.tokens[0] == alone(base, None, ids, 8)


@pytest.mark.parametrize("where", ["in the second layer", "before the model"])
def test_prompt_that_breaks_a_pass_beside_answers_fails_alone(
    base: Any, way: Callable[[Any], Passes], where: str
) -> None:
    kv, asked, is_bad = prefix_of(base, 4, 1), [random_ids(9 + i, i) for i in range(5)], [False]
    expected = [alone(base, kv, ids, 20) for ids in asked]
    poison = next(token for token in range(300) if not any(token in ids for ids in (*asked, *expected)))
    base.get_input_embeddings().register_forward_pre_hook(
        lambda module, given: is_bad.__setitem__(0, bool((given[0] == poison).any()))
    )
    base.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0 if is_bad[0] else None)
    made = Engine(base, passes=way(base), rows=8, chunk=16)
    bad, good = Heard(), [Heard() for _ in asked]
    job = job_of(bad, [9] * 10 + [poison], kv)
    if where == "before the model":
        other = prefix_of(served_base("gemma"), 4, 1)
        job = job_of(bad, [9] * 11, PrefixKV(layers=(kv.layers[0], other.layers[1])))

    def begin(step: Step) -> bool:
        if not (job.over or made._waiting or made._reading):
            made.submit(job)
        return False

    good[0]._on_step = begin  # it comes while the others answer
    made.submit(*(job_of(h, ids, kv, max_tokens=20) for h, ids in zip(good, asked, strict=True)))
    made.start()
    for one in (*good, bad):
        assert one.done.wait(20)
    assert bad.ended == ["broken"]
    assert [one.tokens[0] for one in good] == expected
    made.close(0)


def test_pass_that_finds_no_memory_leaves_the_rows_as_they_were(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune.attachment import Piece, empty_rows, flat_runner

    run_flat, batch, zeros, left = flat_runner(base), empty_rows(base), torch.zeros, [2]
    piece = Piece(rows=batch.fresh([prefix_of(base, 5, 1)], room=3), ids=[5, 6, 7], ends=True)
    run_flat(batch, [], [piece])
    batch.join(piece.rows)
    batch.columns = batch.end  # no room for another token

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of memory")
        return zeros(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_flat(batch, [8], [])
    assert (batch.columns, batch.end) == (8, 8)
    found = run_flat(batch, [8], [])[0]
    with attach(base, prefix_of(base, 5, 1)):
        assert torch.allclose(found, base(torch.tensor([[5, 6, 7, 8]])).logits[0, -1], atol=1e-4)


def test_long_prompts_are_read_in_pieces_beside_answers_and_stay_exact(
    base: Any, way: Callable[[Any], Passes]
) -> None:
    made, passes = Engine(base, passes=way(base), rows=8, chunk=16), list[tuple[int, list[int]]]()
    own = made._passes

    def note(batch: Any, tokens: Any, prompts: Any) -> Any:
        passes.append((len(tokens), [prompt.next for prompt in prompts]))
        return own(batch, tokens, prompts)

    made._passes = note
    asked = [(prefix_of(base, 3 + i, i) if i % 2 else None, random_ids(5 + 25 * i, i)) for i in range(4)]
    heard = [Heard() for _ in asked]
    made.submit(*(job_of(h, ids, kv, max_tokens=14) for h, (kv, ids) in zip(heard, asked, strict=True)))
    made.start()
    for found in heard:
        assert found.done.wait(20)
    for found, (kv, ids) in zip(heard, asked, strict=True):
        assert found.tokens[0] == alone(base, kv, ids, 14)
    assert passes[:4] == [(0, [5, 11]), (1, [16]), (1, [16]), (1, [16])]
    assert passes[4] == (1, [3, 13])  # the rest of one, which had its turn first, beside another
    assert all(sum(read) <= 16 for _, read in passes)
    made.close(0)


def test_cancelled_job_frees_its_rows_and_the_others_go_on(
    base: Any, way: Callable[[Any], Passes], caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[Exception] = []
    made = Engine(base, passes=way(base), rows=1, report=reported.append)
    made.start()
    reached = threading.Event()
    endless = Heard(on_step=lambda step: reached.set() or False)
    waits = Heard()
    job = job_of(endless, random_ids(4, 1), max_tokens=100_000, seconds=600)
    made.cached_tokens = 10**9
    made.submit(job)
    made.submit(job_of(waits, random_ids(5, 2)))
    assert reached.wait(20)
    assert made.waiting == 1
    made.cancel(job)
    assert waits.done.wait(20)
    assert waits.tokens[0] == alone(base, None, random_ids(5, 2), 8)
    count = len(endless.tokens[0])
    assert not endless.ended
    time.sleep(0.05)
    assert len(endless.tokens[0]) == count
    gone = job_of(Heard(), random_ids(4, 1))
    gone.cancelled = True
    made.submit(gone)  # leaves nothing for the pass
    made.close(0)
    made.join(20)
    assert (reported, caplog.text) == ([], "")


def test_listener_that_fails_loses_its_own_job_only(base: Any, engine: Engine) -> None:
    def fail(step: Step) -> bool:
        raise KeyError("gone")

    good = Heard()
    ids = random_ids(5, 2)
    bad = Job(
        ids=ids,
        prefix=None,
        samplings=[GREEDY],
        max_tokens=9,
        ends=frozenset(),
        deadline=time.monotonic() + 9,
        listener=fail,
    )
    engine.submit(bad)
    run(engine, job_of(good, ids))
    assert good.tokens[0] == alone(base, None, ids, 8)


def test_full_queue_refuses_all_of_a_request_and_says_when_to_come_again(base: Any) -> None:
    made = Engine(base, queue=2)  # not started: nothing leaves the queue
    made.submit(job_of(Heard(), [5]))
    with pytest.raises(OverloadedError, match="the queue is full: 2") as error:
        made.submit(job_of(Heard(), [5]), job_of(Heard(), [6]))
    assert 1 <= error.value.retry_after <= 60
    assert made.waiting == 1
    made.submit(job_of(Heard(), [5]))


def test_more_prompts_than_the_queue_holds_are_taken_where_nothing_waits(base: Any) -> None:
    made = Engine(base, queue=1)  # to come again would never help
    made.submit(job_of(Heard(), [5]), job_of(Heard(), [6]))
    assert made.waiting == 2


def test_late_job_is_told_so_while_it_waits_and_while_it_runs(base: Any) -> None:
    made = Engine(base, rows=1, cached_tokens=10**9)
    made.start()
    runs, waits, after = Heard(), Heard(), Heard()
    made.submit(job_of(runs, [5, 6], max_tokens=10**6, seconds=0.6))
    made.submit(job_of(waits, [5, 6], seconds=0.2))
    made.submit(job_of(after, [5, 6]))
    assert after.done.wait(20)
    assert runs.ended == waits.ended == ["timeout"]
    assert runs.tokens[0]
    assert not waits.tokens[0]
    made.close(0)


def test_closing_engine_takes_nothing_new_finishes_in_time_and_ends_the_rest(base: Any) -> None:
    made = Engine(base, cached_tokens=10**9)
    made.start()
    reached = threading.Event()
    endless = Heard(on_step=lambda step: reached.set() or False)
    short = Heard()
    made.submit(job_of(endless, [5, 6], max_tokens=10**6), job_of(short, [7, 8]))
    assert reached.wait(20)
    made.close(0.3)
    with pytest.raises(OverloadedError, match="shutting down"):
        made.submit(job_of(Heard(), [5]))
    made.join(20)
    assert not made.is_alive
    assert short.ended == ["length"]
    assert endless.ended == ["shutdown"]


def test_long_prompt_holds_up_neither_answers_nor_a_short_prompt_behind_it(
    base: Any, way: Callable[[Any], Passes]
) -> None:
    order: list[str] = []
    made = Engine(base, passes=way(base), chunk=8)

    def note(name: str) -> Callable[[Step], bool]:
        return lambda step: bool(order.append(name)) if step.choice else False

    runs, long, short = Heard(on_step=note("runs")), Heard(on_step=note("long")), Heard(on_step=note("short"))
    made.submit(
        job_of(runs, [5], max_tokens=12),
        job_of(long, random_ids(100, 1), max_tokens=1),
        job_of(short, [6, 7]),
    )
    made.start()
    for heard in (runs, long, short):
        assert heard.done.wait(20)
    assert order.index("short") < order.index("long")
    assert order[: order.index("long")].count("runs") >= 10  # 100 tokens in pieces of 8, a token between two
    made.close(0)


def test_prompt_that_is_cut_by_the_budget_goes_on_first(base: Any, way: Callable[[Any], Passes]) -> None:
    made, order = Engine(base, passes=way(base), rows=8, chunk=16), list[int]()
    heard = [Heard(on_step=lambda step, i=i: bool(order.append(i))) for i in range(6)]
    made.submit(*(job_of(h, random_ids(10, i), max_tokens=1) for i, h in enumerate(heard)))
    made.start()
    for one in heard:
        assert one.done.wait(20)
    assert [i for i, _ in itertools.groupby(order)] == list(range(6))
    made.close(0)


def test_prompts_of_about_one_length_are_read_in_one_pass(base: Any) -> None:
    padded, passes = Padded(base), list[int]()
    made, own = Engine(base, passes=padded, rows=8, chunk=64), padded._run
    padded._run = lambda rows, ids, *counts: passes.append(len(ids)) or own(rows, ids, *counts)
    asked = [(prefix_of(base, 3 + i, i) if i % 2 else None, random_ids(9 + i, i)) for i in range(4)]
    heard = [Heard() for _ in asked]
    made.submit(*(job_of(h, ids, kv) for h, (kv, ids) in zip(heard, asked, strict=True)))
    made.start()
    for found in heard:
        assert found.done.wait(20)
    for found, (kv, ids) in zip(heard, asked, strict=True):
        assert found.tokens[0] == alone(base, kv, ids, 8)
    assert passes == [4] * 8  # the prompts, and seven tokens more of each row
    made.close(0)


def test_flat_pass_sees_prompts_and_answers_together(base: Any) -> None:
    flat, passes = Flat(base), list[tuple[int, int]]()
    made, own = Engine(base, passes=flat, rows=8, chunk=20), flat._run
    flat._run = lambda rows, tokens, pieces: (
        passes.append((len(tokens), sum(len(piece.ids) for piece in pieces))) or own(rows, tokens, pieces)
    )
    heard = [Heard() for _ in range(4)]
    made.submit(*(job_of(h, random_ids(10, i), max_tokens=4) for i, h in enumerate(heard)))
    made.start()
    for one in heard:
        assert one.done.wait(20)
    assert passes == [(0, 20), (2, 20), (4, 0), (4, 0), (2, 0)]
    made.close(0)


def test_prompts_whose_common_pass_fails_are_read_one_by_one(base: Any, way: Callable[[Any], Passes]) -> None:
    passes = way(base)
    made, own = Engine(base, passes=passes, rows=8, chunk=64), passes._run  # type: ignore[attr-defined]

    def fail_together(rows: Any, ids: Any, rest: Any = ()) -> Any:
        if (
            len(ids) * (torch.is_tensor(ids) and ids.shape[1] > 1) + len(rest) * (not torch.is_tensor(ids))
            > 1
        ):
            raise RuntimeError("out of memory")
        return own(rows, ids, rest)

    passes._run = fail_together  # type: ignore[attr-defined]
    heard = [Heard() for _ in range(3)]
    made.submit(*(job_of(h, random_ids(9, i)) for i, h in enumerate(heard)))
    made.start()
    for found in heard:
        assert found.done.wait(20)
    for i, found in enumerate(heard):
        assert found.tokens[0] == alone(base, None, random_ids(9, i), 8)
    made.close(0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_layout_changes_neither_weights_nor_answers(family: str) -> None:
    base, other = served_base(family), served_base(family)
    other.load_state_dict(base.state_dict())
    lay_out(other)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])
    ids = torch.tensor([random_ids(9, 1)])
    assert torch.allclose(base(ids).logits, other(ids).logits, atol=1e-5)
    assert other.lm_head.weight.t().is_contiguous()


def test_memory_is_bounded_by_waiting_and_goes_back(base: Any) -> None:
    made = Engine(base, rows=8, cached_tokens=60)
    most = [0]
    made._observe = lambda rows: most.__setitem__(0, max(most[0], rows))
    heard = [Heard() for _ in range(8)]
    made.submit(*(job_of(h, random_ids(12, i)) for i, h in enumerate(heard)))  # 20 tokens each: three at once
    made.start()
    for one in heard:
        assert one.done.wait(20)
    assert most[0] == 3
    made.close(0)
    made.join(10)
    assert made._cache.sides == []


def test_end_token_ends_and_is_not_told(base: Any, engine: Engine) -> None:
    ids = random_ids(9, 2)
    wanted = alone(base, None, ids, 8)
    heard = Heard()
    run(engine, job_of(heard, ids, ends=frozenset({wanted[5]})))
    assert heard.tokens[0] == wanted[: wanted.index(wanted[5])]
    assert heard.ended == ["stop"]


def test_top_p_keeps_the_tokens_that_transformers_keeps() -> None:
    from transformers import TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9, 0.999):
        logits = torch.randn(1, 1000, generator=generator) * 3
        kept = set(TopPLogitsWarper(share)(None, logits.clone())[0].isfinite().nonzero().flatten().tolist())
        chooser = Chooser(Sampling(top_p=share, seed=1))
        drawn = {chooser.choose(logits[0]).token for _ in range(400)}
        assert drawn <= kept
        assert len(kept) > 20 or drawn == kept or share > 0.9


def test_sampling_has_the_probabilities_of_the_logits() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    chooser = Chooser(Sampling(temperature=0.7, seed=5))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[chooser.choose(logits).token] += 1
    assert torch.allclose(counts / 4000, (logits / 0.7).softmax(0), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-30, 1e-6, 1e-5])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_colder_the_surer_down_to_any_temperature(temperature: float, top_p: float) -> None:
    logits = torch.tensor([-30.0, 20.0, 19.9, 3.0])
    chooser = Chooser(Sampling(temperature=temperature, top_p=top_p, presence_penalty=1e-3, seed=5))
    assert {chooser.choose(logits).token for _ in range(20)} == {1}


def test_penalties_are_those_of_openais_formula() -> None:
    logits = torch.tensor([3.0, 2.9, 2.0, 0.0])
    asked = Sampling(temperature=0, presence_penalty=0.05, frequency_penalty=0.3, logprobs=2)
    chooser, seen, found = Chooser(asked), torch.zeros(4), []
    for _ in range(8):
        scores = logits - 0.3 * seen - 0.05 * (seen > 0)
        expected = int(scores.argmax())
        seen[expected] += 1
        choice = chooser.choose(logits)
        found.append(choice.token == expected)
        assert choice.logprob == pytest.approx(float(logits.log_softmax(0)[expected]), abs=1e-6)
        assert [token for token, _ in choice.top] == [0, 1]
    assert all(found)
