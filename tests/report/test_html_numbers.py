"""Every number of the HTML page: read where it stands, and computed again from its own record.

``statements`` yields each text of the page that has a number, with a test that only the right
number passes. A text of which no statement is made is a failure, too, so that a new part of the
page needs one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import pytest
import scipy.stats
from report_records import drafting, record
from test_html import RECORDS, cell, elements, parsed, text_of
from test_html_browser import with_verdict

from hotloop.bench.record import Figure, GreedyFigures, Record, StepCost
from hotloop.bench.statistics import mean_figure
from hotloop.report import published, table
from hotloop.report.fields import value_of
from hotloop.report.glossary import explain_names
from hotloop.report.html import to_html

NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?")

COSTS = tuple(
    StepCost(k=k, n_steps=9, draft_s=draft_s, verify_s=verify_s)
    for k, draft_s, verify_s in ((0, 0.0, 0.0113), (1, 0.0017, 0.0121), (4, 0.0068, 0.0139))
)

ALL: list[Record] = [
    record("transformers/eager", 26.4, loss=0.0013, baseline="transformers"),
    *(with_verdict(one, worse) for one, worse in zip(RECORDS[:4], (0, 3, 7, 2), strict=True)),
    *RECORDS[4:],
    cell("int4-g64", "eager", 64.2, loss=0.234, draft="ngram", mbu=None).model_copy(
        update={"speculation": drafting(costs=COSTS)}
    ),
    cell("int4-g64", "eager", 57.6, loss=0.234).model_copy(
        update={
            "kl_floor": mean_figure([2.3e-5, 3.1e-5]),
            "greedy": GreedyFigures(
                draft="none", agreement=mean_figure([0.97, 0.93]), gap_max=0.23
            ),
        }
    ),
    cell("fp8", "compile", 73.1, loss=0.0034).model_copy(
        update={"decode_tok_s": mean_figure([71.3, 74.9])}
    ),
]

TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Statement:
    """A text of the page, and whether its numbers, or others in their place, would be right."""

    element: Element
    text: str
    holds: Callable[[str], bool]


def is_rounded(shown: str, value: float) -> bool:
    mantissa, _, power = shown.replace(",", "").partition("e")
    step = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    return abs(float(shown.replace(",", "")) - value) <= 0.5000001 * step


def reads(text: str, *expected: float) -> bool:
    shown = NUMBER.findall(text)
    return len(shown) == len(expected) and all(map(is_rounded, shown, expected))


def half(figure: Figure) -> float:
    return scipy.stats.t.ppf(0.975, figure.n - 1) * scipy.stats.sem(figure.samples)


def without_notes(element: Element) -> str:
    notes = "".join(text_of(sup) for sup in elements(element, "sup"))
    return text_of(element).removesuffix(notes)


# ------------------------------------------------------------------------- tables of figures

SCALES = {"ttft_s": 1e3, "mbu": 100, "same_top1": 100}


def of_field(one: Record, field: str) -> Callable[[str], bool]:
    value, scale = value_of(one, field), SCALES.get(field, 1)
    if field == "verdict.loss":
        return lambda text: reads(text, 100 * value, 100 * one.verdict.limits[1])
    if field == "peak_bytes":
        return lambda text: reads(text, value / (2**30 if "GiB" in text else 2**20))
    assert isinstance(value, Figure), f"{field}: say what its cells show"
    width = value.se if field == "delta_ln_ppl" else half(value)
    shown = [scale * value.mean, *([scale * width] if "±" in SHOWS[field] and width else [])]
    return lambda text: reads(text, *shown) or (field == "e2e_tok_s" and reads(text, shown[0]))


SHOWS = {
    **dict.fromkeys(("decode_tok_s", "e2e_tok_s", "delta_ln_ppl"), "mean ± width"),
    **dict.fromkeys(
        ("ttft_s", "mbu", "same_top1", "perplexity", "kl_mean", "speculation.tokens_per_step"),
        "mean",
    ),
}


def of_tables(root: Element) -> Iterator[Statement]:
    for slug in ("figures", "published"):
        (part,) = (e for e in elements(root, "section") if e.get("aria-labelledby") == f"g1-{slug}")
        for tr in elements(elements(part, "tbody")[0], "tr"):
            (link,) = elements(tr, "a")
            number = int(link.get("href").rpartition("-")[2])
            one = ALL[number - 1]
            yield Statement(link, text_of(link), lambda text, number=number: reads(text, number))
            for td in elements(tr, "td"):
                if field := td.get("data-field"):
                    yield Statement(td, without_notes(td), of_field(one, field))
                elif link not in td and NUMBER.search(without_notes(td)):
                    ranks = one.config.get("tensor_parallel", 1)
                    drafts = (4,) if "draft" in one.config else ()
                    first = one.speculation.acceptance[:1] if one.speculation else ()
                    yield Statement(
                        td,
                        without_notes(td),
                        lambda text, known=(ranks, *drafts, *(100 * a for a in first)): any(
                            reads(text, n) for n in known
                        ),
                    )
            for sup in elements(tr, "sup"):
                notes = len(elements(part, "ol") and elements(elements(part, "ol")[0], "li"))
                yield Statement(
                    sup,
                    text_of(sup),
                    lambda text, notes=notes: all(
                        1 <= int(n) <= notes for n in NUMBER.findall(text)
                    ),
                )


# ------------------------------------------------------------------------- differences


def of_differences(root: Element) -> Iterator[Statement]:
    (part,) = (e for e in elements(root, "section") if e.get("aria-labelledby") == "g1-against")
    base, *rows = elements(elements(part, "tbody")[0], "tr")
    known = {one.cell: one for one in ALL}
    against = known[text_of(elements(base, "th")[0])]
    speed = against.decode_tok_s
    (shown,) = (td for td in elements(base, "td") if NUMBER.search(text_of(td)))
    yield Statement(shown, text_of(shown), lambda text: reads(text, speed.mean, half(speed)))
    for tr in rows:
        one = known[text_of(elements(tr, "th")[0])]
        ratio, _, loss, *_ = elements(tr, "td")
        yield Statement(ratio, text_of(ratio), lambda text, one=one: reads(text, *ratio_of(one)))
        yield Statement(loss, text_of(loss), lambda text, one=one: reads(text, *loss_of(one)))

    def ratio_of(one: Record) -> list[float]:
        return change(against, one)

    def loss_of(one: Record) -> list[float]:
        logs = [[math.log(x) for x in r.perplexity.samples] for r in (one, against)]
        changes = [b - a for b, a in zip(*logs, strict=True)]
        if not any(changes):
            return [0.0]
        low, high = scipy.stats.t.interval(
            0.95, len(changes) - 1, sum(changes) / len(changes), scipy.stats.sem(changes)
        )
        return [sum(changes) / len(changes), low, high]


def change(a: Record, b: Record) -> list[float]:
    """The change of speed from a to b in percent, and its interval by Welch's test."""
    of_a, of_b = ([math.log(x) for x in r.decode_tok_s.samples] for r in (a, b))
    found = scipy.stats.ttest_ind(of_b, of_a, equal_var=False)
    mean = sum(of_b) / len(of_b) - sum(of_a) / len(of_a)
    spread = scipy.stats.t.ppf(0.975, math.floor(found.df)) * mean / found.statistic
    return [100 * math.expm1(x) for x in (mean, mean - spread, mean + spread)]


