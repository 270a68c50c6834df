"""Sample a policy on held-out prompts, and see what it has forgotten: blind to the method that made it."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    seed: Annotated[int, typer.Option(help="Line that this is of: the seed of all that is random here.")],
    policy: Annotated[Path, typer.Option(help="Policy to sample from.")],
    sft: Annotated[Path, typer.Option(help="The reference policy.")],
    reward: Annotated[Path, typer.Option(help="Reward model.")],
    prompts: Annotated[Path, typer.Option(help="Prompts; those of test are used.")],
    corpus: Annotated[Path, typer.Option(help="Documents; those of validation are used.")],
    facts: Annotated[Path, typer.Option(help="Questions with one right answer.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the samples go.")],
    retention: Annotated[Path, typer.Option(help="Where log-probabilities of corpus and facts go.")],
    heldout: Annotated[Path | None, typer.Option(help="Samples taken while this policy trained, to be scored.")] = None,
    watched: Annotated[Path | None, typer.Option(help="Where what was measured of them goes.")] = None,
) -> None:
    """Write `samples` with log-probabilities under the policy and pi_ref, RM reward, gold and the annotator's utility; and `retention`."""
    others = [corpus, facts, world, *([heldout] if heldout else [])]
    with frame.stage(
        f"sample@{policy.name}", [policy, sft, reward, prompts], None, others, policy=policy.name, seed=str(seed)
    ) as run:
        import pandas as pd

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import forward, heads, models, text
        from rlhf_vs_dpo.language.generation import decode, generate
        from rlhf_vs_dpo.language.logprobs import Policy
        from rlhf_vs_dpo.preferences import annotator, gold
        from rlhf_vs_dpo.training import forgetting
        from rlhf_vs_dpo.training import watched as watching

        settings, sampling = run.section("sample"), run.section("sampling")
        preferences = run.section("preferences")
        rows = tables.read_table(prompts, "prompts", "test").head(settings.prompts)
        documents = tables.read_table(corpus, "corpus", "validation")
        questions = tables.read_table(facts, "facts")
        model, tokenizer = models.load_policy(policy)
        start, _ = models.load_policy(sft)
        sampled, reference = Policy(model, sampling.temperature), Policy(start, sampling.temperature)
        scorer, judge = heads.load_scorer(reward), gold.load(world)

        each = pd.concat([rows.assign(sample=number) for number in range(settings.per_prompt)], ignore_index=True)
        each = each.sort_values(["prompt_id", "sample"], ignore_index=True)
        plain = text.encode_prompts(tokenizer, list(each["prompt"]))
        # Each policy has random streams of its own, so that wins are those of independent samples.
        streams = [f"{policy.name}/{name}" for name in each["prompt_id"]]
        parts = []
        for suffix in models.prompt_suffixes(model):  # the folder says how it is prompted; mostly by the prompt alone
            asked = text.Prompts(text.encode_prompts(tokenizer, list(each["prompt"]), suffix), streams)
            what = f"{policy.name} {suffix}".strip()
            responses, logp, reference_logp, rewards = (
                run.checkpoint.pieces(f"{name} {suffix}") for name in ("responses", "logp", "reference_logp", "reward")
            )
            drawn = generate(sampled, asked, list(each["sample"]), sampling.max_new_tokens, seed, what, done=responses)
            # The reference and the reward model see the prompt as it is, whatever the policy wants behind it.
            seen = [text.Tokens(prompt, said.response) for prompt, said in zip(plain, drawn.tokens, strict=True)]
            table = each[["prompt_id", "sample"]].assign(
                suffix=suffix,
                response=decode(tokenizer, drawn.tokens),
                tokens=[len(tokens.response) for tokens in drawn.tokens],
                finished=drawn.finished,
                logp=forward.log_likelihoods(sampled, drawn.tokens, "log pi", logp),
                reference_logp=forward.log_likelihoods(reference, seen, "log ref", reference_logp),
                reward=forward.scores(scorer, seen, "reward", rewards),
            )
            table["reward"] = table["reward"].where(table["finished"])
            table = table.join(gold.columns(judge, each["prompt"], each["facts"], table["response"]))
            parts.append(table.assign(utility=annotator.column(table, preferences)))
        table = pd.concat(parts, ignore_index=True)
        kept = forgetting.retention(model, tokenizer, documents, questions, run.params["data"]["max_document_tokens"])
        if heldout is not None:
            scored = watching.scored(tables.read_table(heldout, "heldout"), scorer, preferences)
            tables.write_table(scored, "watched", watched)
        tables.write_table(table, "samples", out)
        tables.write_table(kept, "retention", retention)


if __name__ == "__main__":
    launch.command(main)
