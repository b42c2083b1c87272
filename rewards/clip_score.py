"""How well an image fits its prompt, to CLIP: Hessel et al. (2021), arXiv 2104.08718."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.rewards.open_clip_model import EMBEDDED, RESIZE, SECOND, OpenClip, check_options, is_embedded, load
from diffsteer.shapes.grammar import WORDS
from diffsteer.shapes.tokenizer import CONTEXT, unknown_words
from diffsteer.types import Context, PromptError, setting


@dataclass(eq=False)
class ClipScore(Reward):
    """100 times the cosine similarity of CLIP's image and text features.

    The paper's CLIPScore is ``2.5 * max(cos, 0)`` with OpenAI's ViT-B/32 and the prefix "A photo depicts"; here there is no
    floor and no prefix. Good fits lie near 30 with large models; scores of different checkpoints do not compare.

    The checkpoint follows the model that is steered: the embedded miniature CLIP for the embedded models (a prompt with a word
    that those do not have is refused), LAION's ViT-B-32 (600 MB, fetched once) for all others. A model named here always wins.

    Cost: one pass of the image tower a sample; the text tower runs once a prompt.

    Args:
        model_name: any name of open_clip, ``local-dir:FOLDER``, ``hf-hub:ORG/NAME``, or "shapes", the embedded one (to be named
            where the embedded model cannot be recognised, behind a decoder that is a bare callable).
        pretrained: a tag of the model or a checkpoint file, opened as plain tensors only.
        resize: squash | crop | pad, to the model's square. Only "crop", CLIP's own way, loses part of an image.
        device: where CLIP runs; None for the accelerator if there is one.

    Raises:
        DiffsteerError: options that contradict each other; later, a checkpoint that cannot be loaded, or a prompt with an
            unknown word.
    """

    model_name: str | None = None
    pretrained: str | None = None
    resize: str = setting("squash", choices=RESIZE)
    device: str | None = None

    name: ClassVar[str] = "clip"
    embedded: ClassVar[str] = EMBEDDED
    default: ClassVar[tuple[str, str]] = ("ViT-B-32", "laion2b_s34b_b79k")
    range: ClassVar[tuple[float, float]] = (-100.0, 100.0)
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True
    licence: ClassVar[str | None] = "MIT, for the default checkpoints"
    weights: ClassVar[str | None] = "embedded, or laion/CLIP-ViT-B-32-laion2B-s34B-b79K on huggingface.co"
    weights_bytes: ClassVar[int] = 605_000_000

    def __post_init__(self) -> None:
        check_options(self.name, self.model_name, self.pretrained, self.resize)
        self._loaded: dict[str, OpenClip] = {}

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the checkpoint and encode the prompts; once there are thousands, the features of earlier prompts are dropped."""
        self._texts(prompts, ctx)
        self._clip(ctx).encode_texts.forget_all_but(prompts)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        texts = self._texts(prompts, ctx)
        images = self._clip(ctx).encode_images(samples, self.resize)
        return 100 * (images * texts).sum(-1).to(samples.device)

    def image_features(self, samples: Tensor, ctx: Context) -> Tensor:
        """What samples are compared by: CLIP's image features (N, D) of images (N, 3, H, W) in [0, 1], of length one."""
        return self._clip(ctx).encode_images(samples, self.resize)

    def checkpoint(self, ctx: Context) -> tuple[str, str | None]:
        """Which CLIP it is: what was named, or what goes with the model."""
        if self.model_name is None:
            return (self.embedded, None) if ctx.embedded else self.default
        usual = (self.model_name, self.pretrained) == (self.default[0], None)
        return self.default if usual else (self.model_name, self.pretrained)

    def _clip(self, ctx: Context) -> OpenClip:
        name, pretrained = self.checkpoint(ctx)
        if name not in self._loaded:
            self._loaded[name] = load(name, pretrained, self.device)
        return self._loaded[name]

    def _texts(self, prompts: Sequence[str], ctx: Context) -> Tensor:
        if is_embedded(self.checkpoint(ctx)[0]):
            for prompt in dict.fromkeys(prompts):  # the tokenizer alone would spell a word that it does not know
                for word in unknown_words(prompt):
                    known = ", ".join(WORDS)
                    raise PromptError(f"{self.name}: the embedded CLIP has no word {word!r} ({prompt!r}); it knows: {known}")
                if len(prompt.split()) > CONTEXT - 2:  # the tokenizer would cut it
                    raise PromptError(f"{self.name}: the embedded CLIP reads {CONTEXT - 2} words at most, not {prompt!r}")
        return self._clip(ctx).encode_texts(prompts)


@dataclass(eq=False)
class SecondClip(ClipScore):
    """The same score by another CLIP, to hold out while `clip` steers, or to steer beside it.

    For the embedded models a second miniature CLIP (another architecture, another seed, smaller), for all others OpenAI's
    ViT-L/14 (1.7 GB, fetched once), which was trained on other pictures than the default of `clip`.
    """

    name: ClassVar[str] = "clip2"
    embedded: ClassVar[str] = SECOND
    default: ClassVar[tuple[str, str]] = ("ViT-L-14", "openai")
    weights: ClassVar[str | None] = "embedded, or openai/clip-vit-large-patch14 on huggingface.co"
    weights_bytes: ClassVar[int] = 1_710_000_000
