"""Loading takes the memory of the quantized model, and of three of its largest tensors at most."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loading_peaks import ENCODINGS, ENVIRONMENT

SCRIPT = Path(__file__).with_name("loading_peaks.py")
TENSORS = 3


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("peaks")
    # A process of its own: what others free meanwhile would be a part of the figures.
    command = [sys.executable, str(SCRIPT), str(folder)]
    environment = os.environ | ENVIRONMENT
    return json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_peak_is_within_the_model_and_three_tensors(encoding, peaks):
    peak, model, largest = (peaks[encoding][key] for key in ("peak", "model", "largest"))
    assert peak <= model + TENSORS * largest, f"{(peak - model) / largest:.2f} tensors"
    assert peak >= 0.8 * model, "the model itself was measured"
