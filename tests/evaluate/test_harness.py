"""lm-eval's Python interface: the same numbers as its own Hugging Face backend, item by item.

lm-eval brings two dozen packages, among them pandas and pyarrow, so that it is no part of the
development environment: pip install 'hotloop[eval]' runs these tests.
"""

import json
from pathlib import Path

import pytest
import torch

from hotloop import LLM
from hotloop.errors import ConfigError, ModelNotFoundError, RequestError, UnsupportedError
from hotloop.evaluate import harness
from hotloop.evaluate.tasks import load_task
from hotloop.models.families.llama import FAMILY
from hotloop.types import EngineConfig
from hotloop.weights.hub import resolve_model


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
    with pytest.raises(ConfigError, match="lm-eval:t cannot be compared"):
        harness.right_answers("t", {"t": [sample(0, 0.4, "bleu")]})


@pytest.fixture
def as_installed(monkeypatch):
    """As if lm-eval were here: what a task is can be known without it."""
    monkeypatch.setattr(harness, "find_spec", lambda _: True)
    monkeypatch.setattr(harness, "version", lambda _: "1")


@pytest.mark.usefixtures("as_installed")
def test_a_tasks_file_and_its_data_are_in_its_hash(tmp_path):
    data, task = tmp_path / "d.jsonl", tmp_path / "mine.yaml"
    data.write_text("{}")

    def write(more=""):
        task.write_text(
            f"task: t\ndataset_kwargs: {{data_files: {{test: [{data}]}}}}\n"
            f"process_docs: !function mine.prepare\n{more}"
        )
        return load_task(f"lm-eval:{task}", 10)

    hashes = {write().sha256, write("doc_to_text: q\n").sha256}
    data.write_text('{"a": 1}')
    hashes.add(write().sha256)
    assert len(hashes) == 3
    assert write().sha256 in hashes
    assert write().name == "mine"
    task.write_text("a: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml: is not YAML"):
        load_task(f"lm-eval:{task}", 10)
    with pytest.raises(ConfigError, match="no such file"):
        load_task(f"lm-eval:{tmp_path / 'gone.yaml'}", 10)


def test_the_chance_of_guessing_is_one_in_so_many_choices():
    def sample(doc_id, n):
        return {"doc_id": doc_id, "arguments": [("", "")] * n}

    samples = {"pick": [sample(0, 2), sample(1, 4), sample(1, 4)], "write": [sample(0, 1)]}
    configs = {
        "pick": {"output_type": "multiple_choice"},
        "write": {"output_type": "generate_until"},
    }
    assert harness.chance_of(samples, configs) == pytest.approx((1 / 2 + 1 / 4) / 3)


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


FACTS = Path(__file__).parents[2] / "recipes/facts.jsonl"


