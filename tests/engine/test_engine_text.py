"""How answers end and what of them is shown: stop strings, end tokens, limits, streams."""

import math
from typing import Any

import pytest
import tokenizers
from tiny_models import (
    END,
    N_TOKENS,
    encode,
    tokenizer,
    write_random,
    write_script,
    write_text_files,
)

from hotloop import LLM, Delta, Generation, SamplingParams
from hotloop.engine.core import Admit, Command, Pending
from hotloop.engine.runner import Runner
from hotloop.errors import CheckpointError, RequestError
from hotloop.types import DEFAULT_NEW_TOKENS, ChatPrompt

TEXT = "caïd 🙂\tSTOPxyz"
START = 200
"""A token that is not in TEXT; after it the scripted model says TEXT and END, over and over."""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("scripted")
    write_script(folder, [START, *encode(TEXT), END])
    return LLM(str(folder), dtype="float32")


def stream(llm: LLM, **options: object) -> tuple[list[Delta], Generation]:
    """The pieces of an answer to START, and the answer, which must agree with them."""
    deltas = list(llm.stream([[START]], **options))
    generation = deltas[-1].generation
    assert generation is not None
    assert all(delta.generation is None for delta in deltas[:-1])
    assert "".join(delta.text for delta in deltas) == generation.text
    assert tuple(i for delta in deltas for i in delta.token_ids) == generation.token_ids
    return deltas, generation


def test_an_end_token_ends_the_answer_and_is_a_token_but_no_text(scripted):
    _, g = stream(scripted)
    assert (g.text, g.finish_reason) == (TEXT, "eos")
    assert g.token_ids == (*encode(TEXT), END)


def test_ignore_eos_goes_on_past_end_tokens(scripted):
    _, g = stream(scripted, ignore_eos=True, max_new_tokens=2 * len(encode(TEXT)))
    assert g.finish_reason == "length"
    assert g.token_ids[len(encode(TEXT))] == END
    assert g.text.startswith(TEXT)


def test_every_token_in_the_eos_list_ends_an_answer(tmp_path):
    write_script(tmp_path, [START, *encode(TEXT), END], eos=[END, encode("S")[0]])
    _, g = stream(LLM(str(tmp_path), dtype="float32"))
    assert (g.text, g.finish_reason) == ("caïd 🙂\t", "eos")


@pytest.mark.parametrize("n", [1, 5, len(encode(TEXT)), len(encode(TEXT)) + 1])
def test_max_new_tokens_counts_tokens_and_an_end_token_is_one(scripted, n):
    _, g = stream(scripted, max_new_tokens=n)
    assert len(g.token_ids) == n
    assert g.finish_reason == ("eos" if n > len(encode(TEXT)) else "length")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["STOP"], "caïd 🙂\t"),
        (["STOPPED", "OPx"], "caïd 🙂\tST"),
        (["\tS", "STOP"], "caïd 🙂"),
        (["🙂"], "caïd "),
        (["ï"], "ca"),
        (["c"], ""),
        (["z"], "caïd 🙂\tSTOPxy"),
    ],
    ids=str,
)
def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_ever_emitted(scripted, stop, text):
    _, g = stream(scripted, stop=stop)  # checks that the pieces make up this text and no more
    assert (g.text, g.finish_reason) == (text, "stop")
    shown_and_stop = tokenizer().decode(list(g.token_ids), skip_special_tokens=False)
    assert any(shown_and_stop == text + each for each in stop)


def test_a_stop_string_within_one_token_cuts_its_text_and_not_its_tokens(tmp_path):
    (token_id,) = encode("the")
    llm = LLM(str(write_script(tmp_path, [START, token_id, END])), dtype="float32")
    _, g = stream(llm, stop=["h"])
    assert (g.text, g.token_ids, g.finish_reason) == ("t", (token_id,), "stop")


def test_the_beginning_of_a_stop_string_is_shown_once_it_turns_out_to_be_something_else(scripted):
    deltas, g = stream(scripted, stop=["STOPS", "xyzzy"])
    assert (g.text, g.finish_reason) == (TEXT, "eos")
    shown = {delta.token_ids[0]: delta.text for delta in deltas}
    assert [shown[encode(c)[0]] for c in "STOPx"] == ["", "", "", "", "STOP"]
    assert deltas[-1].text == "xyz"


