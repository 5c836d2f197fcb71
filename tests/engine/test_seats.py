"""Where a prompt is prefilled: what is reused of which seat, and which seat is given up."""

from collections.abc import Sequence

from hotloop.engine.seats import MIN_COPIED_TOKENS, Placement, Seats

TALK = list(range(200))


def used(seats: Seats, ids: Sequence[int], salt: str = "") -> Placement:
    """Places a prompt, prefills it and ends its request."""
    placement = seats.place(ids, salt)
    seats.hold(placement.seat, ids, len(ids))
    seats.release(placement.seat)
    return placement


def cached(seats: Seats, ids: Sequence[int], salt: str = "") -> int:
    return used(seats, ids, salt).n_cached


def test_a_prompt_that_goes_on_takes_the_seat_that_holds_its_beginning():
    seats = Seats(3, reuse="tokens", chunk=16)
    first = used(seats, TALK)
    second = used(seats, [*TALK, 7, 7])
    assert (second.seat, second.n_cached, second.source) == (first.seat, 200, None)


def test_a_short_match_is_copied_and_the_long_conversation_stays():
    seats = Seats(3, reuse="tokens", chunk=16)
    talk = used(seats, TALK)
    for i in range(4):
        placement = used(seats, [*TALK[:40], *[500 + i] * 30])
        assert placement.seat is not talk.seat
        assert placement.n_cached == 40
        assert cached(seats, TALK) == 199, "all but the last token, whose logits are needed"


def test_a_match_of_a_few_tokens_is_not_worth_a_copy():
    seats = Seats(2, reuse="tokens", chunk=16)
    used(seats, TALK)
    placement = used(seats, [*TALK[: MIN_COPIED_TOKENS - 1], 500, 501])
    assert (placement.n_cached, placement.source) == (0, None)
    assert cached(seats, TALK) == 199


def test_a_new_prompt_takes_an_empty_seat_and_then_the_one_unused_for_longest():
    seats = Seats(3, reuse="tokens", chunk=16)
    prompts = [[1000 * i + j for j in range(50)] for i in range(5)]
    own = [used(seats, prompt).seat.index for prompt in prompts[:3]]
    assert len(set(own)) == 3
    assert cached(seats, prompts[0]) == 49
    assert used(seats, prompts[3]).seat.index == own[1]
    assert cached(seats, prompts[1]) == 0, "it took the next one, of the third prompt"
    assert [cached(seats, prompts[i]) for i in (0, 3)] == [49, 49]


def test_a_seat_in_use_is_copied_from_and_never_taken():
    seats = Seats(2, reuse="tokens", chunk=16)
    running = seats.place(TALK)
    seats.hold(running.seat, TALK, 100)
    beside = seats.place([*TALK, 7])
    assert beside.seat is not running.seat
    assert (beside.n_cached, beside.source) == (100, running.seat)
    assert not seats.any_free


def test_prefixes_are_shared_only_under_the_same_salt():
    seats = Seats(3, reuse="tokens", chunk=16)
    used(seats, TALK, "one key")
    assert cached(seats, TALK, "another key") == 0
    assert cached(seats, TALK, "one key") == 199


def test_whole_chunks_are_reused_where_bits_stay_the_same_and_nothing_where_that_is_off():
    for reuse, n in (("chunks", 192), ("none", 0)):
        seats = Seats(2, reuse=reuse, chunk=64)
        used(seats, [*TALK, 1])
        assert cached(seats, [*TALK, 1]) == n
