"""Make preference pairs: two samples of a policy for each prompt, and the annotator's choice between them."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import Annotator
from rlhf_vs_dpo.errors import ParamsError
from rlhf_vs_dpo.language.generation import decode, generate_together
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import prompts_of
from rlhf_vs_dpo.preferences import annotator, gold


class Samples(NamedTuple):
    """Two responses for each prompt, and what they cost.

    table                      rows of `prompts`, all with `sample` 0, then all with 1; `response, response_ids, tokens, finished`
    tokenised_otherwise_share  of those that ended: tokens of the text are not those that were sampled, had only texts been kept
    tokens_generated           sampled for them
    tokens_read                run forward only: the prompts
    """

    table: pd.DataFrame
    tokenised_otherwise_share: float
    tokens_generated: int
    tokens_read: int


def two_samples(
    policy: Policy,
    tokenizer,
    prompts: pd.DataFrame,
    max_new_tokens: int,
    seed: int,
    what: str,
    done: list | None = None,
) -> Samples:
    """Sample two responses for each row of `prompts`; `done` holds responses sampled before, see `generate`."""
    rows = prompts.reset_index(drop=True)
    both = pd.concat([rows.assign(sample=0), rows.assign(sample=1)], ignore_index=True)
    asked = prompts_of(tokenizer, both)
    drawn = generate_together(policy, asked, list(both["sample"]), max_new_tokens, seed, what, done)
    both["response"] = decode(tokenizer, drawn.tokens)
    both["response_ids"] = [tokens.response for tokens in drawn.tokens]
    both["tokens"] = [len(tokens.response) for tokens in drawn.tokens]
    both["finished"] = drawn.finished
    texts, ids = both["response"][both["finished"]], both["response_ids"][both["finished"]]
    again = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    other = [[*new, policy.eos] != list(old) for new, old in zip(again, ids, strict=True)]
    return Samples(both, float(np.mean(other)) if other else 0.0, drawn.tokens_generated, drawn.tokens_read)


def label(samples: pd.DataFrame, judge: gold.Gold | None, settings: Annotator, seed: int) -> tuple[pd.DataFrame, dict]:
    """Let the annotator choose between the two responses of each prompt, a table of `two_samples`.

    Returns pairs as the contract has them, without those that are not usable, and what they are like. Raises ParamsError where there is
    no gold reward (`judge` None), by which the annotator chooses.
    """
    if judge is None:
        raise ParamsError(
            "the simulated annotator needs a gold reward, which this data has not; set `preferences.source: dataset`"
        )
    scored = samples.join(gold.columns(judge, samples["prompt"], samples["facts"], samples["response"]))
    scored["utility"] = annotator.utility(
        scored["gold"].to_numpy(), scored["tokens"].to_numpy(), scored["filler"].to_numpy(), settings
    )
    a, b = (scored[scored["sample"] == number].reset_index(drop=True) for number in (0, 1))
    choice = annotator.choose(a["utility"].to_numpy(), b["utility"].to_numpy(), settings, np.random.default_rng(seed))
    first = pd.Series(choice.first)
    chosen, rejected = a.where(first, b), b.where(first, a)
    # Nothing can be learned from a pair of equal responses; and one that never ended, or says nothing, is no response.
    usable = (a["response"] != b["response"]) & a["finished"] & b["finished"]
    usable &= a["response"].str.strip().ne("") & b["response"].str.strip().ne("")
    pairs = pd.DataFrame(
        {
            "pair_id": "pair-" + a["prompt_id"],
            "prompt_id": a["prompt_id"],
            "split": a["split"],
            "prompt": a["prompt"],
            "chosen": chosen["response"],
            "rejected": rejected["response"],
            "annotator": "simulated",
            "p_chosen": choice.p_chosen,
            "chosen_ids": chosen["response_ids"],
            "rejected_ids": rejected["response_ids"],
        }
    )
    differ = usable & (a["gold"] != b["gold"])
    summary: dict = {
        "dropped_share": float(1 - usable.mean()),
        "annotator_agrees_with_gold": float((chosen["gold"] > rejected["gold"])[differ].mean()),
        "annotator_mean_p_chosen": float(choice.p_chosen[usable].mean()),
    }
    for name in ("gold", "tokens", "filler"):
        summary[name] = {
            "chosen": float(chosen[name][usable].astype(float).mean()),
            "rejected": float(rejected[name][usable].astype(float).mean()),
        }
    return pairs[usable].reset_index(drop=True), summary