# ------------------------------------------------------------------------- speculation


def tokens(p: float, k: int) -> float:
    return sum(p**i for i in range(k + 1))


def of_speculation(root: Element) -> Iterator[Statement]:
    (part,) = (e for e in elements(root, "section") if e.get("aria-labelledby") == "g1-drafts")
    known = {one.cell: one for one in ALL}
    twins = {"int4-g64/eager/draft=ngram": "int4-g64/eager", "int8/compile/draft=ngram": None}
    twins["int8/compile/draft=ngram"] = "int8/compile"
    step = {cost.k: cost.draft_s + cost.verify_s for cost in COSTS}
    for li in elements(part, "li"):
        if "step times were not recorded" not in text_of(li):
            yield Statement(li, stripped(text_of(li)), explanation(known["int4-g64/eager"], step))
    main, at = elements(part, "table")
    for tr in elements(elements(main, "tbody")[0], "tr"):
        one = known[text_of(elements(tr, "th")[0])]
        figures, gain = one.speculation, change(known[twins[one.cell]], one)
        expected = [
            gain,
            [figures.tokens_per_step.mean, half(figures.tokens_per_step)],
            [100 * share for share in figures.acceptance],
            [100 * figures.draft_share],
            [100 * figures.off_share],
            [n for c in figures.costs for n in (c.k, 1e3 * c.draft_s, 1e3 * c.verify_s)],
        ]
        for td, numbers in zip(elements(tr, "td"), expected, strict=True):
            yield Statement(td, text_of(td), lambda text, n=numbers: reads(text, *n))
    (tr,) = elements(elements(at, "tbody")[0], "tr")
    plain, *speeds = elements(tr, "td")
    yield Statement(plain, text_of(plain), lambda text: reads(text, 1 / step[0]))
    shares = (0.6, 0.7, 0.8, 0.9, 0.95)
    for th, td, p in zip(elements(at, "th")[2:7], speeds, shares, strict=True):
        yield Statement(th, text_of(th), lambda text, p=p: reads(text, 100 * p))
        speed, k = max((tokens(p, k) / step[k], k) for k in (1, 4))
        yield Statement(td, text_of(td), lambda text, n=(speed, k): reads(text, *n))


