"""How varied the responses to one prompt are: a policy that is paid for one good answer may forget the others.

    distinct_n        different n-grams among all n-grams of the responses to a prompt (Li et al. 2016, arXiv:1510.03055)
    self_similarity   Jaccard index of the bigrams of two responses to the same prompt, on average over pairs of them
    entropy           -log pi(y|x), on average over samples: the entropy of the policy's responses, in nats (`measure`)

n-grams are of words between blanks. Distinct-n falls with the number and length of responses: compare policies that
answered as often.
"""

from itertools import combinations

import numpy as np


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text, in their order; a text of fewer words is one of its own."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)] or [tuple(words)]


def distinct(responses: list[str], n: int) -> float:
    """Different n-grams as a share of all, in the responses to one prompt."""
    grams = [gram for response in responses for gram in ngrams(response, n)]
    return len(set(grams)) / len(grams)


def self_similarity(responses: list[str]) -> float:
    """Mean Jaccard index of the bigrams of two responses: 1 where all are the same; NaN for a single one."""
    sets = [frozenset(ngrams(response, 2)) for response in responses]
    pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")
