"""What the labels asked for, measured: against closed forms on a problem whose responses can all be enumerated."""

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_vs_dpo.config import Annotator, Preferences
from rlhf_vs_dpo.evaluation import measure
from rlhf_vs_dpo.evaluation.best_of_n import as_samples
from rlhf_vs_dpo.evaluation.statistics import Resamples
from rlhf_vs_dpo.losses.dpo import dpo
from rlhf_vs_dpo.preferences import annotator
from rlhf_vs_dpo.theory import laws

T, PRICE, OUTCOMES, PROMPTS = 0.6, 0.25, 9, 3


@pytest.fixture
def utilities():
    return np.random.default_rng(0).normal(size=(PROMPTS, OUTCOMES))


def table(utility, pi, ref):
    """Every response of every prompt once, `weight` its probability: what is measured of it is exact."""
    return pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{i}" for i in range(PROMPTS)], OUTCOMES), "sample": np.tile(range(OUTCOMES), PROMPTS),
            "response": "x", "tokens": 3, "finished": True, "logp": np.log(pi).ravel(), "reference_logp": np.log(ref).ravel(),
            "reward": utility.ravel(), "gold": utility.ravel(), "utility": utility.ravel(), "filler": 0.0, "weight": pi.ravel(),
            **{f"gold_{part}": 0.0 for part in ("coverage", "faithfulness", "redundancy", "filler", "form")},
        }
    )  # fmt: skip


def measured(utility, pi):
    """Means of a policy whose SFT policy is uniform."""
    ref = np.full((PROMPTS, OUTCOMES), 1 / OUTCOMES)
    sft = table(utility, ref, ref).drop(columns="weight")
    nothing = pd.DataFrame({"prompt_id": [], "gold": [], "reward": []})
    line = measure.Line(sft, nothing, measure.Asked(T, PRICE))
    found = measure.row([measure.policy(table(utility, pi, ref), line, control_length=False)], Resamples(100, 0))
    return {name: found[name].value for name in ("utility", "preferred", "objective", "kl")}


def gibbs(utility):
    ref = np.full((PROMPTS, OUTCOMES), 1 / OUTCOMES)
    return laws.gibbs(ref, utility / T, PRICE)


def test_utility_preferred_and_objective_of_any_policy_in_closed_form(utilities):
    pi = np.random.default_rng(1).dirichlet(np.ones(OUTCOMES), size=PROMPTS)
    ref = np.full((PROMPTS, OUTCOMES), 1 / OUTCOMES)
    found = measured(utilities, pi)
    beats = laws.sigmoid((utilities[:, :, None] - utilities[:, None, :]) / T)
    assert found["utility"] == pytest.approx((pi * utilities).sum(1).mean())
    assert found["preferred"] == pytest.approx(np.einsum("py,pyz,pz->p", pi, beats, ref).mean())
    assert found["objective"] == pytest.approx(laws.objective(pi, ref, utilities / T, PRICE).mean())
    assert abs(found["preferred"] - 0.5) > 0.001


def test_at_the_optimum_the_objective_is_price_log_z_and_nothing_is_higher(utilities):
    best, log_z = gibbs(utilities)
    assert measured(utilities, best)["objective"] == pytest.approx((PRICE * log_z).mean())
    rng = np.random.default_rng(2)
    for _ in range(20):
        other = 0.9 * best + 0.1 * rng.dirichlet(np.ones(OUTCOMES), size=PROMPTS)
        assert measured(utilities, other)["objective"] < (PRICE * log_z).mean()


