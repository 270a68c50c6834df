"""Held-out sampling during training: gold and KL at about ten points.

Training stages keep the samples; the `sample` stage has them scored (watched.py). So the curve has the RM reward for every method, and
a method that needs no reward model does not depend on one.
"""

from typing import Any

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import Monitor
from rlhf_vs_dpo.language.forward import log_likelihoods
from rlhf_vs_dpo.language.generation import decode, generate
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.models import prompt_suffixes
from rlhf_vs_dpo.language.text import Prompts, Tokens, encode_prompts
from rlhf_vs_dpo.preferences.gold import Gold
from rlhf_vs_dpo.preferences.gold import columns as gold_columns
from rlhf_vs_dpo.run.progress import Log


class HeldOut:
    """Samples a fixed set of validation prompts, `asked` of them, from a policy, always with the same random numbers."""

    def __init__(
        self,
        prompts: pd.DataFrame,
        gold: Gold | None,
        reference: Policy,
        tokenizer,
        settings: Monitor,
        max_new_tokens: int,
        seed: int,
        steps: int,
    ):
        self.prompts = prompts.head(settings.prompts).reset_index(drop=True)
        self.plain = encode_prompts(tokenizer, list(self.prompts["prompt"]))
        self.asked = len(self.prompts)
        self.longest = max(map(len, self.plain), default=0) + max_new_tokens
        self.gold, self.reference, self.tokenizer = gold, reference, tokenizer
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.points = {round(p * steps / max(settings.points - 1, 1)) for p in range(settings.points)} | {steps}
        self.tables: list[pd.DataFrame] = []

    def watch(self, policy: Policy, step: int, log: Log) -> None:
        """Measure `policy` if `step` is one of the points: logs means under `heldout/`, keeps the samples."""
        if step not in self.points:
            return
        self.points.discard(step)  # the end of a round is the start of the next
        names = list(self.prompts["prompt_id"])
        asked = encode_prompts(self.tokenizer, list(self.prompts["prompt"]), prompt_suffixes(policy.model)[0])
        drawn = generate(policy, Prompts(asked, names), [0] * len(names), self.max_new_tokens, self.seed)
        # The reference and the reward model see the prompt as it is, whatever the policy wants behind it.
        seen = [Tokens(prompt, said.response) for prompt, said in zip(self.plain, drawn.tokens, strict=True)]
        table = pd.DataFrame(
            {
                "step": step,
                "prompt_id": names,
                "prompt_ids": self.plain,
                "response_ids": [tokens.response for tokens in drawn.tokens],
                "response": decode(self.tokenizer, drawn.tokens),
                "finished": drawn.finished,
                "logp": log_likelihoods(policy, drawn.tokens),
                "reference_logp": log_likelihoods(self.reference, seen),
            }
        )
        judged = gold_columns(self.gold, self.prompts["prompt"], self.prompts["facts"], table["response"])
        self.tables.append(table.join(judged[["gold", "filler"]]))
        log({f"heldout/{name}": value for name, value in self._last().items() if np.isfinite(value)}, step)

    def state_dict(self) -> dict[str, Any]:
        return {"points": sorted(self.points), "tables": self.tables}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.tables = set(state["points"]), state["tables"]

    def table(self) -> pd.DataFrame:
        """All samples taken so far, a `heldout` table."""
        return pd.concat(self.tables, ignore_index=True)

    def final(self) -> dict[str, float]:
        """Means at the last point, named as logged."""
        return {f"heldout/{name}": value for name, value in self._last().items()}

    def _last(self) -> dict[str, float]:
        table = self.tables[-1]
        return {
            "gold": float(table["gold"].mean()),
            "kl": float((table["logp"] - table["reference_logp"]).mean()),
            "tokens": float(table["response_ids"].map(len).mean()),
            "finished": float(table["finished"].mean()),
            "filler": float(table["filler"].mean()),
        }
