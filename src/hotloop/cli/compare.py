"""``hotloop compare``: decides whether measurement B is worse than measurement A."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Token

from hotloop.cli.options import OUTPUT, QUALITY, WORKLOAD, Json, option
from hotloop.cli.output import note, print_json, print_rich, print_text
from hotloop.errors import shorten_value
from hotloop.types import MAX_ACCURACY_LOSS, MAX_DELTA_LN_PPL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop.report.compare import Comparison

app = App(
    name="compare",
    help_epilogue="""\
Examples:
  hotloop compare results/main results/branch
  hotloop compare results/main results/branch --max-slowdown 5% --json
  hotloop compare results/demo:int8/eager results/demo:int8/compile""",
)


_UNITS = {"speed": "", "quality": " Δ ln ppl", "accuracy": " points of accuracy"}


_MIN_SHARE = 1e-6
"""The smallest share above 0 that is accepted."""


def _share(_type: object, tokens: Sequence[Token]) -> float:
    """Reads a share such as ``2%`` or ``0.02``."""
    (token,) = tokens
    text = token.value.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not (share == 0 or _MIN_SHARE <= share < 1):
        raise ValueError(f"{shorten_value(token.value)} is not a share: give one such as 2%.")
    return share


def _share_above_0(type_: object, tokens: Sequence[Token]) -> float:
    """Reads a share above 0: no number of items can rule out every loss."""
    if (share := _share(type_, tokens)) == 0:
        raise ValueError("no number of items rules out a loss of 0: give a share such as 1%.")
    return share


def _loss(_type: object, tokens: Sequence[Token]) -> float:
    """Reads a loss of ln perplexity."""
    (token,) = tokens
    try:
        loss = float(token.value)
    except ValueError:
        loss = -1.0
    if not 0 <= loss < 100:
        raise ValueError(f"{shorten_value(token.value)} is not a loss: give one such as 0.02.")
    return loss


@app.default
def compare(
    a: Annotated[str, option(OUTPUT, "A results folder or a file of records; or PATH:CELL.")],
    b: Annotated[str, option(OUTPUT, "The results to compare with A, given in the same way.")],
    /,
    *,
    max_slowdown: Annotated[
        float,
        option(WORKLOAD, "Loss of decode speed that is tolerated.", "2%", converter=_share),
    ] = 0.02,
    max_loss: Annotated[
        float,
        option(QUALITY, "Increase of ln perplexity that is tolerated.", converter=_loss),
    ] = MAX_DELTA_LN_PPL,
    max_accuracy_loss: Annotated[
        float,
        option(
            QUALITY,
            "Loss of task accuracy that is tolerated, as a share of A's.",
            "1%",
            converter=_share_above_0,
        ),
    ] = MAX_ACCURACY_LOSS,
    json: Json = False,
) -> int:
    """Decide whether one measurement is slower or worse than another.

    Speed, perplexity and answers to tasks are compared, as far as both have them.
    Cells are matched by configuration, or by name; two sets of one cell each are
    compared whatever their configurations. A verdict needs a confidence interval
    that excludes the other outcome. The exit code is 0 for no worse, 1 for worse,
    and 2 for undecided. An invalid command line ends with 2 as well.
    """
    from hotloop.report.compare import EXIT_CODES, read_set
    from hotloop.report.compare import compare as compare_sets

    before, after = (read_set(name, on_problem=note) for name in (a, b))
    found = compare_sets(
        before,
        after,
        max_slowdown=max_slowdown,
        max_delta_ln_ppl=max_loss,
        max_accuracy_loss=max_accuracy_loss,
    )
    if json:
        print_json(found.to_dict())
    else:
        _show(found)
    return EXIT_CODES[found.verdict]


def _show(found: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table("configuration", "", "B against A [95%]", "verdict", box=None, pad_edge=False)
    for cell in found.cells:
        for number, compared in enumerate(cell.quantities):
            unit = _UNITS[compared.quantity] if compared.change is not None else ""
            why = f" ({compared.why})" if compared.why else ""
            name = cell.name if number == 0 else ""
            texts = (name, compared.quantity, compared.text + unit, compared.verdict + why)
            grid.add_row(*map(Text, texts))
    print_rich(grid)
    for cell in found.cells:
        for text in cell.notes:
            print_text(f"{cell.name}: {text}")
    for text in found.missing:
        print_text(text)
    print_text(f"\nB is {found.verdict}." if found.verdict != "undecided" else "\nUndecided.")
