"""``diffsteer evaluate``: samplers at equal budgets on the same prompts and seeds, measured, tabled and plotted."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from diffsteer.asked import check, items_of
from diffsteer.config import build, settings
from diffsteer.evaluation.cells import KEPT, Cell, cells_of, entries_of
from diffsteer.evaluation.features import features_of_files
from diffsteer.evaluation.measure import DIVERSE, SETS, Case, Results, check_axes
from diffsteer.evaluation.plots import plot_fronts, plot_scaling
from diffsteer.evaluation.reference import CLIP, Reading, reading
from diffsteer.evaluation.tables import markdown, write_cases, write_fronts, write_metrics
from diffsteer.files import as_line, replacing
from diffsteer.folder import MANIFEST, TIMINGS
from diffsteer.generate import refuse_many_places
from diffsteer.job import Job, load, snapshot
from diffsteer.leases import rank
from diffsteer.prompts import Item
from diffsteer.shapes.models import MODELS
from diffsteer.status import COMPARISON, lines_of
from diffsteer.types import DiffsteerError, FailedError, RewardError
from diffsteer.work import Work

CASES, METRICS, FRONTS, TABLE, SCALING, FRONT = (
    "cases.csv",
    "metrics.csv",
    "fronts.csv",
    "table.md",
    "scaling.png",
    "fronts.png",
)


def evaluate_folder(config: DictConfig, out: Path, shown: str) -> None:
    """Compare as a configuration says, in a folder; what was made there before is not made again.

    Args:
        shown: the folder as messages name it.

    Raises:
        DiffsteerError: wrong input, said before any work is done; prompts that failed, what was made staying.
    """
    _load_extras()
    told = config.evaluate
    base = OmegaConf.masked_copy(config, [str(key) for key in config if key != "evaluate"])
    OmegaConf.copy_cache(config, base)  # out= may hold the time
    _check_own(config)
    base.holdout = _holdouts(base)
    check(base, prompted=True)
    if base.prompt is None and base.prompts is None and base.model.path not in MODELS:
        raise DiffsteerError(f"model={base.model.path} needs prompts: give prompt=TEXT or prompts=FILE")
    items = items_of(base)
    refuse_many_places(rank()[1])
    entries = entries_of(told.samplers)
    reads = reading(told, base)
    jobs = [Job.of(Cell(entry, None, {}).config(base, base.seed, False), items) for entry in entries]
    if told.axes is not None:
        more = [*(DIVERSE if told.seeds > 1 else ()), *(SETS if reads[1] is not None else ())]
        check_axes(list(told.axes), ["reward", *jobs[0].holdouts, *more])
    asked = [[entry.label, OmegaConf.to_container(entry.sampler)] for entry in entries]
    prompts = [[item.id, item.prompt, dict(item.overrides)] for item in items]
    alike = base.copy()
    alike.seed, alike.sampler = 0, {"name": "none"}
    _, same = settings(alike, device=jobs[0].device.partition(":")[0])
    _, digested = settings(base, samplers=asked, on=prompts, device=jobs[0].device.partition(":")[0])
    _refuse_others(out / COMPARISON, same)
    snapshot(config, out)
    bench = Bench(base, items, jobs)

    cells = cells_of(entries, told.budgets, bench.cost, len(items), out / KEPT, digested)
    seeds = [base.seed + s for s in range(told.seeds)]
    with replacing(out / COMPARISON) as part:
        folders = [str(folder_of(Path(), cell, seed)) for seed in seeds for cell in cells]
        part.write_text(as_line({"folders": folders, "prompts": len(items), "settings": same}))
    failed = bench.run(cells, seeds, out)
    if rank()[0] == 0:
        print(_measured(cells, seeds, items, told, reads, out))
        front = [FRONT] if (out / FRONT).exists() else []
        print(f"{', '.join([TABLE, METRICS, CASES, SCALING, *front])} in {shown}")
    if failed:
        raise FailedError("; ".join(failed))


def _refuse_others(path: Path, settings_hash: str) -> None:
    """Refuse a folder of a comparison whose cells would not compare with these."""
    told = next(iter(lines_of(path, "settings")), None) if path.is_file() else None
    if told is not None and told["settings"] != settings_hash:
        raise DiffsteerError(f"{path} was made with other settings; choose another out=")


class Bench:
    """What fills the folders: the pipeline and the rewards, loaded once something is to be made.

    Args:
        jobs: one a sampler that is compared, to be checked before anything is loaded.
    """

    def __init__(self, base: DictConfig, items: list[Item], jobs: Sequence[Job]) -> None:
        self.base, self.items, self.jobs = base, items, list(jobs)
        self._pipe: Any = None
        self._rewards: Any = None

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            self._pipe = load(self.base, self.jobs[0].device)
        return self._pipe

    def cost(self, sampler: DictConfig) -> int:
        """Evaluations of all prompts under a sampler."""
        config = self.base.copy()
        config.sampler = sampler
        made = build("sampler", sampler)
        guide = None if made is None else build("guide", config.guide)
        return Work(config, self.pipe, made, self.jobs[0].reward, {"guide": guide}).estimate(self.items).evaluations

    def run(self, cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> list[str]:
        """Fill a folder a cell and seed, seed by seed, so that what else the machine does falls on all cells alike. Returns
        what failed, in words."""
        failed = []
        with tqdm(total=len(cells) * len(seeds), unit="folder", disable=None if rank()[0] == 0 else True) as bar:
            for seed in seeds:
                for cell in cells:
                    try:
                        self._fill(cell, seed, seed == seeds[0], folder_of(out, cell, seed))
                    except (FailedError, RewardError) as error:
                        failed.append(f"{cell.name}, seed {seed}: {error}")
                    except DiffsteerError as error:
                        raise DiffsteerError(f"{cell.name}: {error}") from error
                    bar.update()
        return failed

    def _fill(self, cell: Cell, seed: int, first: bool, path: Path) -> None:
        config = cell.config(self.base, seed, first)
        config.out = str(path)
        path.mkdir(parents=True, exist_ok=True)
        job = Job.of(config, self.items, self._rewards)
        folder = job.folder(path, job.sampler)
        snapshot(config, path)
        if folder.missing:
            job.ready(self.pipe, path, [item.prompt for item in folder.missing])
            self._rewards = job.reward, job.holdouts  # loaded, with their scales: those of the first folder are everyone's
        job.fill(folder, self.pipe if folder.missing else None, job.sampler, say=lambda line: None, ahead=False)


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """Where a cell's results with a seed are: a folder such as `diffsteer generate` makes."""
    return out / cell.name / f"seed-{seed}"


