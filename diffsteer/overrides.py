"""What a person types, as what Hydra's grammar takes: texts verbatim, paths and programs as the keys that they stand for."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING

from diffsteer.config import EXPRESSION, GROUPS
from diffsteer.expression import SWEEP, is_expression, is_program, split
from diffsteer.fingerprint import exists
from diffsteer.registry import nearest, registered
from diffsteer.types import DiffsteerError

VERBATIM = ("prompt", "negative_prompt", "reward.text")
NAMED = ("model", "sampler", "reward", "guide", "schedule", "experiment")  # what is named, each by an option of its own
OPEN = ("call", "tune.parameters", "draft.call")  # mappings that take any key


def for_hydra(argv: list[str]) -> list[str]:
    """Rewrite what a person types into what Hydra's grammar takes: texts verbatim, ``model=PATH``."""
    rewritten = []
    for arg in argv:
        key, equals, value = arg.partition("=")
        group = key.lstrip("+~").partition("@")[0]
        if arg.startswith("-"):
            rewritten.append(arg)
        elif equals and not key.strip("+~"):
            raise DiffsteerError(f"{arg!r} has no key: wanted key=value")
        elif equals and (key in OPEN or key.startswith(tuple(f"{o}." for o in OPEN))):
            rewritten.append(f"++{arg}")
        elif equals and key == "prompts" and not value:
            raise DiffsteerError("prompts= names no file")
        elif equals and key == "out" and not value:
            raise DiffsteerError("out= names no folder")
        elif equals and key.lstrip("+") in VERBATIM:
            rewritten.append(f"{key}={quoted(value)}")
        elif equals and key in NAMED[:-1] and value in ("", "null"):
            raise DiffsteerError(f"{key}={value} is no option{nearest(value, _options(key))}")
        elif equals and "[" in value and (group in NAMED or "/" in group) and not _lists_names(arg):
            raise DiffsteerError(f"{key}={value} is no option: wanted names")
        elif equals and key == "reward" and _is_option("reward", value, argv):
            rewritten.append(arg)
        elif equals and key == "reward" and is_expression(value, registered("reward")):
            rewritten += [f"reward={EXPRESSION}", f"reward.text={quoted(value)}"]
        elif equals and key in ("holdout", "tune.holdout", "draft.reward") and _is_reward(value):
            rewritten.append(f"{key}={quoted(value)}")
        elif equals and key in ("holdout", "tune.holdout") and value.startswith("[") and value.endswith("]"):
            parts = [quoted(part) if _is_reward(part) else part for part in split(value)]
            rewritten.append(f"{key}=[{','.join(parts)}]")
        elif equals and key == "reward" and "(" in value and not SWEEP.match(value):  # a program
            rewritten += ["reward=program", f"reward.text={quoted(value)}"]
        elif equals and key == "model" and _is_path(value, argv):
            rewritten += ["model=path", f"model.path={quoted(value)}"]
        elif equals and (key == "prompts" and _names_a_file(value) or not _parses(arg)):
            rewritten.append(f"{key}={quoted(value)}")  # a file's name may hold what Hydra's grammar reads otherwise
        else:
            rewritten.append(arg)
    return rewritten


def _is_reward(value: str) -> bool:
    """Is it an expression of rewards, or a program of constraints?"""
    return is_expression(value, registered("reward")) or is_program(value)


def _parses(arg: str) -> bool:
    try:
        OverridesParser.create().parse_override(arg)
    except HydraException:
        return False
    return True


def _lists_names(arg: str) -> bool:
    """Is every list in it one of texts? Hydra asks no option of a group for anything else, and fails there."""
    try:
        told = OverridesParser.create().parse_override(arg).value()
    except HydraException:
        return True
    several = told.list if isinstance(told, ChoiceSweep) else [told]
    return all(isinstance(each, str | QuotedString) for one in several if isinstance(one, list) for each in one)


def _names_a_file(value: str) -> bool:
    """One file, there or not; no sweep over several, no text quoted for Hydra, no interpolation."""
    return exists(value) or not (set(value) & set(",'\"") or "${" in value)


def _options(group: str) -> list[str]:
    shipped = [f.stem for f in (Path(__file__).parent / "configs" / group).glob("*.yaml")]
    return sorted({*shipped, *(registered(group) if group in (*GROUPS, "schedule") else ())})


def quoted(text: str) -> str:
    """A text as a quoted value of Hydra's grammar that comes out unchanged.

    OmegaConf reads ``${`` as an interpolation, and takes backslashes before it for escapes; Hydra those before a quote. A bare
    ``???`` would mean a missing value and has no escape, so its first letter becomes an interpolation.
    """
    text = re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + r"\${", text) if text != MISSING else "${oc.decode:\"'?'\"}??"
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), text) + "'"


def _is_option(group: str, value: str, argv: list[str]) -> bool:
    """Is there a file of that name, here or in a folder of the user's own?"""
    folders = [Path(__file__).parent / "configs"]
    for flag, after in zip(argv, [*argv[1:], ""], strict=True):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(after))
        elif flag.startswith("--config-dir="):
            folders.append(Path(flag.partition("=")[2]))
    return any(exists(str(folder / group / f"{value}.yaml")) for folder in folders)


def _is_path(value: str, argv: list[str]) -> bool:
    if _is_option("model", value, argv):
        return False
    return "/" in value or (exists(value) and Path(value).is_dir())
