from dataclasses import replace

import pytest

from hotloop.bench.measure import bytes_read_per_step, measure_speed
from hotloop.bench.record import Workload
from hotloop.errors import ConfigError, HotloopError
from hotloop.memory_meter import MemoryMeter
from hotloop.types import EngineConfig, EngineDescription, Generation, Speculation, Timing

MIB = 2**20


class FakeEngine:
    """Answers with the timings it is given, one list a call; the first call is the warm-up.

    ``drafting`` is what drafting did, if it drafts, one for all requests of a call.
    """

    def __init__(
        self, calls, *, drafting=None, max_batch_size=1, max_seq_len=4096, ballast_bytes=0
    ):
        self.calls, self.drafting, self.seen = list(calls), drafting, []
        self.ballast_bytes = ballast_bytes
        self.description = EngineDescription(
            config=EngineConfig(model="fake", max_batch_size=max_batch_size, draft="ngram"),
            family="fake",
            device="cpu",
            device_name="fake",
            dtype="float32",
            vocab_size=50,
            max_seq_len=max_seq_len,
            n_params=1,
            weight_bytes=2000,
            weight_bytes_per_step=1000,
            kv_bytes_per_token=10,
        )

    def generate(self, prompts, params):
        self.seen.append((prompts, params))
        ballast = bytearray(b"x") * self.ballast_bytes
        answers = [
            Generation(
                prompt_ids=tuple(prompt),
                token_ids=(0,) * timing.n_tokens,
                text="",
                finish_reason="length",
                timing=timing,
                speculation=self.drafting and self.drafting[len(self.seen) - 1],
            )
            for prompt, timing in zip(prompts, self.calls[len(self.seen) - 1], strict=True)
        ]
        del ballast
        return answers

    def score(self, windows, *, full=False):
        raise NotImplementedError

    def encode(self, text):
        raise NotImplementedError

    def describe(self):
        return self.description

    def meter(self):
        return MemoryMeter("cpu")

    def close(self):
        pass


def timing(tpot_s, *, n=11, ttft_s=0.5):
    return Timing(n_tokens=n, ttft_s=ttft_s, e2e_s=ttft_s + (n - 1) * tpot_s)


def measure(engine, workload, **options):
    options = {"read_bytes_per_s": None, "datasheet_bytes_per_s": None} | options
    return measure_speed(engine, workload, **options)


WARM_UP = [timing(99.0)]


def test_figures_follow_their_definitions_and_the_warm_up_is_in_none():
    tpots = [0.100, 0.101, 0.099, 0.100, 0.102]
    engine = FakeEngine([WARM_UP, *([timing(t)] for t in tpots)])
    speed = measure(engine, Workload(prompt_tokens=5, new_tokens=11))
    assert speed.tpot_s.samples == pytest.approx(tpots)
    assert speed.decode_tok_s.samples == pytest.approx([1 / t for t in tpots])
    assert speed.e2e_tok_s.samples == pytest.approx([11 / (0.5 + 10 * t) for t in tpots])
    assert speed.ttft_s.samples == pytest.approx([0.5] * 5)
    assert speed.aggregate_tok_s == speed.e2e_tok_s
    assert speed.decode_tok_s.n == 5
    assert speed.instability is None
    assert (speed.mbu, speed.mbu_datasheet) == (None, None)


def test_a_batchs_figures_are_means_over_requests_and_its_aggregate_is_of_all():
    calls = [[timing(0.1), timing(0.2, ttft_s=1.5)]] * 3
    engine = FakeEngine(calls, max_batch_size=2)
    workload = Workload(prompt_tokens=5, new_tokens=11, batch=2, repeats=2)
    speed = measure(engine, workload)
    assert speed.tpot_s.mean == pytest.approx(0.15)
    assert speed.decode_tok_s.mean == pytest.approx((10 + 5) / 2)
    assert speed.ttft_s.mean == pytest.approx(1.0)
    assert speed.e2e_tok_s.mean == pytest.approx((11 / 1.5 + 11 / 3.5) / 2)
    assert speed.aggregate_tok_s.mean == pytest.approx(22 / 3.5)
    assert speed.decode_tok_s.n == 2, "a repeat is the independent sample, not a request"


