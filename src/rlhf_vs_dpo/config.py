"""params.yaml as types: one frozen model per section. An unknown, missing or out-of-range key is an error naming it.

There are no defaults here: every number stands in params.yaml, so that DVC sees it. (A test holds this.)
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlhf_vs_dpo.errors import ParamsError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]  # of what an interval is over: one alone says nothing of another
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Steps = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Section(BaseModel):
    """A section of params.yaml: nothing unknown, nothing coerced, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ---- data ------------------------------------------------------------------------------------------------------------


class Flaws(Section):
    """Probabilities of the flaws of a demonstration in the mini-TL;DR world."""

    omit: Share
    invent: Share
    distract: Share
    filler: Share
    repeat: Share
    state_time: Share


class MiniTldr(Section):
    train: Count
    validation: Several
    test: Several
    corpus_train: Count
    corpus_validation: Count
    flaws: Flaws


class Splits(Section):
    """Shares of prompts held out; a prompt's split follows from a hash of its text."""

    validation: Share
    test: Share
    limit: Count | None

    @model_validator(mode="after")
    def _leave_some(self) -> "Splits":
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise ValueError("validation and test must be above 0 and leave something for train")
        return self


class Hub(Section):
    name: str | None
    config: str | None
    split: str
    held_out: str | None
    revision: str | None
    splits: Splits
    turn_marker: str | None


class Files(Section):
    preferences: str | None
    demonstrations: str | None
    corpus: str | None
    splits: Splits
    turn_marker: str | None


class Imdb(Section):
    origin: Literal["hub", "package"]
    dataset: str
    revision: str | None
    train: Count
    validation: Several
    test: Several
    corpus_train: Count
    corpus_validation: Count
    classifier_reviews: Count
    prompt_words: Annotated[list[Count], Field(min_length=2, max_length=2)]
    response_words: Count

    @model_validator(mode="after")
    def _ordered(self) -> "Imdb":
        if self.prompt_words[0] > self.prompt_words[1]:
            raise ValueError("prompt_words must be the least and the most words, in this order")
        return self


class Data(Section):
    source: Literal["mini_tldr", "imdb", "hub", "files"]
    unusable: Literal["refuse", "drop"]
    max_prompt_tokens: Count | None
    max_document_tokens: Count | None
    chat_template: str | None
    mini_tldr: MiniTldr
    imdb: Imdb
    hub: Hub
    files: Files


# ---- models and training ---------------------------------------------------------------------------------------------


class Scratch(Section):
    """A Llama configuration to pretrain from nothing."""

    layers: Count
    width: Count
    heads: Count
    feed_forward: Count
    context: Count
    bpe_vocabulary: Annotated[int, Field(ge=260)]

    @model_validator(mode="after")
    def _divides(self) -> "Scratch":
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width ({self.width}) must be an even multiple of heads ({self.heads})")
        return self


class Training(Section):
    """One run of AdamW over batches. `batch` is global: micro-batches and processes only divide it."""

    steps: Steps
    batch: Count
    learning_rate: Positive
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    weight_decay: NonNegative
    max_grad_norm: Positive
    adam_epsilon: Positive


class Adapter(Section):
    """Low-rank adapters that are trained in the place of all weights: W + (alpha / rank) B A of the layers that are targets."""

    rank: Count
    alpha: Positive
    targets: Literal["all"] | Annotated[list[str], Field(min_length=1)]
    merge: bool


class Base(Section):
    pretrained: str | None
    revision: str | None
    scratch: Scratch
    training: Training


class Sft(Section):
    training: Training


class Annotator(Section):
    """Bradley-Terry on gold + length_bias * tokens + filler_bias * [filler], divided by the temperature."""

    temperature: Positive
    length_bias: float
    filler_bias: float

    @property
    def tastes(self) -> bool:
        """Whether it likes anything besides gold: where not, utility is gold."""
        return bool(self.length_bias or self.filler_bias)


class Preferences(Section):
    source: Literal["annotator", "dataset"]
    train_prompts: Count
    validation_prompts: Count
    annotator: Annotator


class Reward(Section):
    unit_scale: bool
    training: Training


class Sampling(Section):
    """The distribution that *is* the policy: every log-probability in the project is taken at this temperature."""

    temperature: Positive
    max_new_tokens: Count


