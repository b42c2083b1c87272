"""The command line: ``diffsteer generate | evaluate | tune | status | report | list | comfy``. Composing is Hydra's (`config`).

Modules that need torch are imported when a command does, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffsteer import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from diffsteer.config import Config

USAGE = """\
diffsteer generate [prompt=TEXT | prompts=FILE] [key=value ...]   images, steered by a reward (--help tells the keys)
diffsteer evaluate [evaluate.samplers=[NAME,...]] [key=value ...] samplers at equal budgets, tabled and plotted
diffsteer tune tune.parameters.NAME=LOW..HIGH [key=value ...]     a sampler's parameters, searched for a reward
diffsteer status DIR                                              how far a folder of results is
diffsteer report DIR [OTHER] [-o FILE]                            one page to look at; two folders side by side
diffsteer list samplers | rewards | models | schedules            what there is
diffsteer comfy export DIR | doctor DIR | graph key=value ...     nodes for ComfyUI, and runs as graphs
diffsteer --version"""
TUNE_HELP = """\
diffsteer tune tune.parameters.NAME=LOW..HIGH [key=value ...]: a sampler's parameters, searched for a reward with Optuna.
Its own keys stand under tune.; all others are those of diffsteer generate."""
EVALUATE_HELP = """\
diffsteer evaluate [evaluate.samplers=[NAME,...]] [key=value ...]: samplers at equal budgets on the same prompts and seeds.
Its own keys stand under evaluate.; all others are those of diffsteer generate."""
OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
_FULL_ERROR = "HYDRA_FULL_ERROR"
# What is the matter with a path that was given, and no failure of the machine.
_NO_SUCH_PLACE = {
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
}

# Exit codes of the jobs that this process runs. None where a job is to raise: in a process of its own that a launcher of Hydra
# made, or for a full traceback.
_exits: list[int] | None = None
_started = 0.0  # when the command did


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run a command. Returns the exit code: 0, 1 if something failed while running, 2 for wrong input, 130 after Ctrl-C."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("--version", "-V"):
        return _version()
    if command in ("", "--help", "-h"):
        print(USAGE)
        return OK if command else WRONG_INPUT
    commands: dict[str, Callable[[list[str]], int]] = {
        "generate": _generate,
        "evaluate": _evaluate,
        "tune": _tune,
        "status": _status,
        "report": _report_page,
        "list": _list,
        "comfy": _comfy,
    }
    if command not in commands:
        import difflib

        near = difflib.get_close_matches(command, commands, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        return _complain(f"unknown command {command!r}{hint} valid: {', '.join(commands)}, --version, --help")
    try:
        return commands[command](rest)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "stopped", INTERRUPTED)
    except Exception as error:
        if os.environ.get(_FULL_ERROR) == "1":
            raise
        return _report(error)


def _version() -> int:
    print(f"diffsteer {__version__}")
    return OK


def _complain(message: str, code: int = WRONG_INPUT) -> int:
    print(f"diffsteer: {message}", file=sys.stderr)
    return code


def _report(error: Exception, more: str = "") -> int:
    """Print one line for an error, and `more` if it is no wrong input but a failure; return its exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from diffsteer.config import explain, one_line
    from diffsteer.types import DiffsteerError, FailedError, RewardError

    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _complain(explain(error))
    if isinstance(error, DiffsteerError):
        failed = isinstance(error, RewardError | FailedError)
        return _complain(one_line(error) + (more if failed else ""), FAILED if failed else WRONG_INPUT)
    if isinstance(error, OSError) and error.filename is not None and error.errno in _NO_SUCH_PLACE:
        return _complain(f"{error.filename}: {error.strerror}")
    return _complain(f"{type(error).__name__}: {one_line(error)}{more} ({_FULL_ERROR}=1 shows where)", FAILED)


def _generate(argv: list[str]) -> int:
    from diffsteer.config import Config

    return _composed("generate", argv, Config, _job)


def _tune(argv: list[str]) -> int:
    from diffsteer.config import Tuning
    from diffsteer.overrides import quoted

    own = ["hydra.job.name=tune", f"hydra.help.header={quoted(TUNE_HELP)}"]
    return _composed("tune", [*own, *argv], Tuning, _tune_job)


def _evaluate(argv: list[str]) -> int:
    from diffsteer.config import Evaluating
    from diffsteer.overrides import quoted

    own = ["hydra.job.name=evaluate", f"hydra.help.header={quoted(EVALUATE_HELP)}"]
    return _composed("evaluate", [*own, *argv], Evaluating, _evaluate_job)


def _composed(command: str, argv: list[str], keys: type[Config], job: Callable[[DictConfig], None]) -> int:
    """Run a job with what Hydra composes of the arguments, in the folder that Hydra makes; several with -m."""
    global _exits, _started
    import hydra

    from diffsteer.config import register_schemas
    from diffsteer.overrides import for_hydra
    from diffsteer.types import DiffsteerError

    _started = time.time()
    try:
        argv = _overrides_first(for_hydra(argv))
    except SystemExit:  # --version stands among Hydra's flags
        return _version()
    register_schemas(keys)
    _exits = None if os.environ.get(_FULL_ERROR) == "1" else []
    try:
        with _hydra_raising([f"diffsteer {command}", *argv]), _warnings_in_a_line():
            hydra.main(version_base="1.3", config_path="pkg://diffsteer.configs", config_name="config")(job)()
        return max(_exits or [OK])
    except ValueError as error:  # of Hydra itself, about its flags: a job's errors have been told
        if _exits is None:
            raise
        raise DiffsteerError(str(error)) from error
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    finally:
        _exits = None


