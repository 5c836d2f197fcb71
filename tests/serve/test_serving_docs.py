"""docs/serving.md has every option, limit and metric of the server, and examples that it takes.

``python tests/serve/test_serving_docs.py`` writes the table of options again.
"""

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import httpx2

from hotloop.cli import help_pages, serve
from hotloop.engine.service import MAX_UNREAD_BYTES
from hotloop.serve.served import STALLED_S
from hotloop.serve.settings import KIB, MIB, ServerSettings
from hotloop.types import MAX_GRAMMAR_BYTES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"


def entries() -> Iterator[tuple[str, str]]:
    """The options of the help page and what it says of each."""
    name, text = "", ""
    for line in (help_pages.PAGES / "serve.txt").read_text().splitlines():
        if not line.startswith("│ "):
            continue
        content = line.strip("│").removeprefix(" ").rstrip()
        if content.startswith(" "):
            text += f" {content.strip()}"
            continue
        if name:
            yield name, text
        name, _, text = content.partition("  ")
        text = text.strip()
    yield name, text


def options() -> str:
    """The table of options."""
    lines = ["| option | meaning | default |", "|---|---|---|"]
    for name, text in entries():
        default = re.search(r" \[default: (.*)\]$", text)
        meaning = text[: default.start()] if default else text
        meaning = re.sub(r" \[choices: (.*)\]$", r" One of \1.", meaning).replace("*", r"\*")
        lines.append(f"| `{name}` | {meaning} | {default[1] if default else ''} |")
    return "\n".join(lines)


def test_every_option_is_in_the_table():
    _, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, _ = rest.partition(END)
    assert table.strip() == options(), f"run python {Path(__file__).relative_to(ROOT)}"


def test_the_limits_are_those_of_the_settings():
    settings = ServerSettings()
    for stated in (
        f"| body of a request | {settings.max_body_bytes // MIB} MiB",
        f"| depth of its JSON | {settings.max_depth} |",
        f"| headers | {settings.max_header_bytes // KIB} KiB, {settings.max_headers} of them",
        f"| {settings.headers_s:g} s, {settings.body_s:g} s, then 408",
        f"| connections | {settings.max_connections},",
        f"closed after {settings.keep_alive_s:g} s",
        f"prompts times `n` | {settings.max_choices} |",
        f"| stop strings | {settings.max_stops} |",
        f"cancelled after {settings.send_s:g} s",
        f"every {settings.ping_s:g} s",
        f"or when it is {MAX_UNREAD_BYTES // MIB} MiB behind",
        f"| a schema or grammar | {MAX_GRAMMAR_BYTES // KIB} KiB",
        f"beyond {STALLED_S:g} s `/health` answers 503",
    ):
        assert stated in PAGE.read_text()


def test_every_metric_is_in_the_table(server):
    exposed = httpx2.get(f"{server.url}/metrics", timeout=600).text
    families = {
        name + ("_total" if kind == "counter" and not name.endswith("_total") else "")
        for name, kind in re.findall(r"^# TYPE (hotloop:\S+) (\S+)$", exposed, re.MULTILINE)
        if not name.endswith("_created")
    }
    assert families == set(re.findall(r"`(hotloop:\w+)`", PAGE.read_text()))


def test_commands_of_the_examples_have_options_that_exist():
    known = set(re.findall(r"--[\w-]+", options()))
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / "deploy" / "hotloop.service")
    service = unit["Service"]
    container = (ROOT / "deploy" / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", container, re.MULTILINE)
    for command in re.findall("hotloop serve.*", PAGE.read_text()):
        assert set(re.findall(r"--[\w-]+", command)) <= known
    words = shlex.split(service["ExecStart"].replace("\\\n", " "))
    for command in (words, [*json.loads(entry), "model"]):
        assert command[1] == "serve"
        serve.app.parse_args(command[2:], exit_on_error=False, print_error=False)  # or it raises
    drain_s = float(words[words.index("--drain-s") + 1])
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) > drain_s


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{options()}\n\n{END}{after}")
