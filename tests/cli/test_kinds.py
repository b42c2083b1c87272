"""Pipelines that make something else than pictures, or are asked with something else than texts."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families.toys import TOYS
from PIL import Image

from diffsteer import SteeredPipeline
from diffsteer.media import Sound, read_clip, save
from diffsteer.rewards import Compressibility
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.shapes.clips import render_clip, sample_clip
from diffsteer.types import DiffsteerError

SMALL = ["num_inference_steps=3", "sampler.particles=2", "reward=compressibility"]
CLIP = ["call.num_frames=5", "call.height=16", "call.width=24"]


def saved(name: str, folder: Path) -> str:
    TOYS[name].build().save_pretrained(folder)
    return f"model={folder}"


def test_a_video_is_a_gif_on_a_sheet_of_first_frames(command: Any, manifest: Any, tmp_path: Path) -> None:
    model = saved("AnimateDiffPipeline", tmp_path / "pipe")
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    asked = ("generate", model, "prompts=p.txt", "out=o", *SMALL, *CLIP)
    result = command(*asked, "output=all")
    assert result.code == 0 and result.out.endswith("2 videos, grid.png and manifest.jsonl in o\n"), result.err
    for entry in manifest(tmp_path / "o"):
        for name in (entry["image"], *(p["image"] for p in entry["particles"])):
            with Image.open(tmp_path / "o" / name) as video:
                assert name.startswith("videos/") and video.format == "GIF" and video.size == (24, 16)
                assert 1 < getattr(video, "n_frames", 1) <= 5
    assert Image.open(tmp_path / "o/grid.png").width > 2 * 24
    (tmp_path / "o/videos/001.gif").unlink()
    again = command(*asked, "output=all")
    assert again.code == 0 and again.out.startswith("1 prompt,") and (tmp_path / "o/videos/001.gif").exists()
    assert command(*asked, "output=best").code == 2, "other settings"


def test_clips_follow_a_reference_and_may_be_mp4(command: Any, manifest: Any, tmp_path: Path) -> None:
    save(render_clip(sample_clip("colors", np.random.default_rng(4))), tmp_path / "clip.gif")
    asked = ("generate", "model=shapes-motion", "reward=motion_consistency", "num_inference_steps=2", "sampler.particles=2")
    result = command(*asked, "prompt=a blue ring", "reference=clip.gif", "video=mp4", "out=o")
    assert result.code == 0 and "1 video, grid.png" in result.out and "warning" not in result.err, result.err
    (entry,) = manifest(tmp_path / "o")
    assert entry["image"].endswith(".mp4") and len(read_clip(tmp_path / "o" / entry["image"])) == 8
    assert Image.open(tmp_path / "o/grid.png").width >= 64
    save(render_clip(sample_clip("colors", np.random.default_rng(5))), tmp_path / "clip.gif")
    mixed = command(*asked, "prompt=a blue ring", "reference=clip.gif", "reference_share=0.5", "out=mixed")
    assert mixed.code == 0 and manifest(tmp_path / "mixed")[0]["image"].endswith(".gif"), mixed.err
    other = command(*asked, "prompt=a blue ring", "reference=clip.gif", "video=mp4", "out=o")
    assert other.code == 2 and "other settings" in other.err, "another reference under the same name"
    for folder, sides in (("sizes", (8, 9)), ("broken", (8, 8))):
        (tmp_path / folder).mkdir()
        for i, side in enumerate(sides):
            Image.new("RGB", (side, side)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "broken" / "1.png").write_bytes((tmp_path / "broken" / "1.png").read_bytes()[:40])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "clip.gif").read_bytes()[:-2000])
    for wrong, said in (
        (("prompt=x", "out=p"), "has no reference"),
        (("prompt=a ring", "reference=none.gif", "out=p"), "no such clip"),
        (("prompt=a ring", "reference=sizes", "out=p"), "frames are of several sizes"),
        (("prompt=a ring", "reference=broken", "out=p"), "1.png: it"),
        (("prompt=a ring", "reference=cut.gif", "out=p"), "cut.gif: it"),
        (("prompt=a ring", "reference=clip.gif", "reward.mask=true", "out=p"), "mask=True"),
        (("prompt=a ring", "reference=clip.gif", "video=avi", "out=p"), "valid: gif, mp4"),
        (("prompt=a ring", "reference=clip.gif", "reward=clip", "out=p"), "reference= has no effect"),
        (("prompt=a ring", "reference=", "out=p"), "reference= is empty"),
        (("prompt=a ring", "reference=clip.gif", "reward.reference=clip.gif", "out=p"), "two references"),
        (("prompt=a ring", "reference_share=0.5", "out=p"), "reference_share=0.5 wants a reference="),
    ):
        refused = command(*asked, *wrong)
        assert refused.code == 2 and said in refused.err and refused.err.count("\n") == 1, refused.err


def test_a_reward_of_motion_brings_its_guidance(command: Any) -> None:
    asked = ("generate", "model=shapes-motion", "reference=clip.gif", "reward=motion_consistency", "--cfg", "job")
    own, other = (yaml.safe_load(command(*argv).out) for argv in (asked, (*asked, "sampler=fk", "reward.side=8")))
    assert own["sampler"]["name"] == "freedom" and own["sampler"]["lowest"] > 0.5 and own["reward"]["mask"] == "moving"
    assert other["sampler"]["name"] == "fk" and other["reward"]["side"] == 8 and "reference" in other["reward"]


def test_a_reward_of_pictures_scores_a_video_by_its_frames() -> None:
    pipe = TOYS["AnimateDiffPipeline"].build()
    call: dict[str, Any] = {"num_inference_steps": 3, "num_frames": 5, "height": 16, "width": 24}
    out = SteeredPipeline(pipe, BestOfN(2), Compressibility() + Compressibility())("a red circle", seed=0, **call)
    frames = out.samples[0].flatten(0, 1)
    by_hand = 2 * Compressibility().score(frames, ["a red circle"] * 10, None).view(2, 5).mean(1)  # type: ignore[arg-type]
    torch.testing.assert_close(out.rewards[0].float(), by_hand)


def test_a_sound_is_a_wav(tmp_path: Path) -> None:
    pipe = TOYS["StableAudioPipeline"].build()
    call: dict[str, Any] = {"num_inference_steps": 3, "audio_end_in_s": 1.5}
    with pytest.raises(DiffsteerError, match="compressibility looks at images, but this pipeline makes sound"):
        SteeredPipeline(pipe, BestOfN(2), Compressibility())("rain", seed=0, **call)
    with pytest.raises(DiffsteerError, match="looks at images"):
        SteeredPipeline(pipe, None, 2 * Compressibility())("rain", seed=0, **call)
    loud = SteeredPipeline(pipe, FeynmanKac(2), lambda x, prompts: x.square().mean((1, 2)))
    out = loud("rain", seed=0, **call)
    assert out.images is not None and isinstance(out.images[0], Sound)
    out.save(tmp_path / "o")
    made = out.samples[0, out.chosen[0]]
    with wave.open(str(tmp_path / "o/000.wav")) as file:
        assert (file.getnchannels(), file.getnframes(), file.getframerate()) == (*made.shape, out.images[0].rate)
        read = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).view(-1, len(made)).T
    torch.testing.assert_close(read / 32767, made.clamp(-1, 1), rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "o/run.json").read_text())["prompts"] == ["rain"]


def test_a_folder_of_sounds_has_no_sheet(command: Any, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reward that looks at any samples, as a plug-in may."""
    monkeypatch.setattr(Compressibility, "modality", "any")
    monkeypatch.setattr(Compressibility, "score", lambda self, samples, prompts, ctx: samples.square().mean((1, 2)))
    model = saved("StableAudioPipeline", tmp_path / "pipe")
    result = command("generate", model, "prompt=rain", "out=o", "call.audio_end_in_s=1.5", *SMALL)
    assert result.code == 0 and result.out.endswith("1 sound and manifest.jsonl in o\n"), result.err
    [entry] = manifest(tmp_path / "o")
    assert entry["image"] == "sounds/000.wav" and (tmp_path / "o/sounds/000.wav").exists()
    assert not (tmp_path / "o/grid.png").exists()


