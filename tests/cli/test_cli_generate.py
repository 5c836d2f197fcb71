"""``hotloop generate``."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from cli_fakes import FakeTokenizer

from hotloop.cli import generate
from hotloop.cli.app import main
from hotloop.errors import RequestError
from hotloop.types import Grammar, Speculation

pytestmark = pytest.mark.usefixtures("fake_llm")


def test_the_text_goes_to_stdout_and_its_figures_to_stderr(fake_llm, capsys):
    assert main(["generate", "some-model", "Say hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello world.\n"
    assert "4 tokens · TTFT 0.500 s · decode 4.0 tok/s\n" in err
    (llm,) = fake_llm.made
    assert llm.closed
    assert llm.asked[0].prompt == "Say hello"


def test_text_arrives_piece_by_piece(monkeypatch):
    pieces = []
    monkeypatch.setattr("sys.stdout.write", pieces.append)
    main(["generate", "m", "p"])
    assert pieces == ["Hello", " wor", "ld", ".", "\n"]


def test_json_is_one_object_with_the_engines_own_counts(capsys):
    assert main(["generate", "some-model", "Hi", "--json", "--quant", "int8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said["text"] == "Hello world."
    assert said["cell"] == "int8/eager"
    assert said["prompt"] == "Hi"
    assert (said["n_prompt_tokens"], said["n_tokens"]) == (2, 4)
    assert (said["ttft_s"], said["decode_tok_s"], said["finish_reason"]) == (0.5, 4.0, "eos")


def test_what_drafting_did_is_said_where_there_was_any(fake_llm, capsys, monkeypatch):
    seen = Speculation(n_steps=2, n_tokens=3, proposed=(2, 1), accepted=(1, 0))
    monkeypatch.setattr(fake_llm, "speculation", seen)
    assert main(["generate", "m", "p", "--draft", "ngram", "--draft-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "decode 4.0 tok/s · 1.50 tokens/step, acceptance 50%\n" in err
    assert json.loads(out)["speculation"]["accepted"] == [1, 0]
    assert json.loads(out)["cell"] == "auto/eager/draft=ngram-2"

    monkeypatch.setattr(
        fake_llm, "speculation", Speculation(n_steps=3, n_plain_steps=3, n_tokens=3)
    )
    assert main(["generate", "m", "p"]) == 0
    assert "tok/s · 1.00 tokens/step\n" in capsys.readouterr().err


def test_one_token_takes_no_step_and_says_nothing_of_drafting(fake_llm, capsys, monkeypatch):
    monkeypatch.setattr(fake_llm, "speculation", Speculation())
    assert main(["generate", "m", "p", "-n", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "tokens/step" not in err
    assert "speculation" not in json.loads(out)


def test_a_single_token_has_no_decode_speed_and_its_json_is_still_valid(capsys):
    assert main(["generate", "m", "p", "-n", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["decode_tok_s"] is None
    assert "decode" not in err


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(fake_llm, monkeypatch, capsys):
    tokenizer = SimpleNamespace(encode=lambda _: [])
    monkeypatch.setattr(generate, "early_tokenizer", lambda _: tokenizer)
    assert main(["generate", "m", ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert fake_llm.made == []


def test_a_template_that_fails_is_found_before_the_model_is_loaded(
    fake_llm, monkeypatch, tmp_path, capsys
):
    def refuse(_self, *_messages, **_options):
        raise RequestError("the template refuses")

    monkeypatch.setattr(FakeTokenizer, "chat_prompt", refuse)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    for verb in (["generate", "m", "hi", "--chat"], ["chat", "m"]):
        assert main([*verb, "--chat-template", str(tmp_path / "own.jinja")]) == 2
        assert "the template refuses" in capsys.readouterr().err
    assert fake_llm.made == []


@pytest.mark.parametrize("how", [["-"], ["--stdin"], []])
def test_the_prompt_can_come_through_a_pipe_and_loses_only_its_last_newline(fake_llm, piped, how):
    piped("one\ntwo\n\n")
    assert main(["generate", "m", *how]) == 0
    assert fake_llm.made[0].asked[0].prompt == "one\ntwo\n"


def test_the_prompt_can_come_from_a_file(fake_llm, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße\n", encoding="utf-8")
    assert main(["generate", "m", "--prompt-file", str(file)]) == 0
    assert fake_llm.made[0].asked[0].prompt == "Grüße"


def test_a_prompt_can_begin_with_a_hyphen_after_two_of_them(fake_llm):
    assert main(["generate", "m", "--", "- one"]) == 0
    assert fake_llm.made[0].asked[0].prompt == "- one"


@pytest.mark.parametrize("second", ["-", "--stdin"])
def test_two_prompts_are_refused_before_anything_is_loaded(fake_llm, capsys, piped, second):
    piped("two")
    assert main(["generate", "m", "one", second]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert fake_llm.made == []


def test_log_probabilities_that_nothing_prints_are_refused_with_the_fix(fake_llm, capsys):
    for verb in (["generate", "m", "p"], ["chat", "m"]):
        assert main([*verb, "--logprobs", "2"]) == 2
        assert "--logprobs" in capsys.readouterr().err
    assert fake_llm.made == []


def test_a_missing_prompt_file_is_named(capsys, tmp_path):
    assert main(["generate", "m", "--prompt-file", str(tmp_path / "gone.txt")]) == 2
    assert "gone.txt" in capsys.readouterr().err


def test_chat_wraps_the_prompt_in_the_models_template(fake_llm):
    main(["generate", "m", "Hi", "--chat"])
    assert fake_llm.made[0].asked[0].prompt == "<user>Hi<assistant>"


def test_options_reach_the_engine_and_the_models_own_sampling_stays_where_none_is_given(fake_llm):
    of_engine = "--quant int4-g64 --head none --execution compile --max-seq-len 64"
    of_sampling = "--top-p 0.9 --seed 0 --stop END --stop . --ignore-eos"
    main(["generate", "m", "p", *of_engine.split(), *of_sampling.split()])
    (llm,) = fake_llm.made
    assert llm.config.name == "int4-g64+head=none/compile"
    assert llm.config.max_seq_len == 64
    params = llm.asked[0].params
    assert params.temperature == 0.25
    assert (params.top_p, params.seed, params.stop) == (0.9, 0, ("END", "."))
    assert params.ignore_eos
    assert params.max_new_tokens is None  # the engine's own limit, cut to the room there is


def test_a_sampling_option_that_cannot_be_is_a_usage_error(fake_llm, capsys):
    assert main(["generate", "m", "p", "--top-p", "7"]) == 2
    assert "top_p" in capsys.readouterr().err
    assert fake_llm.made == [], "nothing is loaded for it"


def test_ctrl_c_keeps_what_came_frees_the_engine_and_exits_130(fake_llm, capsys, monkeypatch):
    monkeypatch.setattr(fake_llm, "interrupt_after", 2)
    assert main(["generate", "m", "p"]) == 130
    out, err = capsys.readouterr()
    assert out == "Hello wor\n"
    assert "2 tokens" in err
    assert "ended by Ctrl-C" in err
    assert fake_llm.made[0].closed


def test_control_tokens_in_a_prompt_are_text_with_a_note_unless_asked_for(fake_llm, capsys):
    assert main(["generate", "m", "a<end>"]) == 0
    assert fake_llm.made[-1].asked[0].prompt == "a<end>"
    assert "The prompt contains <end> as plain text. Add --special" in capsys.readouterr().err
    assert main(["generate", "m", "a<end>", "--special"]) == 0
    assert fake_llm.made[-1].asked[0].prompt == "^a$"
    assert "spells" not in capsys.readouterr().err


def test_a_prompt_that_spells_the_beginning_of_text_has_it_once(fake_llm):
    assert main(["generate", "m", "^a", "--special"]) == 0
    assert fake_llm.made[-1].asked[0].prompt == "^a"


@pytest.mark.parametrize("value", ["[1, NaN]", '{"a": -Infinity}', "Infinity"])
def test_a_template_argument_is_json_as_a_whole_or_text_as_a_whole(fake_llm, value):
    assert main(["generate", "m", "hi", "--chat", "--template-arg", f"x={value}"]) == 0
    assert fake_llm.made[-1].asked[0].prompt == f"{{x={value!r}}}<user>hi<assistant>"


def test_template_arguments_are_json_or_text(fake_llm):
    arguments = ["thinking=false", "level=high", 'tools=[{"n": 1}]', "empty=", "odd=NaN"]
    options = [part for argument in arguments for part in ("--template-arg", argument)]
    assert main(["generate", "m", "hi", "--chat", *options]) == 0
    assert fake_llm.made[-1].asked[0].prompt == (
        "{thinking=False}{level='high'}{tools=[{'n': 1}]}{empty=''}{odd='NaN'}<user>hi<assistant>"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chat", "--template-arg", "thinking"], "'thinking': give NAME=VALUE"),
        (["--chat", "--template-arg", "a b=1"], "give NAME=VALUE"),
        (["--chat", "--template-arg", "=1"], "give NAME=VALUE"),
        (["--chat", "--template-arg", "a=1", "--template-arg", "a=2"], "a is given twice"),
        (["--chat", "--template-arg", "messages=[]"], "messages is set by hotloop"),
        (["--chat", "--template-arg", "continue_final_message=1"], "set by hotloop"),
        (["--chat", "--template-arg", "a=" + "9" * 5000], "cannot be read"),
        (["--chat", "--template-arg", "a=" + "[" * 100_000], "cannot be read"),
        (["--chat", "--template-arg", "a=1e999"], "'1e999' cannot be read: the number '1e999' is"),
        (["--chat", "--template-arg", "a=[1, -1e999]"], "the number '-1e999' is too large"),
        (["--chat", "--chat-template", "missing.jinja"], "missing.jinja: there is no such file"),
        (["--chat", "--special"], "--special is for a prompt without --chat"),
        (["--template-arg", "a=1"], "need --chat"),
        (["--answer-start", "Sure"], "need --chat"),
    ],
)
def test_template_options_that_cannot_be_are_refused_before_anything_is_loaded(
    fake_llm, capsys, options, said
):
    assert main(["generate", "m", "hi", *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err) < 1000
    assert not fake_llm.made


def test_an_answer_goes_on_from_its_beginning_which_is_printed_with_it(fake_llm, capsys):
    argv = ["generate", "m", "hi", "--chat", "--answer-start", "Sure, "]
    assert main(argv) == 0
    assert fake_llm.made[-1].asked[0].prompt == "<user>hi<assistant>Sure, "
    assert capsys.readouterr().out == "Sure, Hello world.\n"
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Hello world."


def test_a_template_of_ones_own_takes_the_place_of_the_models(fake_llm, tmp_path, monkeypatch):
    file = tmp_path / "own.jinja"
    file.write_text("OWN")
    made = fake_llm("m", progress=lambda *_: None).tokenizer
    monkeypatch.setattr(type(made), "chat_prompt", lambda self, *_, **__: self)
    monkeypatch.setattr(
        type(made), "decode", lambda _self, ids: f"{ids.chat_template}|{ids.source}"
    )
    assert main(["generate", "m", "hi", "--chat", "--chat-template", str(file)]) == 0
    assert fake_llm.made[-1].asked[0].prompt == f"OWN|{file}"


def test_engine_notes_are_printed_with_unused_kernels_once_for_each_reason(
    fake_llm, capsys, monkeypatch
):
    reason = "no C++ compiler found, so decoding is several times slower (install g++, or set CXX)"
    again = "15 matrices stored as awq are dequantized, and quantized again as int8."
    notes = (f"int8/cpu not used: {reason}", again, f"attention/cpu not used: {reason}")
    monkeypatch.setattr(fake_llm, "notes", notes)
    assert main(["generate", "m", "p"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("no C++ compiler") == 1
    assert f"int8/cpu, attention/cpu not used: {reason}" in err
    assert again in err


def test_a_grammar_comes_from_a_file_and_its_syntax_is_checked_before_a_model_is_loaded(
    fake_llm, tmp_path, capsys
):
    good, bad = tmp_path / "schema.json", tmp_path / "bad.lark"
    good.write_text('{"type": "object"}')
    bad.write_text("start: (")
    assert main(["generate", "m", "p", "--json-schema", str(good)]) == 0
    assert fake_llm.made[-1].asked[-1].params.grammar == Grammar(
        kind="json_schema", source='{"type": "object"}'
    )
    schema = ' {"properties": {"age": {"type": "integer"}}}'
    assert main(["generate", "m", "p", "--json-schema", schema]) == 0
    grammar = fake_llm.made[-1].asked[-1].params.grammar
    assert grammar == Grammar(kind="json_schema", source=schema)
    assert main(["generate", "m", "p", "--json-schema", "true"]) == 2
    assert "the JSON schema holds True, not a JSON object" in capsys.readouterr().err
    n_made = len(fake_llm.made)
    assert main(["generate", "m", "p", "--json-schema", '{"type": 5']) == 2
    assert "the JSON schema" in capsys.readouterr().err
    assert main(["generate", "m", "p", "--grammar", str(bad)]) == 2
    assert "the grammar cannot be used: " in capsys.readouterr().err
    assert main(["generate", "m", "p", "--json-schema", str(good), "--ignore-eos"]) == 2
    assert "ignore_eos contradicts a grammar" in capsys.readouterr().err
    assert len(fake_llm.made) == n_made
