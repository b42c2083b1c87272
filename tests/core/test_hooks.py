"""The denoiser seam: what its hooks see, and where they see nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from core.test_backend import PROMPTS, embeddings, open_session

from diffsteer import UnsupportedError
from diffsteer.classifier_free import guidance_parts
from diffsteer.hooks import Watch, watching
from diffsteer.ledger import Ledger


def test_guidance_parts_are_told_apart_by_reconstruction(toy_pipeline: Any) -> None:
    session = open_session(toy_pipeline, particles=1)
    x = session.noise()
    session.segment(x, 0, 1)
    u, c = session.guidance()
    t = session.shadow.scheduler._grid[0]
    for output, texts in ((u, ["", ""]), (c, PROMPTS)):
        own = toy_pipeline.unet(x, t, encoder_hidden_states=embeddings(toy_pipeline, texts)).sample
        torch.testing.assert_close(output, own, rtol=1e-3, atol=1e-5)
    a, b = torch.randn(2, 3, 4).unbind(0)
    for outputs in ([torch.cat([a, b])], [a, b], [torch.cat([b, a])], [b, a]):
        parts = guidance_parts(outputs, a + 3 * (b - a), 3.0)
        assert torch.equal(parts[0], a) and torch.equal(parts[1], b)
    with pytest.raises(UnsupportedError, match="not recognised"):
        guidance_parts([a, b], a * 7, 3.0)


def test_hooks_are_inert_outside_their_block_and_in_other_threads(toy_pipeline: Any) -> None:
    first, second = Watch(Ledger()), Watch(Ledger())
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 16, 16)

    def forward() -> None:
        toy_pipeline.unet(x, t, encoder_hidden_states=words)

    with watching(first, toy_pipeline.unet):
        forward()
        with watching(second, toy_pipeline.unet):
            forward()
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
        forward()
    forward()
    assert (first.ledger.evaluations, second.ledger.evaluations) == (4, 2)