class Checkpoint(Section):
    """How often a stage keeps what it has done, to go on from when it was killed."""

    minutes: NonNegative | None


class Memory(Section):
    """What is given for memory; it changes no number."""

    gradient_checkpointing: bool
    sharding: bool


class Monitor(Section):
    """Held-out sampling while rl, preference and imitation methods train."""

    points: Count
    prompts: Several


class Pool(Section):
    """How many responses of the SFT policy are drawn and scored, for which prompts."""

    train_prompts: Count
    train_samples: Count
    validation_prompts: Several
    validation_samples: Annotated[int, Field(ge=3)]  # a rival, and two to choose between
    test_prompts: Several
    test_samples: Count
    deep_prompts: Steps
    deep_samples: Count

    @model_validator(mode="after")
    def _nested(self) -> "Pool":
        if self.deep_prompts > self.test_prompts or self.deep_samples < self.test_samples:
            raise ValueError(
                "deep_prompts are the first of test_prompts, with more samples: "
                "deep_prompts <= test_prompts and deep_samples >= test_samples"
            )
        return self


class Rl(Section):
    """What every attempt at reinforcement learning shares: its rollouts and its KL-shaped reward."""

    iterations: Count
    episodes: Count
    samples_per_prompt: Count
    schedule: Literal["constant", "linear", "cosine"]
    adam_epsilon: Positive
    max_grad_norm: Positive
    kl_coefficient: NonNegative
    kl_target: Positive | None
    kl_horizon: Positive
    unfinished_reward: float

    @model_validator(mode="after")
    def _divides(self) -> "Rl":
        if self.episodes % self.samples_per_prompt:
            raise ValueError(
                f"episodes ({self.episodes}) must be a multiple of samples_per_prompt ({self.samples_per_prompt})"
            )
        return self


class Reinforce(Rl):
    algorithm: Literal["reinforce"]
    learning_rate: Positive
    baseline: bool

    @model_validator(mode="after")
    def _has_others(self) -> "Reinforce":
        if self.baseline and self.episodes < 2:
            raise ValueError("episodes must be at least 2: the baseline is the mean of the others")
        return self


class Rloo(Rl):
    algorithm: Literal["rloo"]
    learning_rate: Positive

    @model_validator(mode="after")
    def _has_others(self) -> "Rloo":
        if self.samples_per_prompt < 2:
            raise ValueError("samples_per_prompt must be at least 2: the baseline is the mean of the others")
        return self


class WithCritic(Rl):
    """A value network beside the policy, and advantages per token by GAE."""

    epochs: Count
    minibatches: Count
    value_learning_rate: Positive
    value_clip: Positive
    value_warmup: Steps
    gae_discount: Share
    gae_lambda: Share

    @model_validator(mode="after")
    def _minibatches(self) -> "WithCritic":
        if self.episodes % self.minibatches:
            raise ValueError(f"episodes ({self.episodes}) must be a multiple of minibatches ({self.minibatches})")
        if self.value_warmup >= self.iterations:
            raise ValueError(f"value_warmup ({self.value_warmup}) must be below iterations ({self.iterations})")
        return self


class Trpo(WithCritic):
    algorithm: Literal["trpo"]
    max_kl: Positive
    damping: NonNegative
    cg_steps: Count
    fisher_share: Annotated[float, Field(gt=0, le=1)]
    backtracks: Steps


class Ppo(WithCritic):
    algorithm: Literal["ppo"]
    learning_rate: Positive
    clip: Positive
    ptx_coefficient: NonNegative
    ptx_batch: Count


AnyRl = Annotated[Reinforce | Rloo | Trpo | Ppo, Field(discriminator="algorithm")]


class Passes(Section):
    """Passes of AdamW over pairs or examples: what every loss on given texts shares."""

    epochs: Positive
    batch: Count
    learning_rate: Positive
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    weight_decay: NonNegative
    max_grad_norm: Positive
    adam_epsilon: Positive
    rounds: Count  # 1: the texts that are there; in later rounds, texts sampled from the policy of the last


class Dpo(Passes):
    loss: Literal["dpo"]
    beta: Positive


class Cdpo(Passes):
    loss: Literal["cdpo"]
    beta: Positive
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]


class Ipo(Passes):
    loss: Literal["ipo"]
    tau: Positive


class LnDpo(Passes):
    loss: Literal["ln_dpo"]
    beta: Positive