def test_classes_by_number_or_name(command: Any, tmp_path: Path) -> None:
    pipe = SteeredPipeline(TOYS["DiTPipeline"].build(), BestOfN(1), Compressibility())
    by_name, by_number, by_digits = (pipe(c, num_inference_steps=3, seed=0).samples for c in (["a circle"], [1], ["1"]))
    assert torch.equal(by_name, by_number) and torch.equal(by_name, by_digits)
    with pytest.raises(DiffsteerError, match="knows no 'a cirle'; did you mean 'a circle'"):
        pipe("a cirle", num_inference_steps=3, seed=0)
    model = saved("DiTPipeline", tmp_path / "pipe")
    refused = command("generate", model, "prompt=a dog", "out=o", *SMALL)
    assert refused.code == 2 and "DiTPipeline draws classes" in refused.err and refused.err.count("\n") == 1
    assert command("generate", model, "prompt=7", "out=o", *SMALL).code == 0


def test_what_a_call_lacks_is_said(command: Any, tmp_path: Path) -> None:
    model = saved("StableDiffusionControlNetPipeline", tmp_path / "pipe")
    result = command("generate", model, "prompt=a star", "out=o", *SMALL)
    assert result.code == 2 and "image must be passed" in result.err and result.err.count("\n") == 1
    unknown = command("generate", model, "prompt=a star", "out=o", "call.hight=16", *SMALL)
    assert unknown.code == 2 and "'hight'; did you mean 'height'?" in unknown.err and unknown.err.count("\n") == 1
