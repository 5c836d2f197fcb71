"""Tasks from files: schema, scoring through an engine, and the verdict on the answers."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hotloop.errors import CheckpointError, ConfigError, HotloopError, UnknownNameError
from hotloop.evaluate.jsonl import Cloze, ItemTask
from hotloop.evaluate.likelihood import TextEncoder, rolling_windows, score_windows
from hotloop.evaluate.tasks import (
    AnswersKey,
    answer_tasks,
    compare_tasks,
    load_task,
    load_tasks,
    read_answers,
    resolve_task,
    without_folder,
    write_answers,
)
from hotloop.types import EngineConfig, EngineDescription, Score

V = 128
BOS, EOS = 1, 2


class LetterEngine:
    """One token a letter; ``likes`` are pairs of letters of which the second follows the first."""

    def __init__(self, likes="", *, adds_bos=False, bos_id=BOS, max_seq_len=64):
        logits = torch.zeros(V, V)
        for first, second in likes.split():
            logits[ord(first), ord(second)] = 4.0
        self.log_probs_VV = logits.log_softmax(-1)
        self.calls = []
        self.described = EngineDescription(
            config=EngineConfig(model="letters"),
            family="letters",
            device="cpu",
            device_name="fake",
            dtype="float32",
            vocab_size=V,
            max_seq_len=max_seq_len,
            n_params=1,
            weight_bytes=0,
            weight_bytes_per_step=0,
            kv_bytes_per_token=0,
            bos_id=bos_id,
            adds_bos=adds_bos,
            eos_ids=(EOS,),
        )

    def encode(self, text):
        return list(map(ord, text))

    def describe(self):
        return self.described

    def score(self, windows, *, full=False, share_prefixes=False):  # noqa: ARG002
        self.calls.append([])
        for window in windows:
            self.calls[-1].append(tuple(window))
            given, labels = torch.tensor(window[:-1]), torch.tensor(window[1:])
            log_probs = self.log_probs_VV[given]
            yield Score(
                token_logprobs=log_probs.gather(1, labels[:, None]).squeeze(1),
                top1=log_probs.argmax(-1),
                log_probs=log_probs if full else None,
            )


def text_of(window):
    return "".join(map(chr, window))


@pytest.fixture
def write(tmp_path):
    def items(*lines, name="task"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return items


CHOICE = {"query": "Question: a", "choices": ["x", "y"], "gold": 1}
CLOZE = {"context": "a", "continuation": "b"}
CONTEXTS = {"context_options": ["a p", "a q"], "continuation": "z", "gold": 0}


def answers(engine, path, n_items=None):
    return load_task(path, n_items).answer(engine, lambda *_: None)


def test_a_choice_is_right_if_it_is_the_likeliest_after_the_query(write):
    path = write(CHOICE, CHOICE | {"gold": 0})
    engine = LetterEngine()
    engine.log_probs_VV[ord(" "), ord("y")] += 1
    assert answers(engine, path) == [True, False]
    (windows,) = engine.calls
    assert list(map(text_of, windows[:2])) == [
        "Question: a\nAnswer: x",
        "Question: a\nAnswer: y",
    ], "all choices are scored in one call"


def test_a_continuation_is_chosen_for_its_likeliest_context(write):
    path = write(CONTEXTS, CONTEXTS | {"gold": 1})
    engine = LetterEngine()
    engine.log_probs_VV[ord(" "), ord("z")] += 1
    assert answers(engine, path) == [True, False], "of equals the first is the answer"


def test_a_cloze_is_right_if_greedy_decoding_would_write_it(write):
    path = write(CLOZE | {"delimiter": ""}, CLOZE | {"continuation": "bc", "delimiter": ""})
    assert answers(LetterEngine(likes="ab bd"), path) == [True, False]


def test_chance_is_that_of_guessing(write):
    four = CHOICE | {"choices": ["a", "b", "c", "d"]}
    assert load_task(write(CHOICE, four), None).chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert load_task(write(CLOZE), None).chance == 0


def test_the_first_items_are_taken_and_the_hash_is_theirs(write):
    whole, first = (load_task(write(CLOZE, CLOZE | {"context": "q"}), n) for n in (None, 1))
    assert (len(whole), len(first)) == (2, 1)
    assert first.sha256 == load_task(write(CLOZE, name="other"), None).sha256 != whole.sha256


def test_an_item_that_a_file_repeats_is_one_item(write):
    repeated = load_task(write(CLOZE, CLOZE, CLOZE | {"context": "q"}, CLOZE), 2)
    assert [item.context for item in repeated.items] == ["a", "q"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"query": "a"}', "line 2: an item must have query, choices and gold; or"),
        ('{"query": "a", "choices": ["x"], "gold": 0}', "line 2: choices"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 2}', "gold must be 0 to 1"),
        ('{"query": "a", "choices": ["x", "y"], "gold": true}', "line 2: gold"),
        ('{"context": "a", "continuation": ""}', "line 2: continuation"),
        ('{"context": "a", "continuation": "b", "label": 1}', "label"),
        ("not json", "line 2"),
        ("[1]", "line 2"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 1}', "several forms"),
    ],
)
def test_a_file_of_another_schema_is_refused_with_its_line(write, line, problem):
    path = write(CLOZE)
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=problem):
        load_task(path, None)


def test_an_empty_file_an_unknown_task_and_one_name_twice_are_refused(write, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no items"):
        load_task(str(tmp_path / "empty.jsonl"), None)
    with pytest.raises(UnknownNameError, match="topic"):
        load_task("topic", None)
    with pytest.raises(ConfigError, match="needs a file"):
        load_task("jsonl", None)
    with pytest.raises(ConfigError, match="'task' and 'copy' have the same items"):
        load_tasks([write(CLOZE), write(CLOZE, name="copy")], None)
    with pytest.raises(ConfigError, match="two tasks have the name 'task'"):
        load_tasks([write(CLOZE), write(CLOZE)], None)


def test_paths_of_tasks_are_relative_to_their_recipe(tmp_path):
    assert resolve_task("arc.jsonl", tmp_path) == str(tmp_path / "arc.jsonl")
    assert resolve_task("jsonl:arc.txt", tmp_path) == f"jsonl:{tmp_path / 'arc.txt'}"
    assert resolve_task("topics", tmp_path) == "topics"
    assert resolve_task("lm-eval:arc_easy", tmp_path) == "lm-eval:arc_easy"
    assert resolve_task("lm-eval:my/arc.yaml", tmp_path) == f"lm-eval:{tmp_path / 'my/arc.yaml'}"


@pytest.mark.parametrize(
    "task", ["arc.jsonl", "jsonl:arc.txt", "topics", "lm-eval:arc_easy", "lm-eval:arc.yaml"]
)
def test_a_record_names_the_file_of_a_task_and_not_its_folder(task, tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert without_folder(resolve_task(task, folder)) == task


def test_topics_are_a_task_that_every_machine_has():
    task = load_task("topics", 50)
    assert len(task) == 50
    assert all(item.continuation in item.context for item in task.items)
    assert len(load_task("topics", None)) > 500
    with pytest.raises(ConfigError, match="no argument"):
        load_task("topics:x", 5)


def test_progress_is_told_over_all_tasks(write):
    tasks = load_tasks([write(CLOZE, CLOZE | {"context": "q"}), write(CHOICE, name="other")], None)
    told = []
    answer_tasks(LetterEngine(), tasks, lambda *progress: told.append(progress))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_bos_comes_first_where_the_models_own_tokenizer_puts_it():
    plain, with_bos = (TextEncoder(LetterEngine(adds_bos=b)) for b in (False, True))
    assert plain.encode_pair("ab", "c").ids == (*map(ord, "abc"),)
    assert with_bos.encode_pair("ab", "c").ids == (BOS, *map(ord, "abc"))


def test_a_continuation_without_context_follows_bos_or_the_end_of_sequence():
    assert TextEncoder(LetterEngine()).encode_pair("", "cd").ids == (BOS, ord("c"), ord("d"))
    without = TextEncoder(LetterEngine(bos_id=None))
    assert without.encode_pair("", "cd").ids == (EOS, ord("c"), ord("d"))
    begins_with_it = TextEncoder(LetterEngine()).encode_pair("", chr(BOS) + "c")
    assert (begins_with_it.ids, begins_with_it.n_scored) == ((BOS, ord("c")), 1)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
    window = TextEncoder(LetterEngine()).encode_pair("ab ", "c")
    assert (text_of(window.ids), window.n_scored) == ("ab c", 2)


def test_long_windows_are_cut_from_the_left_and_counted():
    encoder = TextEncoder(LetterEngine(max_seq_len=4))
    assert text_of(encoder.encode_pair("abcdef", "gh").ids) == "efgh"
    assert encoder.n_truncated == 1
    with pytest.raises(
        ConfigError, match="continuation of 4 tokens does not fit in the context of 4"
    ):
        encoder.encode_pair("a", "bcde")


def test_a_likelihood_is_the_sum_over_the_continuation_alone():
    engine = LetterEngine(likes="bc cd")
    (one,) = score_windows(engine, [TextEncoder(engine).encode_pair("ab", "cd")])
    expected = engine.log_probs_VV[ord("b"), ord("c")] + engine.log_probs_VV[ord("c"), ord("d")]
    assert one.logprob == pytest.approx(expected.item())
    assert (one.is_greedy, one.n_tokens) == (True, 2)


def test_a_likelihood_that_is_no_number_is_an_error():
    engine = LetterEngine()
    engine.log_probs_VV[:] = math.nan
    with pytest.raises(HotloopError, match="infinite or not a number"):
        list(score_windows(engine, [TextEncoder(engine).encode_pair("a", "b")]))


def test_rolling_windows_score_each_token_once_and_overlap_as_little_as_they_can():
    windows = rolling_windows(list(range(10, 21)), prefix_id=0, size=5)
    assert [w.ids for w in windows] == [
        (0, 10, 11, 12, 13),
        (13, 14, 15, 16, 17),
        (16, 17, 18, 19, 20),
    ]
    assert [w.n_scored for w in windows] == [4, 4, 3]
    (short,) = rolling_windows([10, 11], prefix_id=0, size=5)
    assert (short.ids, short.n_scored) == ((0, 10, 11), 2)


def cloze_task(name, n):
    return ItemTask(
        name=name, items=tuple(Cloze(context=str(i), continuation="x") for i in range(n))
    )


def test_the_verdict_is_over_all_tasks_but_those_at_chance():
    n = 400
    tasks = [cloze_task("easy", n), cloze_task("hard", n)]
    guessing = replace(cloze_task("guess", n), items=tuple(two_choices(n)))
    reference = [[i < 300 for i in range(n)], [i < 100 for i in range(n)], [True, False] * 200]
    tested = [[i < 299 for i in range(n)], [i < 100 for i in range(n)], [False, True] * 200]
    figures, verdict = compare_tasks([*tasks, guessing], tested, reference)
    assert [f.at_chance for f in figures] == [False, False, True]
    assert verdict.tasks == ("easy", "hard")
    assert (verdict.worse, verdict.better, verdict.n) == (1, 0, 800)
    assert verdict.margin == pytest.approx(0.01 * 400 / 800)
    assert figures[0].reference_accuracy == 0.75
    assert figures[0].compared.loss == pytest.approx(1 / n)
    assert sum(figures[0].accuracy.samples) == 299


def two_choices(n):
    from hotloop.evaluate.jsonl import Choice

    return [Choice(query=str(i), choices=("a", "b"), gold=0) for i in range(n)]


def test_without_a_reference_there_are_figures_and_no_verdict():
    figures, verdict = compare_tasks([cloze_task("t", 4)], [[True, True, False, True]], None)
    assert figures[0].accuracy.mean == 0.75
    assert figures[0].compared is verdict is None


def test_a_task_that_has_changed_since_the_reference_answered_it_is_not_compared():
    with pytest.raises(ConfigError, match="has 4 items, and the reference answered 3: its data"):
        compare_tasks([cloze_task("t", 4)], [[True] * 4], [[True] * 3])


def test_a_reference_without_a_right_answer_gives_no_verdict():
    figures, verdict = compare_tasks([cloze_task("t", 4)], [[True] * 4], [[False] * 4])
    assert (figures[0].at_chance, verdict) == (True, None)


def test_answers_of_a_reference_are_read_as_they_were_written_and_those_of_another_refused(
    tmp_path,
):
    path, key = tmp_path / "answers.json", AnswersKey(weights="w", dtype="float32", tasks=("a",))
    write_answers(path, key, [[True, False]])
    assert read_answers(path, key) == [[True, False]]
    with pytest.raises(ConfigError, match="another model or of other tasks"):
        read_answers(path, key.model_copy(update={"weights": "v"}))
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="key"):
        read_answers(path, key)