def _overrides_first(argv: list[str]) -> list[str]:
    """Check the flags, and bring together the overrides that stand between them: argparse would not."""
    from hydra._internal.utils import get_args_parser

    from diffsteer.registry import nearest
    from diffsteer.types import DiffsteerError

    parser, said = get_args_parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            _, extra = parser.parse_known_args(argv)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise DiffsteerError(said.getvalue().strip().rpartition("error: ")[2]) from None
    unknown = [arg for arg in extra if arg.startswith("-")]
    if unknown:
        raise DiffsteerError(f"unknown option {unknown[0]!r}{nearest(unknown[0], parser._option_string_actions)}")
    valued = {option: action.nargs for action in parser._actions for option in action.option_strings if action.nargs != 0}
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        (flags if arg.startswith("-") else overrides).append(arg)
        takes = [n for o, n in valued.items() if o == arg or (arg.startswith("--") and o.startswith(arg))]
        if takes and rest and not (takes[0] == "?" and rest[0].startswith("-")):
            flags.append(rest.pop(0))  # its value, which may look like an override
    return [*overrides, *flags]


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings as the command's own words, not as places in its code; what is said again, with other numbers, is counted."""
    from diffsteer.config import one_line
    from diffsteer.warn import Notice

    said: dict[str, list[str]] = {}

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        text = one_line(message)
        alike = said.setdefault(re.sub(r"[\d.]+", "#", text), [])
        alike.append(text)
        if len(alike) == 1:
            print(f"diffsteer: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=Notice)
        warnings.showwarning = show
        try:
            yield
        finally:
            for first, *again in said.values():
                if again:
                    print(f"diffsteer: warning: {first} (so, or nearly, {len(again)} times more)", file=sys.stderr)


@contextlib.contextmanager
def _hydra_raising(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`, and raises instead of printing and exiting only if this variable is set."""
    before, full = sys.argv, os.environ.get(_FULL_ERROR)
    sys.argv, os.environ[_FULL_ERROR] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = full


def _job(config: DictConfig) -> None:
    """One job: all prompts with one configuration."""
    from diffsteer.generate import generate_folder

    _in_folder(generate_folder, config)


def _tune_job(config: DictConfig) -> None:
    """One job: a search."""
    from diffsteer.tune import tune_folder

    _in_folder(tune_folder, config)


def _evaluate_job(config: DictConfig) -> None:
    """One job: a comparison."""
    from diffsteer.evaluation.evaluate import evaluate_folder

    _in_folder(evaluate_folder, config)


def _in_folder(work: Callable[[DictConfig, Path, str], None], config: DictConfig) -> None:
    """Do it in the folder that Hydra made, errors said in a line."""
    from hydra.core.hydra_config import HydraConfig

    from diffsteer.status import COMPARISON

    out = Path(HydraConfig.get().runtime.output_dir)
    resume = f"; what is done stays: the same command with out={_shown(out)} goes on"
    try:
        work(config, out, _shown(out))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped{resume}") from None
    except Exception as error:
        if _exits is None:
            raise
        _exits.append(_report(error, resume if any(out.glob("*.jsonl")) or (out / COMPARISON).exists() else ""))
    finally:
        with contextlib.suppress(OSError):
            if out.stat().st_mtime >= _started:  # not a user's own folder
                out.rmdir()  # only if nothing is in it


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _comfy(argv: list[str]) -> int:
    from diffsteer.comfy.command import main as comfy

    with _warnings_in_a_line():
        return comfy(argv)


def _status(argv: list[str]) -> int:
    from diffsteer.status import status

    if len(argv) != 1 or argv[0].startswith("-"):
        return _complain("status of what? diffsteer status DIR, a folder of results")
    lines, done = status(argv[0])
    for line in lines:
        print(line)
    return OK if done else FAILED


def _report_page(argv: list[str]) -> int:
    import argparse

    from diffsteer.report import write_report
    from diffsteer.types import DiffsteerError

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise DiffsteerError(f"report: {message}; diffsteer report DIR [OTHER] [-o FILE]")

    parser = Parser(prog="diffsteer report", description="One self-contained HTML page about one or two folders of results.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a folder of results, or two to be put side by side")
    parser.add_argument("-o", "--output", type=Path, help="where the page goes; report.html in the first folder without it")
    try:
        told = parser.parse_args(argv)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    if len(told.folders) > 2:
        raise DiffsteerError(f"report: {len(told.folders)} folders; one, or two side by side")
    print(_shown(write_report(told.folders, told.output).resolve()))
    return OK


def _list(argv: list[str]) -> int:
    from diffsteer.listing import KINDS

    if len(argv) != 1 or argv[0] not in KINDS:
        from diffsteer.registry import nearest

        return _complain(f"list {' '.join(argv) or 'what'}?{nearest(argv[0] if argv else '', KINDS)}")
    for line in KINDS[argv[0]]():
        print(line)
    return OK
