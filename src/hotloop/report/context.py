"""The context of a table: the model, device, versions and workload of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from hotloop.bench.record import Record
from hotloop.report.numbers import memory, percent, significant


def context(
    records: Sequence[Record], *, leave_out: Iterable[str] = ()
) -> tuple[tuple[str, str], ...]:
    """Returns the context of records, as pairs of a label and a text.

    If records differ, each value is listed with its cells.

    Args:
        records: The records of a table.
        leave_out: Labels of ``CONTEXT`` to leave out.
    """
    lines = []
    for label, of in CONTEXT.items():
        if label in leave_out:
            continue
        cells: dict[str, list[str]] = {}
        for record in records:
            if text := of(record):
                cells.setdefault(text, []).append(record.cell)
        if len(cells) == 1:
            lines.append((label, next(iter(cells))))
        else:
            lines += [(label, f"{text} ({', '.join(names)})") for text, names in cells.items()]
        if label == "device" and (bandwidth := _bandwidth(records)):
            lines.append(("measured read bandwidth", bandwidth))
    return tuple(lines)


RANDOM_ACCEPTANCE = (
    "Random weights: the acceptance is that of unrelated models, and not that of trained models."
)


def assumed_note(record: Record) -> str | None:
    """Returns a note that the acceptance was assumed; None if drafts were verified."""
    share = record.speculation and record.speculation.assumed_acceptance
    if share is None:
        return None
    return (
        f"Assumed acceptance: each draft was accepted with probability {share:g}, whether or not "
        "it "
        "was right. The speed holds for this acceptance, which these models may not reach."
    )


def has_random_weights(record: Record) -> bool:
    """Returns whether a record's model has random weights."""
    return record.config.get("weights") == "random"


def has_random_acceptance(record: Record) -> bool:
    """Returns whether a record's drafts were verified by a model with random weights."""
    verified = record.speculation is not None and assumed_note(record) is None
    return verified and has_random_weights(record)


def notes(record: Record) -> tuple[str, ...]:
    """Returns the engine's notes: above all, why a faster path was not taken."""
    return (record.engine or {}).get("notes", ())


def model_name(record: Record) -> str:
    """Returns the name of the model, and whether it has random weights."""
    random = ", random weights" if has_random_weights(record) else ""
    return f"{record.config.get('model')}{random}"


def device_name(record: Record) -> str:
    """Returns the device's name; empty if the cell ended before it was known."""
    return record.provenance.get("device", {}).get("name", "")


def _device(record: Record) -> str:
    """Names the device; a GPU together with its host, whose speed matters too."""
    device, host = record.provenance.get("device", {}), record.provenance.get("host", {})
    if (n_threads := device.get("n_threads")) is not None:
        return f"{device_name(record)}, {n_threads} thread{'s' * (n_threads > 1)}"
    if device.get("kind") != "cuda" or not (cpu := host.get("cpu")):
        return device_name(record)
    n_cpus = host.get("n_cpus_allowed")
    return f"{device_name(record)}, host {cpu}" + (f", {n_cpus} CPUs" if n_cpus else "")


def _bandwidth(records: Sequence[Record]) -> str:
    """Returns the measured read bandwidth, over all cells."""
    devices = [record.provenance.get("device", {}) for record in records]
    measured = sorted(d["read_bytes_per_s"] / 1e9 for d in devices if d.get("read_bytes_per_s"))
    if not measured:
        return ""
    low, high = (significant(measured[end], 3) for end in (0, -1))
    return f"{low if low == high else f'{low} to {high}'} GB/s"


def bandwidth_note(record: Record, field: str, records: Iterable[Record]) -> str | None:
    """Returns a note on a memory bandwidth utilization above 100 %; None if it is not above.

    Args:
        record: The record.
        field: ``mbu`` or ``mbu_datasheet``.
        records: The records of the table: their measured bandwidths show how it varied.
    """
    mbu = record.mbu if field == "mbu" else record.mbu_datasheet
    if mbu is None or mbu.mean <= 1:
        return None
    device = record.provenance.get("device", {})
    text, causes = "MBU above 100%: a step reads more bytes per second than", []
    bandwidth = device.get("read_bytes_per_s")
    if field == "mbu_datasheet":
        text += " the memory bandwidth in the datasheet."
    elif bandwidth is None:
        text += " the measured read bandwidth."
    else:
        measured = significant(bandwidth / 1e9, 3)
        text += f" the read bandwidth that was measured before, {measured} GB/s."
        most = max(
            r.provenance["device"].get("read_bytes_per_s") or 0.0
            for r in records
            if device_name(r) == device_name(record) and "device" in r.provenance
        )
        if most > bandwidth:
            against = percent(mbu.mean * bandwidth / most)
            causes.append(
                f"Before other cells {significant(most / 1e9, 3)} GB/s were measured; MBU is "
                f"{against} of that."
            )
    cache = device.get("last_level_cache_bytes")
    weights = (record.engine or {}).get("weight_bytes_per_step")
    if cache and weights:
        # The ranks of a CPU share its cache, and each reads weights of its own.
        sharing = record.config.get("tensor_parallel", 1) if device.get("kind") == "cpu" else 1
        held = percent(min(1.0, cache / (weights * sharing)))
        causes.append(f"The last-level cache ({memory(cache)}) can hold {held} of these weights.")
    if not causes:
        slowed = ", or other work slowed that measurement" if field == "mbu" else ""
        causes = [f"A cache may hold a part of the weights{slowed}."]
    return " ".join((text, *causes))


def _versions(record: Record) -> str:
    hotloop = record.provenance.get("hotloop", {})
    changed = " with local changes" if hotloop.get("git_dirty") else ""
    commit = f", commit {hotloop['git_commit'][:10]}{changed}" if hotloop.get("git_commit") else ""
    versions = {"hotloop": hotloop.get("version"), **record.provenance.get("versions", {})}
    named = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join(named) + commit


def _workload(record: Record) -> str:
    if (workload := record.workload) is None:
        return ""
    batch = f"batch {workload.batch}, " if workload.batch != 1 else ""
    return (
        f"{batch}{workload.prompt_tokens} prompt tokens, {workload.new_tokens} new tokens, "
        f"{workload.repeats} repeat{'s' * (workload.repeats != 1)}"
    )


def _text(record: Record) -> str:
    if (protocol := record.quality_protocol) is None:
        return ""
    against = f", against {protocol.reference}" if protocol.reference else ""
    return f"{protocol.text}, {protocol.n_windows} windows of {protocol.window} tokens{against}"


CONTEXT: Mapping[str, Callable[[Record], str]] = {
    "model": model_name,
    "weights stored as": lambda record: record.provenance.get("stored", {}).get("summary", ""),
    "device": _device,
    "element type": lambda record: (record.engine or {}).get("dtype", ""),
    "versions": _versions,
    "other engines": lambda record: (record.engine or {}).get("version") or "",
    "workload": _workload,
    "text": _text,
    "date": lambda record: record.started_at[:10],
}
"""The text of each label, in order; empty texts are left out."""
