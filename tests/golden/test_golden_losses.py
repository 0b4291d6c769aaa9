"""Twenty steps of five recipes against recordings: bits on the same platform, else the start."""

import json

import pytest

from tests.golden.losses import FOLDER, RECIPES, differences, golden_file, platform_name, train

ELSEWHERE_STEPS, ELSEWHERE_TOLERANCE = 3, 1e-3
"""Without a recording of the platform: rounding differs, and grows with the steps."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_equal_the_recording(recipe: str) -> None:
    curve = train(recipe)
    file = golden_file(platform_name())
    if file.exists():
        lines = differences(curve, json.loads(file.read_text())[recipe])
        assert not lines, f"{recipe}: " + "; ".join(lines)
        return
    recordings = sorted(FOLDER.glob("torch-*.json"))
    assert recordings
    expected = json.loads(recordings[-1].read_text())[recipe]
    for name in ("lm_loss", "grad_norm"):
        start = expected[name][:ELSEWHERE_STEPS]
        assert curve[name][:ELSEWHERE_STEPS] == pytest.approx(start, rel=ELSEWHERE_TOLERANCE)


def test_a_difference_in_the_last_bit_is_found() -> None:
    curve = {"lm_loss": [1.0, 0.1 + 0.2]}
    assert differences(curve, {"lm_loss": [1.0, 0.3]}) == [
        "lm_loss at step 2: 0.30000000000000004, recorded 0.3"
    ]
