r"""What a method costs, with all that it needs before it can start.

    FLOPs = N (6 trained + 2 (generated + read)) - 2 F trained                           (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)

N is the number of weights outside the table of embeddings; F those of them that do not learn (under adapters), whose gradients nobody
computes; `trained` counts a token once for each network and pass that
learns from it (forward and backward), `generated` those sampled, `read` those run forward only: prompts, and texts that a
reference, a reward model or a value network looks at. Attention's share, quadratic in length, is left out, as there. What
only watches or judges (held-out samples, evaluation) is left out of tokens and FLOPs; seconds and memory, which are of the machine, are kept apart (`of_machine`).
"""

from typing import Any, NamedTuple

from pydantic import BaseModel

POOL_KEYS = ("train_prompts", "train_samples")  # of the pool stage: what whoever learns from it must choose
COUNTED = ("flops", "tokens_trained", "tokens_generated", "tokens_read")


def flops(run: dict[str, Any]) -> float:
    """Floating-point operations of a stage, estimated from what its run file says it did."""
    forward = run.get("tokens_generated", 0) + run.get("tokens_read", 0)
    trained = run.get("tokens_trained", 0)
    return float(run.get("parameters", 0) * (6 * trained + 2 * forward) - 2 * run.get("frozen", 0) * trained)


def of_stage(run: dict[str, Any], share: float = 1.0) -> dict[str, float]:
    """What counts of a stage's cost; of the pool, only the share that methods learn from."""
    counted = {name: float(run.get(name, 0)) for name in COUNTED} | {"flops": flops(run)}
    return {name: value * share for name, value in counted.items()}


def needs(family: str, kind: str) -> list[str]:
    """Stages whose work a method cannot do without, the SFT policy apart, which all start from.

    kind: its algorithm, loss or recipe. Labels are everybody's need; who pays for them is not asked.
    """
    match family, kind:
        case "preference", "simpo":
            return ["preferences"]
        case "preference", _:
            return ["preferences", "reference"]
        case "imitation", "chosen_sft" | "control_tokens":
            return ["preferences"]
        case "imitation", _:
            return ["preferences", "reward", "pool"]
        case _:  # rl, and best-of-n at inference
            return ["preferences", "reward"]


def hyperparameters(settings: BaseModel, tag: str) -> int:
    """How many numbers one must choose: the keys of a method's settings, what kind of method it is (`tag`) left out."""

    def leaves(values: dict[str, Any]) -> int:
        return sum(leaves(value) if isinstance(value, dict) else 1 for value in values.values())

    return leaves(settings.model_dump(exclude={tag}))


class Line(NamedTuple):
    """What a method did in one line, from run files: its own run, and those of the stages that it needs, by name.

    `shares` say what part of an upstream stage is for learning (the pool is also for measuring).
    """

    own: dict[str, Any]
    upstream: dict[str, dict[str, Any]]
    shares: dict[str, float]


def of_method(lines: list[Line]) -> dict[str, Any]:
    """Cost of a method, means over lines: `own`, `upstream` of the stages it needs, and `total` of both.

    Models held are the most that any of these stages needed at once.
    """
    own = {name: _mean([of_stage(line.own)[name] for line in lines]) for name in COUNTED}
    before = {
        name: _mean(
            [sum(of_stage(run, line.shares.get(s, 1.0))[name] for s, run in line.upstream.items()) for line in lines]
        )
        for name in COUNTED
    }
    return {
        "own": own,
        "upstream": before,
        "total": {name: own[name] + before[name] for name in COUNTED},
        "needs": list(lines[0].upstream),
        "models_held": max(run.get("models_held", 0) for line in lines for run in (line.own, *line.upstream.values())),
    }


def of_machine(lines: list[Line]) -> dict[str, float]:
    """What a method took of the machine that ran it, means over lines: `own_seconds`, `total_seconds` with what it needs,
    `peak_memory_mib` of any of these stages."""
    own = _mean([line.own.get("seconds", 0.0) for line in lines])
    before = _mean(
        [sum(r.get("seconds", 0.0) * line.shares.get(s, 1.0) for s, r in line.upstream.items()) for line in lines]
    )
    peak = max(run.get("peak_memory_mib", 0.0) for line in lines for run in (line.own, *line.upstream.values()))
    return {"own_seconds": own, "total_seconds": own + before, "peak_memory_mib": peak}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