def explanation(_: Record, step: dict[int, float]) -> Callable[[str], bool]:
    def break_even(k: int) -> float:
        return next(p for p in itertools.count(0, 1e-6) if tokens(p, k) >= step[k] / step[0])

    p, k = min((break_even(k), k) for k in (1, 4))
    seen = drafting().acceptance
    best = max((0, 1), key=lambda k: (1 + sum(seen[:k])) / step[k])
    said = [4, step[4] / step[0], 100 * p, k, 100 * seen[0], best]
    return lambda text: reads(text, *said)


# ------------------------------------------------------------------------- plots


def of_plots(root: Element) -> Iterator[Statement]:
    known = {one.cell: one for one in ALL}
    explained = {text_of(li).removesuffix(".") for li in elements(root, "li")}
    for figure in elements(root, "figure"):
        name = figure.get("id").removeprefix("g1-")
        for drawing in (e for e in elements(figure, "svg") if e.get("role") == "img"):
            titles = []
            for g in (g for g in elements(drawing, "g") if g.get("data-cell")):
                title = next(e for e in g if str(e.tag).rpartition("}")[2] == "title")
                titles.append(text_of(title))
                holds = TITLES[name](known[g.get("data-cell")])
                yield Statement(title, stripped(text_of(title)), holds)
                for rect in (r for r in elements(g, "rect") if r.get("data-value")):
                    value = float(rect.get("data-value"))
                    (of_part,) = elements(rect, "title")
                    yield Statement(
                        of_part,
                        text_of(of_part),
                        lambda text, value=value: reads(text, float(f"{value:.4g}")),
                    )
            yield from of_texts(drawing, titles, explained)


def of_texts(
    drawing: Element, titles: Sequence[str], explained: Container[str]
) -> Iterator[Statement]:
    (summary,) = elements(drawing, "desc")
    rest = text_of(summary)
    for title in titles:
        rest = rest.replace(title, "")
    if "drafting pays" in rest:  # as the list of the section on drafts says in these words
        yield Statement(summary, text_of(summary).removesuffix("."), explained.__contains__)
    else:
        yield Statement(summary, stripped(rest), lambda text: not NUMBER.search(text))
    said = {number for title in titles for number in NUMBER.findall(title)}
    for text in elements(drawing, "text"):
        if "tick" in text.get("class"):
            continue  # of the axis, against which marks are checked below
        limit = {f"{TOLERANCE:g}"} if "limit" in text.get("class") else set()
        yield Statement(
            text,
            stripped(text_of(text)),
            lambda shown, known=said | limit: set(NUMBER.findall(shown)) <= known,
        )


