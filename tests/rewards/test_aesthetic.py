"""The aesthetic heads against their layers written out, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffsteer.rewards import Aesthetic
from diffsteer.rewards.aesthetic import load_head
from diffsteer.types import Context, DiffsteerError

V2, V1 = "sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth"


def v1_layout() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(2)
    return {"weight": torch.randn(1, 768, generator=draws), "bias": torch.randn(1, generator=draws)}


@pytest.fixture
def heads(tmp_path: Path, v2_state: dict[str, Tensor]) -> dict[str, Path]:
    """The real heads where DIFFSTEER_DATA has them, else files of the same layout."""
    data = os.environ.get("DIFFSTEER_DATA")
    if data:
        return {"v1": Path(data) / V1, "v2": Path(data) / V2}
    torch.save(v1_layout(), tmp_path / V1)
    torch.save(v2_state, tmp_path / V2)
    return {"v1": tmp_path / V1, "v2": tmp_path / V2}


def features(n: int = 7) -> Tensor:
    return normalize(torch.randn(n, 768, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_v2_is_its_linear_layers_in_a_row(heads: dict[str, Path]) -> None:
    state, x = torch.load(heads["v2"], map_location="cpu", weights_only=True), features()
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    head = load_head(heads["v2"])
    assert (head.version, head.features) == ("v2", 768)
    torch.testing.assert_close(head(features()), x[:, 0])


def test_v2_keeps_the_place_of_the_published_dropouts(heads: dict[str, Path]) -> None:
    layers = nn.Sequential(
        *(nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    published = nn.ModuleDict({"layers": layers})
    published.load_state_dict(torch.load(heads["v2"], map_location="cpu", weights_only=True))
    published.eval()
    expected = layers(features())[:, 0]
    head = load_head(heads["v2"])
    torch.testing.assert_close(head(features()), expected)
    torch.testing.assert_close(head.train()(features()), expected)


def test_v1_is_one_product(heads: dict[str, Path]) -> None:
    state, head = torch.load(heads["v1"], map_location="cpu", weights_only=True), load_head(heads["v1"])
    assert (head.version, head.features) == ("v1", 768)
    torch.testing.assert_close(head(features()), features() @ state["weight"][0] + state["bias"])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_features_are_normalised(heads: dict[str, Path], version: str) -> None:
    head = load_head(heads[version])
    torch.testing.assert_close(head(17 * features()), head(features()))


def test_safetensors_and_halves(tmp_path: Path, v2_state: dict[str, Tensor]) -> None:
    state = {k: v.half() for k, v in v2_state.items()}
    save_file(state, tmp_path / "head.safetensors")
    torch.save({k: v.float() for k, v in state.items()}, tmp_path / "head.pth")
    one, other = load_head(tmp_path / "head.safetensors"), load_head(tmp_path / "head.pth")
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert torch.equal(one(features()), other(features()))


def test_loading_draws_nothing(heads: dict[str, Path]) -> None:
    before = torch.random.get_rng_state()
    load_head(heads["v2"])
    assert torch.equal(before, torch.random.get_rng_state())


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["code", "module", "list", "garbage"])
def test_pickles_of_anything_else_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "head.pth"
    if content == "garbage":
        path.write_bytes(b"not a checkpoint")
    else:
        torch.save({"code": {"weight": Trap(tmp_path / "sprung")}, "module": nn.Linear(768, 1), "list": [1.0]}[content], path)
    with pytest.raises(DiffsteerError, match=r"head.pth is not a file of plain tensors.*weights_only=False\)\.state_dict\(\)"):
        load_head(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "state",
    [
        {"linear.weight": torch.zeros(1, 768), "linear.bias": torch.zeros(1)},
        {"weight": torch.zeros(2, 768), "bias": torch.zeros(2)},
        {"weight": torch.zeros(1, 768)},
        {"layers.0.weight": torch.zeros(64, 768), "layers.0.bias": torch.zeros(64), "layers.2.weight": torch.zeros(1, 64)},
        {},
    ],
    ids=["names", "two outputs", "no bias", "another depth", "empty"],
)
def test_other_layouts_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(DiffsteerError, match="no known layout") as caught:
        load_head(tmp_path / "head.pth")
    assert all(key in str(caught.value) for key in state)


def test_scores_are_the_head_on_clip_features(clip_folder: Path, heads: dict[str, Path], images: Tensor) -> None:
    name = f"local-dir:{clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, image_resize_mode="squash")
    from torchvision.transforms.functional import to_pil_image

    with torch.no_grad():
        x = model.eval().encode_image(torch.stack([preprocess(to_pil_image(i)) for i in images]))
        expected = load_head(heads["v2"])(x)
    scores = Aesthetic(str(heads["v2"]), name, None).score(images, [""] * 5, Context())
    assert expected.std() > 0.01
    torch.testing.assert_close(scores, expected, atol=0.1 * float(expected.std()), rtol=0)


def test_the_default_trunk_is_openais_with_its_activation() -> None:
    reward = Aesthetic("head.pth")
    assert reward.pretrained is not None
    assert open_clip.get_model_config(reward.model_name)["quick_gelu"] is True
    assert open_clip.get_model_config(reward.model_name)["embed_dim"] == 768
    weights = open_clip.get_pretrained_cfg("ViT-L-14", "openai")
    assert open_clip.get_pretrained_cfg(reward.model_name, reward.pretrained)["hf_hub"] == weights["hf_hub"]


def test_without_a_head_it_says_where_to_get_one() -> None:
    with pytest.raises(DiffsteerError) as caught:
        Aesthetic().prepare([""], Context())
    for part in (V1, V2, "christophschuhmann/improved-aesthetic-predictor", "LAION-AI/aesthetic-predictor"):
        assert part in str(caught.value)
    with pytest.raises(DiffsteerError, match="there is no file 'nowhere.pth'"):
        Aesthetic("nowhere.pth").prepare([""], Context())


def test_head_and_trunk_must_go_together(clip_folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, tmp_path / "b32.pth")
    with pytest.raises(DiffsteerError, match="takes 512 features, local-dir:.* gives 768"):
        Aesthetic(str(tmp_path / "b32.pth"), f"local-dir:{clip_folder}", None).prepare([""], Context())


def test_folder_names_take_no_tag() -> None:
    with pytest.raises(DiffsteerError, match="brings its own weights: set pretrained=null"):
        Aesthetic("head.pth", "local-dir:somewhere")