class SimPo(Passes):
    loss: Literal["simpo"]
    beta: Positive
    gamma: float


Preference = Annotated[Dpo | Cdpo | Ipo | LnDpo | SimPo, Field(discriminator="loss")]


class Once(Passes):
    rounds: Literal[1]


class ChosenSft(Once):
    recipe: Literal["chosen_sft"]


class ControlTokens(Once):
    recipe: Literal["control_tokens"]


class RmFiltered(Passes):
    recipe: Literal["rm_filtered"]
    share: Annotated[float, Field(gt=0, le=1)]


class BestOfN(Passes):
    recipe: Literal["best_of_n"]
    n: Annotated[int, Field(ge=2, le=1024)]


Imitation = Annotated[ChosenSft | ControlTokens | RmFiltered | BestOfN, Field(discriminator="recipe")]


# ---- measuring -------------------------------------------------------------------------------------------------------


class Sample(Section):
    prompts: Several
    per_prompt: Count


class GoldJudge(Section):
    """The gold reward of the source, where it has one."""

    kind: Literal["gold"]


class RewardModelJudge(Section):
    """Another reward model: a folder or a Hub id."""

    kind: Literal["reward_model"]
    model: str
    revision: str | None
    batch: Count


class LanguageModelJudge(Section):
    """A language model behind an OpenAI-compatible endpoint. `question` holds {prompt}, {first} and {second}."""

    kind: Literal["language_model"]
    endpoint: str
    model: str
    question: str
    key_variable: str | None
    max_tokens: Count
    retries: Annotated[int, Field(ge=0, le=20)]
    timeout: Positive
    workers: Count

    @model_validator(mode="after")
    def _asks(self) -> "LanguageModelJudge":
        lost = [name for name in ("{prompt}", "{first}", "{second}") if name not in self.question]
        if lost:
            raise ValueError(f"question lacks {', '.join(lost)}; the judge could not see what it compares")
        return self


class LexiconJudge(Section):
    """VADER, a lexicon of sentiment: an outsider where the task is to write what is positive."""

    kind: Literal["vader"]


AnyJudge = Annotated[GoldJudge | RewardModelJudge | LanguageModelJudge | LexiconJudge, Field(discriminator="kind")]


class Judging(Section):
    """Who says which response is better, besides the annotator that made the preferences."""

    prompts: Count
    judges: dict[Name, AnyJudge]


class Collapse(Section):
    """When a run counts as collapsed."""

    finished_below: Share
    gain_below: float


class Evaluate(Section):
    """How sure we are, and what is compared with what."""

    resamples: Annotated[int, Field(ge=100)]
    price: NonNegative
    preferred_by: Name | None
    questions: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(max_length=12)]
    settings_of: dict[Name, list[Name]]
    collapse: Collapse
    equal_kl: list[Positive]
    equal_compute: list[Annotated[float, Field(gt=0, le=1)]]


class Tabular(Section):
    """Enumerable problem 1: a softmax over outcomes for each prompt, one logit each."""

    prompts: Annotated[int, Field(ge=1, le=16)]
    outcomes: Annotated[int, Field(ge=2, le=5000)]


class Theory(Section):
    """Problems that are small enough to be solved exactly."""

    tabular: Tabular
    kl_coefficient: Positive
    rl_iterations: Count
    episodes: Annotated[int, Field(ge=8, multiple_of=8)]
    pairs: Annotated[int, Field(ge=64)]
    pair_steps: Count
    transformer_iterations: Count
    law_outcomes: Annotated[int, Field(ge=50, le=5000)]


class Report(Section):
    examples: Count


Range = Annotated[list[NonNegative], Field(min_length=2, max_length=2)]