def speed_quality_title(one: Record) -> Callable[[str], bool]:
    speed, loss = one.decode_tok_s, one.delta_ln_ppl
    width = [half(loss)] if half(loss) else []
    return lambda text: reads(text, speed.mean, half(speed), loss.mean, *width)


def scaling_title(one: Record) -> Callable[[str], bool]:
    speed, first = one.decode_tok_s, next(r for r in ALL if r.cell == "int8/compile")
    times = [speed.mean / first.decode_tok_s.mean, 1] * (one is not first)
    return lambda text: reads(text, speed.mean, half(speed), *times)


def step_title(one: Record) -> Callable[[str], bool]:
    ms, share = 1e3 * one.tpot_s.mean, one.mbu.mean
    return lambda text: reads(text, ms, ms * share, 100 * share)


def gain_title(one: Record) -> Callable[[str], bool]:
    plain = next(r for r in ALL if r.cell == one.cell.removesuffix("/draft=ngram"))
    return lambda text: reads(text, 1 + change(plain, one)[0] / 100)


TITLES = {
    "speed-quality": speed_quality_title,
    "scaling": scaling_title,
    "step-time": step_title,
    "speculation": gain_title,
}


# ------------------------------------------------------------------------- folds


def of_folds(root: Element) -> Iterator[Statement]:
    for article, (number, one) in zip(
        elements(root, "article"), enumerate(ALL, start=1), strict=True
    ):
        (heading,) = elements(article, "h3")
        yield Statement(
            heading,
            stripped(text_of(heading)).partition(".")[0],
            lambda text, number=number: reads(text, number),
        )
        (fold,) = elements(article, "details")
        for table_ in elements(fold, "table"):
            for tr in elements(elements(table_, "tbody")[0], "tr"):
                figure = value_of(one, text_of(elements(tr, "th")[0]))
                for td, text in zip(elements(tr, "td"), samples_row(figure), strict=True):
                    yield Statement(td, text_of(td), text.__eq__)
        held = one.model_dump(mode="json")
        sections = zip(elements(fold, "h4"), elements(fold, "dl"), strict=True)
        for section, (dt, dd) in (
            (text_of(h4), pair)
            for h4, dl in sections
            for pair in zip(elements(dl, "dt"), elements(dl, "dd"), strict=True)
        ):
            path = text_of(dt).split(".")
            value = recorded(held if section == "record" else held[section], path)
            yield Statement(dt, "", lambda _: True)
            yield Statement(dd, text_of(dd), value.__eq__)
        for reason in (p for p in elements(article, "p") if "reason" in p.get("class", "")):
            yield Statement(reason, text_of(reason), (one.reason or "").__eq__)
    for code in elements(root, "code"):
        levers = {str(n) for one in ALL for n in (*one.config.values(), 32, 64, 256, 5)}
        yield Statement(
            code,
            re.sub(r"^printf.*", "", text_of(code)),  # a recipe, which another test runs
            lambda text, levers=levers: set(NUMBER.findall(stripped(text))) <= levers,
        )


def samples_row(figure: Figure) -> list[str]:
    interval = "–" if figure.ci95 is None else "{} to {}".format(*figure.ci95)
    samples = ", ".join(map(str, figure.samples))
    return [str(figure.mean), interval, str(figure.se), str(figure.n), samples]


def recorded(held: Any, path: Sequence[str]) -> str:
    """The value at a path of names, and of numbers from 1 in lists, as a setting shows it."""
    for name in path:
        held = held[int(name) - 1] if isinstance(held, list) else held[name]
    if isinstance(held, list):
        return ", ".join(map(str, held)) or "–"
    return {"True": "yes", "False": "no", "None": "–"}.get(str(held), str(held))


