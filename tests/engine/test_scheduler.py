"""The scheduler against a core without a device: who is in a step, and who gets its tokens."""

import dataclasses
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from hotloop.engine.core import (
    Admit,
    Admitted,
    Command,
    CopySeat,
    Done,
    MoveRow,
    Pending,
    Prefill,
    PrefillBatching,
    ScoreBatching,
    ScoreWindows,
    Step,
    StepResult,
    StepTimes,
    WindowChunk,
)
from hotloop.engine.draft_control import DraftController
from hotloop.engine.request import Request, Scoring
from hotloop.engine.scheduler import Scheduler
from hotloop.engine.seats import MIN_SHARED_TOKENS
from hotloop.types import Grammar, SamplingParams, Score

N_POSITIONS, CHUNK = 64, 8
END = 7
"""Ends an answer whose request does not ignore it."""


@dataclasses.dataclass
class Row:
    """A sequence on the fake device: its seat, its prompt, and how far its answer is."""

    seat: int
    prompt_ids: list[int]
    n: int = 0

    @property
    def name(self) -> int:
        return self.prompt_ids[0]


class FakeCore:
    """Counts: the i-th token of the answer to prompt [p, …] is 100 p + i, or ``END`` in its place.

    It checks what no core may be asked for: two requests in one seat, rows that are not dense, a
    chunk or a step whose seat does not hold the tokens before. Steps are counted when they are
    launched, as on a stream; their tokens wait to be asked for.
    """

    captures = False

    def __init__(
        self, n_rows: int, *, asynchronous: bool = False, ends: dict[int, int] | None = None
    ) -> None:
        self.asynchronous, self.n_rows = asynchronous, n_rows
        self.ends = ends or {}  # by prompt, how many tokens before the end
        self.rows: dict[int, Row] = {}
        self.cache: list[list[int]] = [[] for _ in range(n_rows)]  # the tokens in each seat
        self.commands: list[Command[Any]] = []
        self.right = 0  # drafts that are right in a step that has any
        self.failures: dict[int, str] = {}  # of grammars, by row

    def run(self, command: Command[Any]) -> Pending[Any]:
        self.commands.append(command)
        match command:
            case Prefill():
                self._write(command.seat, command.start, command.ids)
                return Done(None)
            case Admit():
                first = [
                    self._admit(row, each) for row, each in enumerate(command.prompts, command.row)
                ]
                return Done(StepResult(rows=first, n_drafts=[0] * len(first)))
            case CopySeat():
                assert command.n <= len(self.cache[command.source])
                self.cache[command.target] = self.cache[command.source][: command.n]
                return Done(None)
            case ScoreWindows():
                return Done([self._score(chunk) for chunk in command.chunks])
            case MoveRow():
                assert command.target < command.source
                self.rows[command.target] = self.rows.pop(command.source)
                return Done(None)
            case Step():
                return Done(self._step(command))
        raise AssertionError(command)

    def _admit(self, row: int, prompt: Admitted) -> list[tuple[int, None]]:
        ids = list(prompt.prompt_ids)
        assert 0 <= prompt.n_cached <= prompt.start < len(ids)
        assert self.cache[prompt.seat][: prompt.start] == ids[: prompt.start]
        self._write(prompt.seat, prompt.start, ids[prompt.start :])
        self.rows[row] = Row(prompt.seat, ids)
        return self._tokens(row, 1)

    def _score(self, chunk: WindowChunk) -> Score:
        self._write(chunk.seat, chunk.start, chunk.ids[:-1])
        window = torch.tensor([*self.cache[chunk.seat], chunk.ids[-1]])
        at = range(chunk.start, chunk.start + len(chunk.ids) - 1)
        # Of each prediction: what it depends on, all tokens before.
        sums = torch.stack([(window[: t + 2] * torch.arange(1, t + 3)).sum() for t in at]).float()
        return Score(token_logprobs=sums, top1=window[chunk.start + 1 :], top1_logprobs=sums)

    def _write(self, seat: int, start: int, ids: Sequence[int]) -> None:
        """Writes a chunk, which is the only one since a step and begins where chunks begin."""
        assert 0 < len(ids) <= CHUNK
        assert (start + len(ids) - 1) // CHUNK == start // CHUNK, "the grid is that of the seat"
        assert len(self.cache[seat]) >= start, "the seat holds the tokens before"
        self.cache[seat] = [*self.cache[seat][:start], *ids]

    def _step(self, step: Step) -> StepResult:
        assert len(set(step.seats)) == len(step.seats) == step.n, "no two rows share a seat"
        for row in range(step.n):
            assert step.seats[row] == self.rows[row].seat, "a request stays in its seat"
        for row, known in step.known_positions.items():
            position = len(self.rows[row].prompt_ids) - 1 + self.rows[row].n
            assert known <= position <= known + step.slack
            assert position + step.k + step.n_steps <= step.longest
        first, *others = [self._result(step) for _ in range(step.n_steps if step.k else 1)]
        return dataclasses.replace(first, later=others)

    def _result(self, step: Step) -> StepResult:
        k_by_row = [0 if row in step.undrafted else step.k for row in range(step.n)]
        return StepResult(
            rows=[
                self._tokens(row, 1 + min(self.right, k) if step.k else step.n_steps)
                for row, k in enumerate(k_by_row)
            ],
            n_drafts=k_by_row,
            k=step.k,
            times=StepTimes(model_s=1.0),
            failures=self.failures,
        )

    def _tokens(self, row: int, n: int) -> list[tuple[int, None]]:
        state, tokens = self.rows[row], []
        for _ in range(n):
            if state.n:  # the newest token was an input of the step
                at = len(state.prompt_ids) + state.n - 1
                self.cache[state.seat] = [*self.cache[state.seat][:at], self._token(state)]
            state.n += 1
            tokens.append((self._token(state), None))
        return tokens

    def _token(self, state: Row) -> int:
        """The newest token of an answer."""
        i = state.n - 1
        return END if i == self.ends.get(state.name, -1) else 100 * state.name + i

    def close(self) -> None:
        pass

    @property
    def steps(self) -> list[Step]:
        return [command for command in self.commands if isinstance(command, Step)]


