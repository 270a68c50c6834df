"""Pretrain a small transformer from scratch, or take pretrained weights."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    corpus: Annotated[Path, typer.Option(help="Documents to pretrain on.")],
    world: Annotated[Path, typer.Option(help="Folder with the closed vocabulary, if the source has one.")],
    out: Annotated[Path, typer.Option(help="Where the base model goes.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Make the model that SFT starts from: all tokens of the corpus are predicted."""
    launch.on_all_devices()
    with frame.stage("base", [corpus], run_file, [world, Path("data/own")]) as run:
        import torch

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import forward, models, text
        from rlhf_vs_dpo.language.logprobs import Policy, check_projection
        from rlhf_vs_dpo.run.progress import Record
        from rlhf_vs_dpo.training import supervised

        settings = run.section("base")
        torch.manual_seed(run.section("seed"))
        train = tables.read_table(corpus, "corpus", "train")
        heldout = tables.read_table(corpus, "corpus", "validation")
        if settings.pretrained is not None:
            model, tokenizer = models.pretrained(settings)
        else:
            words = json.loads((world / "words.json").read_text())
            tokenizer = (
                text.word_tokenizer(words)
                if words
                else text.bpe_tokenizer(list(train["text"]), settings.scratch.bpe_vocabulary)
            )
            model = models.from_scratch(settings.scratch, tokenizer)
        models.to_learn(model, None, run.section("memory"))
        # Perplexity is of the model itself; every later log-probability is of the policy, at the sampling temperature.
        policy = Policy(model, temperature=1.0).to(models.device())
        most = run.params["data"]["max_document_tokens"]
        examples = text.Examples(text.documents(tokenizer, train["text"], policy.context, most), list(train["doc_id"]))
        check_projection(policy, text.collate(examples.tokens[:2], policy.pad).to(models.device()))
        run.checkpoint.keep(policy=policy)
        trained = supervised.likelihood(
            policy, examples, settings.training, run.section("seed"), Record(run.log, "base", checkpoint=run.checkpoint)
        )
        run.spent(parameters=models.size(policy.model), tokens_trained=trained, models_held=1)
        if launch.is_main():
            held = text.documents(tokenizer, heldout["text"], policy.context, most)
            logp = sum(forward.log_likelihoods(policy, held, "held-out corpus"))
            tokens = sum(len(example.response) for example in held)
            models.save(policy.model, tokenizer, out)
            run.curve(curves)
            parameters = sum(p.numel() for p in policy.model.parameters())
            run.finish(
                {"nll_per_token": -logp / tokens, "parameters": parameters, "vocabulary": len(tokenizer)},
                metrics,
                settings.training.steps,
            )


if __name__ == "__main__":
    launch.command(main)
