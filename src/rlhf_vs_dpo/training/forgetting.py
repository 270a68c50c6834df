"""What a policy still knows of its pretraining: log-probability of held-out documents, and recall of facts.

Alignment tax (Ouyang et al. 2022, arXiv:2203.02155, section 4.2) in miniature: PPO-ptx exists to keep it low.
"""

import pandas as pd
import torch
from torch import nn

from rlhf_vs_dpo.language.forward import log_likelihoods, measure
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Batch, Tokens, documents, encode_prompts


def retention(
    model: nn.Module, tokenizer, corpus: pd.DataFrame, facts: pd.DataFrame, document_tokens: int | None = None
) -> pd.DataFrame:
    """A `retention` table: one row per document and per fact.

    Perplexity is that of the model itself (temperature 1), as everywhere in the literature. A fact is recalled
    (`correct` = 1) where greedy decoding of its question gives its answer. Documents are cut at `document_tokens`.
    """
    plain = Policy(model, temperature=1.0)
    texts = documents(tokenizer, corpus["text"], plain.context, document_tokens)
    rows = pd.DataFrame({"kind": "corpus", "item_id": corpus["doc_id"], "correct": float("nan")})
    rows["tokens"] = [len(tokens.response) for tokens in texts]
    rows["logp"] = log_likelihoods(plain, texts, "held-out corpus")
    if not len(facts):
        return rows
    answers = tokenizer(list(facts["answer"]), add_special_tokens=False)["input_ids"]
    questions = [Tokens(p, a) for p, a in zip(encode_prompts(tokenizer, list(facts["prompt"])), answers, strict=True)]
    asked = pd.DataFrame({"kind": "fact", "item_id": facts["fact_id"], "tokens": [len(a) for a in answers]})
    asked["logp"] = log_likelihoods(plain, questions)
    asked["correct"] = measure(plain, questions, greedily_right)
    return pd.concat([rows, asked], ignore_index=True)


def greedily_right(policy: Policy, batch: Batch) -> list[float]:
    """1.0 where the most likely token is the right one at every token of the response, for each row."""
    mask = batch.response_mask
    right = policy.distributions(batch).argmax(-1) == batch.input_ids[mask]
    return torch.ones_like(mask).masked_scatter(mask, right).all(-1).float().tolist()
