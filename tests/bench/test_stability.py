import re
import subprocess
import sys
import time

import pytest

from hotloop.bench.stability import CpuTimes, cpu_times, explain_instability


def test_small_scatter_is_stable():
    assert explain_instability([1.0, 1.02, 0.99, 1.01, 1.0]) is None
    assert explain_instability([1.0]) is None


@pytest.mark.parametrize(
    ("seconds", "cause"),
    [
        ([1.0, 1.1, 1.2, 1.3, 1.4], "grew steadily, by 40%.*heat or a power limit"),
        ([1.0, 1.05, 1.04, 1.2, 1.3], "grew steadily"),
        ([1.4, 1.2, 1.1, 1.05, 1.04], "fell steadily, by 26%.*warm-up"),
        ([1.5, 1.0, 1.01, 0.99, 1.0], "repeat 1 took 50% longer.*warm-up was too short"),
        ([1.5, 1.0, 1.0, 1.0, 1.0], "repeat 1 took 50% longer"),
        ([1.0, 1.01, 1.5, 0.99, 1.0], "repeat 3 took 50% longer.*another process"),
        ([1.0, 1.01, 0.5, 0.99, 1.0], "repeat 3 took 50% less.*another process slowed the others$"),
        ([0.5, 1.01, 1.0, 0.99, 1.0], "repeat 1 took 50% less.*another process slowed the others$"),
        ([1.0, 1.4, 0.8, 1.3, 0.9], "no pattern"),
        ([1.0, 1.5, 1.0], "3 repeats are too few"),
    ],
)
def test_instability_names_its_likely_cause(seconds, cause):
    explanation = explain_instability(seconds)
    assert explanation is not None
    assert "coefficient of variation, limit 5%" in explanation
    assert re.search(cause, explanation)


@pytest.mark.parametrize(
    ("spread", "shown"), [(0.0504, "5.04%"), (0.0512, "5.1%"), (0.056, "6%"), (0.2, "20%")]
)
def test_a_variation_above_the_limit_never_reads_as_the_limit(spread, shown):
    half = spread / 2**0.5
    explanation = explain_instability([1 - half, 1 + half])
    assert explanation is not None
    assert explanation.startswith(f"time per token varies by {shown} between")


def test_what_the_machine_did_meanwhile_is_quoted_only_where_it_matters():
    seconds = [1.0, 1.4, 0.8, 1.3, 0.9]
    quiet = explain_instability(
        seconds, others_cpu=[0.01, None, 0.02, 0.0, 0.0], sm_clock_mhz=[1980, None, 1965, 1980]
    )
    assert quiet == explain_instability(seconds)
    busy = explain_instability(
        seconds, others_cpu=[0.1, 0.4, None, 0.3, 0.1], sm_clock_mhz=[1980, 1410, 1980]
    )
    assert "other processes took up to 40% of the CPU" in busy
    assert "between 1410 and 1980 MHz" in busy


def test_texts_that_drafts_suit_unequally_are_not_blamed_on_the_machine():
    seconds = [1.0, 1.4, 0.8, 1.3, 0.9]
    varied = explain_instability(seconds, tokens_per_step=[2.4, 1.2, 3.1, 1.3, 2.6])
    assert varied is not None
    assert varied.endswith("acceptance varies by text, from 1.20 to 3.10 tokens per step")
    drawn = explain_instability(
        seconds, tokens_per_step=[2.4, 1.2, 3.1, 1.3, 2.6], acceptance_assumed=True
    )
    assert drawn is not None
    assert drawn.endswith("drafts are accepted at random, from 1.20 to 3.10 tokens per step")
    alike = explain_instability(seconds, tokens_per_step=[2.4, 2.41, 2.4, 2.39, 2.4])
    assert alike == explain_instability(seconds)
    assert explain_instability([1.0] * 5, tokens_per_step=[1.2, 3.1, 1.3, 2.6, 2.0]) is None


def test_own_work_and_that_of_ended_children_is_not_blamed_on_others():
    before = CpuTimes(total=100, busy=40, own=10)
    after = CpuTimes(total=200, busy=120, own=40)
    assert after.others_since(before) == pytest.approx(0.5)
    assert CpuTimes(total=100.02, busy=40.02, own=10).others_since(before) is None

    start = cpu_times()
    spin = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert cpu_times().own - start.own > 0.25
