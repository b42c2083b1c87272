"""What fills the folders of a comparison, one a cell and seed, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from diffsteer.config import build, one_line
from diffsteer.evaluation.cells import NONE, Cell
from diffsteer.evaluation.measure import COSTS, Case
from diffsteer.folder import MANIFEST, TIMINGS
from diffsteer.job import Job, load, snapshot
from diffsteer.leases import rank
from diffsteer.prompts import Item
from diffsteer.status import lines_of
from diffsteer.types import DiffsteerError, FailedError, PromptError, RewardError
from diffsteer.work import Work


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
        return self._work(sampler).estimate(self.items).evaluations

    def _work(self, sampler: DictConfig) -> Work:
        config = self.base.copy()
        config.sampler = sampler
        made = build("sampler", sampler)
        guide = None if made is None else build("guide", config.guide)
        return Work(config, self.pipe, made, self.jobs[0].reward, {"guide": guide})

    def alike(self) -> bool:
        """Does the plain pipeline evaluate as much for every prompt?"""
        return len({self._work(OmegaConf.create({"name": NONE})).estimate([item]).evaluations for item in self.items}) < 2

    def run(self, cells: Sequence[Cell], seeds: Sequence[int], out: Path, settings_hash: str) -> list[str]:
        """Fill a folder a cell and seed, seed by seed, so that what else the machine does falls on all cells alike.

        Args:
            settings_hash: of what all cells have in common; what is measured for all of them is kept in `out` under it.

        Returns:
            What failed, in words. A cell that fails as a whole is not tried with further seeds; the others go on.
        """
        failed: list[str] = []
        broken: set[str] = set()
        with tqdm(total=len(cells) * len(seeds), unit="folder", disable=None if rank()[0] == 0 else True) as bar:
            for seed in seeds:
                for cell in cells:
                    if cell.name not in broken:
                        try:
                            self._fill(cell, seed, seeds[0], out, settings_hash)
                        except FailedError as error:
                            failed.append(f"{cell.name}, seed {seed}: {error}")
                        except DiffsteerError as error:
                            if not isinstance(error, RewardError | PromptError):
                                raise DiffsteerError(f"{cell.name}: {error}") from error
                            failed.append(f"{cell.name}, seed {seed}: {error}")
                        except OSError:
                            raise
                        except Exception as error:
                            broken.add(cell.name)
                            failed.append(f"{cell.name}, seed {seed}: {type(error).__name__}: {one_line(error)}")
                    bar.update()
        return failed

    def _fill(self, cell: Cell, seed: int, first: int, out: Path, settings_hash: str) -> None:
        path = folder_of(out, cell, seed)
        config = cell.config(self.base, seed, seed == first)
        config.out = str(path)
        path.mkdir(parents=True, exist_ok=True)
        items = [shifted(item, seed - first) for item in self.items]
        job = Job.of(config, items, self._rewards)
        folder = job.folder(path, job.sampler)
        snapshot(config, path)
        if folder.missing:
            job.ready(self.pipe, out, [item.prompt for item in folder.missing], settings_hash)
            self._rewards = job.reward, job.holdouts  # loaded, with their scales
        job.fill(folder, self.pipe if folder.missing else None, job.sampler, say=lambda line: None, ahead=False)


def shifted(item: Item, by: int) -> Item:
    """An item whose own seed, if it has one, is so much further."""
    own = item.overrides.get("seed")
    return item if own is None else replace(item, overrides={**item.overrides, "seed": own + by})


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """Where a cell's results with a seed are: a folder such as `diffsteer generate` makes."""
    return out / cell.name / f"seed-{seed}"


def cases_in(folder: Path) -> dict[Any, Case]:
    """What a folder of results holds, by prompt. Seconds are without what only looked on."""
    seconds: dict[Any, float] = {}
    for timing in lines_of(folder / TIMINGS, "ids", "seconds"):
        told = timing["seconds"]
        for id in timing["ids"]:
            seconds[id] = (float(told.get("total", 0.0)) - float(told.get("held-out", 0.0))) / len(timing["ids"])
    found = {}
    for entry in lines_of(folder / MANIFEST, "id", "image", "reward", "ledger"):
        scores = {"reward": _number(entry["reward"])}
        scores |= {name: _number(held["score"]) for name, held in entry.get("held_out", {}).items()}
        cost = {key: float(entry["ledger"].get(key, 0)) for key in COSTS if key != "seconds"}
        cost["seconds"] = seconds.get(entry["id"], float("nan"))
        found[entry["id"]] = Case(scores, cost, folder / entry["image"])
    return found


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
