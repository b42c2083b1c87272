import torch
from diffsteer_warmth import Warmth

from diffsteer.conformance import check_reward
from diffsteer.types import Context


def test_it_keeps_what_a_reward_promises() -> None:
    check_reward(Warmth)
    check_reward(lambda: Warmth(middle=0.5))


def test_red_is_warm() -> None:
    pictures = torch.zeros(2, 3, 8, 8)
    pictures[0, 0], pictures[1, 2] = 1, 1
    assert Warmth().score(pictures, ["", ""], Context()).tolist() == [1.0, -1.0]