def test_every_prompt_is_new_random_seeded_and_within_the_vocabulary():
    calls = [[timing(0.1)] * 3] * 6
    workload = Workload(prompt_tokens=40, new_tokens=11, batch=3)
    first, again, other = (FakeEngine(calls, max_batch_size=3) for _ in range(3))
    measure(first, workload)
    measure(again, workload)
    measure(other, workload.model_copy(update={"seed": 1}))
    prompts = [tuple(prompt) for batch, _ in first.seen for prompt in batch]
    assert len(prompts) == len(set(prompts)) == 6 * 3
    assert {len(prompt) for prompt in prompts} == {40}
    assert {token for prompt in prompts for token in prompt} == set(range(50))
    assert [batch for batch, _ in again.seen] == [batch for batch, _ in first.seen]
    assert [batch for batch, _ in other.seen] != [batch for batch, _ in first.seen]


def test_timed_runs_are_greedy_and_do_not_stop_early():
    engine = FakeEngine([WARM_UP, [timing(0.1)]])
    measure(engine, Workload(prompt_tokens=5, new_tokens=11, repeats=1))
    for _, params in engine.seen:
        assert params.greedy
        assert params.ignore_eos
        assert params.max_new_tokens == 11


def test_progress_is_told_after_each_timed_repeat():
    engine = FakeEngine([WARM_UP, [timing(0.1)], [timing(0.2)]])
    told = []
    measure(
        engine,
        Workload(prompt_tokens=5, new_tokens=11, repeats=2),
        on_repeat=lambda *progress: told.append(progress),
    )
    assert told == [(1, 2, pytest.approx(10)), (2, 2, pytest.approx(5))]


@pytest.mark.parametrize(("batch", "prompt_tokens", "new_tokens"), [(1, 5, 2), (4, 100, 33)])
def test_bytes_read_are_those_of_each_timed_step_added_up(batch, prompt_tokens, new_tokens):
    description = FakeEngine([]).describe()
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    steps = [1000 + batch * 10 * (prompt_tokens + i) for i in range(1, new_tokens)]
    mean = sum(steps) / len(steps)
    assert bytes_read_per_step(description, workload) == pytest.approx(mean)


def test_mbu_is_bytes_over_time_over_each_bandwidth():
    engine = FakeEngine([WARM_UP, [timing(0.1)], [timing(0.1)]])
    workload = Workload(prompt_tokens=5, new_tokens=11, repeats=2)
    speed = measure(engine, workload, read_bytes_per_s=20_000, datasheet_bytes_per_s=40_000)
    read = 1000 + 10 * (5 + 11 / 2)
    assert speed.mbu.mean == pytest.approx(read / 0.1 / 20_000)
    assert speed.mbu_datasheet.mean == pytest.approx(read / 0.1 / 40_000)


def test_what_drafting_did_is_that_of_all_requests_of_all_repeats_but_the_warm_up():
    drafting = [
        Speculation(n_steps=99, n_tokens=99, proposed=(99, 99, 99), accepted=(0, 0, 0)),
        Speculation(
            n_steps=5,
            n_plain_steps=1,
            n_tokens=10,
            proposed=(4, 2),
            accepted=(3, 1),
            draft_s=1.0,
            verify_s=3.0,
        ),
        Speculation(
            n_steps=10, n_plain_steps=5, n_tokens=10, proposed=(4,), accepted=(1,), verify_s=4.0
        ),
    ]
    calls = [[timing(0.1), timing(0.1)]] * 3
    engine = FakeEngine(calls, drafting=drafting, max_batch_size=2)
    workload = Workload(prompt_tokens=5, new_tokens=11, batch=2, repeats=2)
    seen = measure(engine, workload).speculation
    assert seen.draft == "ngram-4"
    assert (seen.proposed, seen.accepted) == ((16, 4), (8, 2))
    assert seen.acceptance == (0.5, 0.5)
    assert seen.tokens_per_step.samples == (2.0, 1.0)
    assert (seen.draft_share, seen.verify_share) == (2 / 16, 14 / 16)
    assert seen.off_share == 12 / 30