def request(
    name: int,
    n: int,
    *,
    prompt: Sequence[int] = (),
    ignore_eos: bool = True,
    speculates: bool = False,
    salt: str = "",
    grammar: Grammar | None = None,
    speculate: bool = True,
) -> Request:
    return Request(
        name,
        [name, *prompt],
        SamplingParams(
            ignore_eos=ignore_eos and grammar is None, grammar=grammar, speculate=speculate
        ),
        seed=0,
        max_new_tokens=n,
        eos_ids={END},
        tokenizer=None,
        submitted_s=0.0,
        speculates=speculates,
        salt=salt,
    )


def scheduler(core: FakeCore, **options: Any) -> Scheduler:
    return Scheduler(core, n_rows=core.n_rows, n_positions=N_POSITIONS, chunk=CHUNK, **options)


def finish(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Iterates until the scheduler is idle: (request, token), in the order of delivery."""
    found = []
    while not scheduler.idle:
        for job, delta in scheduler.iterate():
            if isinstance(job, Request):
                found += [(job.index, token) for token in delta.token_ids]
    return found


def expected(name: int, n: int) -> list[int]:
    return [100 * name + i for i in range(n)]


def admitted(core: FakeCore) -> list[list[int]]:
    """The requests whose prompts were prefilled together, in order."""
    commands = [command for command in core.commands if isinstance(command, Admit)]
    return [[prompt.prompt_ids[0] for prompt in command.prompts] for command in commands]


both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class Awaited(NamedTuple):
    """A result that notes what was waited for."""

    command: Command[Any]
    result: Pending[Any]
    awaited: list[Command[Any]]

    def wait(self) -> Any:
        self.awaited.append(self.command)
        return self.result.wait()


class AwaitedCore(FakeCore):
    """Notes the commands whose results were waited for, in order."""

    def __init__(self, n_rows: int) -> None:
        super().__init__(n_rows, asynchronous=True)
        self.awaited: list[Command[Any]] = []

    def run(self, command: Command[Any]) -> Pending[Any]:
        return Awaited(command, super().run(command), self.awaited)


def test_tokens_of_a_step_do_not_wait_for_the_chunk_behind_it():
    core = AwaitedCore(2)
    driven = scheduler(core)
    talking, long = request(1, 20), request(2, 1, prompt=range(3 * CHUNK))
    driven.submit(talking)
    while not talking.token_ids:
        driven.iterate()
    driven.submit(long)
    n_beside = 0
    while not long.token_ids:
        pieces = driven.iterate()
        if any(job is talking for job, _ in pieces):
            assert isinstance(core.awaited[-1], Step)
            n_beside += sum(isinstance(each, Prefill) for each in core.awaited) > 0
    assert n_beside > 0, "steps ran beside the prompt"
    finish(driven)
    assert talking.token_ids == expected(1, 20)


@both
def test_every_request_gets_its_own_tokens_and_they_are_admitted_as_they_came(asynchronous):
    core = FakeCore(3, asynchronous=asynchronous, ends={2: 4, 5: 0, 6: 3})
    driven = scheduler(core)
    requests = [request(name, 3 + name, ignore_eos=name % 2 == 1) for name in range(1, 9)]
    for each in requests:
        driven.submit(each)
    delivered = finish(driven)
    for each in requests:
        n = each.max_new_tokens
        if each.index in (2, 6):
            assert each.token_ids == [*expected(each.index, core.ends[each.index]), END]
            assert each.finish_reason == "eos"
        elif each.index == 5:
            assert each.token_ids == [END, *expected(5, n)[1:]], "it ignores the end"
        else:
            assert each.token_ids == expected(each.index, n)
            assert each.finish_reason == "length"
        assert [token for index, token in delivered if index == each.index] == each.token_ids
    assert [name for names in admitted(core) for name in names] == list(range(1, 9))


@both
def test_short_prompts_that_wait_are_prefilled_together_in_their_order(asynchronous):
    core = FakeCore(12, asynchronous=asynchronous)
    driven = scheduler(
        core,
        prefill_batching=PrefillBatching(
            max_prompts=4, max_prompt_tokens=3, max_tokens=8, max_forward_tokens=8
        ),
    )
    lengths = [1, 2, 3, 3, 2, 4, 3, 3, CHUNK + 2, 1, 1, 1]
    for name, length in enumerate(lengths, 1):
        driven.submit(request(name, 5, prompt=range(length - 1)))
    delivered = finish(driven)
    # The fourth and the ninth would be too many tokens; the sixth and the ninth are not short, and
    # the rest of the ninth is.
    assert admitted(core) == [[1, 2, 3], [4, 5], [6], [7, 8], [9, 10, 11, 12]]
    for name in range(1, 13):
        assert [token for index, token in delivered if index == name] == expected(name, 5)


@both
def test_prompts_that_need_other_numbers_of_forwards_are_not_prefilled_together(asynchronous):
    core = FakeCore(8, asynchronous=asynchronous)
    driven = scheduler(
        core,
        prefill_batching=PrefillBatching(
            max_prompts=4, max_prompt_tokens=6, max_tokens=24, max_forward_tokens=2
        ),
    )
    for name, length in enumerate([1, 2, 3, 4, 2, 5], 1):
        driven.submit(request(name, 2, prompt=range(length - 1)))
    finish(driven)
    assert admitted(core) == [[1, 2], [3, 4], [5], [6]]


@both
def test_a_window_and_a_full_cache_end_what_is_prefilled_together(asynchronous):
    core = FakeCore(3, asynchronous=asynchronous)
    driven = scheduler(
        core,
        prefill_batching=PrefillBatching(
            max_prompts=4, max_prompt_tokens=3, max_tokens=12, max_forward_tokens=8
        ),
    )
    window = Scoring([5, 6, 7], full=False)
    for job in (request(1, 2), request(2, 9), window, *(request(i, 3) for i in (3, 4, 5))):
        driven.submit(job)
    finish(driven)
    assert window.ended
    first, *others = admitted(core)
    assert first == [1, 2], "the window is next"
    assert [name for names in others for name in names] == [3, 4, 5]


@both
def test_requests_that_are_cancelled_free_no_row_of_those_they_were_prefilled_with(asynchronous):
    core = FakeCore(4, asynchronous=asynchronous)
    driven = scheduler(
        core,
        prefill_batching=PrefillBatching(
            max_prompts=4, max_prompt_tokens=3, max_tokens=12, max_forward_tokens=8
        ),
    )
    requests = [request(i, 6) for i in range(1, 8)]
    for each in requests:
        driven.submit(each)
    while len(core.steps) < 2:
        driven.iterate()
    for i in (0, 2):  # holes, which moves fill before the next are prefilled
        driven.cancel(requests[i])
    finish(driven)
    assert admitted(core)[0] == [1, 2, 3, 4]
    assert [len(names) for names in admitted(core)[1:]] == [2, 1]
    for each in (requests[i] for i in (1, 3, 4, 5, 6)):
        assert each.token_ids == expected(each.index, 6)


@both
def test_a_request_can_be_submitted_between_iterations_while_others_run(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, first, second = scheduler(core), request(1, 9), request(2, 4)
    driven.submit(first)
    for _ in range(3):
        list(driven.iterate())
    driven.submit(second)
    finish(driven)
    assert (first.token_ids, second.token_ids) == (expected(1, 9), expected(2, 4))


@both
def test_what_is_left_moves_to_the_first_rows_and_stays_in_its_seats(asynchronous):
    core = FakeCore(4, asynchronous=asynchronous)
    driven = scheduler(core)
    for name, n in ((1, 8), (2, 30), (3, 10), (4, 20)):
        driven.submit(request(name, n))
    finish(driven)
    sizes = [step.n for step in core.steps]
    assert sizes[: sizes.index(4)] == sorted(sizes[: sizes.index(4)]), "one joins after the other"
    assert sizes[sizes.index(4) :] == sorted(sizes[sizes.index(4) :], reverse=True)
    assert (sizes[0], sizes[-1]) == (1, 1)
    assert core.steps[-1].seats == (1,), "where its prompt was put"
    moves = [(c.source, c.target) for c in core.commands if isinstance(c, MoveRow)]
    assert moves == [(3, 0), (1, 0)]


def test_seats_are_in_order_again_once_nothing_runs():
    core = FakeCore(3)
    driven = scheduler(core)
    for round_ in range(3):
        for name, n in ((1, 8), (2, 9), (3, 6)):
            driven.submit(request(name, n))
        before = len(core.steps)
        finish(driven)
        seats = [step.seats for step in core.steps[before:]]
        assert seats[0] == (0,), round_
        assert (0, 1, 2) in seats, round_


@both
@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("who", [1, 2, 3, 4])
def test_a_cancelled_request_gets_no_more_tokens_and_its_place_goes_to_another(
    asynchronous, after, who
):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, requests = scheduler(core), [request(name, 8) for name in (1, 2, 3, 4)]
    for each in requests:
        driven.submit(each)
    for _ in range(after):
        list(driven.iterate())
    cancelled = requests[who - 1]
    had = list(cancelled.token_ids)
    driven.cancel(cancelled)
    driven.cancel(cancelled)  # again does no harm
    assert cancelled not in driven._seat_of, "its row and its seat are free"
    assert cancelled not in driven._rows
    finish(driven)
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.token_ids == had
    assert cancelled.generation().finish_reason == "cancelled"
    for other in requests:
        if other is not cancelled:
            assert other.token_ids == expected(other.index, 8)


@both
def test_with_all_its_requests_cancelled_it_is_idle_at_once(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, requests = scheduler(core), [request(name, 8) for name in (1, 2, 3)]
    for each in requests:
        driven.submit(each)
    list(driven.iterate())
    for each in requests:
        driven.cancel(each)
    assert driven.idle
    again = request(4, 5)
    driven.submit(again)
    finish(driven)
    assert again.token_ids == expected(4, 5)


def test_a_cancelled_request_that_has_ended_stays_as_it_is():
    driven, ended = scheduler(FakeCore(1)), request(1, 2)
    driven.submit(ended)
    finish(driven)
    driven.cancel(ended)
    assert ended.finish_reason == "length"


@both
def test_several_steps_are_taken_at_once_only_while_nothing_waits_or_is_prefilled(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, first = scheduler(core, n_steps=4), request(1, 30)
    second, third = request(2, 14, prompt=range(5 * CHUNK)), request(3, 14)
    driven.submit(first)
    driven.iterate()
    driven.iterate()
    assert core.steps[-1].n_steps == 4
    driven.submit(second)
    driven.submit(third)  # waits for a seat
    before = len(core.steps)
    while not third.token_ids:
        driven.iterate()
    assert {step.n_steps for step in core.steps[before:-1]} == {1}
    finish(driven)
    assert 4 in {step.n_steps for step in core.steps[before:]}
    for each, n in ((first, 30), (second, 14), (third, 14)):
        assert each.token_ids == expected(each.index, n)


@both
def test_beside_a_grammar_steps_are_single_ones_and_with_it_alone_it_fails(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, free = scheduler(core, n_steps=4), request(1, 30)
    bound = request(2, 9, grammar=Grammar(kind="regex", source="a"))
    driven.submit(free)
    driven.submit(bound)
    while len(bound.token_ids) < 4:
        driven.iterate()
    assert all(step.n_steps == 1 for step in core.steps if step.features.constrain)
    row = driven._rows.index(bound)
    core.failures = {row: "a limit"}
    while not bound.ended:
        driven.iterate()
    core.failures = {}
    assert (bound.failed, bound.grammar_failure, bound.finish_reason) == (True, "a limit", None)
    assert bound.token_ids == expected(2, len(bound.token_ids)), "those of the failed step are none"
    before = len(core.steps)
    finish(driven)
    assert 4 in {step.n_steps for step in core.steps[before:]}
    assert free.token_ids == expected(1, 30)


@both
@pytest.mark.parametrize("right", [0, 2, 4])
def test_drafts_that_are_right_bring_several_tokens_and_none_beyond_the_end(asynchronous, right):
    core = FakeCore(2, asynchronous=asynchronous)
    core.right = right
    controller = DraftController((0, 2, 4), always=True)
    driven = scheduler(core, controller=controller)
    requests = [request(1, 17, speculates=True), request(2, 6, speculates=True)]
    for each in requests:
        driven.submit(each)
    finish(driven)
    assert [r.token_ids for r in requests] == [expected(1, 17), expected(2, 6)]
    assert {step.k for step in core.steps} <= {0, 2, 4}
    assert max(step.k for step in core.steps) == 4
    for each in requests:
        speculation = each.generation().speculation
        assert speculation is not None
        assert speculation.n_tokens == len(each.token_ids) - 1


@both
def test_requests_that_ask_for_no_drafts_get_none(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    core.right = 2
    driven = scheduler(core, controller=DraftController((0, 2), always=True), n_steps=3)
    off = request(1, 30, speculate=False, speculates=True)
    driven.submit(off)
    while len(off.token_ids) < 10:
        driven.iterate()
    assert {(step.k, step.n_steps) for step in core.steps} == {(0, 3)}, "alone as without a drafter"
    on = request(2, 20, speculates=True)
    driven.submit(on)
    finish(driven)
    assert [off.token_ids, on.token_ids] == [expected(1, 30), expected(2, 20)]
    both = [step for step in core.steps if step.n == 2 and step.k]
    assert both
    assert all(len(step.undrafted) == 1 for step in both)
    found, drafted = (each.generation().speculation for each in (off, on))
    assert found.n_plain_steps == found.n_steps
    assert sum(drafted.accepted) > 0


@both
def test_several_steps_with_drafts_are_one_launch_of_a_request_alone(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous, ends={1: 30})
    core.right = 1
    driven = scheduler(core, controller=DraftController((0, 2), always=True), n_steps=8)
    first = request(1, 50, ignore_eos=False, speculates=True)
    driven.submit(first)
    while len(first.token_ids) < 12:
        assert len([delta for _, delta in driven.iterate() if delta.token_ids]) <= 1
    assert {(step.k, step.n_steps) for step in core.steps} == {(2, 4)}
    before, second = len(core.steps), request(2, 7, speculates=True)
    driven.submit(second)
    finish(driven)
    assert {step.n_steps for step in core.steps[before:] if step.n == 2} == {1}
    assert first.token_ids == [*expected(1, 30), END], "what follows the end is dropped"
    assert second.token_ids == expected(2, 7)
    counted = first.generation().speculation
    assert counted.n_tokens == 30 == counted.n_steps + sum(counted.accepted)


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_looked_at():
    order: list[str] = []

    class Watched(FakeCore):
        def run(self, command: Command[Any]) -> Pending[Any]:
            pending, name = super().run(command), type(command).__name__
            order.append(f"run {name}")

            class Later:
                def wait(self) -> Any:
                    order.append(f"wait {name}")
                    return pending.wait()

            return Later()

    driven = scheduler(Watched(1, asynchronous=True))
    driven.submit(request(1, 4))
    finish(driven)
    assert order == [
        *("run Admit", "run Step", "wait Admit"),
        *("run Step", "wait Step", "run Step", "wait Step", "wait Step"),
    ]


@both
def test_a_prompt_is_prefilled_a_chunk_at_a_time_between_the_steps_of_others(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, first = scheduler(core), request(1, 20)
    long = request(2, 3, prompt=range(3 * CHUNK + 1))
    driven.submit(first)
    while len(core.steps) < 2:
        driven.iterate()
    driven.submit(long)
    begun = len(core.commands)
    finish(driven)
    kinds = [type(c).__name__ for c in core.commands[begun:]]
    chunks = [i for i, kind in enumerate(kinds) if kind in ("Prefill", "Admit")]
    assert [kinds[i] for i in chunks] == ["Prefill", "Prefill", "Prefill", "Admit"]
    for here, there in itertools.pairwise(chunks):
        assert kinds[here + 1 : there] == ["Step"], "decoders first, then one chunk"
    joined = core.commands[begun + chunks[-1] + 1]
    assert isinstance(joined, Step)
    assert joined.n == 2, "it is in the next step, before its first token has been looked at"
    assert (first.token_ids, long.token_ids) == (expected(1, 20), expected(2, 3))


def test_others_never_wait_for_more_than_one_chunk_however_many_prompts_come():
    core = FakeCore(3, asynchronous=True)
    driven = scheduler(core)
    driven.submit(request(1, 60))
    driven.iterate()
    for name in range(2, 8):
        driven.submit(request(name, 5, prompt=range(name * 4)))
    finish(driven)
    kinds = "".join(type(command).__name__[0] for command in core.commands)
    assert kinds.count("P") + kinds.count("A") > 10
    between = re.sub("[MC]", "", kinds[1 : kinds.rindex("S")])
    assert not re.search("[PA][PA]", between), "two chunks without a step between"


@both
@pytest.mark.parametrize("n_chunks", [0, 1, 2])
def test_a_request_is_cancelled_in_the_middle_of_its_prefill(asynchronous, n_chunks):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, first = scheduler(core), request(1, 12)
    long, next_ = request(2, 5, prompt=range(4 * CHUNK)), request(3, 5)
    for each in (first, long, next_):
        driven.submit(each)
    while sum(isinstance(command, Prefill) for command in core.commands) < n_chunks:
        driven.iterate()
    driven.cancel(long)
    before = len(core.commands)
    finish(driven)
    assert not any(isinstance(c, Prefill) for c in core.commands[before:])
    assert (long.finish_reason, long.token_ids) == ("cancelled", [])
    assert (first.token_ids, next_.token_ids) == (expected(1, 12), expected(3, 5))


@both
def test_a_window_is_scored_in_a_seat_of_its_own_a_chunk_at_a_time(asynchronous):
    core = FakeCore(2, asynchronous=asynchronous)
    driven, first = scheduler(core), request(1, 9)
    window, cancelled = (Scoring(list(range(2 * CHUNK + 4)), full=False) for _ in range(2))
    for job in (first, window, cancelled):
        driven.submit(job)
    finished = []
    while not driven.idle:
        finished += [job for job, _ in driven.iterate() if isinstance(job, Scoring)]
        if cancelled.parts:
            driven.cancel(cancelled)
    assert finished == [window]
    assert window.score().top1.tolist() == window.ids[1:]
    scored = [chunk for c in core.commands if isinstance(c, ScoreWindows) for chunk in c.chunks]
    assert [each.start for each in scored][:4] == [0, CHUNK, 2 * CHUNK, 0]
    assert {each.seat for each in scored} == {1}
    assert first.token_ids == expected(1, 9)


def chunks_scored(core: FakeCore) -> list[list[tuple[int, int]]]:
    """Of each command, the first position and the number of predictions of each chunk."""
    commands = [command for command in core.commands if isinstance(command, ScoreWindows)]
    return [[(each.start, len(each.ids) - 1) for each in c.chunks] for c in commands]


def score_alone(window: Scoring) -> list[float]:
    driven, alone = scheduler(FakeCore(1)), Scoring(window.ids, full=False)
    driven.submit(alone)
    finish(driven)
    return alone.score().token_logprobs.tolist()


def score_all(core: FakeCore, windows: Sequence[Scoring], batching: ScoreBatching) -> list[Scoring]:
    """Scores windows that wait together; returns them in the order of their ends."""
    driven, ended = scheduler(core, score_batching=batching), []
    for window in windows:
        driven.submit(window)
    while not driven.idle:
        ended += [job for job, _ in driven.iterate()]
    return ended


@both
def test_windows_that_wait_together_are_scored_together_as_far_as_limits_allow(asynchronous):
    core = FakeCore(4, asynchronous=asynchronous)
    lengths = [4, 5, 3, 4, 9, 3]  # a chunk has 8
    windows = [Scoring([i, *range(n - 1)], full=False) for i, n in enumerate(lengths)]
    batching = ScoreBatching(chunk=CHUNK, max_windows=4, max_tokens=3 * 4)
    assert score_all(core, windows, batching) == windows
    assert chunks_scored(core) == [[(0, 3), (0, 4), (0, 2)], [(0, 3)], [(0, 8)], [(0, 2)]]
    assert [w.score().token_logprobs.tolist() for w in windows] == [*map(score_alone, windows)]


@both
@pytest.mark.parametrize("n_rows", [1, 4])
def test_the_beginning_of_a_group_of_windows_is_scored_once(asynchronous, n_rows):
    core, group = FakeCore(n_rows, asynchronous=asynchronous), object()
    shots, questions = list(range(20)), [[30, *range(9)], [31, *range(9)]]
    windows = [
        Scoring([*shots, *question, choice, 60], full=False, group=group)
        for question in questions
        for choice in (50, 51, 52)
    ]
    batching = ScoreBatching(chunk=CHUNK, max_windows=n_rows, max_tokens=64)
    assert score_all(core, windows, batching) == windows
    assert [w.score().token_logprobs.tolist() for w in windows] == [*map(score_alone, windows)]
    # A token before a choice is an input again: it predicts the choice.
    n_alike = [0, 29, 29, 19, 29, 29]
    n_cached = [window.n_cached for window in windows]
    if n_rows == 1:
        assert n_cached == n_alike
    assert all(n - MIN_SHARED_TOKENS < m <= n for m, n in zip(n_cached, n_alike, strict=True))
    n_new = sum(n for chunks in chunks_scored(core) for _, n in chunks)
    assert n_new == sum(len(w.ids) - 1 - w.n_cached for w in windows)


def test_windows_of_different_calls_share_nothing_and_leave_nothing_to_prompts():
    core = FakeCore(2)
    driven = scheduler(core, prefix_cache="tokens")
    first, second = (Scoring(list(range(1, 20)), full=False, group=object()) for _ in range(2))
    for window in (first, second):
        driven.submit(window)
        finish(driven)
    alike = request(1, 3, prompt=range(2, 20))
    driven.submit(alike)
    finish(driven)
    assert (second.n_cached, alike.n_cached) == (0, 0)
    assert alike.token_ids == expected(1, 3)


@both
@pytest.mark.parametrize("seed", range(8))
def test_windows_among_random_requests_that_are_cancelled_have_their_own_scores(asynchronous, seed):
    random = Random(seed)
    core = FakeCore(4, asynchronous=asynchronous)
    batching = ScoreBatching(chunk=CHUNK, max_windows=3, max_tokens=20)
    driven = scheduler(
        core, prefix_cache=random.choice(["none", "tokens"]), score_batching=batching
    )
    beginnings = [[random.randrange(9) for _ in range(40)] for _ in range(2)]
    groups = [None, object(), object()]
    wanted: dict[object, list[Scoring]] = {group: [] for group in groups}
    requests = []
    for i in range(40):
        if random.random() < 0.3:
            requests.append(request(1 + i, random.randint(1, 6), prompt=range(i % 12)))
            driven.submit(requests[-1])
        elif (group := random.choice(groups)) in wanted:
            begins = random.choice(beginnings)[: random.randint(0, 40)]
            ids = [*begins, *(random.randrange(9) for _ in range(random.randint(2, 6)))]
            wanted[group].append(Scoring(ids, full=False, group=group))
            driven.submit(wanted[group][-1])
        for _ in range(random.randint(0, 2)):
            driven.iterate()
        if i == 30:
            for window in wanted.pop(groups[1]):
                driven.cancel(window)
    finish(driven)
    for window in itertools.chain.from_iterable(wanted.values()):
        assert window.score().token_logprobs.tolist() == score_alone(window)
    for each in requests:
        assert each.token_ids == expected(each.index, each.max_new_tokens)


@both
@pytest.mark.parametrize("prefix_cache", ["none", "chunks", "tokens"])
@pytest.mark.parametrize("seed", range(8))
def test_random_arrivals_cancellations_and_lengths_change_no_answer(
    asynchronous, prefix_cache, seed
):
    random = Random(seed)
    core = FakeCore(random.randint(1, 4), asynchronous=asynchronous)
    controller = DraftController((0, 2), always=True) if seed % 2 else None
    core.right = random.randint(0, 2)
    driven = scheduler(
        core, prefix_cache=prefix_cache, controller=controller, n_steps=random.choice([1, 3, 4])
    )
    shared = [random.randrange(90) for _ in range(N_POSITIONS)]
    requests: list[Request] = []
    for _ in range(24):
        n_prompt, n = random.randint(0, 35), random.randint(1, 20)
        prompt = [*shared[: n_prompt // 2], *(random.randrange(90) for _ in range(n_prompt // 2))]
        salt, name = random.choice(["", "a"]), random.randint(1, 3)
        options = {"speculates": controller is not None, "speculate": random.random() < 0.7}
        made = request(name, n, prompt=prompt, salt=salt, **options)
        driven.submit(made)
        requests.append(made)
        for _ in range(random.randint(0, 6)):
            driven.iterate()
        if random.random() < 0.2:
            driven.cancel(random.choice(requests))
    finish(driven)
    for each in requests:
        whole = expected(each.index, each.max_new_tokens)
        if each.finish_reason == "cancelled":
            assert each.token_ids == whole[: len(each.token_ids)]
        else:
            assert (each.token_ids, each.finish_reason) == (whole, "length")
    if prefix_cache == "none":
        assert not any(each.n_cached for each in requests)


def test_it_needs_no_torch():
    code = "import sys, hotloop.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
