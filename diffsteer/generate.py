"""``diffsteer generate`` from a composed configuration: a folder, or with no prompt a demonstration, and what is printed."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffsteer.asked import check, items_of
from diffsteer.folder import GRID, MANIFEST, Folder
from diffsteer.job import Job, load, snapshot
from diffsteer.leases import rank
from diffsteer.registry import find
from diffsteer.sheet import first_frame, sheet
from diffsteer.types import DiffsteerError

PLAIN = "plain"  # the folder, inside the one of the demonstration, of what is not steered


def generate_folder(config: DictConfig, out: Path, shown: str) -> None:
    """Do what a configuration asks for in a folder; what was done there before is not done again.

    Args:
        shown: the folder as messages name it.

    Raises:
        DiffsteerError: wrong input, said before any work is done; a reward or an item that fails, what was done staying.
    """
    demo = check(config)
    items = items_of(config)
    refuse_many_places(rank()[1])
    job = Job.of(config, items)
    sampler = job.sampler
    folder = job.folder(out, sampler)
    runs = {"steered" if sampler else PLAIN: (folder, sampler)}
    if demo and sampler is not None:
        method = find("sampler", "best_of_n")(particles=1, eta=sampler.eta)
        runs = {PLAIN: (job.folder(out / PLAIN, method), method), **runs}
    snapshot(config, out)
    kept = len(items) - len(folder.missing)
    pipe = load(config, job.device) if any(f.missing for f, _ in runs.values()) else None
    if pipe is not None:
        job.ready(pipe, out, [item.prompt for item in folder.missing])
    for f, method in runs.values():
        job.fill(f, pipe, method)
    if demo:
        _show_demo({name: f for name, (f, _) in runs.items()})
    before = f"; {kept} of them were there already" if kept else ""
    kind = Path(folder.entries[items[0].id]["image"]).parts[0].removesuffix("s")
    sheets = f", {GRID}" if kind != "sound" else ""
    if rank()[0] == 0:
        print(f"{len(items)} {kind}{'s' * (len(items) > 1)}{sheets} and {MANIFEST} in {shown}{before}")


def refuse_many_places(processes: int) -> None:
    """Several processes that work together want one folder, which Hydra's own names, after the time, are not."""
    if processes > 1 and not any(o.startswith("out=") for o in HydraConfig.get().overrides.task):
        raise DiffsteerError(f"{processes} processes work on one folder: give out=DIR")


def _show_demo(folders: dict[str, Folder]) -> None:
    """A table of verdicts and rewards, a line a prompt; the sheet of the last folder shows its images below the others'."""
    from diffsteer.shapes.check import check

    table = [["prompt", *folders, "reward: " + ", ".join(folders)]]
    last = list(folders.values())[-1]
    for item in last.items:
        verdicts, rewards = [], []
        for folder in folders.values():
            entry = folder.entries[item.id]
            verdict = check(first_frame(folder.path / entry["image"]), item.prompt)
            verdicts.append("right" if verdict.correct else f"wrong: {verdict.reasons[0]}")
            rewards.append("none" if entry["reward"] is None else f"{entry['reward']:.3f}")
        table.append([item.prompt, *verdicts, ", ".join(rewards)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    rows = [[f.path / f.entries[item.id]["image"] for item in f.items] for f in folders.values()]
    sheet(rows, [item.prompt for item in last.items], last.path / GRID)