@pytest.fixture(scope="module")
def both_of_smollm2(tmp_path_factory):
    """lm-eval's model of Hugging Face and ours, of SmolLM2's weights; ours scores in batches."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'hotloop[eval]'")
    pytest.importorskip("accelerate", reason="lm-eval's own backend needs accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from hotloop.baselines.transformers import ENGINE
    from hotloop.evaluate.harness_model import EngineLM

    try:
        resolve_model("smollm2-135m")
    except ModelNotFoundError:
        pytest.skip("smollm2-135m is not here: hotloop pull smollm2-135m")
    folder = tmp_path_factory.mktemp("tokenizer")
    options = {"model": "smollm2-135m", "dtype": "float32", "device": "cpu", "max_seq_len": 128}
    hugging_face = ENGINE.create(EngineConfig(engine="transformers", **options))
    with LLM(quant="none", max_batch_size=4, **options) as llm:
        llm.tokenizer.save(folder)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
        )
        theirs = HFLM(
            pretrained=hugging_face._model, tokenizer=tokenizer, batch_size=1, max_length=127
        )
        yield theirs, EngineLM(llm)


# Thirty layers round differently, and a likelihood is a sum over tokens.
ROUNDING = {"rtol": 1e-5, "atol": 1e-3}


def facts(n):
    """Questions of four choices; for every third the answer to the next question is right."""
    items = [json.loads(line) for line in FACTS.read_text().splitlines()]
    step = len(items) // n
    for i in range(n):
        choices = [items[(i * step + k) % len(items)]["continuation"] for k in range(4)]
        gold = i % 4
        right = 1 if i % 3 == 0 else 0
        choices[right], choices[gold] = choices[gold], choices[right]
        yield {"q": items[i * step]["context"], "choices": choices, "gold": gold}


def resps(samples):
    """The log-likelihoods of each item, in order."""
    return [
        torch.tensor([float(p) for p, _ in sample["filtered_resps"]])
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood"])
def test_smollm2_answers_as_in_lm_evals_own_backend_item_by_item_but_for_ties(
    both_of_smollm2, kind, tmp_path
):
    from lm_eval import simple_evaluate

    task, n = local_task(tmp_path, kind, facts(24)), 24
    theirs, ours = (
        simple_evaluate(model=lm, tasks=[task], log_samples=True, bootstrap_iters=0)
        for lm in both_of_smollm2
    )
    name = f"local_{kind}"
    right = [harness.right_answers(name, each["samples"]) for each in (theirs, ours)]
    assert 0 < sum(right[0]) < n, "some are right and some are wrong"
    likelihoods = [resps(each["samples"][name]) for each in (theirs, ours)]
    assert len(likelihoods[0]) == n
    for expected, found, was, is_now in zip(*likelihoods, *right, strict=True):
        torch.testing.assert_close(found, expected, **ROUNDING)
        best = expected.sort(descending=True).values
        is_tie = kind == "multiple_choice" and best[0] - best[1] < 2e-3
        assert was == is_now or is_tie


@pytest.mark.slow
def test_smollm2_scores_documents_and_writes_answers_as_in_lm_evals_own_backend(both_of_smollm2):
    documents = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 9,)])
    expected, found = (lm.loglikelihood_rolling(documents, True) for lm in both_of_smollm2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **ROUNDING)
    options = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", [(item["q"], options) for item in facts(4)])
    expected, found = (lm.generate_until(asked, True) for lm in both_of_smollm2)
    assert found == expected
    assert any(expected)


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
    with pytest.raises(RequestError, match="requests 500 new tokens"):
        both[1].generate_until(instances("generate_until", [("a", {"max_gen_toks": 500})]))


LOCAL = {
    "multiple_choice": (
        {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
        [{"metric": "acc"}],
    ),
    "loglikelihood": (
        {"doc_to_text": "{{q}}", "doc_to_target": "{{' ' + choices[gold]}}"},
        [{"metric": "acc"}, {"metric": "perplexity"}],
    ),
    "generate_until": (
        {
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
        },
        [{"metric": "exact_match"}],
    ),
    "loglikelihood_rolling": (
        {"doc_to_text": "", "doc_to_target": "{{q}}"},
        [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    ),
}


ITEMS = [
    {"q": f"The {a} is", "choices": [a, "blue", "long"], "gold": i % 3}
    for i, a in enumerate(("sea", "way", "road", "bee", "sky", "tea"))
]


def local_task(folder, kind, items=ITEMS) -> str:
    """A task of one kind in a file, whose data is a file, too: nothing is fetched."""
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    fields, metrics = LOCAL[kind]
    task = {
        "task": f"local_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": kind,
        "metric_list": metrics,
        **fields,
    }
    (folder / f"{kind}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return str(folder / f"{kind}.yaml")


@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_task_of_each_kind_is_as_lm_evals_own_backend_has_it(both, kind, tmp_path):
    from lm_eval import simple_evaluate

    task = local_task(tmp_path, kind)
    theirs, ours = (
        simple_evaluate(model=lm, tasks=[task], log_samples=True, bootstrap_iters=0) for lm in both
    )
    name = f"local_{kind}"
    assert len(ours["samples"][name]) == 6
    for metric, value in theirs["results"][name].items():
        if isinstance(value, float):
            assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4)
    if kind == "loglikelihood_rolling":
        with pytest.raises(ConfigError, match="cannot be compared item by item"):
            harness.right_answers(name, ours["samples"])
        return
    right = [harness.right_answers(name, each["samples"]) for each in (theirs, ours)]
    assert right[0] == right[1]
    loaded = load_task(f"lm-eval:{task}", 4)
    assert loaded.answer(both[1].engine, lambda *_: None) == right[1][:4]
    assert loaded.chance == pytest.approx(1 / 3 if kind == "multiple_choice" else 0)


def test_a_task_that_lm_eval_does_not_have_is_refused(both):
    with pytest.raises(ConfigError, match="lm-eval has no task 'no_such'"):
        load_task("lm-eval:no_such", 4).answer(both[1].engine, lambda *_: None)