# ------------------------------------------------------------------------- sentences


def stripped(text: str) -> str:
    """Without the names that records give to things, and words that have digits."""
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    names = {one.cell for one in ALL} | {"A Processor", "2025-01-02", "hotloop 0.1.0"}
    names |= {one.reason for one in ALL if one.reason}
    names |= {"torch 2.13.0", "c" * 10, "top-1", "8-bit", "4-bit", "int8", "int4-g64", "fp8"}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "")
    return text


def sentence(text: str) -> bool:
    """Whether each number, in its unit, is one of the few that sentences are about."""
    of = {"%": 100, " ms": 1e3, " GB/s": 1e-9}
    for found in NUMBER.finditer(text):
        unit = next((unit for unit in of if text[found.end() :].startswith(unit)), "")
        known = KNOWN + (SHARES if unit == "%" else COUNTS)
        if not any(is_rounded(found[0], n * of.get(unit, 1)) for n in known):
            return False
    return True


def figures_in_sentences() -> Iterator[float]:
    for one in ALL:
        if (speed := one.decode_tok_s) is not None:
            yield from (speed.mean, half(speed))
        if (loss := one.delta_ln_ppl) is not None:
            yield from (loss.mean, loss.se)
            yield loss.mean + scipy.stats.t.ppf(0.95, loss.n - 1) * loss.se
    yield from (TOLERANCE, 2.7e-5, 0.23, 28.04e9)  # the floor of KL, the gap, the bandwidth


KNOWN = tuple(figures_in_sentences())
CHOSEN = next(r for r in ALL if r.config.get("tensor_parallel") == 2)
RATIOS = [one.decode_tok_s.mean / CHOSEN.decode_tok_s.mean for one in ALL if one.decode_tok_s]
COUNTS = (
    *(1 / ratio for ratio in RATIOS),
    *(len(ALL), *Counter(one.status for one in ALL).values()),
    *(one.verdict.needed for one in ALL if one.verdict and one.verdict.needed),
    *(480, 5, 256, 32, 64, 2, 20),  # items, windows, their tokens, workload, threads, "fewer than"
    0,  # "holds 0", "near 0"
)
SHARES = (
    *(ratio - 1 for ratio in RATIOS),
    *(0.95, 0.01),  # intervals; the margin's share of the accuracy
    *(one.verdict.margin for one in ALL if one.verdict),
    *(one.verdict.loss for one in ALL if one.verdict),
    0.95,  # of greedy answers
)


def of_sentences(root: Element) -> Iterator[Statement]:
    explained = dict(explain_names(ALL))
    for name in ("p", "li", "figcaption", "dd", "dt", "h1", "summary"):
        for element in elements(root, name):
            text = text_of(element)
            if text in explained or text in explained.values():
                yield Statement(element, "", lambda _: True)
            else:
                yield Statement(element, stripped(text), sentence)
    headings = {"95% interval"} | {
        column.heading for column in (*table.FIGURES, *published.LABELS, *published.SPEEDS)
    }
    for th in elements(root, "th"):
        text = text_of(th).removeprefix("★ ")
        if text in headings or not NUMBER.search(stripped(text)):
            yield Statement(th, "", lambda _: True)


# ------------------------------------------------------------------------- the promise


def statements(root: Element) -> list[Statement]:
    """The statements about each element, the most specific ones first."""
    parts: Iterable[Iterator[Statement]] = (
        of_tables(root),
        of_differences(root),
        of_speculation(root),
        of_plots(root),
        of_folds(root),
        of_sentences(root),
    )
    first: dict[int, Statement] = {}
    for each in itertools.chain.from_iterable(parts):
        first.setdefault(id(each.element), each)
    return list(first.values())


@pytest.fixture(scope="module")
def root() -> Element:
    return parsed(to_html(ALL, max_delta_ln_ppl=TOLERANCE))


