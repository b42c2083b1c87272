"""What the command line composes: the schema, what Hydra is handed, what its errors mean, and the objects that come of it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from diffsteer import __version__
from diffsteer.expression import is_expression, is_program, reward_of
from diffsteer.fingerprint import fingerprints
from diffsteer.registry import find, nearest, registered
from diffsteer.reward import Reward
from diffsteer.types import DiffsteerError

PROGRAM = "program"  # the one that a text such as area(red) > area(blue) means
EXPRESSION = "expression"  # the option of reward= that stands for a text such as clip + 0.3*z(aesthetic)
GROUPS = ("sampler", "reward")  # of the registry, that can be configured
_WITH_FILES = ("model", "reward", "decoder", "reference", "draft", "noise_network", "holdout")  # keys that may name some
# Keys that do not change what a prompt's result is. `chunk` does in a deterministic run, where every block has that size.
_WITHOUT_EFFECT = ("prompt", "prompts", "out", "batch", "report", "sinks")


@dataclass
class ModelConfig:
    """`path` is the name of an embedded model, a folder, or an id of the Hugging Face hub."""

    name: str = MISSING
    path: str = MISSING
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"


@dataclass
class BudgetConfig:
    """What a search may spend, see `diffsteer.budget.Budget`."""

    evals: int | None = None
    seconds: float | None = None
    reward_calls: int | None = None
    decodes: int | None = None


@dataclass
class DraftConfig:
    """What a search runs on, see `diffsteer.draft.Draft`. `use` is true or false; None is the search's own way. `model` is
    named as that of ``model=``, `reward` by its name or as a mapping."""

    use: bool | None = None
    steps: int | None = None
    share: float | None = None
    decoder: str | None = None
    reward: Any = None
    model: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    finalists: int = 4


@dataclass
class Config:
    """Everything that `diffsteer generate` can be told. None stands for the model's own default.

    Attributes:
        prompt, prompts: one prompt, or a file of them.
        negative_prompt: for all prompts.
        seed: the key of all randomness, together with a prompt's id.
        out: the folder for what is made; in a sweep each job has a folder of its own in there.
        output: which particles become images: best | draw | all.
        reference: a clip whose motion is wanted, for a reward that has a reference.
        reference_share: of the first noise's low frequencies, taken from the reference, see `diffsteer.start.ReferenceNoise`.
        video: gif | mp4, the format of what pipelines of video make.
        decoder: full | tiny | tiny:PATH, what the reward sees on the way. transition: own | native. noise: eta | quadratic.
        batch: prompts at a time. chunk: rows in the network at a time, None for all, "auto" for as many as fit.
        deterministic: bits that depend neither on `batch` nor on what was done before.
        call: further arguments of the pipeline's call, such as call.height=512.
        device: None for the accelerator if there is one.
        guide: gradient guidance beside a sampler that selects, one of the samplers that guide.
        budget: what a search may spend. draft: what it runs on before the best few are made in full.
        noise_network: a trained change of the model (of the drafts' model, where there is one) that moves first noises: a
            file of `scripts/train_noise.py`, or shapes-turbo, which is embedded and that model's.
        holdout: a reward, or a list of them, that looks on and never steers; "checker" reads the shapes world.
        report: of so many prompts, the first ones, the events are kept as small pictures, for `diffsteer report`.
        sinks: what the results are written as beside their files: webdataset, parquet.
        schedule: where to put the steps, in the place of the model's own grid; or in numbers, `sigmas` or `timesteps`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: Any = MISSING
    reward: Any = MISSING
    guide: Any = MISSING
    schedule: Any = MISSING
    sigmas: Any = None
    timesteps: Any = None
    prompt: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    out: str = MISSING
    output: str = "best"
    reference: str | None = None
    reference_share: float = 0.0
    video: str = "gif"
    decoder: str = "full"
    transition: str = "own"
    noise: str = "eta"
    batch: int = 1
    chunk: Any = None
    deterministic: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    noise_network: str | None = None
    holdout: Any = None
    report: int = 64
    sinks: list[str] = field(default_factory=list)


@dataclass
class TuneConfig:
    """What `diffsteer tune` is told beside that.

    Attributes:
        parameters: ranges by field of the sampler: "LOW..HIGH" or [LOW, HIGH], a text with the word log or linear if wanted.
        log: for ranges without such a word; None for a logarithmic scale wherever LOW is above 0.
        trials: how many, in all. evaluations: the budget, None for none.
        holdout: the reward that only looks on, by its name or as a mapping; "checker" reads the shapes world.
        name: of the file that is written; None for the sampler's and "_tuned".
        seeds: noises a prompt.
    """

    parameters: dict[str, Any] = field(default_factory=dict)
    log: bool | None = None
    trials: int = 20
    evaluations: int | None = None
    holdout: Any = None
    name: str | None = None
    seeds: int = 1


@dataclass
class Tuning(Config):
    """Everything that `diffsteer tune` can be told."""

    tune: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class EvaluateConfig:
    """What `diffsteer evaluate` is told beside that.

    Attributes:
        samplers: that are compared: names or mappings, or a mapping of labels to them; "none" is the pipeline as it is.
        budgets: multiples of what the plain pipeline evaluates; None for samplers as they stand.
        seeds: noises a prompt, `seed` and those after it.
        features: what pictures are compared by: "colours", "inception", or a reward with features.
        reference: a folder of real pictures; "shapes" for some that the shapes world draws itself.
        neighbours: of precision, recall, density and coverage. axes: of the front, names of metrics.
    """

    samplers: Any = None
    budgets: list[int] | None = field(default_factory=lambda: [4])
    seeds: int = 8
    features: Any = None
    reference: str | None = None
    neighbours: int = 3
    axes: list[str] | None = None


@dataclass
class Evaluating(Config):
    """Everything that `diffsteer evaluate` can be told."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def schema(cls: type[Any], name: str) -> type[Any]:
    """The fields of a sampler or a reward, and its name, as a dataclass that Hydra can fill."""
    hints = get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = [("name", str, field(default=name))]
    for f in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if f.init:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            default = MISSING if default is dataclasses.MISSING else default
            if isinstance(default, (list, tuple, dict)):
                plain = list(default) if isinstance(default, tuple) else default
                fields.append((f.name, Any, field(default_factory=partial(copy.deepcopy, plain))))
            else:
                listed = any(get_origin(part) is Sequence for part in (hints[f.name], *get_args(hints[f.name])))
                fields.append((f.name, Any if listed else hints[f.name], field(default=default)))
    return dataclasses.make_dataclass(cls.__name__, fields)


def register_schemas(whole: type[Config] = Config) -> None:
    """Tell Hydra the types of all keys, `whole` being the command's. A plug-in without a YAML file of its own becomes an option
    of its group."""
    store = ConfigStore.instance()
    store.store(name="config", group="schema", node=whole)
    shipped = Path(__file__).parent / "configs"
    for kind in GROUPS:
        for name, cls in registered(kind).items():
            store.store(name=name, group=f"schema/{kind}", node=schema(cls, name))
            if not (shipped / kind / f"{name}.yaml").exists():
                store.store(name=name, group=kind, node=schema(cls, name))
            if hasattr(cls, "guidance"):
                store.store(name=name, group="guide", node=schema(cls, name))
    for name, cls in registered("schedule").items():
        store.store(name=name, group="schedule", node=schema(cls, name))
    for group in ("guide", "schedule"):
        store.store(name="none", group=group, node={"name": "none"})
    store.store(name=EXPRESSION, group="reward", node={"name": EXPRESSION, "text": MISSING})


def build(kind: str, config: DictConfig) -> Any:
    """The sampler, reward or schedule that a configuration names, checked against its own fields; None for `name: none`.

    Raises:
        DiffsteerError: an unknown name or key, a wrong type or value.
    """
    name = config.get("name")
    if not isinstance(name, str):
        raise DiffsteerError(f"{kind}: it has no name{nearest('', registered(kind))}")
    if kind in ("sampler", "guide", "schedule") and name == "none":
        extra = [key for key in config if key != "name"]
        if extra:
            raise DiffsteerError(f"{kind}=none has no {extra[0]!s}")
        return None
    if kind == "reward" and name == EXPRESSION:
        return expressed(config)
    group, kind = kind, "sampler" if kind == "guide" else kind
    cls = find(kind, name)
    try:
        given = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        merged = OmegaConf.merge(OmegaConf.structured(schema(cls, name)), given)
        values = OmegaConf.to_container(merged, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise DiffsteerError(_explain_key(error, kind)) from error
    assert isinstance(values, dict)
    del values["name"]
    if group == "guide":
        for key in ("particles", "eta"):
            if values[key] != getattr(cls, key):
                raise DiffsteerError(f"guide.{key}={values[key]} has no effect: give sampler.{key}")
    for f in dataclasses.fields(cls):
        if "of" in f.metadata:  # samplers within a sampler, rewards within a reward
            if not isinstance(values[f.name], list):
                raise DiffsteerError(f"{kind}.{f.name}={values[f.name]}; wanted a list, such as [{values[f.name]}]")
            values[f.name] = [build(f.metadata["of"], _mapping(v, f"{kind}.{f.name}")) for v in values[f.name]]
    return cls(**{str(k): tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def expressed(config: DictConfig) -> Reward:
    """The reward that a text such as ``clip + 0.3*z(aesthetic)`` stands for, each of its rewards checked as on its own.

    Raises:
        DiffsteerError: what is not understood, or an unknown reward or key.
    """
    text = config.get("text") if not OmegaConf.is_missing(config, "text") else None
    if not isinstance(text, str) or set(config) != {"name", "text"}:
        raise DiffsteerError(f"reward={EXPRESSION} takes a text and nothing else: reward='clip + 0.3*z(aesthetic)'")
    return reward_of(text, lambda name, given: build("reward", OmegaConf.create({"name": name, **given})), registered("reward"))


def named(value: Any) -> Any:
    """What a text or a mapping names, as a mapping with a name: an option, or an expression of rewards."""
    if not isinstance(value, str):
        return value
    if is_expression(value, registered("reward")):
        return {"name": EXPRESSION, "text": value}
    if is_program(value):
        return {"name": PROGRAM, "text": value}
    return {"name": value}


def _mapping(value: Any, where: str) -> DictConfig:
    """A sampler within a sampler, or a reward within a reward, by its name or as a mapping."""
    made = OmegaConf.create(
        named(value) if where.startswith("reward") else {"name": value} if isinstance(value, str) else value
    )
    if not isinstance(made, DictConfig):
        raise DiffsteerError(f"{where}: {value!r} is neither a name nor a mapping such as {{name: ...}}")
    return made


def settings(config: DictConfig, **more: Any) -> tuple[dict[str, Any], str]:
    """Everything that decides a prompt's result, files that the model, the reward and the decoder name among it, and its
    SHA-256."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    left_out = _WITHOUT_EFFECT if config.deterministic else (*_WITHOUT_EFFECT, "chunk")
    with_files = {key: values[key] for key in _WITH_FILES if config.get(key) is not None}
    files = fingerprints(with_files, Path(config.out))
    kept = {str(k): v for k, v in values.items() if k not in left_out} | {"version": __version__, "files": files} | more
    return kept, hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def as_yaml(config: Any) -> str:
    """A configuration as YAML that reads back equal. PyYAML writes a NEL (U+0085) so that it reads back as a blank; then every
    text is quoted and escaped."""
    text = OmegaConf.to_yaml(config)
    if "\x85" in text:
        text = yaml.safe_dump(OmegaConf.to_container(config), default_style='"', sort_keys=False)
    return text


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf: what is wrong, where, what is valid."""
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name} is unknown{nearest(name, error.options)}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _explain_key(error.__cause__)
    if isinstance(error, OmegaConfBaseException):
        return _explain_key(error)
    said = re.sub(r"expecting \{.*?\}|See https://\S+.*", "", str(error))
    return one_line(said)


def one_line(said: object) -> str:
    """A message of several lines as one."""
    return "; ".join(line.strip() for line in str(said).splitlines() if line.strip())


def _explain_key(error: OmegaConfBaseException, within: str = "") -> str:
    key = ".".join(part for part in (within, str(error.full_key or error.key or "")) if part)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: give {key}=VALUE"
    parent = error.parent_node
    if isinstance(parent, DictConfig) and isinstance(error.key, str) and error.key not in parent:
        valid = [str(k) for k in parent if k != "hydra"]
        if "sampler" in valid:
            valid.append("experiment")  # a group without a key of its own
        return f"unknown key {key!r}{nearest(error.key, valid)}"
    first = str(error.msg or error).strip().splitlines()[0]
    return f"{key}: {first}" if key else first
