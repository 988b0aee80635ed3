"""The cases, measures, arms and statistics of the study of presets."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import study
import study_cases
import study_loop
import study_measures
import study_page
import study_tables
from study_cases import REGIMES, case_of

from kvlock_jax.sampling import loop


@pytest.mark.parametrize("name", ["few_steps", "open_prompt", "post", "beside", "both"])
def test_the_truth_of_an_edit_is_right(name):
    case = case_of(REGIMES[name], 3)
    assert (case.truth == case.video)[~case.mask].all()
    for target in case.targets:
        assert target.thing.shape in case.prompt and target.mask.any()
        assert (target.thing.colour in case.prompt) == (name != "open_prompt")
        assert not (target.mask & ~case.mask).any()
    assert len(case.targets) == 1 + (name == "both")
    best = study_measures.measure(case, case.truth)
    assert best.right and best.background_psnr == np.inf and best.ring_error == 0
    assert best.truth_psnr > 60 and best.nearest_psnr > 38 and best.flicker < 1
    kept = study_measures.measure(case, case.video)  # an edit that does nothing
    assert not kept.right and kept.nearest_psnr < 20


def test_a_moved_object_is_near_a_valid_render_alone():
    case = case_of(REGIMES["loose_mask"], 1)
    moved = np.roll(case.truth, 2, axis=2)
    moved[~case.mask] = case.video[~case.mask]
    found = study_measures.measure(case, moved)
    assert found.right and found.nearest_psnr > found.truth_psnr + 3


@pytest.mark.parametrize("shift", [(0.5, 0.25), (5.0, -4.0)])
def test_a_valid_object_elsewhere_in_a_still_mask_is_found(shift):
    regime = REGIMES["loose_mask"]
    case = case_of(regime, 1)
    (target,) = case.targets
    assert 12 <= target.reach <= 16
    video = target.behind.astype(float)
    colour = np.array(study_measures.COLOURS[target.thing.colour])
    for frame, centre in zip(video, target.centres, strict=True):
        shape, radius = target.thing.shape, target.thing.radius + 0.5
        cover = study_measures.shape_cover(shape, radius, tuple(centre + shift))[..., None]
        frame[:] = (1 - cover) * frame + cover * colour
    found = study_measures.measure(case, np.rint(video).astype(np.uint8))
    assert found.right and found.nearest_psnr > 38 > 32 > found.truth_psnr


def test_a_post_hides_no_truth_from_the_judge():
    cases = [case_of(REGIMES["post"], number) for number in range(8)]
    assert sum(study_measures.measure(case, case.truth).right for case in cases) == 8


def test_an_edit_of_two_objects_is_wrong_where_their_colours_are_swapped():
    case = case_of(REGIMES["both"], 3)
    one, two = (target.thing for target in case.targets)
    swapped = case.truth.copy()
    for target, other in zip(case.targets, (two, one), strict=True):
        colour = np.array(study_measures.COLOURS[target.thing.colour])
        inside = (case.truth == colour).all(-1) & target.mask
        swapped[inside] = study_measures.COLOURS[other.colour]
    assert not study_measures.measure(case, swapped).right
    half = np.where(case.targets[0].mask[..., None], case.truth, swapped)
    assert not study_measures.measure(case, half).right


def test_a_still_mask_does_not_move():
    mask = case_of(REGIMES["post"], 2).mask
    assert (mask == mask[:1]).all()
    moving = case_of(REGIMES["few_steps"], 2).mask
    assert (moving != moving[:1]).any()


def test_arms(tmp_path):
    names = [study.name_of(arm) for arm in ("cfg", "cfg:omega=2", "a=cfg:omega=2")]
    assert names == ["cfg", "cfg:omega=2", "a"]
    arms = [study.Arm.of(text) for text in study.ARMS]
    assert len({arm.name for arm in arms}) == len(arms) >= 13
    regime, arms = REGIMES["strong_guidance"], {arm.name: arm for arm in arms}
    past = study.Past(tmp_path, tmp_path / "rows.csv")
    halved = study.settings_of(regime, arms["cfg_half"], past)
    assert halved.sample.guidance_scale == 5 and halved.sample.steps == regime.steps
    late = study.settings_of(regime, arms["late_one"], past).lock
    assert (late.kappa, late.guidance_ratio) == (3, 0.1)
    assert late.background == "source" and late.rescale_uncond
    eased = study.settings_of(regime, arms["eased"], past).lock
    assert (eased.kappa, eased.guidance_ratio) == (3, 0.5)
    last = study.settings_of(regime, arms["late_one_long"], past).lock
    assert (last.kappa, last.guidance_ratio) == (5, 0.1)
    (tmp_path / "rows.csv").write_text("arm,alpha,omega\nkvlock,1,8\nkvlock,0.5,12\ncfg,0,10\n")
    level = study.settings_of(regime, arms["kvlock_level"], past).lock
    assert (level.fusion_ratio, level.adapt_fusion_ratio, level.guidance_ratio) == (0.75, False, 1)
    assert not level.adapt_guidance and level.kappa == 6
    short = study.settings_of(study_cases.Regime("", 4), arms["kvlock_level"], past).lock
    assert short.kappa == 2  # the steps that have a statistic
    plain = study.settings_of(REGIMES["plain"], arms["kvlock_level"], past).lock
    assert plain.kappa == 20
    with pytest.raises(ValueError, match="sigma2 must be one of"):
        study.Arm.of("a=cfg:sigma2=none")


def test_replayed_courses_are_of_another_edit_or_of_all(tmp_path):
    past = study.Past(tmp_path / "courses", tmp_path / "rows.csv")
    cases = [case_of(REGIMES["few_steps"], number) for number in range(3)]
    with pytest.raises(ValueError, match="run it again"):
        past.rule("other", cases)
    past.record(cases, np.array([[0.01, 0.02, 0.06], [4, 5, 6]]))
    own = np.zeros(2)
    assert list(past.rule("other", cases[1:])(1, own)) == [6, 4]
    np.testing.assert_allclose(past.rule("mean", cases[1:])(0, own), 0.05 / 3)
    assert past.rule("", cases) is None and past.rule("level", cases) is None
    sigma2 = np.array([1.0, 4])  # 2 is usual
    wanted = {"direct": [0.5, 2], "direct_other": [2, 0.5], "inverse": [2, 0.5]}
    wanted["inverse_other"] = [0.5, 2]
    for kind, ratios in wanted.items():
        found = past.rule(kind, cases)(0, sigma2)
        np.testing.assert_allclose(found, np.array(ratios) / 100)
    (tmp_path / "rows.csv").write_text("arm,edit\n" + "kvlock,0\n" * 4)
    with pytest.raises(ValueError, match="run it again"):
        past.rule("mean", cases)


def test_a_run_follows_what_is_replayed(monkeypatch):
    import kvlock_jax as kvl

    model, regime = kvl.load("demo"), study_cases.Regime("quick", 4)
    cases = [case_of(regime, number) for number in range(2)]
    config = study.settings_of(regime, study.Arm.of("kvlock"), None)
    run, before = study.run_batch, loop.advance
    traces = []
    monkeypatch.setattr(study, "run_batch", lambda *a, **k: traces.extend(run(*a, **k)) or traces)

    class Past:
        def rule(self, kind, cases):
            return study_loop.recorded(np.array([[0, 0], [0, 0.005], [0.005, 0.1], [0.02, 0]]))

        def record(self, cases, sigma2):
            assert sigma2.shape == (4, 2)

    rows = study.run_arm(model, regime, study.Arm.of("kvlock"), cases, Past())
    assert loop.advance is before and config.sample.steps == 4
    one, two = (result.trace for result in traces)
    np.testing.assert_allclose(one.guidance_scale, [4, 4, 2, 8])
    np.testing.assert_allclose(two.fusion_ratio, [0, 0, 1, 0])
    assert all(np.isfinite(row.signals).all() and row.signals[-1] > 0 for row in rows)


def test_statistics():
    scores, failed = np.array([1.0, 2, 3, 4]), np.array([False, False, True, True])
    assert study_measures.auroc(scores, failed) == 1
    assert study_measures.auroc(-scores, failed) == 0
    assert study_measures.auroc(np.ones(4), failed) == 0.5
    mean, low, high = study_measures.interval(np.arange(100.0))
    assert mean == 49.5 and 43 < low < 46 and 53 < high < 56
    assert np.isnan(study_measures.auroc_interval(scores, np.zeros(4, bool))).all()
    equal = study_measures.share_interval(np.ones(48), np.ones(48))
    np.testing.assert_allclose(equal, [0, -1.96 / 50, 1.96 / 50])
    difference, low, high = study_measures.share_interval(np.ones(40), np.repeat([0.0, 1], 20))
    assert difference == 0.5 and 0.3 < low < 0.36 and 0.6 < high < 0.65


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
    rows = [
        study.Row("cfg", n, measures, 4.0, 0.0, 1.0, (1.0, 2.0, 3.0, 4.0, 5.0), 0.1)
        for n in range(2)
    ]
    study.append(tmp_path / "a.csv", rows[:1])
    study.append(tmp_path / "a.csv", rows[1:])
    assert study.finished(tmp_path / "a.csv") == {("cfg", 0), ("cfg", 1)}
    assert study.finished(tmp_path / "b.csv") == set()
    assert study_cases.FIRST_SEED > 910_000_048  # of `eval_demo.py`


def test_rows_of_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("arm,edit,right\ncfg,0,1\n")
    measures = study_measures.Measures(True, 1.0, 2.0, 3.0, 4.0, 0.5, 6.0)
    rows = [study.Row("cfg", 1, measures, 4.0, 0.0, 1.0, (1.0, 2.0, 3.0, 4.0, 5.0), 0.1)]
    with pytest.raises(ValueError, match="other columns: remove it"):
        study.append(tmp_path / "a.csv", rows)


def rows_of(arm, gain, rights):
    nan = float("nan")
    for edit, right in enumerate(rights):
        psnr = 20 + gain + edit % 2
        measures = study_measures.Measures(right, psnr, psnr, 1.0, 30 + gain, 0.9, 2.0)
        signals = (float(not right), 1.0, 1.0, 1.0, 2.0 if arm == "cfg" else nan)
        yield study.Row(arm, edit, measures, 4.0, 0.0, 1.0, signals, 0.1)


def test_the_page_says_what_the_rows_say(tmp_path, monkeypatch):
    arms = {"cfg": 0, "hard_lock": 1, "kvlock": -1, "kvlock_other": -1.5, "eased": 2}
    rights = [True, True, False, False] * 2
    for arm, gain in arms.items():
        study.append(tmp_path / "few_steps.csv", list(rows_of(arm, gain, rights)))
    scale = "changed,steps,solver,shift,guidance,window,low,median,high,edits\n"
    scale += ",25,unipc,3.0,4.0,10,0.01,0.02,0.03,8\nsteps,50,unipc,3.0,4.0,10,0.04,0.05,0.06,8\n"
    (tmp_path / "scale.csv").write_text(scale)
    spread = [f"few_steps,{n},{2 - right}" for n, right in enumerate(rights)]
    (tmp_path / "spread.csv").write_text("\n".join(["regime,edit,spread", *spread, ""]))
    (tmp_path / "intro.md").write_text("# A head\n")
    page = tmp_path / "page.md"
    monkeypatch.setattr(
        sys, "argv", ["study_page.py", "--folder", str(tmp_path), "--page", str(page)]
    )
    study_page.main()
    text = page.read_text()
    assert text.startswith("# A head\n") and (tmp_path / "pareto.png").stat().st_size > 1000
    # eased on the odd edits, and its gains over cfg.
    assert "| few_steps | 50% | 0 (-33 to 33) | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |" in text
    assert "| few_steps | nearest | 0.50 (0.50 to 0.50) |  |" in text  # kvlock - kvlock_other
    assert "| few_steps | eased | -3.00 (-3.00 to -3.00) |" in text  # the best level
    assert "| judged right no less often than `cfg`: no interval under 0 | 1 of 1 |" in text
    assert "both better than `kvlock`'s, intervals over 0 | 1 of 1 |" in text
    table = study_tables.read(tmp_path / "few_steps.csv", REGIMES["few_steps"])
    held = [line.split(" | ")[-1] for line in study_tables.verdicts({"": table}, "kvlock")[2:]]
    assert held == ["1 of 1 |", "0 of 1 |", "0 of 1 |", "0 of 1 |"]
    assert study_tables.verdicts({"": {"cfg": table["cfg"]}}, "eased")[2].endswith("| 0 of 0 |")
    assert "| **50** | unipc | 3.0 | 4.0 | 10 | 0.05 | 0.04 to 0.06 | 2.50 |" in text
    assert "| few_steps | 50% | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |" in text
    best = "1.00 (1.00 to 1.00) | sigma2 | 1.00 (1.00 to 1.00) |"
    assert f"| few_steps | cfg | 50% | {best}" in text
    assert "| cfg | 50% | 1.00 (1.00 to 1.00) | 0.50 (0.50 to 0.50) |" in text  # detectors


def test_edits_fail_against_their_truth_and_saturated_replays_say_nothing(tmp_path):
    path, rights = tmp_path / "few_steps.csv", [True] * 4
    seen = list(rows_of(study_tables.TRUTH, 8, [*rights[:3], False]))
    for rows in (seen, list(rows_of("cfg", 5, rights)), list(rows_of("hard_lock", 0, rights))):
        study.append(path, rows)
    for arm, adapts in (("kvlock", 0.0), ("kvlock_other", 1.0)):
        rows = [dataclasses.replace(row, adapts=adapts) for row in rows_of(arm, 0, rights)]
        study.append(path, rows)
    table = study_tables.read(path, REGIMES["few_steps"])
    assert list(table["cfg"]["edit"]) == [0, 1, 2]  # the judge does not see the truth of the fourth
    assert not table["cfg"]["failed"].any() and table["hard_lock"]["failed"].all()
    free = study_tables.read(path, REGIMES["text_to_video"])
    assert not free["hard_lock"]["failed"].any()
    assert len(study_tables.adapting({"few_steps": table})) == 2  # the head alone
    table["kvlock"]["adapts"] += 0.5
    assert len(study_tables.adapting({"few_steps": table})) == 4


def test_examples_to_train_on_are_described_by_their_captions():
    import train_demo_pairs as pairs

    kinds = set()
    for seed in range(120):
        found = pairs.example(seed)
        names, shares = found.prompts()
        assert set(names) <= set(pairs.NUMBERS) and sum(shares) == pytest.approx(1)
        assert len(names) == (4 if found.scene.other and found.kind not in ("both", "all") else 2)
        assert names[0] == found.scene.caption and found.mask.shape == (9, 96, 96)
        covered = found.mask[pairs.render(found.scene).mask].mean()
        assert covered == (found.kind != "none")
        kinds.add((found.kind, found.scene.other is not None, found.scene.post is not None))
    assert {kind for kind, *_ in kinds} == set(pairs.ONE_MASKED) | set(pairs.TWO_MASKED)
    held_out = pairs.example(3, held_out=True, kind="both")
    assert held_out.scene.other and held_out.scene.photo in ("camera", "chelsea")
