"""A judge behind an HTTP endpoint that speaks as OpenAI's does: it is shown a picture and answers with a number."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer.media import picture_of
from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError, RewardError, check_numbers, setting

QUESTION = (
    'Rate how well this picture shows "{prompt}", from {low} (nothing of it) to {high} (all of it). '
    "Answer with the number alone."
)
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which it is worth asking again
OF_ONE = (400, 413, 415, 422)  # statuses that are about one picture or prompt
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_THOUGHTS = re.compile(r".*</think>", re.DOTALL)  # some templates swallow where they begin
MOST = 20_000  # answers that are remembered


@dataclass(eq=False)
class RemoteJudge(Reward):
    """The number that a model of language and vision answers with, from `low` to `high`.

    The key, where the endpoint wants one, is read from the environment and goes nowhere else. A picture that was asked about
    is not asked about again. Answers may come in any order; each stays with its picture. An answer without a number, or with
    one out of range, is asked for again, and in the end is NaN, which loses. At temperature 0 an endpoint may still answer
    otherwise another time.

    Cost: a request a sample, `parallel` at a time.

    Args:
        url: up to /v1, such as http://localhost:8000/v1. model: as the endpoint calls it.
        question: with ``{prompt}`` in it, ``{low}`` and ``{high}`` if wanted.
        low, high: the ends of the scale.
        timeout: seconds that an answer may take. retries: further tries, with twice the pause before each, or the one that the
            endpoint asks for.
        max_tokens: of an answer, which a model that thinks aloud wants many of; temperature: of the model. None leaves them to
            an endpoint that refuses to be told.
        parallel: requests at a time.
        key: the name of the environment variable that holds the key.

    Raises:
        DiffsteerError: what is no option; later, an endpoint that does not answer, or refuses.
    """

    url: str | None = None
    model: str | None = None
    question: str = QUESTION
    low: float = 0.0
    high: float = 10.0
    timeout: float = setting(60.0, low=0)
    retries: int = setting(3, low=0)
    parallel: int = setting(4, low=1)
    max_tokens: int | None = 16
    temperature: float | None = 0.0
    key: str = "OPENAI_API_KEY"

    name: ClassVar[str] = "remote_judge"
    range: ClassVar[tuple[float, float]] = (0.0, 10.0)
    deterministic: ClassVar[bool] = False
    waits: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True
    licence: ClassVar[str | None] = "that of the endpoint"
    weights: ClassVar[str | None] = "behind the endpoint"

    def __post_init__(self) -> None:
        check_numbers(
            "remote_judge: ",
            {"retries": self.retries, "parallel": self.parallel},
            {"timeout": self.timeout, "temperature": self.temperature},
        )
        if "{prompt}" not in self.question:
            raise DiffsteerError(f"remote_judge: question={self.question!r} has no {{prompt}} in it")
        if not self.low < self.high:
            raise DiffsteerError(f"remote_judge: low={self.low:g} is not below high={self.high:g}")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise DiffsteerError(f"remote_judge: max_tokens={self.max_tokens}; wanted a whole number, at least 1, or null")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise DiffsteerError(f"remote_judge: temperature={self.temperature:g}; wanted a number, at least 0, or null")
        if self.timeout <= 0 or self.retries < 0 or self.parallel < 1:
            raise DiffsteerError(
                f"remote_judge: timeout={self.timeout:g}, retries={self.retries}, parallel={self.parallel}; "
                "wanted more than 0, at least 0, at least 1"
            )
        self.__dict__.update(range=(self.low, self.high))
        self._known: dict[str, float] = {}

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Refuse a judge without an address."""
        if not self.url or not self.url.startswith(("http://", "https://")):
            raise DiffsteerError(f"remote_judge: url={self.url}; wanted one such as http://localhost:8000/v1")
        if not self.model:
            raise DiffsteerError("remote_judge: which model? Give model=, as the endpoint calls it")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,). NaN for an image with NaN, and where there is no answer with a number."""
        self.prepare(prompts, ctx)
        shown = [None if bool(image.isnan().any()) else _png(image) for image in samples]
        keys = [None if png is None else _digest(png, prompt) for png, prompt in zip(shown, prompts, strict=True)]
        known = self._known  # of now: another thread may put an empty one in its place
        new = {k: (png, p) for k, png, p in zip(keys, shown, prompts, strict=True) if k is not None and k not in known}
        if len(known) + len(new) > MOST:
            self._known = known = {k: known[k] for k in keys if k is not None and k in known}
        with ThreadPoolExecutor(self.parallel) as pool:  # `map` keeps the order
            said = pool.map(lambda asked: self._rate(asked[0], asked[1]), new.values())
            known |= dict(zip(new, said, strict=True))
        found = [float("nan") if key is None else known[key] for key in keys]
        return torch.tensor(found, dtype=torch.float32, device=samples.device)

    def _rate(self, png: bytes, prompt: str) -> float:
        question = self.question.replace("{low}", f"{self.low:g}").replace("{high}", f"{self.high:g}")
        return self._answer(question.replace("{prompt}", prompt), base64.b64encode(png).decode())

    def _answer(self, question: str, png: str) -> float:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
        turn = {"role": "user", "content": [{"type": "text", "text": question}, picture]}
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body = {"model": self.model, "messages": [turn], **{k: v for k, v in options.items() if v is not None}}
        said = ""
        for _ in range(self.retries + 1):
            said, cut = self._post(body)
            number = number_in(said, self.high, cut)
            if number is not None and self.low <= number <= self.high:
                return number
        wanted = f"no number from {self.low:g} to {self.high:g}"
        warnings.warn(f"remote_judge: {self.model} answered {said[:60]!r}, {wanted}", stacklevel=2)
        return float("nan")

    def _post(self, body: dict[str, Any]) -> tuple[str, bool]:
        """One answer, and was it cut off? Asked for again where that may help."""
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        retry = Retry(self.retries, backoff_factor=0.5, status_forcelist=AGAIN, allowed_methods=None, raise_on_status=False)
        secret = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        assert self.url is not None
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            with requests.Session() as http:
                for scheme in ("http://", "https://"):
                    http.mount(scheme, HTTPAdapter(max_retries=retry))
                got = http.post(address, json=body, headers=headers, timeout=self.timeout)
        except requests.RequestException as error:
            raise DiffsteerError(
                f"remote_judge: {address} does not answer ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        if got.status_code in OF_ONE:
            raise RewardError(f"remote_judge: {address} answered {got.status_code} {got.reason}: {got.text[:200]}")
        if not got.ok:
            raise DiffsteerError(f"remote_judge: {address} answered {got.status_code} {got.reason}: {got.text[:200]}")
        try:
            choice = got.json()["choices"][0]
            return str(choice["message"]["content"]), choice.get("finish_reason") == "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise DiffsteerError(f"remote_judge: {address} answered what is no completion: {got.text[:200]}") from error


def number_in(answer: str, high: float = 10.0, cut: bool = False) -> float | None:
    """The number that an answer begins with, or the only one in it, thoughts and an "out of 10" left away; of several nobody
    knows which is meant. Of one that was cut off, only what it begins with, and nothing of its thoughts."""
    answer = _THOUGHTS.sub("", answer)
    if "<think>" in answer:
        return None
    said = re.sub(rf"\s*(?:/|out of)\s*{high:g}\b", "", answer)
    if re.search(r"\d,\d", said):  # a half to some, thousands to others
        return None
    numbers = _NUMBER.findall(said)
    begins = _NUMBER.match(said.strip().lstrip("*\"'"))
    return float(begins[0]) if begins else float(numbers[0]) if len(numbers) == 1 and not cut else None


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    picture_of(image).save(file, format="PNG")
    return file.getvalue()


def _digest(png: bytes, prompt: str) -> str:
    return hashlib.sha256(png + prompt.encode()).hexdigest()
