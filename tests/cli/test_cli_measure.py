"""The verbs that measure: ``bench``, ``eval``, ``sweep``, and ``report``, which shows it again.

What they call is faked where it would load a model; what is checked is that the command line gets
there, and that what comes back is printed.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_fakes import figure, record

from hotloop.bench.record import Record
from hotloop.cli.app import main
from hotloop.sweep import cell, job, models, plan, runner, store
from hotloop.sweep.cell import base_record
from hotloop.sweep.events import CellFinished, CellStarted
from hotloop.sweep.job import Job
from hotloop.sweep.models import KnownModel, Models
from hotloop.types import EngineConfig
from hotloop.weights.identity import StoredForm, StoredType


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "is_quantized_copy", lambda name: name == "copy")


RANDOM_7B = ["--weights", "random", "--shape", "llama-2-7b"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """Cells that end as ``ok`` at once; the jobs they were given, the references first."""
    given: list[Job] = []
    monkeypatch.setenv("HOTLOOP_CACHE", str(tmp_path / "cache"))

    def run(each: Job, on_event) -> Record:
        given.append(each)
        on_event(CellStarted(each.cell, 1, 1))
        if each.task == "reference":
            each.reference.touch()
        return record(each.config, perplexity=figure(20.0) if each.quality else None)

    for name in ("run_cell", "score_cell", "score_reference"):
        monkeypatch.setattr(cell, name, run)
    monkeypatch.setattr(cell, "refuse_cell", lambda _: None)
    monkeypatch.setattr(job, "Models", FakeModels)
    monkeypatch.setattr(job, "check_length", lambda *_: None)
    return given


UNQUANTIZED = StoredForm(
    types=(StoredType(dtype="BF16", n_tensors=1, n_bytes=1),), quantization=None
)


class FakeModels(Models):
    """Every name is an unquantized model, whose content it is."""

    def __getitem__(self, name: str) -> KnownModel:
        model = KnownModel(name=name, path=Path(name))
        vars(model).update(sha256=name, stored=UNQUANTIZED)
        return model


def test_bench_prints_for_people_and_shows_progress_on_stderr(jobs, capsys):
    assert main(["bench", *RANDOM_7B, "--quant", "int8"]) == 0
    out, err = capsys.readouterr()
    assert "int8/eager" in out.splitlines()[0]
    assert any(line.startswith("decode tok/s") and "10" in line for line in out.splitlines())
    assert "[1/1] int8/auto" in err
    assert "[1/1] int8/eager  ok" in err
    assert len(jobs) == 1


@pytest.mark.usefixtures("jobs")
def test_a_record_for_people_ends_with_the_notes_that_its_lines_cite(monkeypatch, capsys):
    engine = {"notes": ["a not used: slow", "b not used: slower"]}

    def run(each, _):
        return record(each.config, "unstable", engine=engine, quality_reason="not requested")

    monkeypatch.setattr(cell, "run_cell", run)
    assert main(["bench", *RANDOM_7B, "--execution", "eager"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decode tok/s") and line.endswith(" [1] [2]") for line in lines)
    assert lines[lines.index("[1] a not used: slow") + 1] == "[2] b not used: slower"
    assert ["reason", "because"] in [line.split() for line in lines]
    assert "No quality: not requested." in lines


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("gb_s", "shown"), [(1.53, "2.3 s, weights at 1.5 GB/s"), (None, "2.3 s")], ids=["read", "made"]
)
def test_bench_says_how_long_loading_took_and_how_fast_weights_were_read(
    gb_s, shown, monkeypatch, capsys
):
    def run(each, _):
        return record(each.config, load_s=2.34, load_gb_s=gb_s)

    monkeypatch.setattr(cell, "run_cell", run)
    assert main(["bench", *RANDOM_7B, "--execution", "eager"]) == 0
    said = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert ["load", shown] in said


def test_eval_prints_the_remarks_and_notes_of_a_table(jobs, monkeypatch, capsys):
    def score(each, _):
        scored = record(
            each.config,
            perplexity=figure(20.0),
            delta_ln_ppl=figure(0.1),
            engine={"notes": ["210 matrices are dequantized."]},
            provenance={"stored": {"is_quantized": True, "summary": "int4"}},
        )
        speed = ("decode_tok_s", "e2e_tok_s", "ttft_s", "tpot_s")
        return scored.model_copy(update=dict.fromkeys(speed))

    monkeypatch.setattr(cell, "score_cell", score)
    assert main(["eval", "m", "--quant", "int8", "--execution", "eager"]) == 0
    out = capsys.readouterr().out
    assert "[1] 210 matrices are dequantized." in out.splitlines()
    assert "The reference's weights are quantized, as they are stored" in out
    assert "TTFT" not in out
    assert len(jobs) == 1


def test_bench_json_is_the_record_a_sweep_would_write(jobs, capsys):
    argv = ["--execution", "compile", "--prompt-tokens", "5", "--new-tokens", "7", "--batch", "2"]
    assert (
        main(["bench", *RANDOM_7B, *argv, "--repeats", "9", "--weights-seed", "3", "--json"]) == 0
    )
    assert Record.model_validate_json(capsys.readouterr().out).status == "ok"
    config, workload = jobs[0].config, jobs[0].workload
    assert (config.model, config.weights, config.seed) == ("llama-2-7b", "random", 3)
    assert (config.execution, config.max_batch_size) == ("compile", 2)
    assert (workload.prompt_tokens, workload.new_tokens, workload.repeats) == (5, 7, 9)
    assert jobs[0].quality is None


@pytest.mark.usefixtures("jobs")
def test_bench_of_what_does_not_fit_prints_the_record_and_exits_1(monkeypatch, capsys):
    monkeypatch.setattr(
        cell, "run_cell", lambda each, _: record(each.config, status="predicted-oom")
    )
    assert main(["bench", *RANDOM_7B, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "predicted-oom"


def test_bench_prints_why_it_cannot_run_once(jobs, monkeypatch, capsys):
    why = "no GPU is here"
    monkeypatch.setattr(
        cell,
        "refuse_cell",
        lambda each: Record(**base_record(each), status="unsupported", reason=why),
    )
    assert main(["bench", *RANDOM_7B, "--execution", "fused"]) == 2, "as generate refuses it"
    out, err = capsys.readouterr()
    assert (out + err).count(why) == 1
    assert jobs == []


def test_bench_without_a_model_is_a_usage_error(jobs, capsys):
    assert main(["bench"]) == 2
    assert "either MODEL or --shape" in capsys.readouterr().err
    assert jobs == []


def test_eval_compares_with_the_unquantized_model_in_the_same_type(jobs, capsys):
    assert main(["eval", "m", "--quant", "int8", "--dtype", "float32", "--window", "64"]) == 0
    reference, scored = jobs
    assert (reference.config.quant, reference.config.dtype) == ("none", "float32")
    assert scored.reference == reference.reference
    assert scored.config.quant == "int8"
    assert scored.config.max_seq_len == 64
    assert "20" in capsys.readouterr().out


def test_eval_can_go_without_a_reference(jobs, capsys):
    assert main(["eval", "m", "--no-reference", "--json"]) == 0
    assert [each.reference for each in jobs] == [None]
    assert json.loads(capsys.readouterr().out)["perplexity"]["mean"] == 20.0


def test_eval_says_why_there_is_no_reference_and_goes_on(jobs, monkeypatch):
    monkeypatch.setattr(cell, "score_reference", lambda each, _: record(each.config, status="oom"))
    assert main(["eval", "m", "--quant", "int8"]) == 0
    assert jobs[0].reference is None
    assert jobs[0].no_reference_reason == "the reference none/eager ended as oom: because"


def test_what_cannot_run_is_refused_before_its_reference_is_scored(jobs, monkeypatch, capsys):
    monkeypatch.setattr(
        cell,
        "refuse_cell",
        lambda each: Record(**base_record(each), status="unsupported", reason="it is a copy"),
    )
    assert main(["eval", "m", "--quant", "int8"]) == 2
    out = capsys.readouterr().out
    assert "it is a copy" in out
    assert "workload" not in out  # nobody asked for one
    assert jobs == []


class FakeSweeps:
    """Runs nothing: cells end as ``ends`` says, in turn. ``asked`` is what each sweep was given."""

    def __init__(self) -> None:
        self.ends: tuple[str, ...] = ("ok", "failed")
        self.asked: list[SimpleNamespace] = []

    def __call__(self, recipe, results, *, resume, part, ray_address, on_event) -> list[Record]:
        asked = {"resume": resume, "part": part, "ray_address": ray_address}
        self.asked.append(SimpleNamespace(recipe=recipe, results=results, **asked))
        results.mkdir(parents=True)
        records = []
        for i, config in enumerate(runner.expand(recipe)):
            end = self.ends[i % len(self.ends)]
            if end == "Ctrl-C":
                raise KeyboardInterrupt
            on_event(CellStarted(config.name, i + 1, 2))
            records.append(record(config, status=end, delta_ln_ppl=figure(1e-4)))
            store.append(results / store.RECORDS, records[-1])
            on_event(CellFinished(records[-1]))
        return records


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> FakeSweeps:
    fake = FakeSweeps()
    monkeypatch.setattr(runner, "run_sweep", fake)
    return fake


def test_sweep_by_flags_prints_the_table_and_leaves_it_in_the_folder(sweeps, tmp_path, capsys):
    out = tmp_path / "results"
    argv = ["--quant", "none,int8", "--execution", "eager", "--out", str(out)]
    assert main(["sweep", "m", *argv, "--batch", "2", "--window", "64", "--timeout-s", "9"]) == 0
    recipe = sweeps.asked[0].recipe
    assert recipe.matrix.quant == ["none", "int8"]
    assert (recipe.workload.batch, recipe.quality.window, recipe.timeout_s) == (2, 64, 9)
    shown, progress = capsys.readouterr()
    assert "none/eager" in shown
    assert "Recommended" in shown
    assert shown.splitlines() == [line.rstrip() for line in shown.splitlines()]
    assert "none/eager" in progress
    files = {"records.jsonl", "table.md", "table.csv", "published.md", "report.html"}
    assert {file.name for file in out.iterdir()} == files


def test_a_part_of_the_cells_goes_into_a_folder_of_its_own(sweeps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "m", "--cells", "2/3"]) == 0
    assert (sweeps.asked[0].part.index, sweeps.asked[0].part.count) == (2, 3)
    assert sweeps.asked[0].results == Path("results/m-2-of-3")
    assert main(["sweep", "m", "--cells", "4/3"]) == 2


def test_sweep_without_flags_is_the_matrix_of_the_levers(sweeps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "m"]) == 0
    assert len(runner.expand(sweeps.asked[0].recipe)) == 6


@pytest.mark.parametrize(
    ("model", "folder"),
    [("m", "m"), ("./models/small/", "small"), ("models/My model.gguf", "My_model"), (".", "here")],
)
def test_results_of_flags_go_to_the_models_folder_and_that_is_said_first(
    model, folder, sweeps, tmp_path, monkeypatch, capsys
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["sweep", model]) == 0
    assert sweeps.asked[0].results == Path("results", folder)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"Records and tables go to results/{folder}."


def test_the_matrix_of_a_quantized_copy_has_its_own_scheme_alone(sweeps, tmp_path):
    assert main(["sweep", "copy", "--out", str(tmp_path / "a")]) == 0
    assert main(["sweep", "copy", "--quant", "int8", "--out", str(tmp_path / "b")]) == 0
    schemes = [{c.quant for c in runner.expand(asked.recipe)} for asked in sweeps.asked]
    assert schemes == [{"auto"}, {"int8"}]


def test_sweep_takes_a_recipe_and_its_name_for_the_folder(sweeps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("name: mine\nmodel: m\nmatrix: {quant: [int8]}\n")
    assert main(["sweep", "r.yaml", "--resume"]) == 0
    assert sweeps.asked[0].results == Path("results/mine")
    assert sweeps.asked[0].resume


def test_a_recipe_is_not_overruled_by_flags_that_would_go_unnoticed(sweeps, tmp_path, capsys):
    recipe = tmp_path / "r.yml"
    recipe.write_text("model: m\n")
    assert main(["sweep", str(recipe), "--quant", "int8", "--batch", "2", "--no-quality"]) == 2
    assert "--quant, --batch, --no-quality cannot be given with a recipe" in capsys.readouterr().err
    assert sweeps.asked == []


def test_a_recipes_models_can_be_replaced(sweeps, tmp_path):
    recipe = tmp_path / "r.yml"
    recipe.write_text("model: big\nmatrix: {draft: [none, small]}\n")
    argv = ["--weights", "random", "--model", "bigger", "--draft-model", "smaller"]
    assert main(["sweep", str(recipe), *argv, "--out", str(tmp_path / "r")]) == 0
    configs = runner.expand(sweeps.asked[0].recipe)
    assert [(c.model, c.weights, c.draft) for c in configs] == [
        ("bigger", "random", "none"),
        ("bigger", "random", "smaller"),
    ]


def test_a_recipe_of_random_weights_can_be_run_with_a_checkpoint_or_another_shape(sweeps, tmp_path):
    recipe = tmp_path / "r.yml"
    recipe.write_text("model: llama-2-7b\nweights: random\n")
    replacements = (["--weights", "checkpoint", "--model", "m"], ["--shape", "llama-2-13b"])
    for i, argv in enumerate(replacements):
        assert main(["sweep", str(recipe), *argv, "--out", str(tmp_path / f"{i}")]) == 0
    said = [(asked.recipe.model, asked.recipe.weights) for asked in sweeps.asked]
    assert said == [("m", "checkpoint"), ("llama-2-13b", "random")]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["m", "--model", "n", "--draft-model", "d"], "--model, --draft-model can be given only"),
        (["r.yml", "--model", "n", "--shape", "llama-2-7b"], "either --model or --shape"),
        (["r.yml", "--draft-model", "d"], "no cell with a draft model"),
        (["r.yml", "--draft", "ngram", "--draft-tokens", "2", "--tp", "2"], "with a recipe: set"),
        (["r.yml", "--weights-seed", "3"], "--weights-seed cannot be given with a recipe"),
    ],
)
def test_an_invalid_replacement_is_refused(argv, says, sweeps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text("model: m\n")
    assert main(["sweep", *argv]) == 2
    assert says in capsys.readouterr().err
    assert sweeps.asked == []


def test_sweep_takes_drafts_and_devices_as_axes(sweeps, tmp_path):
    argv = ["--quant", "int8", "--execution", "eager", "--tp", "1,2", "--draft", "none,ngram,small"]
    of_drafts = ["--draft-quant", "int8", "--draft-tokens", "2", "--draft-policy", "always"]
    assert main(["sweep", "m", *argv, *of_drafts, "--out", str(tmp_path / "r")]) == 0
    configs = runner.expand(sweeps.asked[0].recipe)
    assert [config.name for config in configs] == [
        f"int8/eager{tp}{draft}"
        for tp in ("", "/tp2")
        for draft in ("", "/draft=ngram-2-always", "/draft=small:int8-2-always")
    ]


def test_a_number_of_devices_that_is_none_is_refused_by_its_place(sweeps, capsys):
    assert main(["sweep", "m", "--tp", "1,two"]) == 2
    assert "--tensor-parallel: must be an integer" in capsys.readouterr().err
    assert sweeps.asked == []


@pytest.mark.usefixtures("sweeps")
def test_sweep_json_is_a_record_a_line(tmp_path, capsys):
    argv = ["--quant", "none,int8", "--execution", "eager", "--out", str(tmp_path / "r")]
    assert main(["sweep", "m", *argv, "--json"]) == 0
    records = map(Record.model_validate_json, capsys.readouterr().out.splitlines())
    assert [(r.cell, r.status) for r in records] == [("none/eager", "ok"), ("int8/eager", "failed")]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (("ok", "failed"), 0),
        (("predicted-oom", "failed"), 0),
        (("unsupported", "oom"), 0),
        (("failed", "timeout"), 1),
        (("ok", "Ctrl-C"), 130),
        (("Ctrl-C", "ok"), 130),
    ],
)
def test_the_exit_code_of_a_sweep_says_whether_anything_was_learned(
    ends, code, sweeps, tmp_path, capsys
):
    sweeps.ends = ends
    argv = ["--quant", "none,int8", "--execution", "eager", "--out", str(tmp_path / "r")]
    assert main(["sweep", "m", *argv]) == code
    out, err = capsys.readouterr()
    assert ("none/eager" in out) == (ends[0] != "Ctrl-C")
    assert ("--resume continues" in err) == (code == 130)


def test_dry_run_prints_cells_and_predicted_memory_and_runs_nothing(sweeps, monkeypatch, capsys):
    def planned(recipe):
        config = EngineConfig(model=recipe.model)
        bytes_ = {f"{part}_bytes": 2**20 for part in ("weights", "cache", "total", "free")}
        yield plan.PlannedCell(cell="a", config=config, predicted_bytes=bytes_, fits=False)
        yield plan.PlannedCell(cell="b", config=config, unsupported="[no] such groups")
        ranks = replace(config, tensor_parallel=2)
        yield plan.PlannedCell(cell="c", config=ranks)

    monkeypatch.setattr(plan, "plan", lambda recipe: list(planned(recipe)))
    assert main(["sweep", "m", "--dry-run"]) == 0
    title, _, heading, first, second, third, _, reason = capsys.readouterr().out.splitlines()
    assert title.startswith("Memory per rank of each cell")
    assert heading.split()[:2] == ["configuration", "weights"]
    assert first.split() == ["a", *["1", "MiB"] * 4, "no"]
    assert second.split() == ["b", "unsupported"]
    assert third.split() == ["c", "not", "known"]
    assert reason == "b: [no] such groups"

    assert main(["sweep", "m", "--dry-run", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["cell"], each["fits"]) for each in said] == [
        ("a", False),
        ("b", None),
        ("c", None),
    ]
    assert sweeps.asked == []


@pytest.mark.usefixtures("sweeps")
def test_a_dry_run_in_which_no_cell_can_run_says_so_and_exits_1(monkeypatch, capsys):
    config = EngineConfig(model="m")
    cells = [
        plan.PlannedCell(cell="a", config=config, fits=False),
        plan.PlannedCell(cell="b", config=config, unsupported="no such groups"),
    ]
    monkeypatch.setattr(plan, "plan", lambda _: cells)
    assert main(["sweep", "m", "--dry-run"]) == 1
    assert "no cell can run here" in capsys.readouterr().err


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for quant in ("none", "int8"):
        config = EngineConfig(model="m", quant=quant)
        store.append(tmp_path / store.RECORDS, record(config, delta_ln_ppl=figure(1e-4)))
    with (tmp_path / store.RECORDS).open("a") as file:
        file.write('{"half')
    return tmp_path


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json"])
def test_report_prints_every_format_and_names_damaged_lines_on_stderr(results, form, capsys):
    assert main(["report", str(results), "--format", form]) == 0
    out, err = capsys.readouterr()
    assert "line 3" in err
    match form:
        case "json":
            cells = [json.loads(line)["cell"] for line in out.splitlines()]
            assert cells == ["none/eager", "int8/eager"]
        case "csv":
            rows = csv.DictReader(io.StringIO(out))
            assert [row["cell"] for row in rows] == ["none/eager", "int8/eager"]
        case "markdown":
            assert out.startswith("| configuration")
        case "table":
            assert "Recommended" in out


def test_the_reference_layout_joins_folders(results, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    config = EngineConfig(model="n", quant="none", tensor_parallel=4)
    store.append(other / store.RECORDS, record(config, status="unsupported"))
    argv = ["report", str(results), str(other), "--layout", "published"]

    assert main([*argv, "--format", "markdown"]) == 0
    first, second = capsys.readouterr().out.split("## ")[1:]
    assert first.startswith("m\n\n| Quantization |")
    assert "unsupported: because" in second
    assert main(argv) == 0
    assert "Tensor" in capsys.readouterr().out
    assert main([*argv, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["model"], row["quantization"]) for row in rows] == [
        ("m", "none"),
        ("m", "int8"),
        ("n", "none"),
    ]
    assert main([*argv, "--json"]) == 0
    cells = [json.loads(line)["cell"] for line in capsys.readouterr().out.splitlines()]
    assert cells == ["none/eager", "int8/eager", "none/auto/tp4"]


def test_the_full_layout_is_of_one_folder(results, capsys):
    assert main(["report", str(results), str(results)]) == 2
    assert "only --html, --png and --layout published combine several" in capsys.readouterr().err


def test_report_leaves_the_tables_in_the_folder_where_it_is_asked_to(results, capsys):
    assert main(["report", str(results)]) == 0
    assert [file.name for file in results.iterdir()] == [store.RECORDS]
    assert main(["report", str(results), "--write", "--layout", "published"]) == 0
    assert {file.name for file in results.iterdir()} == {
        store.RECORDS,
        "table.md",
        "table.csv",
        "published.md",
        "report.html",
    }
    assert main(["report", str(results / store.RECORDS), "--write"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_report_writes_one_page_and_prints_its_path(results, tmp_path, capsys):
    assert main(["report", str(results), "--html"]) == 0
    page = results / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    joined = tmp_path / "joined.html"
    assert main(["report", str(results), str(results), "--html", "--out", str(joined)]) == 0
    assert joined.read_text() == page.read_text(), "the last attempt at a cell counts"
    assert main(["report", str(results), "--out", str(joined)]) == 2
    assert "add --html" in capsys.readouterr().err


def test_report_json_is_the_json_format(results, capsys):
    main(["report", str(results), "--format", "json"])
    by_format = capsys.readouterr().out
    main(["report", str(results), "--json"])
    assert capsys.readouterr().out == by_format


def test_report_of_nothing_is_a_usage_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
