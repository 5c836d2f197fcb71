"""The process of one cell, which ``process`` starts with a file descriptor FD as its argument.

It reads a job, one line of JSON, from stdin, and writes events, a line of JSON each, to the file
descriptor FD; the last event has the record. stdout and stderr go to the log.

stdin stays open as long as the parent lives. When it closes, the parent has ended and nothing reads
the result. Then the whole process group ends, and so do the processes that this process started in
other sessions.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

from hotloop.parallel.link import end_group
from hotloop.sweep.cell import run_cell, score_reference
from hotloop.sweep.descendants import CELL_ID, end_descendants
from hotloop.sweep.events import CellFinished, Event, to_line
from hotloop.sweep.job import Job


def main() -> None:
    """Runs the job that stdin holds, and writes its events to the descriptor in ``sys.argv``."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    job = Job.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe = int(sys.argv[1])
    os.set_inheritable(pipe, False)  # or a process started here could hold it open

    def send(event: Event) -> None:
        line = to_line(event)
        while line:
            line = line[os.write(pipe, line) :]

    run = score_reference if job.task == "reference" else run_cell
    send(CellFinished(run(job, send)))


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    if cell_id := os.environ.get(CELL_ID):
        end_descendants(cell_id)
    end_group()
