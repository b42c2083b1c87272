"""``diffsteer tune``: a sampler's parameters, searched for a reward on a few prompts, as a file that ``sampler=`` can name."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from diffsteer import __version__
from diffsteer.asked import check, items_of
from diffsteer.config import build, named, schema, settings
from diffsteer.files import finite
from diffsteer.fingerprint import fingerprints
from diffsteer.folder import MANIFEST
from diffsteer.grids import check_schedule
from diffsteer.guidance import guidance_of
from diffsteer.job import SCALES, load, scaled_reward, snapshot
from diffsteer.leases import local_device
from diffsteer.ledger import Ledger
from diffsteer.pipeline import SteeredPipeline
from diffsteer.prompts import Item
from diffsteer.ranges import ranges_of
from diffsteer.registry import find, nearest, registered
from diffsteer.reward import Reward, prepare
from diffsteer.run import SteeredOutput
from diffsteer.selection import Scorer
from diffsteer.shapes.models import MODELS, digest, is_embedded
from diffsteer.told import call_of, given_call, held_out, rewarded, schedule_of, steered_of, told_reward
from diffsteer.trial import Search
from diffsteer.tuned import Record, in_columns, report, table, warnings_of, write, write_sampler
from diffsteer.tuning import PLAIN, Measured, Trial, best_of, load_optuna, search
from diffsteer.types import Context, DiffsteerError, Sampler

RECORD, REPORT = "trials.jsonl", "report.md"
Case = tuple[Item, int]  # a prompt and a seed


def tune_folder(config: DictConfig, out: Path, shown: str) -> None:
    """Search as a configuration says, in a folder; what was measured there before is not measured again.

    Args:
        shown: the folder as messages name it.

    Raises:
        DiffsteerError: wrong input, said before any work is done; a reward that fails, what was measured staying.
    """
    load_optuna()
    told = config.tune
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "tune"])
    OmegaConf.copy_cache(config, plain)  # out= may hold the time
    check(plain)
    _check_own(told)
    sampler = build("sampler", plain.sampler)
    if sampler is None:
        raise DiffsteerError(f"sampler=none has nothing to tune{nearest('', registered('sampler'))}")
    if isinstance(sampler, Search):
        raise DiffsteerError(f"sampler={sampler.name} is a search itself, which tune does not tune: compare settings with -m")
    ranges = ranges_of(type(sampler), told.parameters, told.log)
    name = told.name or f"{sampler.name}_tuned"
    _check_name(name)
    if not 0 <= plain.seed + told.seeds - 1 < 2**63:
        raise DiffsteerError(f"seed={plain.seed}; tune.seeds={told.seeds} of them lie in [0, 2^63)")
    items = items_of(plain)
    judge = _judge(plain, told.holdout, items)
    bench = Bench(plain, sampler, [(item, plain.seed + s) for s in range(told.seeds) for item in items], judge)
    asked = {"parameters": {k: vars(r) for k, r in ranges.items()}, "holdout": _plainly(told.holdout), "seeds": told.seeds}
    asked["judge"] = fingerprints({"holdout": asked["holdout"]}, out)
    own = {"weights": digest(plain.model.path)} if plain.model.path in MODELS else {}
    prompts = [[item.id, item.prompt] for item in items]
    _, digested = settings(plain, device=bench.device.partition(":")[0], tune=asked, tuned_on=prompts, **own)
    if (out / MANIFEST).exists():
        raise DiffsteerError(f"{out / MANIFEST} is of diffsteer generate; choose another out=")
    bench.record = Record(out / RECORD, digested)
    snapshot(config, out)
    with tqdm(total=told.trials + 1, unit="trial", disable=None) as bar:

        def done(trial: Trial) -> None:
            bar.update()
            bar.set_postfix(reward=f"{trial.reward:.4g}", state=trial.state)

        trials = search(
            ranges,
            len(bench.cases),
            bench.measure,
            bench.cost,
            seed=plain.seed,
            trials=told.trials,
            evaluations=told.evaluations,
            first={key: getattr(sampler, key) for key in ranges},
            known=bench.record.parameters,
            done=done,
        )
    _leave(trials, bench, told, name, out, shown)


def _leave(trials: list[Trial], bench: Bench, told: DictConfig, name: str, out: Path, shown: str) -> None:
    """Report and configuration file, and what is printed of them."""
    reward, method, best = str(bench.config.reward.get("name")), bench.sampler.name, best_of(trials)
    held = None if bench.judge is None else bench.judge if isinstance(bench.judge, str) else bench.judge.name
    spent, cases = sum(t.evaluations for t in trials), len(bench.cases)
    seeds = f" with {told.seeds} seeds each" if told.seeds > 1 else ""
    prompts = cases // told.seeds
    facts = [
        f"{prompts} prompt{'s' * (prompts > 1)}{seeds}, {len(trials) - 1} trials, {spent} evaluations. Every trial had the "
        "same noise; the plain chain is best_of_n with as many particles. Rewards are means over the prompts that were run."
    ]
    if len(trials) - 1 < told.trials:
        facts.append(f"The budget of {told.evaluations} evaluations ended it before {told.trials} trials.")
    if hasattr(build("schedule", bench.config.schedule), "measured"):
        facts.append("The schedule was measured on these prompts (`schedule.json`); `generate` measures it on its own.")
    command = " ".join([f"diffsteer generate --config-dir {shlex.quote(shown)} sampler={name}", *_told()])
    file = out / "sampler" / f"{name}.yaml"
    if best is not None:
        facts.append(f"The best trial is `sampler/{name}.yaml`: `{command}`")
        comments = [f"Tuned by diffsteer {__version__}: {reward} {best.reward:.4g}, plain {trials[0].reward:.4g}.", command]
        write_sampler(file, method, _filled(bench.config, best.parameters), comments)
    write(out / REPORT, report(trials, f"{method} tuned for {reward}", facts, reward, held))
    print(in_columns(table(trials, reward, held)))
    for text in warnings_of(trials, held):
        print(f"diffsteer: warning: {text}", file=sys.stderr)
    print(f"{len(trials) - 1} trials, {spent} evaluations; {REPORT} and {RECORD} in {shown}")
    if best is not None:
        print(command)


def _told() -> list[str]:
    """What the search was told beside its own keys, its prompts and seeds, and the sampler, quoted."""
    own = ("tune", "sampler", "out", "prompt", "prompts", "seed")
    given = [str(o) for o in HydraConfig.get().overrides.task]
    return [shlex.quote(o) for o in given if o.lstrip("+~").partition("=")[0].partition(".")[0] not in own]


def _check_own(told: DictConfig) -> None:
    for key in ("trials", "seeds", "evaluations"):
        if told[key] is not None and told[key] < 1:
            raise DiffsteerError(f"tune.{key}={told[key]}; at least 1 is needed")


def _check_name(name: str) -> None:
    """A name that a file of the sampler group can have, and that no other has: Hydra would take that one."""
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise DiffsteerError(f"tune.name={name}; it takes letters, digits, _ and -, a letter first")
    if (
        name == "none"
        or name in registered("sampler")
        or (Path(__file__).parent / "configs" / "sampler" / f"{name}.yaml").exists()
    ):
        raise DiffsteerError(f"tune.name={name} is the name of a sampler that there is; choose another")


def _same(one: DictConfig, other: DictConfig) -> bool:
    """Do two configurations of a reward describe the same one?"""
    cls = find("reward", str(one.name))
    whole = OmegaConf.structured(schema(cls, str(one.name)))
    filled = [OmegaConf.to_container(OmegaConf.merge(whole, OmegaConf.create(_plainly(config)))) for config in (one, other)]
    return filled[0] == filled[1]


def _plainly(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _judge(config: DictConfig, holdout: Any, items: Sequence[Item]) -> Reward | None:
    """The held-out reward; the checker by its name.

    Raises:
        DiffsteerError: what `held_out` refuses; the reward that steers.
    """
    if holdout is None:
        return None
    held = held_out(holdout, "tune.holdout", config.model.path, [item.prompt for item in items])
    steers = None if OmegaConf.is_missing(config, "reward") else told_reward(config)
    mine = OmegaConf.create(named(holdout))
    if steers is not None and held.name == steers.get("name") and _same(mine, steers):
        raise DiffsteerError(f"tune.holdout={holdout} is the reward that steers: hold out another one")
    return held


class Bench:
    """What measures: the pipeline, loaded once something is to be measured, under the sampler with other parameters.

    Args:
        cases: prompts with seeds, in the order in which every trial takes them.
    """

    record: Record

    def __init__(self, config: DictConfig, sampler: Sampler, cases: list[Case], judge: Reward | None) -> None:
        self.config, self.sampler, self.cases, self.judge = config, sampler, cases, judge
        self.reward, self.start = rewarded(config)
        if self.reward is None:
            raise DiffsteerError(f"there is no reward to tune for{nearest('', registered('reward'))}")
        self.guide, self.schedule = build("guide", config.guide), build("schedule", config.schedule)
        guidance_of(self.guide, sampler)
        check_schedule(self.schedule, True, config.transition)
        self.device = config.device or local_device()

    @functools.cached_property
    def pipe(self) -> Any:
        """Loaded once, its call's arguments and the rewards' prompts checked."""
        from diffsteer.pipes import check_call

        pipe = load(self.config, self.device)
        check_call(pipe, given_call(self.config))
        prompts = list(dict.fromkeys(item.prompt for item, _ in self.cases))
        for reward in (self.reward, self.judge):
            if isinstance(reward, Reward):
                prepare(reward, prompts, Context(embedded=is_embedded(pipe)))
        assert self.reward is not None
        where, told = self.record.path.parent, self.record.settings_hash
        self.reward = scaled_reward(self.reward, self.config, pipe, prompts, where / SCALES, told)
        if self.judge is not None:
            self.judge = scaled_reward(self.judge, self.config, pipe, prompts, where / SCALES.replace(".", "-0."), told)
        self.schedule = schedule_of(self.config, pipe, prompts, where, told)
        return pipe

    def cost(self, number: int, parameters: dict[str, float]) -> int:
        """Evaluations of all cases."""
        steered = self._steered(number, parameters)
        call = {"negative_prompt": self.config.negative_prompt, **call_of(self.config)}
        return steered.estimate(len(self.cases), self.config.num_inference_steps, **call).evaluations

    def measure(self, number: int, parameters: dict[str, float], case: int) -> Measured:
        """One case, from the record if it is there."""
        item, seed = self.cases[case]
        if (number, item.id, seed) not in self.record.measured:
            out = self._steered(number, parameters)(
                [item.prompt],
                seed=seed,
                ids=[item.id],
                num_inference_steps=self.config.num_inference_steps,
                negative_prompt=self.config.negative_prompt,
                **call_of(self.config),
            )
            reward = float(out.rewards[0, out.chosen[0]])
            seen = Measured(reward, self._judged(out, item.prompt), out.ledger.evaluations, out.ledger.seconds["total"])
            self.record.add(number, parameters, item, seed, seen)
        return self.record.measured[number, item.id, seed]

    def _steered(self, number: int, parameters: dict[str, float]) -> SteeredPipeline:
        if number == PLAIN:
            method, guide = find("sampler", "best_of_n")(particles=self.sampler.particles, eta=self.sampler.eta), None
        else:
            method, guide = build("sampler", OmegaConf.create(_filled(self.config, parameters))), self.guide
        pipe = self.pipe  # which settles the schedule
        objects = {"guide": guide, "start": self.start, "schedule": self.schedule}
        return steered_of(self.config, pipe, method, self.reward, **objects)

    def _judged(self, out: SteeredOutput, prompt: str) -> float | None:
        sample = out.samples[0, out.chosen[0]]
        if self.judge is None:
            return None
        done = out.trace.events[-1].done
        scorer = Scorer(self.judge, None, [prompt], Ledger(), is_embedded(self.pipe))
        return finite(scorer.score(sample[None], done, done)[0, 0])


def _filled(config: DictConfig, parameters: dict[str, float]) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config.sampler, resolve=True)
    return {**values, **parameters}