def test_an_answer_that_runs_out_of_tokens_shows_what_was_held_back(scripted):
    _, g = stream(scripted, stop=["STOPS"], max_new_tokens=len(encode("caïd 🙂\tSTO")))
    assert (g.text, g.finish_reason) == ("caïd 🙂\tSTO", "length")


def test_a_stop_string_on_the_last_token_allowed_counts_as_a_stop(scripted):
    _, g = stream(scripted, stop=["STOP"], max_new_tokens=len(encode("caïd 🙂\tSTOP")))
    assert g.finish_reason == "stop"


def test_characters_of_several_tokens_are_streamed_whole(scripted):
    deltas, _ = stream(scripted)
    assert [delta.text for delta in deltas] == [
        *"ca",
        "",
        "ï",
        *"d ",
        "",
        "",
        "",
        *"🙂\tSTOPxyz",
        "",
    ]


def test_half_a_character_at_the_end_becomes_a_replacement_character(scripted):
    _, g = stream(scripted, max_new_tokens=len(encode("caïd ")) + 2)
    assert g.text == "caïd \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_streamed_pieces_join_to_the_decoded_tokens(llm, temperature):
    prompts = [f"prompt {i}" for i in range(7)]
    pieces: dict[int, str] = dict.fromkeys(range(7), "")
    done: dict[int, Generation] = {}
    for delta in llm.stream(prompts, temperature=temperature, seed=4, max_new_tokens=60):
        assert delta.index not in done
        pieces[delta.index] += delta.text
        if delta.generation:
            done[delta.index] = delta.generation
    assert sorted(done) == list(range(7))
    for i, g in done.items():
        assert g.text == pieces[i] == llm.tokenizer.decode(g.token_ids)
        assert g.prompt_ids == tuple(llm.encode(prompts[i]))


def test_an_answer_from_random_weights_has_tokens_and_no_text(folder):
    shape = LLM(str(folder), weights="random", dtype="float32")
    (g,) = shape.generate([[5]], max_new_tokens=4)
    assert (len(g.token_ids), g.text, g.finish_reason) == (4, "", "length")


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_a_stream_early_frees_its_rows(llm, taken):
    expected = [g.token_ids for g in llm.generate(["a", "bc"], max_new_tokens=9)]
    abandoned = llm.stream(["long", "longer", "longest", "waiting"], max_new_tokens=100)
    for _ in range(taken):
        next(abandoned)
    abandoned.close()
    assert [g.token_ids for g in llm.generate(["a", "bc"], max_new_tokens=9)] == expected