def cases_in(folder: Path) -> dict[Any, Case]:
    """What a folder of results holds, by prompt."""
    seconds: dict[Any, float] = {}
    for timing in lines_of(folder / TIMINGS, "ids", "seconds"):
        for id in timing["ids"]:
            seconds[id] = float(timing["seconds"].get("total", 0.0)) / len(timing["ids"])
    found = {}
    for entry in lines_of(folder / MANIFEST, "id", "image", "reward", "ledger"):
        scores = {"reward": _number(entry["reward"])}
        scores |= {name: _number(held["score"]) for name, held in entry.get("held_out", {}).items()}
        cost = {key: float(entry["ledger"].get(key, 0)) for key in ("evaluations", "decodes", "reward_calls")}
        cost["seconds"] = seconds.get(entry["id"], float("nan"))
        found[entry["id"]] = Case(scores, cost, folder / entry["image"])
    return found


def _measured(
    cells: Sequence[Cell], seeds: Sequence[int], items: Sequence[Item], told: DictConfig, reads: Reading, out: Path
) -> str:
    """Measure, write, and return the table."""
    asked = {item.id for item in items}
    cases: dict[str, dict[Any, dict[int, Case]]] = {}
    for cell in cells:
        for seed in seeds:
            for id, case in cases_in(folder_of(out, cell, seed)).items():
                if id in asked:
                    cases.setdefault(cell.name, {}).setdefault(id, {})[seed] = case
        cases.setdefault(cell.name, {})
    sounds = any(case.image.suffix == ".wav" for of in cases.values() for by in of.values() for case in by.values())
    space, real = reads
    labels = {cell.name: (cell.entry.label, cell.budget) for cell in cells}
    results = Results(
        labels,
        cases,
        seeds,
        None if sounds else lambda files: features_of_files(space, files),
        None if sounds or real is None else real(items, space),
        told.neighbours,
    )
    rows = results.rows()
    axes = [str(a) for a in told.axes] if told.axes is not None else _axes(results)
    front = results.front(axes) if len(axes) > 1 else None
    write_cases(out / CASES, results)
    write_metrics(out / METRICS, rows)
    metrics = [*results.scores, *(m for m in DIVERSE if m in results.by_prompt[cells[0].name]), *results.sets]
    first = [*dict.fromkeys([*axes, *metrics])]
    plot_scaling(out / SCALING, rows, first)
    if front is not None:
        write_fronts(out / FRONTS, front)
        plot_fronts(out / FRONT, front, rows)
    text = markdown(rows, front, _about(results, told, seeds, len(items)))
    with replacing(out / TABLE) as part:
        part.write_text(text, encoding="utf-8")
    return text


