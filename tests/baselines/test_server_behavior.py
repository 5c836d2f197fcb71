"""``hotloop bench --endpoint`` against servers that behave in known ways."""

from __future__ import annotations

import json

import pytest
from fake_server import Habits, serve

from hotloop.baselines.completions import Completion, CompletionsClient
from hotloop.baselines.server_behavior import ServerBehavior, loop_share, measure_server
from hotloop.bench.record import Workload
from hotloop.cli.app import main

WORKLOAD = Workload(prompt_tokens=6, new_tokens=12, repeats=3)
TEXT = "the quick brown fox jumps over the lazy dog " * 3
MANY_WORDS = tuple(f"w{i}" for i in range(50))


def behavior(habits: Habits, other: Habits | None = None) -> ServerBehavior:
    with serve(habits) as url, CompletionsClient(url) as client:
        if other is None:
            return measure_server(client, WORKLOAD, TEXT)
        with serve(other) as second, CompletionsClient(second) as against:
            return measure_server(client, WORKLOAD, TEXT, against=against)


class Remembering:
    """A server whose first token takes a second for a new prompt, and a quarter for a known one."""

    model, server, refused = "m", "s", ()

    def __init__(self, token_s=0.5):
        self.known = set()
        self.token_s = token_s

    def complete(self, prompt, max_tokens, *, ignore_eos=False):
        first_s = 0.25 if prompt in self.known else 1.0
        self.known.add(prompt)
        times = tuple(first_s + self.token_s * i for i in range(max_tokens))
        return Completion(
            text="a" * ignore_eos,
            times=times,
            token_ids=None,
            n_tokens=max_tokens,
            n_prompt_tokens=9,
            finish_reason="length",
        )


def test_a_new_prompt_and_a_known_one_are_told_apart():
    found = measure_server(Remembering(), WORKLOAD, TEXT)
    assert found.cold_ttft_s.samples == (1.0,) * 3
    assert found.warm_ttft_s.samples == (0.25,) * 3
    assert found.tpot_s.samples == (0.5,) * 6
    assert found.interval_s == (0.5,) * 4
    assert found.n_prompt_tokens.mean == 9


def test_answers_that_arrive_all_at_once_have_no_time_per_token():
    assert measure_server(Remembering(token_s=0.0), WORKLOAD, TEXT).tpot_s is None


def test_every_prompt_is_salted_and_asked_twice():
    habits = Habits()
    behavior(habits)
    prompts = [body["prompt"] for body in habits.asked[1:]]
    assert prompts[0::2] == prompts[1::2]
    assert len({prompt.split()[0] for prompt in prompts}) == 3
    assert all(len(prompt.split()) == 7 for prompt in prompts)


def test_pieces_and_tokens_are_counted():
    found = behavior(Habits(per_piece=4))
    assert found.tokens_per_event.mean == 4
    assert found.n_tokens.mean == 12
    assert found.interval_s is not None
    assert list(found.interval_s) == sorted(found.interval_s)


def test_a_server_that_does_not_count_has_no_figures_per_token():
    found = behavior(Habits(usage=False, refuses=("return_token_ids",)))
    assert found.tpot_s is None
    assert found.tokens_per_event is None
    assert found.refused_fields == ("return_token_ids",)


def test_loops_of_an_answer_are_found():
    assert behavior(Habits(words=("again",))).loop_share.mean == pytest.approx(10 / 12)
    assert behavior(Habits(words=MANY_WORDS)).loop_share.mean == 0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("a b c d", 0),
        ("a a", 0),
        ("a a a", 1 / 3),
        ("a b a b a b", 2 / 6),
        ("x a b a b a b y", 2 / 8),
        ("a b a b a b a b", 4 / 8),
        ("a b a b c a b a b c", 0),
    ],
)
def test_a_loop_is_a_passage_said_three_times_on_end(text, share):
    assert loop_share(text) == pytest.approx(share)


def test_answers_of_two_servers_are_compared_from_their_first_difference():
    same, other = Habits(words=MANY_WORDS), Habits(words=("w0", "w1", *("x",) * 10))
    found = behavior(same, other)
    assert found.repeated.n_equal == found.repeated.n == 3
    assert found.against.n_equal == 0
    assert found.against.first_difference == (len(" w0 w1 "),) * 3


def test_the_command_prints_it(capsys):
    with serve(Habits(per_piece=2)) as url:
        given = ["bench", "--endpoint", url, "--repeats", "2", "--new-tokens", "4"]
        assert main(given) == 0
        text = capsys.readouterr().out
        assert main([*given, "--against", url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "TTFT, new prompt" in text
    assert "2 of 2 answers are equal" in text
    assert said["against"]["n_equal"] == 2
    assert len(said["cold_ttft_s"]["samples"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model", "--endpoint", "http://x/v1"], "model cannot be given with --endpoint"),
        (["--endpoint", "http://x/v1", "--quant", "int8"], "quant cannot be given with --endpoint"),
        (["--endpoint", "http://x/v1", "--batch", "2"], "--batch"),
        (["--against", "http://x/v1"], "--endpoint"),
        (["--endpoint", "nowhere"], "is not the URL of a server"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options, said, capsys):
    assert main(["bench", *options]) == 2
    assert said in capsys.readouterr().err
