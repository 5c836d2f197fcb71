"""``hotloop pull``: downloads a model by its name."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App

from hotloop.cli.engine import note_cache
from hotloop.cli.options import MODEL, Json, option
from hotloop.cli.output import note, print_json, print_text

app = App(
    name="pull",
    help_epilogue="""\
Examples:
  hotloop pull smollm2-135m
  hotloop pull HuggingFaceTB/SmolLM2-360M-Instruct""",
)


@app.default
def pull(
    name: Annotated[str, option(MODEL, "A short name, or ORG/MODEL on the Hugging Face hub.")],
    /,
    *,
    json: Json = False,
) -> int:
    """Download a model, and print its path.

    A model that was downloaded before is only verified. Then every command accepts its name.
    """
    from hotloop.weights import hub

    note_cache()
    path = hub.pull(name, progress=note)
    if json:
        print_json({"name": name, "path": str(path)})
    else:
        print_text(str(path))
    return 0