def _about(results: Results, told: DictConfig, seeds: Sequence[int], asked: int) -> list[str]:
    missing = asked - len(results.prompts)
    lines = [
        f"{len(results.prompts)} prompts, {len(seeds)} seeds each; costs are a prompt's. In brackets: 95 % intervals over "
        "prompts, of means by bootstrap, of sets of pictures by leaving out a tenth."
    ]
    if missing:
        lines.append(f"{missing} prompts that some sampler failed on are left out.")
    if results.features:
        width = next(iter(results.features.values())).shape[-1]
        pictures = len(results.prompts) * len(seeds)
        lines.append(f"Pictures are compared in {width} features ({_said(told.features)}): {pictures} of each sampler.")
        if "fid" in results.sets and pictures < 10 * width:
            lines.append(f"FID of {pictures} pictures in {width} features is far too large; compare it at equal numbers alone.")
    return lines


def _axes(results: Results) -> list[str]:
    """Consistency, diversity, realism: the checker or whatever is held out, how different seeds are, how real pictures look."""
    names = results.scores
    consistent = "checker" if "checker" in names else names[1] if len(names) > 1 else names[0]
    measured = next(iter(results.by_prompt.values()))
    return [consistent, *(["vendi"] if "vendi" in measured else []), *(["density"] if "density" in results.sets else [])]


def _check_own(config: DictConfig) -> None:
    told = config.evaluate
    for key in ("seeds", "neighbours"):
        if told[key] < 1:
            raise DiffsteerError(f"evaluate.{key}={told[key]}; at least 1 is needed")
    if told.budgets is not None and (not told.budgets or min(told.budgets) < 1 or len(set(told.budgets)) < len(told.budgets)):
        raise DiffsteerError(f"evaluate.budgets={list(told.budgets)}; wanted different numbers of plain runs, such as [2,4,8]")
    if not 0 <= config.seed + told.seeds - 1 < 2**63:
        raise DiffsteerError(f"seed={config.seed}; evaluate.seeds={told.seeds} of them lie in [0, 2^63)")
    if told.budgets is not None and config.budget.evals is not None:
        raise DiffsteerError("budget.evals and evaluate.budgets both tell what a search may spend: give one of them")
    if told.axes is not None and len(told.axes) < 2:
        raise DiffsteerError(f"evaluate.axes={list(told.axes)}; wanted two metrics or more, such as [checker,vendi,density]")
    for o in HydraConfig.get().overrides.task:
        if re.match(r"[+~]*sampler[=.]", o):
            raise DiffsteerError(f"{o} has no effect: give evaluate.samplers=, such as evaluate.samplers=[none,best_of_n,fk]")


def _holdouts(base: DictConfig) -> Any:
    """What looks on where nothing is said: CLIPScore, and for pictures of the shapes world its checker and its other CLIP."""
    if base.holdout is not None:
        return base.holdout
    steers = None if OmegaConf.is_missing(base, "reward") else base.reward.get("name")
    looking = ["checker", "clip2", CLIP] if base.model.path in MODELS else [CLIP]
    return [name for name in looking if name != steers] if base.model.path != "shapes-motion" else []


def _load_extras() -> None:
    for module in ("matplotlib", "torchmetrics", "scipy"):
        if importlib.util.find_spec(module) is None:
            raise DiffsteerError(f"diffsteer evaluate wants {module}: pip install diffsteer[evaluate]")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _said(value: Any) -> str:
    return str(OmegaConf.to_container(value)) if OmegaConf.is_config(value) else str(value)