def test_every_number_of_the_page_is_the_records_where_it_stands(root):
    for each in statements(root):
        assert each.holds(each.text), each.text


def test_there_is_no_number_of_which_nothing_is_known(root):
    known = {id(each.element) for each in statements(root)}
    parents = {child: parent for parent in root.iter() for child in parent}

    def said(element: Element | None) -> bool:
        while element is not None:
            if id(element) in known:
                return True
            element = parents.get(element)
        return False

    left = []
    for element in root.iter():
        kind = str(element.tag).rpartition("}")[2]
        if kind in ("script", "style") or "tick" in element.get("class", ""):
            continue
        if element.text and NUMBER.search(stripped(element.text)) and not said(element):
            left.append(element.text)
        if element.tail and NUMBER.search(stripped(element.tail)) and not said(parents[element]):
            left.append(element.tail)
    assert left == []


def test_another_number_in_its_place_is_seen(root):
    """Each number of the page is changed in its last digit, one at a time."""
    unseen, n = [], 0
    for each in statements(root):
        for found in NUMBER.finditer(each.text):
            digits = re.search(r"\d(?=(?:e[+-]\d+)?$)", found[0])
            changed = found[0][: digits.start()] + str((int(digits[0]) + 5) % 10)
            changed += found[0][digits.end() :]
            n += 1
            if each.holds(each.text[: found.start()] + changed + each.text[found.end() :]):
                unseen.append((each.text, changed))
    assert n > 1000
    assert len(unseen) < 0.02 * n, f"of {n}: {unseen}"


def places(drawing: Element, attribute: str, other: str) -> tuple[list[float], list[float]]:
    """The values of an axis's ticks and their places, in the order of the values."""
    ticks = [e for e in elements(drawing, "text") if "tick" in e.get("class")]
    along = [e.get(other) for e in ticks]
    axis = [e for e in ticks if along.count(e.get(other)) > 1]
    found = sorted((float(text_of(e).replace(",", "")), float(e.get(attribute))) for e in axis)
    return [value for value, _ in found], [place for _, place in found]


def test_marks_are_drawn_where_their_values_are_between_the_ticks(root):
    (figure,) = (f for f in elements(root, "figure") if f.get("id") == "g1-speed-quality")
    for drawing in (e for e in elements(figure, "svg") if e.get("role") == "img"):
        marks = [g for g in elements(drawing, "g") if g.get("data-cell")]
        whiskers = [e.get("d") for e in elements(drawing, "path") if "whisker" in e.get("class")]
        (x, at_x), (y, at_y) = places(drawing, "x", "y"), places(drawing, "y", "x")
        assert len(x) >= 3
        assert len(y) >= 3
        for mark, whisker in zip(marks, whiskers, strict=True):
            across = float(re.search(r"M([\d.]+) [\d.]+V", whisker)[1])
            up = float(re.search(r"M[\d.]+ ([\d.]+)H", whisker)[1])
            scale = (at_x[-1] - at_x[0]) / (x[-1] - x[0])
            expected = at_x[0] + scale * (float(mark.get("data-x")) - x[0])
            assert across == pytest.approx(expected, abs=0.1)
            value, ticks = float(mark.get("data-y")), list(zip(y, at_y, strict=True))
            lower = [place for tick, place in ticks if tick <= value]
            upper = [place for tick, place in ticks if tick >= value]
            assert max(upper, default=0) - 5 <= up <= min(lower, default=math.inf) - 4


def test_bars_are_as_long_as_their_values_by_the_ticks(root):
    (figure,) = (f for f in elements(root, "figure") if f.get("id") == "g1-step-time")
    for drawing in (e for e in elements(figure, "svg") if e.get("role") == "img"):
        values, at = places(drawing, "x", "y")
        scale = (at[-1] - at[1]) / (values[-1] - values[1])
        for bar in (e for e in elements(drawing, "rect") if e.get("data-value")):
            length = scale * float(bar.get("data-value"))
            assert float(bar.get("width")) == pytest.approx(max(0.5, length), abs=0.1)
