"""Scores are transformers' log-probabilities, of whatever weights are under the engine."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tiny_models import write_random
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hotloop import LLM, SamplingParams
from hotloop.engine.core import ScoreWindows
from hotloop.engine.service import Service
from hotloop.errors import RequestError
from hotloop.evaluate.quality import measure_quality, write_reference
from hotloop.evaluate.reference import ReferenceKey
from hotloop.quant import QTensor, parse_scheme
from hotloop.weights.checkpoint import open_checkpoint

WINDOW = torch.randint(2, 300, (90,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.inference_mode()
def twin_log_probs(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Of every token but the first, float32 [T - 1, V]."""
    return model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(dim=-1)


def assert_scores(llm: LLM, windows: list[list[int]], expected: list[Tensor]) -> None:
    for window, score, log_probs_TV in zip(
        windows, llm.score(windows, full=True), expected, strict=True
    ):
        chosen_T = log_probs_TV.gather(1, torch.tensor(window[1:])[:, None])[:, 0]
        torch.testing.assert_close(score.token_logprobs, chosen_T)
        torch.testing.assert_close(score.log_probs, log_probs_TV)
        assert score.top1.equal(log_probs_TV.argmax(dim=-1))


def test_scores_are_the_log_probabilities_of_transformers(llm, twin):
    windows = [WINDOW, WINDOW[:2], WINDOW[40:70]]
    assert_scores(llm, windows, [twin_log_probs(twin, window) for window in windows])


def test_a_score_has_the_whole_distribution_only_when_asked(llm):
    (score,) = llm.score([WINDOW])
    assert score.log_probs is None
    assert score.token_logprobs.dtype == torch.float32
    assert score.top1.dtype == torch.int64
    assert len(score.token_logprobs) == len(score.top1) == len(WINDOW) - 1


@pytest.mark.parametrize("prefill_chunk", [1, 3, 89])
def test_the_size_of_prefill_chunks_does_not_change_scores(folder, twin, prefill_chunk):
    chunked = LLM(str(folder), dtype="float32", prefill_chunk=prefill_chunk)
    assert_scores(chunked, [WINDOW], [twin_log_probs(twin, WINDOW)])


@pytest.mark.parametrize("rows", [1, 3])
def test_no_more_windows_are_taken_in_advance_than_are_scored_together(folder, rows):
    taken = []

    def windows():
        for i in range(7):
            taken.append(i)
            yield WINDOW[i:30]

    with LLM(str(folder), dtype="float32", max_batch_size=rows) as llm:
        scores = llm.score(windows())
        next(scores)
        assert taken == list(range(rows))
        next(scores)
        assert taken == list(range(rows + 1))


def test_whole_distributions_are_not_kept_for_more_windows_than_memory_is_meant_for(
    folder, monkeypatch
):
    with LLM(str(folder), dtype="float32", max_batch_size=8) as llm:
        per_window = 4 * 30 * llm.describe().vocab_size
        monkeypatch.setattr("hotloop.engine.llm.MAX_FULL_BYTES", 2 * per_window)
        windows = iter([WINDOW[i : i + 30] for i in range(7)])
        next(llm.score(windows, full=True))
        assert len(list(windows)) == 5


def test_a_call_that_goes_on_while_the_engine_is_served_is_refused(folder):
    with LLM(str(folder), dtype="float32") as llm:
        scores = llm.score([WINDOW[:9]] * 2)
        next(scores)
        with Service(llm), pytest.raises(RequestError, match="has a service"):
            next(scores)
        assert len(list(llm.score([WINDOW[:9]]))) == 1


def test_an_error_of_a_window_comes_behind_the_scores_of_those_before(folder):
    with LLM(str(folder), dtype="float32", max_batch_size=4) as llm:
        scores = llm.score([WINDOW[:9], WINDOW[:5], [7], WINDOW[:8]])
        assert [len(next(scores).top1) for _ in range(2)] == [8, 4]
        with pytest.raises(RequestError, match="2 tokens or more, not 1"):
            next(scores)
        assert len(list(llm.score([WINDOW[:9]]))) == 1, "the engine goes on"


def alike() -> list[list[int]]:
    """Windows as tasks have them: few examples, then questions with several answers; and others."""
    shots = WINDOW[:50]
    questions = [[*shots, *WINDOW[i : i + n]] for i, n in ((50, 9), (60, 20), (3, 14))]
    answers = [[*question, answer, 9] for question in questions for answer in (5, 11, 17, 250)]
    others = [WINDOW, WINDOW[:2], WINDOW[3:9], WINDOW[20:33], WINDOW[30:33], WINDOW[5:80]]
    return [*others, *answers, *others[::-1], answers[0], answers[-1]]