class Tuning(Section):
    """The study: as many trials for every method, from a space of at most three numbers each.

    `spaces` maps a method to the ends between which keys of its own are drawn: evenly on a logarithmic scale, or evenly where the lower is 0.
    """

    trials: Count
    seed: Seed
    criterion: Literal["preferred", "gold", "utility", "objective", "reward"]
    spaces: Annotated[dict[Name, Annotated[dict[str, Range], Field(min_length=1, max_length=3)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> "Tuning":
        for method, space in self.spaces.items():
            for key, (low, high) in space.items():
                if low >= high:
                    raise ValueError(f"spaces.{method}.{key} is [{low}, {high}]; the lower end comes first")
        return self


class Policies(Section):
    """Rows of the comparison: entries of the families, and n of best-of-n without training."""

    rl: list[Name]
    preference: list[Name]
    imitation: list[Name]
    best_of_n: list[Annotated[int, Field(ge=2, le=1024)]]


SECTIONS: dict[str, Any] = {
    "seed": Seed,
    "seeds": Annotated[list[Seed], Field(min_length=1)],
    "policies": Policies,
    "data": Data,
    "base": Base,
    "adapter": Adapter | None,
    "sft": Sft,
    "sampling": Sampling,
    "preferences": Preferences,
    "reward": Reward,
    "monitor": Monitor,
    "checkpoint": Checkpoint,
    "memory": Memory,
    "rl": AnyRl,
    "preference": Preference,
    "pool": Pool,
    "imitation": Imitation,
    "theory": Theory,
    "sample": Sample,
    "judging": Judging,
    "evaluate": Evaluate,
    "report": Report,
    "tuning": Tuning,
}
# Sections that hold `defaults` and one entry per method -> the key of an entry that says which kind of method it is.
FAMILIES = {"rl": "algorithm", "preference": "loss", "imitation": "recipe"}


def read_params(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """params.yaml as plain dicts (YAML 1.2, as DVC reads it: 1e-5 is a number)."""
    try:
        return YAML(typ="safe").load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; restore it with `make profile NAME=default`") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {error}") from None


def section(params: dict[str, Any], name: str, method: str | None = None, place: str = "params.yaml") -> Any:
    """One section of params.yaml as its type; for a family, the entry of `method` laid over its `defaults`.

    Raises ParamsError that names every wrong key by its dotted path.
    """
    key = f"{name}.{method}" if method else name
    try:
        values = params[name]
        if method:
            entry = {} if values[method] is None else values[method]
            if not isinstance(entry, dict):
                raise ParamsError(f"{place}: `{key}` is {entry!r}; a method is a map of keys")
            values = _over_defaults(name, values["defaults"], entry)
    except (KeyError, TypeError) as error:
        lost = error.args[0] if isinstance(error, KeyError) else key
        raise ParamsError(f"{place}: missing key `{lost if lost == name else f'{name}.{lost}'}`") from None
    return _validated(SECTIONS[name], values, key, place)


def _kinds(head: str) -> dict[str, type[Section]]:
    """Kinds of the entries of a family, or of judges, by the value of the key that tells them apart."""
    union, tag = (AnyJudge, "kind") if head == "judging" else (SECTIONS[head], FAMILIES[head])
    return {get_args(member.model_fields[tag].annotation)[0]: member for member in get_args(get_args(union)[0])}


def _over_defaults(family: str, defaults: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """An entry laid over those of its family's defaults that its kind of method knows (TRPO has no `clip`)."""
    kinds = _kinds(family)
    kind = entry.get(FAMILIES[family])
    known = kinds[kind].model_fields if isinstance(kind, str) and kind in kinds else {}
    return {**{key: value for key, value in defaults.items() if key in known}, **entry}


def _validated(kind: Any, values: Any, key: str, place: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values, strict=True)
    except ValidationError as errors:
        raise ParamsError("\n".join(_explain(error, key, place) for error in errors.errors())) from None


def _explain(error: Any, key: str, place: str) -> str:
    # The location of an error inside an entry holds its kind ("dpo"), which is no key of the file: at its head, or behind `judges.<name>`.
    head = key.split(".")[0]
    inner, tag, at = [str(part) for part in error["loc"]], FAMILIES.get(head, "kind"), 0 if head in FAMILIES else 2
    if head in (*FAMILIES, "judging") and len(inner) > at:
        del inner[at]
    dotted = ".".join([key, *inner])
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key `{dotted}`; check its spelling, or remove it"
        case "missing":
            return f"{place}: missing key `{dotted}`; profiles/default.yaml shows its default"
        case "union_tag_invalid":
            known = error["ctx"]["expected_tags"]
            return f"{place}: `{dotted}.{tag}` is {error['ctx']['tag']!r}, which is no known {tag} ({known})"
        case "union_tag_not_found":
            return f"{place}: missing key `{dotted}.{tag}`; it is one of {', '.join(_kinds(head))}"
    if error["type"] == "value_error":  # keys that do not fit together
        return f"{place}: `{dotted}`: {error['ctx']['error']}"
    return f"{place}: `{dotted}` is {error['input']!r}: {error['msg']}"


def check(params: dict[str, Any], place: str = "params.yaml") -> None:
    """Validate a whole params.yaml, every method of it included; all faults are reported together."""
    if not isinstance(params, dict):
        raise ParamsError(f"{place}: must be a map of sections, not {type(params).__name__}")
    faults = [
        f"{place}: unknown key `{key}`; check its spelling, or remove it" for key in params.keys() - SECTIONS.keys()
    ]

    def attempt(name: str, method: str | None = None) -> Any:
        try:
            return section(params, name, method, place)
        except ParamsError as error:
            faults.append(str(error))

    for name in SECTIONS.keys() - {*FAMILIES, "policies"}:
        attempt(name)
    policies = attempt("policies")
    listed = {family: list(getattr(policies, family)) for family in FAMILIES} if policies else {}
    for family in FAMILIES:
        entries = params.get(family)
        if not isinstance(entries, dict) or not isinstance(entries.get("defaults"), dict):
            faults.append(f"{place}: missing key `{family}.defaults`")
            continue
        known = {key for kind in _kinds(family).values() for key in kind.model_fields}
        faults += [
            f"{place}: unknown key `{family}.defaults.{key}`; check its spelling, or remove it"
            for key in entries["defaults"].keys() - known
        ]
        for method in entries.keys() - {"defaults"}:
            attempt(family, method)
        for method in listed.get(family, []):
            if method not in entries or method == "defaults":
                faults.append(f"{place}: `policies.{family}` lists {method!r}, but there is no `{family}.{method}`")
        if len(set(listed.get(family, []))) < len(listed.get(family, [])):
            faults.append(f"{place}: `policies.{family}` lists a method twice")
    everywhere = [name for names in listed.values() for name in names]
    if policies and not everywhere:
        faults.append(f"{place}: `policies` lists no method of any family; there is nothing to compare")
    twice = {name for name in everywhere if everywhere.count(name) > 1}
    faults += [f"{place}: {name!r} is listed under several families of `policies`" for name in sorted(twice)]
    rows = {f"best_of_{n}" for n in policies.best_of_n} if policies else set()
    taken = {"sft", "base", "reward", "preferences", "reference", "pool", "demonstrations", "theory", *rows} & set(
        everywhere
    )
    faults += [f"{place}: `policies` lists {name}; that name is taken, choose another" for name in sorted(taken)]
    if policies and len(set(policies.best_of_n)) < len(policies.best_of_n):
        faults.append(f"{place}: `policies.best_of_n` lists a number twice")
    seeds = params.get("seeds")
    if isinstance(seeds, list) and len(set(map(str, seeds))) < len(seeds):
        faults.append(f"{place}: `seeds` holds a seed twice")
    faults += _disagreements(params, place) if not faults else []
    if faults:
        raise ParamsError("\n".join(sorted(dict.fromkeys(faults))))


def check_study(params: dict[str, Any]) -> None:
    """Raise ParamsError where `make tune` would train what cannot be trained, on params that `check` has passed."""
    for method in _never_labelled(params, section(params, "tuning").spaces):
        raise ParamsError(
            f"`tuning.spaces` has `{method}`, whose later rounds need `preferences.source: annotator`, to choose between new samples; "
            f"take `{method}` out of `tuning.spaces` in params.yaml"
        )


def _never_labelled(params: dict[str, Any], methods: Iterable[str]) -> list[str]:
    """Those of the methods that train on new samples in later rounds, where there is no annotator to choose between them."""
    if section(params, "preferences").source != "dataset":
        return []
    of_pairs = [method for method in methods if method in params["preference"]]
    return [method for method in of_pairs if section(params, "preference", method).rounds > 1]


def _disagreements(params: dict[str, Any], place: str) -> list[str]:
    """Sections that are each right and do not fit together: better said now than after an hour of training."""
    data, base = section(params, "data"), section(params, "base")
    faults = []
    if data.source == "files" and data.files.preferences is None:
        faults.append(f"{place}: `data.source` is files, and `data.files.preferences` names none")
    if data.source == "hub" and data.hub.name is None:
        faults.append(f"{place}: `data.source` is hub, and `data.hub.name` names none")
    own_pairs = section(params, "preferences").source == "dataset"
    if own_pairs != (data.source in ("hub", "files")):
        needed = "dataset" if data.source in ("hub", "files") else "annotator"
        faults.append(f"{place}: `data.source` is {data.source}, which needs `preferences.source: {needed}`")
    if base.pretrained is None and section(params, "sampling").max_new_tokens >= base.scratch.context - 1:
        faults.append(f"{place}: `sampling.max_new_tokens` leaves no room for a prompt in `base.scratch.context`")
    pool, policies = section(params, "pool"), section(params, "policies")
    for n in policies.best_of_n:
        if n > pool.test_samples:
            faults.append(
                f"{place}: `policies.best_of_n` lists {n}, more than `pool.test_samples` ({pool.test_samples})"
            )
    evaluate, judging = section(params, "evaluate"), section(params, "judging")
    known = {name for family in FAMILIES for name in params[family]} - {"defaults"} | {"sft"}
    for key, groups in (("questions", evaluate.questions), ("settings_of", evaluate.settings_of.values())):
        for name in dict.fromkeys(name for group in groups for name in group):
            if name not in known and not re.fullmatch(r"best_of_\d+", name):
                faults.append(f"{place}: `evaluate.{key}` names {name!r}, which is no method of params.yaml")
    for method in evaluate.settings_of.keys() - known:
        faults.append(f"{place}: `evaluate.settings_of` is for {method!r}, which is no method of params.yaml")
    for a, b in evaluate.questions:
        if a == b:
            faults.append(f"{place}: `evaluate.questions` asks how {a} differs from itself")
    if evaluate.preferred_by not in (None, *judging.judges):
        faults.append(f"{place}: `evaluate.preferred_by` is {evaluate.preferred_by}, which is none of `judging.judges`")
    for method in policies.imitation:
        entry = section(params, "imitation", method)
        if getattr(entry, "n", 1) > pool.train_samples:
            faults.append(
                f"{place}: `imitation.{method}.n` ({entry.n}) is more than `pool.train_samples` ({pool.train_samples})"
            )
    for method in _never_labelled(params, policies.preference):
        faults.append(
            f"{place}: `preference.{method}.rounds` above 1 needs `preferences.source: annotator`, to choose between new samples; "
            f"without one, take `{method}` off `policies.preference`"
        )
    tuning = section(params, "tuning")
    if tuning.seed in section(params, "seeds"):
        faults.append(
            f"{place}: `tuning.seed` ({tuning.seed}) is one of `seeds`; choose another, for the study needs a line that no result uses"
        )
    for method, space in tuning.spaces.items():
        if method not in known - {"sft"}:
            faults.append(f"{place}: `tuning.spaces` names {method!r}, which is no method of params.yaml")
            continue
        for end in (0, 1):
            try:
                section(
                    with_settings(params, method, {key: ends[end] for key, ends in space.items()}),
                    family_of(params, method),
                    method,
                )
            except ParamsError as error:
                faults.append(f"{place}: `tuning.spaces.{method}`: {str(error).partition(': ')[2]}")
    if section(params, "report").examples > section(params, "sample").prompts:
        faults.append(f"{place}: `report.examples` is more than `sample.prompts`")
    return faults


def family_of(params: dict[str, Any], method: str) -> str:
    """The family whose section of params.yaml has an entry for `method`."""
    return next(family for family in FAMILIES if method in params[family])


def with_settings(params: dict[str, Any], method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """params.yaml with other numbers for one method."""
    family = family_of(params, method)
    return params | {family: params[family] | {method: params[family][method] | settings}}


def folders(policies: Policies, seeds: list[int]) -> dict[str, list[str]]:
    """Method -> its folders under models/, one for each line; the SFT policy first."""
    methods = ["sft", *(name for family in FAMILIES for name in getattr(policies, family))]
    return {method: [f"{method}-{seed}" for seed in seeds] for method in methods}


def families(policies: Policies) -> dict[str, str]:
    """Method -> its family; the SFT policy is one of its own."""
    return {"sft": "sft"} | {method: family for family in FAMILIES for method in getattr(policies, family)}


if __name__ == "__main__":  # `make check`: every key of params.yaml, before any stage starts
    import sys

    try:
        check(read_params())
    except ParamsError as error:
        sys.exit(f"error: {error}")