def test_dpo_on_these_labels_ends_with_the_same_objective(utilities):
    """Population DPO on Bradley-Terry labels of u / T, beta the price: where RLHF ends, too."""
    best, log_z = gibbs(utilities)
    logits = torch.zeros(PROMPTS, OUTCOMES, dtype=torch.float64, requires_grad=True)
    u = torch.from_numpy(utilities)
    first, second = torch.cartesian_prod(torch.arange(OUTCOMES), torch.arange(OUTCOMES)).T
    chosen = torch.from_numpy(annotator.probability(u[:, first].numpy(), u[:, second].numpy(), T))
    ref = torch.full((PROMPTS, len(first)), -np.log(OUTCOMES), dtype=torch.float64)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        logp = logits.log_softmax(-1)
        loss = (chosen * dpo(logp[:, first], logp[:, second], ref, ref, PRICE).loss).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    pi = logits.detach().softmax(-1).numpy()
    assert measured(utilities, pi)["objective"] == pytest.approx((PRICE * log_z).mean(), abs=1e-6)
    assert np.abs(pi - best).max() < 1e-4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_of_the_utility_itself_against_its_law(n):
    """N equally spaced utilities: the best of n without replacement is n (N + 1) / (n + 1) on average."""
    count = 40
    pool = pd.DataFrame({"prompt_id": "p", "sample": range(count), "response": [str(i) for i in range(count)],
                         "tokens": 3, "finished": True, "logp": -np.log(count), "reference_logp": -np.log(count),
                         "reward": np.arange(1.0, count + 1), "utility": np.arange(1.0, count + 1)})  # fmt: skip
    best = as_samples(pool, n)
    assert (best["weight"] * best["utility"]).sum() == pytest.approx(n * (count + 1) / (n + 1))


def test_a_judge_takes_the_place_of_an_annotator(utilities):
    ref = np.full((PROMPTS, OUTCOMES), 1 / OUTCOMES)
    sft = table(utilities, ref, ref).drop(columns="weight").assign(utility=np.nan)
    line = measure.Line(sft, pd.DataFrame({"prompt_id": [], "gold": [], "reward": []}), measure.Asked(None, PRICE))
    wins = pd.Series([1.0, 0.5, 1.0], index=["p0", "p1", "p2"])
    found = measure.row([measure.policy(sft, line, judged=wins)], Resamples(100, 0))
    assert found["preferred"].value == pytest.approx(2.5 / 3)
    assert found["utility"].interval()["mean"] is None and found["objective"].interval()["mean"] is None
    nobody = measure.row([measure.policy(sft, line)], Resamples(100, 0))
    assert nobody["preferred"].interval()["mean"] is None


def test_what_is_watched_is_compared_with_other_samples_of_the_sft_policy():
    rows = pd.DataFrame({"step": [0, 0, 0], "prompt_id": ["a", "b", "c"], "logp": [-1.0, -2.0, -3.0],
                         "reference_logp": [-1.5, -2.0, -3.0], "utility": [1.0, 0.0, 5.0]})  # fmt: skip
    rivals = pd.DataFrame({"prompt_id": ["a", "a", "b"], "utility": [1.0, 1.0 - T, 2 * T]})
    seen = measure.watched(rows, rivals, measure.Asked(T, PRICE))
    expected = [(0.5 + laws.sigmoid(np.array(1.0))) / 2, laws.sigmoid(np.array(-2.0)), np.nan]
    assert seen["preferred"].tolist() == pytest.approx(expected, nan_ok=True)
    assert seen["objective"].tolist() == pytest.approx([1 / T - PRICE * 0.5, 0.0, 5 / T])
    assert measure.watched(rows, rivals, measure.Asked(None, PRICE))["preferred"].isna().all()


def test_utility_is_the_annotators_and_unknown_for_pairs_of_a_data_set():
    settings = Preferences(
        source="annotator", train_prompts=1, validation_prompts=1,
        annotator=Annotator(temperature=T, length_bias=0.02, filler_bias=0.75),
    )  # fmt: skip
    judged = pd.DataFrame({"gold": [1.0, 2.0], "tokens": [10, 20], "filler": [1.0, np.nan]})
    assert annotator.column(judged, settings).tolist() == pytest.approx([1.0 + 0.2 + 0.75, 2.0 + 0.4])
    assert annotator.column(judged, settings.model_copy(update={"source": "dataset"})).isna().all()