def watch_scoring(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Returns a list that will have the tokens of each chunk of each ``ScoreWindows``."""
    run, lengths = llm._runner.run, []

    def watched(command):
        if isinstance(command, ScoreWindows):
            lengths.append([len(chunk.ids) - 1 for chunk in command.chunks])
        return run(command)

    monkeypatch.setattr(llm._runner, "run", watched)
    return lengths


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32"])
def test_with_cpu_kernels_a_window_has_the_same_bits_whatever_it_is_scored_with(
    folder, monkeypatch, quant, rows
):
    windows, kinds = alike(), ("share_prefixes", "full")
    with LLM(str(folder), dtype="bfloat16", quant=quant) as llm:
        alone = {
            kind: [next(llm.score([window], **{kind: True})) for window in windows]
            for kind in kinds
        }
    with LLM(str(folder), dtype="bfloat16", quant=quant, max_batch_size=rows) as llm:
        lengths = watch_scoring(llm, monkeypatch)
        for kind in kinds:
            scores = llm.score(windows, **{kind: True})
            for score, expected in zip(scores, alone[kind], strict=True):
                assert score.token_logprobs.equal(expected.token_logprobs)
                assert score.top1.equal(expected.top1)
                assert score.top1_logprobs.equal(expected.top1_logprobs)
                assert kind != "full" or score.log_probs.equal(expected.log_probs)
            if kind == "share_prefixes":
                assert sum(map(sum, lengths)) < 0.7 * sum(map(len, windows)), "less is computed"
    assert max(map(len, lengths)) == rows


def test_windows_that_share_no_prefix_have_the_chunks_of_prompts(folder, monkeypatch):
    # So the floor of KL, the same predictions in shorter windows, is rounded in another way.
    with LLM(str(folder), dtype="bfloat16", max_batch_size=2) as llm:
        lengths = watch_scoring(llm, monkeypatch)
        for options in ({"full": True}, {}, {"share_prefixes": True}):
            next(llm.score([WINDOW], **options))
    assert lengths == [[89], [89], [64], [25]]


@pytest.mark.parametrize(("dtype", "n_together"), [("bfloat16", 7), ("float32", 1)])
def test_windows_that_share_no_prefix_have_the_same_bits_with_distributions_and_any_seats(
    folder, monkeypatch, dtype, n_together
):
    windows = [WINDOW, *(WINDOW[i : i + 10] for i in range(7))]
    with LLM(str(folder), dtype=dtype) as llm:
        timed = list(llm.score(windows, full=True))
    with LLM(str(folder), dtype=dtype, max_batch_size=8) as llm:
        lengths = watch_scoring(llm, monkeypatch)
        for full in (False, True):
            for score, expected in zip(llm.score(windows, full=full), timed, strict=True):
                assert score.token_logprobs.equal(expected.token_logprobs)
                assert score.top1.equal(expected.top1)
    assert max(map(len, lengths)) == n_together


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_perplexity_of_a_text_has_the_same_bits_alone_and_against_the_reference(
    folder, tmp_path, dtype
):
    windows = [WINDOW[i : i + 80] for i in range(9)]
    with LLM(str(folder), dtype=dtype, max_batch_size=8) as llm:
        alone = measure_quality(llm, windows)
        key = ReferenceKey(
            weights="",
            dtype=dtype,
            vocab_size=llm.describe().vocab_size,
            text_sha256="",
            window=80,
            n_windows=9,
        )
        reference = write_reference(llm, windows, tmp_path / "reference", key)
    with LLM(str(folder), dtype=dtype) as llm:
        timed = measure_quality(llm, windows, reference=reference)
    assert timed.perplexity == alone.perplexity
    assert timed.delta_ln_ppl.samples == (0,) * 9


def test_whole_distributions_of_shared_prefixes_are_refused(llm):
    with pytest.raises(RequestError, match="full and share_prefixes cannot be combined"):
        next(llm.score([WINDOW], full=True, share_prefixes=True))


@pytest.mark.parametrize("rows", [1, 5])
def test_elsewhere_a_window_has_the_same_scores_but_for_rounding(folder, monkeypatch, twin, rows):
    windows = alike()
    with LLM(str(folder), dtype="float32", max_batch_size=rows, max_seq_len=96) as llm:
        lengths = watch_scoring(llm, monkeypatch)
        assert_scores(llm, windows, [twin_log_probs(twin, window) for window in windows])
        for window, score in zip(windows, llm.score(windows, share_prefixes=True), strict=True):
            labels = torch.tensor(window[1:])[:, None]
            expected = twin_log_probs(twin, window).gather(1, labels)[:, 0]
            torch.testing.assert_close(score.token_logprobs, expected)
    assert max(map(len, lengths)) == (1 if rows == 1 else 4)


def test_two_calls_that_overlap_share_nothing_and_a_call_that_is_left_leaves_the_engine_free(
    folder,
):
    windows = alike()
    with LLM(str(folder), dtype="bfloat16", max_batch_size=3) as llm:
        alone = [
            next(llm.score([window], share_prefixes=True)).token_logprobs for window in windows
        ]
        first, second, left = (llm.score(windows, share_prefixes=True) for _ in range(3))
        next(left)
        answer = llm.generate([[7, 8]], max_new_tokens=3, ignore_eos=True)
        for expected in alone:
            assert next(first).token_logprobs.equal(expected)
            assert next(second).token_logprobs.equal(expected)
        left.close()
        assert llm._scheduler.idle
        assert llm.generate([[7, 8]], max_new_tokens=3, ignore_eos=True)[0].token_ids == (
            answer[0].token_ids
        )


def test_scores_do_not_depend_on_what_ran_before(llm):
    (first,) = llm.score([WINDOW[:30]])
    llm.generate([[5] * 60] * 3, max_new_tokens=20, ignore_eos=True)
    (second,) = llm.score([WINDOW[:30]])
    assert first.token_logprobs.equal(second.token_logprobs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", ["int8", "fp8", "int4-g32", "int4-g64-asym"])
@pytest.mark.parametrize("head", ["none", "int8", "int4-g64"])
def test_a_quantized_model_scores_as_transformers_with_its_dequantized_weights(
    tmp_path, quant, head, tied
):
    write_random(tmp_path, tie_word_embeddings=tied, attention_bias=True, embedding_std=0.1)
    twin = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for name, parameter in twin.named_parameters():
        is_head = parameter is twin.lm_head.weight  # and the embedding as well, where it is tied
        if parameter.dim() == 2 and (is_head or "embed" not in name):
            quantized = parse_scheme(head if is_head else quant).quantize(parameter.detach())
            if isinstance(quantized, QTensor):
                parameter.data = quantized.dequantize()
    llm = LLM(str(tmp_path), dtype="float32", quant=quant, head=head)
    assert_scores(llm, [WINDOW], [twin_log_probs(twin, WINDOW)])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("quant", ["none", "int8", "int4-g32", "int4-g64-asym"])
def test_bfloat16_decoding_agrees_with_scoring_up_to_rounding(folder, quant, rows):
    # Few rows go through kernels of their own, many rows through the library's product: where they
    # first differ, each side's token must be among the other's best, of which a random model has
    # three or more within one rounding step.
    llm = LLM(str(folder), dtype="bfloat16", quant=quant, max_batch_size=rows)
    prompts = [WINDOW[i : i + 12] for i in range(0, 48, 12)]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=4)
    for g in llm.generate(prompts, params):
        (score,) = llm.score([[*g.prompt_ids, *g.token_ids]], full=True)
        scored_TV = score.log_probs[len(g.prompt_ids) - 1 :]
        for decoded, scored_V in zip(g.logprobs, scored_TV, strict=True):
            assert decoded.logprob == pytest.approx(scored_V[decoded.token_id].item(), abs=0.15)
            best = int(scored_V.argmax())
            if decoded.token_id != best:
                assert decoded.token_id in scored_V.topk(4).indices
                assert dict(decoded.top)[best] == pytest.approx(decoded.logprob, abs=0.05)
                break


@pytest.mark.slow
def test_a_real_model_gives_the_log_probabilities_of_transformers_over_512_tokens_of_text(smollm2):
    path = Path(smollm2)
    llm = LLM(smollm2, dtype="float32", max_seq_len=513)
    ids = llm.encode("\n".join(topics.values())[:10_000])[:513]

    checkpoint = open_checkpoint(path)
    keys = {k: v for k, v in checkpoint.config.items() if k not in ("architectures", "model_type")}
    state = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    checkpoint.close()
    twin = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig(**keys), state_dict=state, dtype=torch.float32
    ).eval()
    assert {name for name, _ in twin.named_parameters()} == state.keys()
    for name, parameter in twin.named_parameters():
        assert parameter.equal(state[name])
    assert_scores(llm, [ids], [twin_log_probs(twin, ids)])


@pytest.mark.slow
def test_blocks_as_they_are_stored_are_as_near_their_exact_worth_as_dequantized_ones(smollm2):
    def log_probs(quant: str, dtype: str) -> Tensor:
        with LLM(smollm2, quant=quant, dtype=dtype, device="cpu", max_seq_len=160) as llm:
            ids = llm.encode("\n".join(topics.values())[:2_000])[:128]
            (score,) = llm.score([ids], full=True)
        assert score.log_probs is not None
        return score.log_probs

    def divergence(quant: str, dtype: str) -> float:
        return float((exact.exp() * (exact - log_probs(quant, dtype))).sum(-1).mean())

    exact = log_probs("none", "float32")
    torch.testing.assert_close(log_probs("auto", "float32"), exact)
    assert divergence("auto", "float32") < 1e-4, "nothing is rounded a second time"
    # Activations in bfloat16 are: their rounding outweighs that of the weights, which is none.
    assert divergence("auto", "bfloat16") < 1.15 * divergence("none", "bfloat16")
