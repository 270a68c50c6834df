"""Make preference pairs: two samples of a policy for each prompt, and the annotator's choice between them."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import Annotator
from rlhf_vs_dpo.language.generation import decode, generate_together
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import prompts_of
from rlhf_vs_dpo.preferences import annotator, gold


class Labelled(NamedTuple):
    """`pairs` as the contract has them, what they are like, and how many tokens were sampled, and read, for them."""

    pairs: pd.DataFrame
    summary: dict
    tokens_generated: int
    tokens_read: int


def label(
    policy: Policy,
    tokenizer,
    prompts: pd.DataFrame,
    judge: gold.Gold,
    settings: Annotator,
    max_new_tokens: int,
    seed: int,
    what: str,
    done: list | None = None,
) -> Labelled:
    """Sample two responses for each row of `prompts` and let the annotator choose; unusable pairs are left out.

    `done` holds responses sampled before, see `generate`.
    """
    rows = prompts.reset_index(drop=True)
    both = pd.concat([rows.assign(sample=0), rows.assign(sample=1)], ignore_index=True)
    asked = prompts_of(tokenizer, both)
    drawn = generate_together(policy, asked, list(both["sample"]), max_new_tokens, seed, what, done)
    both["response"] = decode(tokenizer, drawn.tokens)
    both["response_ids"] = [tokens.response for tokens in drawn.tokens]
    both["tokens"] = [len(tokens.response) for tokens in drawn.tokens]
    both["finished"] = drawn.finished
    scored = both.join(gold.columns(judge, both["prompt"], both["facts"], both["response"]))
    scored["utility"] = annotator.utility(
        scored["gold"].to_numpy(), scored["tokens"].to_numpy(), scored["filler"].to_numpy(), settings
    )
    a, b = scored.iloc[: len(rows)].reset_index(drop=True), scored.iloc[len(rows) :].reset_index(drop=True)
    choice = annotator.choose(a["utility"].to_numpy(), b["utility"].to_numpy(), settings, np.random.default_rng(seed))
    first = pd.Series(choice.first)
    chosen, rejected = a.where(first, b), b.where(first, a)
    # Nothing can be learned from a pair of equal responses; and one that never ended, or says nothing, is no response.
    usable = (a["response"] != b["response"]) & a["finished"] & b["finished"]
    usable &= a["response"].str.strip().ne("") & b["response"].str.strip().ne("")
    pairs = pd.DataFrame(
        {
            "pair_id": "pair-" + rows["prompt_id"],
            "prompt_id": rows["prompt_id"],
            "split": rows["split"],
            "prompt": rows["prompt"],
            "chosen": chosen["response"],
            "rejected": rejected["response"],
            "annotator": "simulated",
            "p_chosen": choice.p_chosen,
            "chosen_ids": chosen["response_ids"],
            "rejected_ids": rejected["response_ids"],
        }
    )
    differ = usable & (a["gold"] != b["gold"])
    texts, ids = both["response"][both["finished"]], both["response_ids"][both["finished"]]
    again = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    other = [[*new, policy.eos] != list(old) for new, old in zip(again, ids, strict=True)]
    summary: dict = {
        "tokenised_otherwise_share": float(np.mean(other))
        if other
        else 0.0,  # had texts been kept, and not their tokens
        "dropped_share": float(1 - usable.mean()),
        "annotator_agrees_with_gold": float((chosen["gold"] > rejected["gold"])[differ].mean()),
        "annotator_mean_p_chosen": float(choice.p_chosen[usable].mean()),
    }
    for name in ("gold", "tokens", "filler"):
        summary[name] = {
            "chosen": float(chosen[name][usable].astype(float).mean()),
            "rejected": float(rejected[name][usable].astype(float).mean()),
        }
    return Labelled(pairs[usable].reset_index(drop=True), summary, drawn.tokens_generated, drawn.tokens_read)
