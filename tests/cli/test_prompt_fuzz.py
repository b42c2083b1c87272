"""`prompt=` is taken verbatim: whatever is typed survives the shell's words, Hydra's grammar and OmegaConf's interpolations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from diffsteer.config import as_yaml, register_schemas
from diffsteer.folder import Folder
from diffsteer.overrides import for_hydra
from diffsteer.prompts import as_items

EXAMPLES = [
    "", " ", "  two  blanks ", "${oc.env:HOME}", "\\${x}", "\\\\${x}", "${", "$", "}", "${a}'${b}\\", "a,b", "a, b", "x=(1)",
    "f(x)", "[a]", "{a: b}", "'", '"', "it's", "\\", "\\\\", "\\'", "a\\", "'a'", '"a"', "null", "true", "3", "~", "???",
    "???x", "a:b", "#", "%", "*", "é", "日本", "\u2028", "a\x85\\${b}1", "🔴", "\t", "choice(a,b)", "range(1,5)", "+a",
    "--help", "prompt=a",
]  # fmt: skip
# The pieces that mean something to Hydra or OmegaConf, so that they meet often.
HARD = st.lists(st.sampled_from(["${", "}", "\\", "'", '"', ",", "=", "(", ")", "$", "{", "a", " ", "é"])).map("".join)
TEXT = HARD | st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]))


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    register_schemas()
    with initialize_config_module("diffsteer.configs", version_base="1.3"):
        yield


def check_through(text: str, *more: str) -> Any:
    config = compose("config", overrides=for_hydra([f"prompt={text}", *more]))
    assert config.prompt == text
    assert OmegaConf.create(as_yaml(config)).prompt == text  # the snapshot
    return config


@pytest.mark.parametrize("text", EXAMPLES)
def test_texts_known_to_be_hard(text: str) -> None:
    config = check_through(text, f"negative_prompt={text}")
    assert config.negative_prompt == text


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(TEXT)
def test_any_text_through_the_configuration(text: str) -> None:
    check_through(text)


@settings(max_examples=400)
@given(TEXT)
@example("a,b")
@example("???")
def test_any_text_is_one_value_in_a_sweep_too(text: str) -> None:
    """The basic sweeper writes every override anew for its jobs."""
    parser = OverridesParser.create()
    [given] = for_hydra([f"prompt={text}"])
    first = parser.parse_override(given)
    assert not first.is_sweep_override()
    again = parser.parse_override(f"prompt={first.get_value_element_as_str()}")
    assert OmegaConf.create({"prompt": again.value()}).prompt == text


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_any_text_through_the_manifest(text: str, tmp_path: Path) -> None:
    line = {"id": 0, "prompt": text, "image": "images/000.png", "settings": "s"}
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images/000.png").touch()
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert Folder(tmp_path, as_items([text]), "s").missing == []
