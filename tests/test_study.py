"""The cases, measures, arms and statistics of the study of presets."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import study
import study_cases
import study_measures
from study_cases import REGIMES, case_of


@pytest.mark.parametrize("name", ["few_steps", "two_objects", "open_prompt"])
def test_the_truth_of_an_edit_is_right(name):
    case = case_of(REGIMES[name], 3)
    assert (case.truth == case.video)[~case.mask].all()
    assert case.prompt.endswith(case.target.shape)
    assert (case.target.colour in case.prompt) == (name != "open_prompt")
    best = study_measures.measure(case, case.truth)
    assert best.right and best.background_psnr == np.inf and best.ring_error == 0
    assert best.truth_psnr > 60 and best.nearest_psnr > 40 and best.flicker < 1
    kept = study_measures.measure(case, case.video)  # an edit that does nothing
    assert not kept.right and kept.nearest_psnr < 20


def test_a_moved_object_is_near_a_valid_render_alone():
    case = case_of(REGIMES["loose_mask"], 1)
    moved = np.roll(case.truth, 2, axis=2)
    moved[~case.mask] = case.video[~case.mask]
    found = study_measures.measure(case, moved)
    assert found.right and found.nearest_psnr > found.truth_psnr + 3


def test_other_objects_lie_off_the_mask():
    one, two = (case_of(REGIMES[name], 5) for name in ("few_steps", "two_objects"))
    changed = (one.video != two.video).any(-1)
    assert changed.any() and not (changed & two.mask).any()


def test_arms():
    assert [study.name_of(arm) for arm in ("cfg", "cfg:omega=2", "a=cfg:omega=2")] == [
        "cfg",
        "cfg:omega=2",
        "a",
    ]
    assert len({study.name_of(arm) for arm in study.ARMS}) == len(study.ARMS) >= 13
    regime = REGIMES["strong_guidance"]
    halved = study.settings_of(regime, "cfg_half=cfg:omega=0.5")
    assert halved.sample.guidance_scale == 5 and halved.sample.steps == 20
    late = study.settings_of(regime, study.ARMS[-1])
    assert (late.lock.kappa, late.lock.omega_floor, late.lock.omega_ceiling) == (8, 0.5, 0.5)
    assert late.lock.background == "source" and late.lock.rescale_uncond


def test_statistics():
    scores, failed = np.array([1.0, 2, 3, 4]), np.array([False, False, True, True])
    assert study_measures.auroc(scores, failed) == 1
    assert study_measures.auroc(-scores, failed) == 0
    assert study_measures.auroc(np.ones(4), failed) == 0.5
    mean, low, high = study_measures.interval(np.arange(100.0))
    assert mean == 49.5 and 43 < low < 46 and 53 < high < 56
    assert np.isnan(study_measures.auroc_interval(scores, np.zeros(4, bool))).all()


def test_signals_are_of_late_steps():
    masks = np.zeros((1, 1, 2, 1), bool)
    masks[0, 0, 0] = True
    heard = study.Signals(steps=5, window=2, masks=masks)

    class Step:
        def __init__(self, number, inside):
            self.number, self.inside = number, inside

        def estimate(self):
            return np.array([self.inside, 7.0]).reshape(1, 1, 2, 1, 1)

    for number, inside in enumerate([0.0, 10, 20, 22, 26]):
        heard.on_step(Step(number, inside))
    ((mean, most, whole, change),) = heard.of_edits()
    assert (mean, most, whole, change) == (5.0, 8.0, 2.5, 10.0)


def test_rows_are_written_and_found_again(tmp_path):
    measures = study_measures.Measures(True, 1.0, 2.0, 3.0, 4.0, 0.5, 6.0)
    rows = [study.Row("cfg", n, measures, 4.0, 0.0, (1.0, 2.0, 3.0, 4.0), 0.1) for n in range(2)]
    study.append(tmp_path / "a.csv", rows[:1])
    study.append(tmp_path / "a.csv", rows[1:])
    assert study.finished(tmp_path / "a.csv") == {("cfg", 0), ("cfg", 1)}
    assert study.finished(tmp_path / "b.csv") == set()
    assert study_cases.FIRST_SEED > 910_000_048  # of `eval_demo.py`
