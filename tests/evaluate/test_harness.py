"""lm-eval's Python interface: the same numbers as its own Hugging Face backend, item by item.

lm-eval brings two dozen packages, among them pandas and pyarrow, so that it is no part of the
development environment: pip install 'hotloop[eval]' runs these tests.
"""

import json

import pytest
import torch

from hotloop import LLM
from hotloop.errors import ConfigError, RequestError, UnsupportedError
from hotloop.evaluate import harness
from hotloop.evaluate.tasks import load_task
from hotloop.models.families.llama import FAMILY


def test_without_lm_eval_its_tasks_are_refused_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hotloop\[eval\]'"):
        load_task("lm-eval:arc_easy", 10)


def test_a_task_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="lm-eval:NAME"):
        load_task("lm-eval", 10)


def test_the_first_filter_of_an_item_counts_and_items_stand_in_order():
    def sample(doc_id, value, metric="exact_match"):
        return {"doc_id": doc_id, metric: value, "metrics": [metric]}

    samples = {"t": [sample(1, 0.0), sample(0, 1.0), sample(1, 1.0), sample(0, 0.0)]}
    assert harness.right_answers("t", samples) == [True, False]
    with pytest.raises(ConfigError, match="lm-eval:t does not say"):
        harness.right_answers("t", {"t": [sample(0, 0.4, "bleu")]})


TEXT = "It is a long way from here to the sea, and the road is not an easy one to walk. "
PAIRS = [
    ("The sea is", " blue"),
    ("The sea is ", "blue"),
    ("The sea is", " a very long way from here"),
    ("", "The sea"),
    (TEXT * 4, " done"),
    ("one two", " three"),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """lm-eval's model of Hugging Face and ours, of the same random weights."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'hotloop[eval]'")
    pytest.importorskip("accelerate", reason="lm-eval's own backend needs accelerate")
    from lm_eval.models.huggingface import HFLM

    from hotloop.evaluate.harness_model import EngineLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(folder)
    save_random(folder, tokenizer)
    theirs = HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, max_length=95
    )
    with LLM(str(folder), dtype="float32", device="cpu", max_seq_len=96) as llm:
        yield theirs, EngineLM(llm)


def save_random(folder, vocab_size):
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {k: v for k, v in FAMILY.tiny.items() if k not in ("model_type", "architectures")}
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**keys | sizes))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = (1.0, 0.3) if "norm" in name else (0.0, parameter.shape[-1] ** -0.5)
            parameter.normal_(mean, std, generator=noise)
    model.save_pretrained(folder)


def write_tokenizer(folder) -> int:
    """A tokenizer of bytes and some words, with BOS that it does not add. Returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["Ġthe", "Ġsea", "Ġis", "Ġblue", "Ġlong", "Ġway", "Th", "he", "Ġt", "Ġs", "Ġb"]
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, "<s>", "</s>"]
    merges = [("Ġ", "t"), ("Ġ", "s"), ("Ġ", "b"), ("T", "h"), ("h", "e"), ("Ġt", "he")]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
        )
    )
    return len(vocabulary)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


def test_log_likelihoods_are_those_of_lm_evals_own_backend(both):
    asked = instances("loglikelihood", PAIRS)
    theirs, ours = (lm.loglikelihood(asked, disable_tqdm=True) for lm in both)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        torch.tensor([p for p, _ in ours]), torch.tensor([p for p, _ in theirs])
    )


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_backend(both):
    asked = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 7,), ("The",)])
    theirs, ours = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in both)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs))


def test_generated_answers_are_those_of_lm_evals_own_backend(both):
    options = [
        {"until": [], "max_gen_toks": 12},
        {"until": ["e"], "max_gen_toks": 20},
        {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
    ]
    asked = instances("generate_until", [(p, o) for o in options for p in ("The sea is", TEXT * 5)])
    theirs, ours = (lm.generate_until(asked, disable_tqdm=True) for lm in both)
    assert ours == theirs


def test_the_prefix_is_bos_and_not_the_end_of_sequence(both):
    theirs, ours = both
    assert ours.prefix_token_id == theirs.prefix_token_id != ours.eot_token_id


def test_more_new_tokens_than_the_context_holds_are_refused(both):
    with pytest.raises(RequestError, match="asks for 500 new tokens"):
        both[1].generate_until(instances("generate_until", [("a", {"max_gen_toks": 500})]))
