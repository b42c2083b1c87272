"""Rewards as texts: what they mean, what they refuse, and that no text ends in anything but a reward or one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from diffsteer.config import build, named
from diffsteer.expression import is_expression, is_program, reward_of, split
from diffsteer.registry import registered
from diffsteer.reward import FunctionReward, Reward, ZScore, leaves, terms_of
from diffsteer.rewards import Brightness, ClipScore, Program, Symmetry
from diffsteer.rewards.constraints import BOUNDS, GROUPS, RELATIONS
from diffsteer.rewards.measurements import MEASUREMENTS
from diffsteer.types import Context, DiffsteerError

NAMES = ("red", "green", "blue")
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def channel(name: str, given: dict[str, Any]) -> Reward:
    n, power = NAMES.index(name), given.get("power", 1)

    def mean(x: Tensor, p: Any) -> Tensor:
        scores: Tensor = x[:, n].mean((1, 2)) ** power
        return scores

    mean.__name__ = name
    return FunctionReward(mean)


def value(text: str) -> Tensor:
    return reward_of(text, channel, NAMES).score(X, ["a"] * 4, Context())


R, G, B = X.mean((2, 3)).unbind(1)
MEANS: dict[str, Tensor] = {
    "red": R,
    "red + green": R + G,
    "red - green - blue": R - G - B,
    "-red + 2*green": -R + 2 * G,
    "2 * (red - 3*green) / 4": (R - 3 * G) / 2,
    "red*2*3 + (1 + 1)*blue": 6 * R + 2 * B,
    "(1/2 + 1/2) * red": R,
    "red + -0.5 * blue": R - 0.5 * B,
    "z(red, mean=0.5, std=2)": (R - 0.5) / 2,
    "0.5*z(red + green, mean=1, std=0.1) - blue": 5 * (R + G - 1) - B,
    "red(power=2)": R**2,
    "red(power=2.0) + 1e-1*green": R**2 + 0.1 * G,
    "  red\t+\n green ": R + G,
}


@pytest.mark.parametrize("text", MEANS)
def test_what_an_expression_means(text: str) -> None:
    torch.testing.assert_close(value(text), MEANS[text])


WRONG = {
    "": "something is missing at the end",
    "red +": "character 6 of 'red \\+': something is missing at the end",
    "red green": "character 5 of 'red green': 'green' is out of place",
    "(red": "a '\\)' is missing",
    "red)": "'\\)' is out of place",
    "3": "'3' is a number, and no reward",
    "red + 3": "a number that is added changes no choice",
    "red * green": "rewards can be added, not multiplied",
    "red / green": "only numbers other than 0",
    "red / 0": "only numbers other than 0",
    "gren": "there is no 'gren' .*did you mean 'green'. valid: blue, green, red",
    "z(3)": "z\\(\\) takes a reward",
    "z(red": "a '\\)' is missing",
    "z(red, low=3)": "takes mean= and std=, not low=",
    "z(red, mean=0, std=0)": "std above 0",
    "z(red, mean=0)": "wanted both",
    "z(red, mean=a, std=1)": "mean='a' is no number",
    "red(2)": "arguments are key=value",
    "red(power=2, power=3)": "power= is given twice",
    "red(power=a/b)": "a ',' is missing",
    "red(power=+)": "put texts into quotes",
    "red $ green": "character 5 of .*'\\$' is not understood",
    "(" * 80 + "red" + ")" * 80: "nested more than 60 deep",
    "red + 'text'": "is out of place",
    "1e999*red": "1e999 is no weight",
    "1e308*10*red": "a weight in .* is no finite number",
    "red/1e-320": "a weight in .* is no finite number",
    "z(red, mean=0, std=1e999)": "std=inf is no number",
    "red(power=" + "9" * 5000 + ")": "too large a number",
}


@pytest.mark.parametrize("text", WRONG, ids=[t[:20] for t in WRONG])
def test_what_is_no_expression_is_said_in_a_line(text: str) -> None:
    with pytest.raises(DiffsteerError, match=WRONG[text]):
        value(text)


TOKENS = ["red", "green", "z", "(", ")", "+", "-", "*", "/", ",", "=", "2", "0.5", "mean", "std", "'a'", "$", " "]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(TOKENS), max_size=14).map("".join))
def test_any_text_is_a_reward_or_one_clear_line(text: str) -> None:
    try:
        made = reward_of(text, channel, NAMES)
    except DiffsteerError as error:
        assert "\n" not in str(error) and str(error).strip()
    else:
        assert isinstance(made, Reward)


def sums() -> st.SearchStrategy[tuple[str, Tensor]]:
    part = st.sampled_from([("red", R), ("green", G), ("blue", B)])
    number = st.integers(-5, 5).map(lambda n: n / 2)

    def joined(children: st.SearchStrategy[tuple[str, Tensor]]) -> st.SearchStrategy[tuple[str, Tensor]]:
        return st.one_of(
            st.tuples(children, children).map(lambda p: (f"({p[0][0]} + {p[1][0]})", p[0][1] + p[1][1])),
            st.tuples(children, children).map(lambda p: (f"({p[0][0]} - {p[1][0]})", p[0][1] - p[1][1])),
            st.tuples(number, children).map(lambda p: (f"{p[0]} * {p[1][0]}", p[0] * p[1][1])),
            st.tuples(children, st.sampled_from([2.0, -0.5])).map(lambda p: (f"({p[0][0]}) / {p[1]}", p[0][1] / p[1])),
        )

    return st.recursive(part, joined, max_leaves=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sums())
def test_expressions_compute_what_they_say(made: tuple[str, Tensor]) -> None:
    text, wanted = made
    torch.testing.assert_close(value(text), wanted, rtol=1e-4, atol=1e-4)


def test_rewards_in_it_are_those_of_the_registry_checked_like_on_their_own() -> None:
    text = "clip(resize=pad) + 0.3*z(symmetry(axis='horizontal'), mean=-0.5, std=0.1) - 2*brightness(target=null)"
    made = build("reward", OmegaConf.create({"name": "expression", "text": text}))
    clip, scaled, bright = (r for _, r in terms_of(made))
    assert [w for w, _ in terms_of(made)] == [1, 0.3, -2]
    assert isinstance(clip, ClipScore) and clip.resize == "pad" and isinstance(bright, Brightness)
    assert isinstance(scaled, ZScore) and isinstance(scaled.reward, Symmetry) and scaled.reward.axis == "horizontal"
    assert [type(r) for r in leaves(made)] == [ClipScore, Symmetry, Brightness] and made.needs_prompt
    inner = build("reward", OmegaConf.create({"name": "expression", "text": "clip + program(text='area(red) > 0.1')"}))
    assert isinstance(terms_of(inner)[1][1], Program)
    for text, said in (
        ("clip(resize=stretch)", "resize='stretch' is unknown"),
        ("clip(size=3) + clip2", "unknown key"),
        ("2*aesthetik", "did you mean 'aesthetic'"),
        ("rank_ensemble(rewards=clip)", "rank_ensemble|rewards"),
    ):
        with pytest.raises(DiffsteerError, match=said):
            build("reward", OmegaConf.create({"name": "expression", "text": text}))
    for wrong in ({"name": "expression"}, {"name": "expression", "text": "clip", "more": 1}, {"name": "expression", "text": 3}):
        with pytest.raises(DiffsteerError, match="takes a text and nothing else"):
            build("reward", OmegaConf.create(wrong))


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("clip", False),
        ("clip,aesthetic", False),
        ("clip + aesthetic", True),
        ("0.5*clip", True),
        ("z(clip)", True),
        ("clip(resize=pad)", True),
        ("clip+clpi2", True),
        ("my-reward", False),
        ("all_of(area(red) > area(blue), left_of(red, blue))", False),
        ("brightness() > 0.5", False),
        ("less_than(brightness(), 0.2)", False),
        ("all_of(greater_than(brightness(), 0.2), left_of(red, blue))", False),
        ("area(red) + brightness() < 0.5", False),
        ("area(red) * 2 > 0.1", False),
        ("brightness() - 0.2 > 0.1", False),
        ("0.1 < 2 * area(red)", False),
        ("clip + program(text='area(red) > 0.1')", True),
        ("choice(clip,aesthetic)", False),
        ("[z(clip),clip2]", False),
        ("path/to/clip", True),
    ],
)
def test_what_a_person_means(text: str, is_one: bool) -> None:
    assert is_expression(text, registered("reward")) == is_one
    program = "area" in text and not is_one or "brightness" in text
    kind = "expression" if is_one else "program" if program else None
    assert is_program(text) == (kind == "program") and named(text) == ({"name": kind, "text": text} if kind else {"name": text})


def test_every_word_of_programs_is_known_for_one() -> None:
    assert all(is_program(f"{word}(") for word in (*GROUPS, *RELATIONS, *BOUNDS))
    assert all(is_program(f"{name}() > 1") for name in MEASUREMENTS)


def test_lists_of_expressions_are_cut_where_they_mean_it() -> None:
    assert split("[a, b(c, d) , 'e, f', [g,h]]") == ["a", "b(c, d)", "'e, f'", "[g,h]"] and split("[]") == [""]
