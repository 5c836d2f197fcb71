"""Scores are transformers' log-probabilities, of whatever weights are under the engine."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tiny_models import write_random
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hotloop import LLM, SamplingParams
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


def test_windows_are_scored_one_at_a_time(llm):
    taken = []

    def windows():
        for i in range(3):
            taken.append(i)
            yield WINDOW[i:]

    scores = llm.score(windows())
    next(scores)
    assert taken == [0]


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
