"""From cases to rows and fronts, on cases made by hand; feature spaces; what is written."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsteer.evaluation.features import as_tensor, features_of_files, pictures_in, space_of
from diffsteer.evaluation.measure import Case, Results, Row, sets_of
from diffsteer.evaluation.plots import plot_fronts, plot_scaling
from diffsteer.evaluation.tables import markdown, shown, write_cases, write_fronts, write_metrics
from diffsteer.rewards import ClipScore, Compressibility
from diffsteer.types import Context, DiffsteerError

CELLS: dict[str, tuple[str, int | None]] = {"plain": ("plain", None), "fk-x2": ("fk", 2), "fk-x4": ("fk", 4)}
SEEDS = [3, 4]


def case(cell: int, prompt: int, seed: int) -> Case:
    scores = {"reward": 10.0 * cell + prompt + seed, "checker": float(cell > 0)}
    return Case(
        scores,
        {"evaluations": 2.0**cell, "decodes": 1, "reward_calls": 1, "seconds": 0.1 * (cell + 1)},
        Path(f"{cell}/{prompt}/{seed}"),
    )


def features(files: Sequence[Path]) -> Tensor:
    """The seeds of a prompt look the same under the last cell, and nothing alike under the others."""
    rows = []
    for file in files:
        cell, prompt, seed = map(int, file.parts)
        place = torch.zeros(16)
        place[prompt if cell == 2 else 2 * prompt + seed - 3] = 1 + 0.01 * cell
        rows.append(place)
    return torch.stack(rows)


def real(prompts: Sequence[Any]) -> Tensor:
    """As the middle cell made them."""
    return features([case(1, p, s).image for p in prompts for s in SEEDS])


@pytest.fixture
def cases() -> dict[str, dict[Any, dict[int, Case]]]:
    return {name: {p: {s: case(c, p, s) for s in SEEDS} for p in range(8)} for c, name in enumerate(CELLS)}


def test_rows_are_means_over_seeds_and_prompts_and_differences_are_paired(cases: Any) -> None:
    results = Results(CELLS, cases, SEEDS, features)
    rows = {(r.cell, r.metric): r for r in results.rows()}
    assert rows["plain", "reward"].value.value == pytest.approx(3.5 + 3.5)
    assert rows["fk-x4", "reward"].difference == pytest.approx((20, 20, 20))  # the same for every prompt: no doubt at all
    assert rows["plain", "reward"].value.high - rows["plain", "reward"].value.low > 1
    assert rows["fk-x2", "checker"].value.low < 0.7  # eight of eight
    assert [rows[c, "vendi"].value.value for c in CELLS] == pytest.approx([2, 2, 1])
    assert [rows[c, "distance"].value.value for c in CELLS] == pytest.approx([1, 1, 0])
    assert rows["fk-x2", "evaluations"].value == (2, 2, 2) and rows["fk-x2", "reward"].budget == 2
    assert results.scores == ["reward", "checker"] and "fid" not in {m for _, m in rows}


def test_real_pictures_are_told_from_others(cases: Any) -> None:
    results = Results(CELLS, cases, SEEDS, features, real, neighbours=2)
    rows = {(r.cell, r.metric): r for r in results.rows()}
    assert rows["fk-x2", "fid"].value.value == pytest.approx(0, abs=1e-9) and rows["fk-x2", "precision"].value.value == 1
    assert rows["fk-x4", "fid"].value.value > rows["plain", "fid"].value.value
    assert rows["fk-x4", "coverage"].value.value < 1 == rows["fk-x2", "coverage"].value.value
    assert rows["fk-x2", "coverage"].value.high <= 1 and rows["plain", "fid"].value.low >= 0
    assert rows["fk-x4", "fid"].difference.value == pytest.approx(
        rows["fk-x4", "fid"].value.value - rows["plain", "fid"].value.value
    )


def test_fronts_of_several_aims(cases: Any) -> None:
    front = Results(CELLS, cases, SEEDS, features).front(["checker", "vendi"])
    assert front.points == {"plain": (0, 2), "fk-x2": (1, 2), "fk-x4": (1, 1)} and front.on_front == ["fk-x2"]
    assert front.reference == (0, 1)
    assert {k: v.value for k, v in front.volumes.items()} == pytest.approx({"plain": 0, "fk": 1, "all": 1})
    signed = Results(CELLS, cases, SEEDS, features, real).front(["reward", "fid"])
    assert all(p[1] <= 0 for p in signed.points.values()) and "fk-x2" in signed.on_front
    with pytest.raises(DiffsteerError, match="evaluate.axes: beauty is not measured; valid: reward, checker"):
        Results(CELLS, cases, SEEDS, features).front(["beauty", "vendi"])


def test_prompts_that_a_cell_lacks_are_left_out_of_all(cases: Any) -> None:
    del cases["plain"][2], cases["fk-x4"][5][4]
    assert Results(CELLS, cases, SEEDS).prompts == [0, 1, 3, 4, 6, 7]
    cases["plain"].clear()
    with pytest.raises(DiffsteerError, match="no prompt is done by all"):
        Results(CELLS, cases, SEEDS)


def test_a_score_that_is_no_number_leaves_its_prompt_out(cases: Any, tmp_path: Path) -> None:
    """Of that metric, in every cell; where no prompt is left there is no number, and nothing falls over."""
    cases["plain"][0][3].scores["reward"] = math.nan
    cases["fk-x4"][7][4].cost["seconds"] = math.nan
    results = Results(CELLS, cases, SEEDS, features)
    rows = {(r.cell, r.metric): r for r in results.rows()}
    assert rows["plain", "reward"].value.value == pytest.approx(4 + 3.5) and rows["fk-x2", "reward"].difference.value == 10
    assert rows["fk-x4", "seconds"].value.value == pytest.approx(0.3)
    assert [int(results.known[m].sum()) for m in ("reward", "checker", "seconds")] == [7, 8, 7]
    front = results.front(["reward", "vendi"])
    assert front.on_front == ["fk-x2", "fk-x4"] and front.volumes["fk"].value > 0
    for prompt in range(8):
        cases["fk-x2"][prompt][3].scores["reward"] = math.nan
    nothing = Results(CELLS, cases, SEEDS, features)
    blank = nothing.front(["reward", "vendi"])
    assert blank.on_front == [] and math.isnan(blank.volumes["all"].value)
    text = markdown(nothing.rows(), blank, ["about"])
    assert "| fk-x2 | none |" in text and text.endswith("about\n")
    plot_scaling(tmp_path / "s.png", nothing.rows(), nothing.metrics)
    plot_fronts(tmp_path / "f.png", blank, nothing.rows())
    write_metrics(tmp_path / "m.csv", nothing.rows())
    with (tmp_path / "m.csv").open() as file:
        told = {(r["cell"], r["metric"]): r for r in csv.DictReader(file)}
    assert told["fk-x2", "reward"]["value"] == "" and float(told["plain", "checker"]["value"]) == 0


def test_one_prompt_has_values_and_no_intervals(cases: Any) -> None:
    one = {name: {0: by[0]} for name, by in cases.items()}
    results = Results(CELLS, one, SEEDS, features)
    front = results.front(["reward", "vendi"])
    assert math.isnan(front.volumes["all"].low) and math.isnan(results.rows()[0].value.low)
    assert "| plain | 3.5 |" in markdown(results.rows(), front, [])


def test_sets_want_samples_enough() -> None:
    assert sets_of(1, 1, 9, 3) == [] and sets_of(2, 2, 9, 3) == ["fid", "kid"] and len(sets_of(5, 1, 9, 3)) == 6
    assert sets_of(20, 8, 3, 3) == ["fid", "kid"]


def test_what_is_written(cases: Any, tmp_path: Path) -> None:
    results = Results(CELLS, cases, SEEDS, features)
    rows, front = results.rows(), results.front(["checker", "vendi", "reward"])
    write_cases(tmp_path / "c.csv", results)
    write_fronts(tmp_path / "f.csv", front)
    with (tmp_path / "c.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 8 * 2 and lines[-1]["cell"] == "fk-x4" and float(lines[-1]["reward"]) == 31
    with (tmp_path / "f.csv").open() as file:
        kinds = [line["what"] for line in csv.DictReader(file)]
    assert kinds == ["cell"] * 3 + ["sampler"] * 3 + ["reference"]
    plot_scaling(tmp_path / "s.png", rows, ["reward", "checker", "vendi"])
    plot_fronts(tmp_path / "f.png", front, rows)
    for name in ("s.png", "f.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50  # something is drawn
    assert "Differences" not in markdown([r for r in rows if r.cell == "plain"], None, [])


@pytest.mark.parametrize(
    "value, text",
    [
        ((1.0, 0.9, 1.1), "1.00 (0.90 to 1.10)"),
        ((123.4, 120, 130), "123 (120 to 130)"),
        ((2, 2, 2), "2"),
        ((math.nan,) * 3, "none"),
    ],
)
def test_numbers_for_people(value: tuple[float, float, float], text: str) -> None:
    from diffsteer.evaluation import Interval

    assert shown(Interval(*value)) == text


# --------------------------------------------------------------------------------------------------------- features


def test_features_of_files_are_those_of_their_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n, size in enumerate([(8, 8), (8, 8), (12, 8)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    (tmp_path / "deep").mkdir()
    Image.new("L", (8, 8), 128).save(tmp_path / "deep" / "gray.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    files = pictures_in(tmp_path)
    assert [f.name for f in files] == ["0.png", "1.png", "2.png", "gray.jpg"]
    colours = space_of("colours", Context())
    found = features_of_files(colours, files)
    assert found.shape == (4, 193) and torch.allclose(found.norm(dim=1), torch.ones(4))
    for row, file in zip(found, files, strict=True):
        with Image.open(file) as picture:
            assert torch.equal(row, colours(as_tensor(picture.convert("RGB"))[None])[0])


def test_a_reward_with_features_is_a_space() -> None:
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ctx, clip = Context(embedded=True), ClipScore()
    found = space_of(clip, ctx)(x)
    assert found.shape[0] == 3 and torch.allclose(found.norm(dim=1), torch.ones(3))
    prompts = ["a red circle"] * 3
    clip.prepare(prompts, ctx)
    assert torch.allclose(100 * found @ clip._texts(prompts[:1], ctx)[0], clip.score(x, prompts, ctx))
    with pytest.raises(DiffsteerError, match="compressibility has no features; some have: clip, clip2"):
        space_of(Compressibility(), ctx)
    with pytest.raises(DiffsteerError, match="evaluate.features=colors is unknown; did you mean 'colours'"):
        space_of("colors", ctx)


def test_a_reference_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DiffsteerError, match="is no folder"):
        pictures_in(tmp_path / "gone")
    with pytest.raises(DiffsteerError, match="holds no pictures"):
        pictures_in(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no png")
    with pytest.raises(DiffsteerError, match=r"bad.png is no picture"):
        features_of_files(space_of("colours", Context()), pictures_in(tmp_path))


def test_rows_have_the_shape_that_readers_expect(cases: Any) -> None:
    assert all(
        isinstance(r, Row) and r.value.low <= r.value.value <= r.value.high
        for r in Results(CELLS, cases, SEEDS, features).rows()
    )


def test_inception_takes_weights_at_hand(tmp_path: Path) -> None:
    """A file of the true layout, its numbers drawn at random: 2048 features, those of the network itself."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, **k: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("untrained", ["2048"])
    torch.save(network.state_dict(), tmp_path / "w.pth")
    x = torch.rand(2, 3, 299, 299)  # of its own size: how others are brought to it is torchmetrics' own way
    found = space_of(f"inception:{tmp_path / 'w.pth'}", Context())(x)
    assert found.shape == (2, 2048) and torch.allclose(found, network.eval()((x * 255).round().byte())[0], rtol=1e-4)
    with pytest.raises(DiffsteerError, match="evaluate.features=inception: its weights could not be loaded"):
        space_of(f"inception:{tmp_path / 'gone.pth'}", Context())
