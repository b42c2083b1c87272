"""``diffsteer comfy export | doctor | graph``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from diffsteer.types import DiffsteerError

USAGE = """\
diffsteer comfy export DIR                                 a node pack, into a ComfyUI, its custom_nodes, or any folder
diffsteer comfy doctor DIR                                 what is wrong with an installation there
diffsteer comfy graph prompt=TEXT [key=value ...] [-o FILE] [--canvas] [--checkpoint NAME]
                                                           what generate would do, as a graph in API form (or of the canvas)"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DiffsteerError(f"{self.prog}: {message}")


def main(argv: list[str]) -> int:
    """Run a command; its exit code.

    Raises:
        DiffsteerError: wrong input.
    """
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE)
        return 0 if argv else 2
    commands = {"export": _export, "doctor": _doctor, "graph": _graph}
    if argv[0] not in commands:
        from diffsteer.registry import nearest

        raise DiffsteerError(f"comfy {argv[0]} is unknown{nearest(argv[0], commands)}")
    return commands[argv[0]](argv[1:])


def _export(argv: list[str]) -> int:
    from diffsteer.comfy.pack import export

    folder = export(_folder("export", argv))
    print(f"node pack in {folder}; restart ComfyUI to see it, and ask `diffsteer comfy doctor {folder}` if you do not")
    return 0


def _doctor(argv: list[str]) -> int:
    from diffsteer.comfy.pack import doctor

    found = list(doctor(_folder("doctor", argv)))
    for well, text in found:
        print(f"{'ok   ' if well else 'WRONG'} {text}")
    wrong = sum(not well for well, _ in found)
    print(f"{wrong} thing{'s are' if wrong != 1 else ' is'} wrong" if wrong else "all is well")
    return 1 if wrong else 0


def _graph(argv: list[str]) -> int:
    from diffsteer.asked import check
    from diffsteer.comfy.of_run import graph_of
    from diffsteer.config import build

    parser = _Parser(prog="comfy graph", add_help=False, allow_abbrev=False)
    parser.add_argument("-o", dest="file")
    parser.add_argument("--checkpoint")
    parser.add_argument("--canvas", action="store_true")
    known, overrides = parser.parse_known_args(argv)
    flags = [arg for arg in overrides if arg.startswith("-")]
    if flags:
        raise DiffsteerError(f"comfy graph: unknown option {flags[0]!r}; valid: -o, --canvas, --checkpoint, and key=value")
    config = _composed(overrides)
    check(config, prompted=True)
    if config.prompt is None:
        raise DiffsteerError("a graph holds one prompt: give prompt=TEXT")
    sampler, reward = build("sampler", config.sampler), build("reward", config.reward)
    graph = graph_of(config, config.prompt, sampler, reward, known.checkpoint)
    made: dict[str, Any] = graph.canvas() if known.canvas else graph.api()
    text = json.dumps(made, indent=1, ensure_ascii=False)
    if known.file is None:
        print(text)
    else:
        Path(known.file).write_text(text + "\n", encoding="utf-8")
        print(f"{len(graph.placed)} nodes in {known.file}")
    return 0


def _composed(overrides: list[str]) -> Any:
    import hydra

    from diffsteer.config import register_schemas
    from diffsteer.overrides import for_hydra

    register_schemas()
    with hydra.initialize_config_module("diffsteer.configs", version_base="1.3"):
        return hydra.compose("config", for_hydra(overrides))


def _folder(command: str, argv: list[str]) -> str:
    parser = _Parser(prog=f"comfy {command}", add_help=False)
    parser.add_argument("DIR")
    return str(parser.parse_args(argv).DIR)