def test_a_stream_refuses_a_request_at_once(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.stream([[5], []])


def test_the_makers_suggestions_are_taken_unless_something_else_is_asked(tmp_path):
    write_random(tmp_path)

    def suggest(**generation: object) -> LLM:
        write_text_files(tmp_path, **generation)
        return LLM(str(tmp_path), dtype="float32")

    assert suggest().default_sampling == SamplingParams()
    llm = suggest(do_sample=True, temperature=0.7, top_k=9, max_new_tokens=5)
    assert llm.default_sampling == SamplingParams(temperature=0.7, top_k=9)
    assert len(llm.generate([[5]], ignore_eos=True)[0].token_ids) == 5
    assert len(llm.generate([[5]], ignore_eos=True, max_new_tokens=2)[0].token_ids) == 2


class CapturingRunner(Runner):
    """Warming up takes the suggested sampling in, as where steps are captured."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.captures = True


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotloop.engine.llm.Runner", CapturingRunner)


@pytest.mark.usefixtures("as_on_gpus")
def test_a_suggestion_out_of_range_fails_for_who_takes_it_not_for_who_loads(tmp_path):
    write_random(tmp_path)
    write_text_files(tmp_path, do_sample=True, repetition_penalty=5000)
    llm = LLM(str(tmp_path), dtype="float32")
    said = r"generation_config\.json: repetition_penalty: must be between 0\.001 and 1000, not 5000"
    with pytest.raises(CheckpointError, match=said):
        llm.generate([[5]])
    assert llm.generate([[5]], SamplingParams(max_new_tokens=2))[0].token_ids


@pytest.mark.usefixtures("as_on_gpus")
def test_warming_up_hides_no_error_of_the_suggested_sampling(tmp_path, monkeypatch):
    write_random(tmp_path)
    write_text_files(tmp_path, do_sample=True, temperature=0.7)
    run = Runner.run

    def run_greedy(self: Runner, command: Command[Any]) -> Pending[Any]:
        if isinstance(command, Admit) and command.prompts[0].params.temperature > 0:
            raise CheckpointError("model.safetensors", "is damaged")
        return run(self, command)

    monkeypatch.setattr(Runner, "run", run_greedy)
    with pytest.raises(CheckpointError, match="is damaged"):
        LLM(str(tmp_path), dtype="float32")


def test_only_a_length_that_the_caller_gave_is_refused_for_want_of_room(tmp_path):
    write_random(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", max_seq_len=20)
    assert llm.default_new_tokens == DEFAULT_NEW_TOKENS > 20
    assert len(llm.generate([[5]], ignore_eos=True)[0].token_ids) == 20 - 1
    with pytest.raises(RequestError, match="max_new_tokens is 20"):
        llm.generate([[5]], max_new_tokens=20)
    longer = LLM(str(tmp_path), dtype="float32")
    assert len(longer.generate([[5]], ignore_eos=True)[0].token_ids) == DEFAULT_NEW_TOKENS


def test_one_text_can_be_the_stop(scripted):
    _, g = stream(scripted, stop="STOP")
    assert (g.text, g.finish_reason) == ("caïd 🙂\t", "stop")


def test_timings_are_in_order_and_count_the_tokens_of_the_engine(llm):
    prompts = [[5] * (i + 1) for i in range(6)]
    generations = llm.generate(prompts, max_new_tokens=7, ignore_eos=True)
    for g in generations:
        assert g.timing.n_tokens == len(g.token_ids) == 7
        assert 0 < g.timing.ttft_s < g.timing.e2e_s
        assert g.timing.tpot_s == pytest.approx((g.timing.e2e_s - g.timing.ttft_s) / 6)
    # The last three waited for the first three, and that counts.
    assert max(g.timing.ttft_s for g in generations[:3]) < generations[3].timing.ttft_s
    assert min(g.timing.e2e_s for g in generations[:3]) < generations[3].timing.ttft_s
    (one,) = llm.generate([[5]], max_new_tokens=1)
    assert one.timing.ttft_s == one.timing.e2e_s
    assert math.isnan(one.timing.tpot_s)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Says ``w1 w2 w3 …``, in a vocabulary of words with the space before them, from ``<s>`` on."""
    folder = tmp_path_factory.mktemp("spaced")
    vocabulary = {"<s>": 0} | {f"▁w{i}": i for i in range(1, N_TOKENS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    words.add_special_tokens(["<s>"])
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    write_script(folder, range(10))
    words.save(str(folder / "tokenizer.json"))
    return LLM(str(folder), dtype="float32", max_batch_size=1)


def test_prompt_and_answer_are_one_text(spaced):
    assert spaced.generate("w1 w2", max_new_tokens=3).text == " w3 w4 w5"
    (g,) = spaced.generate([[1, 2]], max_new_tokens=2)
    assert g.text == " w3 w4"
    assert "".join(d.text for d in spaced.stream("w1 w2", max_new_tokens=2)) == " w3 w4"
    assert spaced.generate("w1", stop=(" w3",), max_new_tokens=5).text == " w2"
    assert spaced.generate([[0]], max_new_tokens=2)[0].text == "w1 w2"  # nothing came before


def test_answer_of_a_chat_begins_without_a_space(spaced):
    prompt = ChatPrompt(token_ids=(0, 1, 2))
    assert spaced.generate(prompt, max_new_tokens=2).text == "w3 w4"
    continued = ChatPrompt(token_ids=(0, 1, 2), starts_text=False)
    assert [g.text for g in spaced.generate([prompt, continued], max_new_tokens=1)] == ["w3", " w3"]
