"""``diffsteer evaluate``: samplers at equal budgets on the same prompts and seeds, measured, tabled and plotted."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffsteer.asked import check, items_of
from diffsteer.config import settings
from diffsteer.evaluation.bench import Bench, cases_in, folder_of
from diffsteer.evaluation.cells import KEPT, Cell, cells_of, entries_of
from diffsteer.evaluation.features import features_of_files
from diffsteer.evaluation.measure import DIVERSE, Case, Results, check_axes, sets_of
from diffsteer.evaluation.plots import plot_fronts, plot_scaling
from diffsteer.evaluation.reference import CLIP, Reading, reading
from diffsteer.evaluation.tables import markdown, write_cases, write_fronts, write_metrics
from diffsteer.files import as_line, replacing
from diffsteer.folder import MANIFEST
from diffsteer.generate import refuse_many_places
from diffsteer.job import Job, snapshot
from diffsteer.leases import rank
from diffsteer.prompts import Item
from diffsteer.shapes.models import MODELS
from diffsteer.status import COMPARISON, lines_of
from diffsteer.types import DiffsteerError, FailedError

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
    _check_own(config, base)
    base.holdout = _holdouts(base)
    check(base, prompted=True)
    if base.prompt is None and base.prompts is None and base.model.path not in MODELS:
        raise DiffsteerError(f"model={base.model.path} needs prompts: give prompt=TEXT or prompts=FILE")
    items = items_of(base)
    refuse_many_places(rank()[1])
    entries = entries_of(told.samplers)
    reads = reading(told, base)
    bench = Bench(base, items, [Job.of(Cell(entry, None, {}).config(base, base.seed, False), items) for entry in entries])
    job, seeds = bench.jobs[0], [base.seed + s for s in range(told.seeds)]
    if told.axes is not None:
        sets = sets_of(len(items), len(seeds), reads.many(len(items)), told.neighbours) if reads.real is not None else []
        check_axes(list(told.axes), ["reward", *job.holdouts, *(DIVERSE if len(seeds) > 1 else ()), *sets])
    device, alike = job.device.partition(":")[0], base.copy()
    alike.seed, alike.sampler = 0, {"name": "none"}
    _, same = settings(alike, device=device)
    asked = [[entry.label, OmegaConf.to_container(entry.sampler)] for entry in entries]
    prompts = [[item.id, item.prompt, dict(item.overrides)] for item in items]
    _, digested = settings(alike, samplers=asked, on=prompts, device=device)
    _refuse_others(out, same)
    lock = FileLock(out / ".evaluate.lock")  # several processes may compare in one folder
    with lock:
        snapshot(config, out)
        cells = cells_of(entries, told.budgets, bench, len(items), out / KEPT, digested)
        with replacing(out / COMPARISON) as part:
            folders = [str(folder_of(Path(), cell, seed)) for seed in seeds for cell in cells]
            part.write_text(as_line({"folders": folders, "ids": [item.id for item in items], "settings": same}))
    failed = bench.run(cells, seeds, out, same)
    if rank()[0] == 0:
        with lock:
            try:
                print(_measured(cells, seeds, items, told, reads, out))
                front = [FRONT] if (out / FRONT).exists() else []
                print(f"{', '.join([TABLE, METRICS, CASES, SCALING, *front])} in {shown}")
            except DiffsteerError as error:
                failed.append(str(error))
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise FailedError("; ".join(failed[:3]) + more)


def _refuse_others(out: Path, settings_hash: str) -> None:
    """Refuse a folder of something else, or of a comparison whose cells would not compare with these."""
    if (out / MANIFEST).exists():
        raise DiffsteerError(f"{out / MANIFEST} is of diffsteer generate; choose another out=")
    told = next(iter(lines_of(out / COMPARISON, "settings")), None)
    if told is not None and told["settings"] != settings_hash:
        raise DiffsteerError(f"{out / COMPARISON} was made with other settings; choose another out=")


def _measured(
    cells: Sequence[Cell], seeds: Sequence[int], items: Sequence[Item], told: DictConfig, reads: Reading, out: Path
) -> str:
    """Measure, write, and return the table. A cell of which nothing is there is left out."""
    by_id = {item.id: item for item in items}
    cases: dict[str, dict[Any, dict[int, Case]]] = {}
    for cell in cells:
        for seed in seeds:
            for id, case in cases_in(folder_of(out, cell, seed)).items():
                if id in by_id:
                    cases.setdefault(cell.name, {}).setdefault(id, {})[seed] = case
    sounds = any(case.image.suffix == ".wav" for of in cases.values() for by in of.values() for case in by.values())
    real = reads.real
    results = Results(
        {cell.name: (cell.entry.label, cell.budget) for cell in cells if cell.name in cases},
        cases,
        seeds,
        None if sounds else lambda files: features_of_files(reads.space, files),
        None if sounds or real is None else lambda ids: real([by_id[id] for id in ids]),
        told.neighbours,
    )
    rows = results.rows()
    write_cases(out / CASES, results)
    write_metrics(out / METRICS, rows)
    plot_scaling(out / SCALING, rows, results.metrics)
    axes = [str(a) for a in told.axes] if told.axes is not None else _axes(results)
    front = results.front(axes) if len(axes) > 1 else None
    if front is not None:
        write_fronts(out / FRONTS, front)
        plot_fronts(out / FRONT, front, rows)
    text = markdown(rows, front, _about(results, reads, seeds, len(items)))
    with replacing(out / TABLE) as part:
        part.write_text(text, encoding="utf-8")
    return text


def _about(results: Results, reads: Reading, seeds: Sequence[int], asked: int) -> list[str]:
    prompts = len(results.prompts)
    lines = [f"{prompts} prompts, {len(seeds)} seeds each; costs are a prompt's. In brackets: 95 % intervals over prompts."]
    if asked > prompts:
        lines.append(f"{asked - prompts} prompts that some sampler failed on are left out.")
    for metric, known in results.known.items():
        if not known.all():
            lines.append(f"{metric}: {prompts - int(known.sum())} prompts for which some sampler has no number are left out.")
    if results.features:
        width = next(iter(results.features.values())).shape[-1]
        pictures = prompts * len(seeds)
        lines.append(f"Pictures are compared in {width} features ({reads.name}): {pictures} of each sampler.")
        if "fid" in results.sets and pictures < 10 * width:
            lines.append(f"FID of {pictures} pictures in {width} features is far too large; compare it at equal numbers alone.")
    return lines


def _axes(results: Results) -> list[str]:
    """Consistency, diversity, realism: the checker or whatever is held out, how different seeds are, how real pictures look."""
    names = results.scores
    consistent = "checker" if "checker" in names else names[1] if len(names) > 1 else names[0]
    measured = next(iter(results.by_prompt.values()))
    return [consistent, *(["vendi"] if "vendi" in measured else []), *(["density"] if "density" in results.sets else [])]


def _check_own(config: DictConfig, base: DictConfig) -> None:
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
    told_of = [o for o in HydraConfig.get().overrides.task if re.match(r"[+~]*sampler[=.]", o)]
    if told_of or base.sampler != compose("config").sampler:
        given = told_of or [o for o in HydraConfig.get().overrides.task if o.lstrip("+").startswith("experiment=")]
        raise DiffsteerError(f"{', '.join(given) or 'sampler='} has no effect: give evaluate.samplers=[none,best_of_n,fk]")


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
