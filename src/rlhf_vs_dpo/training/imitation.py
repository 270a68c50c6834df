"""Four ways to do without reinforcement learning: supervised fine-tuning on texts that somebody or something liked.

What the policy converges to, where both responses of a pair come from ref, equal ones among them, and samples are many:

    chosen_sft       SFT on the chosen responses                       pi = 2 ref(y) E_{y' ~ ref} sigmoid(r - r')
    control_tokens   SFT on [GOOD] + chosen and [BAD] + rejected       the same, prompted by [GOOD]
    rm_filtered      SFT on the share of samples that score highest    pi = ref(y) [r(y) > threshold] / share
    best_of_n        SFT on the best of every n samples                pi = law of the best of n; n^t after t rounds

Sources: Binary FeedME and reward conditioning in Dubois et al. 2023, arXiv:2305.14387; Lu et al. 2022 (Quark),
arXiv:2205.13636; expert iteration: Anthony et al. 2017, arXiv:1705.08439; best-of-n: Stiennon et al. 2020, arXiv:2009.01325.

Where we differ: pairs of equal responses are not stored, for a preference between them says nothing, so that chosen_sft
learns the law of the chosen one of two *different* responses (`metrics/preferences.json` has the share left out); and the
best share of N samples has a threshold that is itself a sample.
"""

import pandas as pd

from rlhf_vs_dpo.config import Imitation
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.language.forward import scores, tokens_read
from rlhf_vs_dpo.language.generation import from_main, generate_together
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Examples, Prompts, Tokens, encode_pairs

NEEDS = {"chosen_sft": "pairs", "control_tokens": "pairs", "rm_filtered": "pool", "best_of_n": "pool"}
GOOD, BAD = "[GOOD]", "[BAD]"


def from_pairs(recipe: str, pairs: pd.DataFrame, tokenizer, context: int) -> Examples:
    """The chosen responses; for control tokens, the rejected ones too, each behind its token."""
    if recipe == "chosen_sft":
        learned = encode_pairs(tokenizer, pairs, context)
        return Examples(learned.chosen, learned.names)
    good, bad = (encode_pairs(tokenizer, pairs, context, suffix) for suffix in (GOOD, BAD))
    return Examples(good.chosen + bad.rejected, good.names + bad.names)


def from_pool(settings: Imitation, pool: pd.DataFrame, prompts: Prompts) -> Examples:
    """What a recipe keeps of a pool: `prompt_id, sample, response_ids, finished, reward`; `prompts` are those of the pool.

    Responses that never ended have no score and are never kept. Raises DataError where nothing is left.
    """
    if not pool["finished"].any():
        raise DataError(f"the pool holds nothing to imitate: none of its {len(pool)} responses ended")
    kept = above_threshold(pool, settings.share) if settings.recipe == "rm_filtered" else best_of_each(pool, settings.n)
    asked = dict(zip(prompts.names, prompts.ids, strict=True))
    return Examples(
        [Tokens(asked[row.prompt_id], list(row.response_ids)) for row in kept.itertuples()],
        [f"{prompt}/{sample}" for prompt, sample in zip(kept["prompt_id"], kept["sample"], strict=True)],
    )


def above_threshold(pool: pd.DataFrame, share: float) -> pd.DataFrame:
    """The share of each prompt's samples that scores highest, one at least.

    A threshold for each prompt, for Bradley-Terry fixes rewards only up to a constant of the prompt: one for all would
    choose among prompts.
    """
    scored = pool[pool["finished"]]
    rank = scored.groupby("prompt_id")["reward"].rank(method="first", ascending=False)
    count = pool.groupby("prompt_id").size().mul(share).round().clip(lower=1)
    return scored[rank <= scored["prompt_id"].map(count)]


def best_of_each(pool: pd.DataFrame, n: int) -> pd.DataFrame:
    """The best of every n samples of a prompt, in the order in which they were drawn; what is left over is not used."""
    group = pool["sample"] // n
    whole = pool.groupby([pool["prompt_id"], group])["sample"].transform("size") == n
    usable = pool[whole & pool["finished"]]
    best = usable.groupby([usable["prompt_id"], usable["sample"] // n], sort=False)["reward"].idxmax()
    return pool.loc[best]


def draw_pool(
    policy: Policy, reward: Scorer, prompts: Prompts, samples: int, max_new_tokens: int, seed: int
) -> tuple[pd.DataFrame, int, int]:
    """A pool of the policy as it is now: the columns that `from_pool` reads, and the tokens generated and read for it."""
    each = Prompts(*([entry for entry in column for _ in range(samples)] for column in prompts))
    numbers = list(range(samples)) * len(prompts.names)
    drawn = generate_together(policy, each, numbers, max_new_tokens, seed, "pool of this round")
    table = pd.DataFrame(
        {
            "prompt_id": each.names,
            "sample": numbers,
            "response_ids": [tokens.response for tokens in drawn.tokens],
            "finished": drawn.finished,
            "reward": from_main(scores(reward, drawn.tokens)),
        }
    )
    return table, drawn.tokens_generated, drawn.tokens_read + tokens_read(drawn.tokens)