def test_instability_by_varying_acceptance_is_explained():
    drafting = [Speculation(n_steps=steps, n_tokens=12) for steps in (6, 6, 12, 6, 4, 12)]
    calls = [WARM_UP, *([timing(t)] for t in (0.1, 0.2, 0.1, 0.07, 0.2))]
    engine = FakeEngine(calls, drafting=drafting)
    speed = measure(engine, Workload(prompt_tokens=5, new_tokens=11))
    assert "acceptance varies by text, from 1.00 to 3.00 tokens per step" in speed.instability
    assumed = FakeEngine(calls, drafting=drafting)
    config = replace(assumed.description.config, assume_acceptance=0.5)
    assumed.description = replace(assumed.description, config=config)
    speed = measure(assumed, Workload(prompt_tokens=5, new_tokens=11))
    assert "accepted at random, from 1.00 to 3.00 tokens per step" in speed.instability


def test_drafting_that_nothing_came_of_and_that_no_clock_saw_is_recorded_as_such():
    drafting = [Speculation(n_steps=10, n_plain_steps=10, n_tokens=10)] * 2
    engine = FakeEngine([WARM_UP, [timing(0.1)]], drafting=drafting)
    seen = measure(engine, Workload(prompt_tokens=5, new_tokens=11, repeats=1)).speculation
    assert (seen.acceptance, seen.off_share, seen.tokens_per_step.mean) == ((), 1.0, 1.0)
    assert (seen.draft_share, seen.verify_share) == (None, None)


def test_a_step_with_drafts_is_no_token_and_has_no_mbu():
    calls, bandwidths = (
        [WARM_UP, [timing(0.1)]],
        {"read_bytes_per_s": 1, "datasheet_bytes_per_s": 1},
    )
    workload = Workload(prompt_tokens=5, new_tokens=11, repeats=1)
    drafting = [Speculation(n_steps=5, n_tokens=10)] * 2
    speed = measure(FakeEngine(calls, drafting=drafting), workload, **bandwidths)
    assert (speed.mbu, speed.mbu_datasheet) == (None, None)
    plain = measure(FakeEngine(calls), workload, **bandwidths)
    assert plain.speculation is None
    assert plain.mbu is not None


def test_peak_memory_of_generating_is_seen():
    workload = Workload(prompt_tokens=5, new_tokens=11, repeats=1)
    small = measure(FakeEngine([WARM_UP, [timing(0.1)]]), workload)
    large = measure(FakeEngine([WARM_UP, [timing(0.1)]], ballast_bytes=100 * MIB), workload)
    assert large.peak_bytes - small.peak_bytes == pytest.approx(100 * MIB, rel=0.1)


def test_repeats_that_disagree_say_why_and_keep_their_figures():
    tpots = [0.15, 0.1, 0.1, 0.1, 0.1]
    engine = FakeEngine([WARM_UP, *([timing(t)] for t in tpots)])
    speed = measure(engine, Workload(prompt_tokens=5, new_tokens=11))
    assert "repeat 1 took 50% longer" in speed.instability
    assert speed.tpot_s.samples == pytest.approx(tpots)


def test_an_answer_that_arrived_all_at_once_is_not_timed():
    engine = FakeEngine([WARM_UP, [timing(0.0)]])
    with pytest.raises(HotloopError, match="all 11 tokens of an answer arrived together"):
        measure(engine, Workload(prompt_tokens=5, new_tokens=11))


def test_an_engine_that_generates_too_few_tokens_is_not_timed():
    engine = FakeEngine([WARM_UP, [timing(0.1, n=7)]])
    with pytest.raises(HotloopError, match=r"\[7\] tokens instead of \[11\]"):
        measure(engine, Workload(prompt_tokens=5, new_tokens=11))


@pytest.mark.parametrize(
    ("workload", "problem"),
    [
        ({"batch": 2}, "max_batch_size=1"),
        ({"prompt_tokens": 90}, "max_seq_len=100"),
    ],
)
def test_a_workload_that_cannot_be_timed_is_refused_before_anything_runs(workload, problem):
    engine = FakeEngine([], max_seq_len=100)
    with pytest.raises(ConfigError, match=problem):
        measure(engine, Workload(**{"prompt_tokens": 5, "new_tokens": 11} | workload))
    assert engine.seen == []
