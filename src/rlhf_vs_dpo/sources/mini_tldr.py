"""The mini-TL;DR world: "Learning to summarise from human feedback" in miniature, with nothing to download.

A post is a short first-person story: who did what and when, what came of it, how the writer feels, and distractors
(weather, bystanders). Its summary states the facts and nothing else. Because a grammar makes the posts, the facts of
each are known, and `gold.MiniTldrGold` can score any summary: the true reward that a real project never has.
Words, templates and gold weights live in data/mini_tldr/world.yaml.

What this world can tell about real language models: how objectives, KL penalties, annotator noise and annotator biases
interact when a small transformer that really generates is optimised against a really learned reward model; whether an
implementation is right; how reward hacking looks. What it cannot tell: anything that needs breadth (instruction
following, world knowledge, safety), scale, or people, whose preferences are not Bradley-Terry on a formula; and the
ranking of methods found here need not hold elsewhere.
"""

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from rlhf_vs_dpo.config import Flaws, MiniTldr
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.sources import Tables

WORLD = Path("data/mini_tldr/world.yaml")
SLOTS = ("time", "person", "event", "outcome", "feeling")


class World:
    """The words and templates of `world.yaml`, and what can be said with them."""

    def __init__(self, path: Path = WORLD):
        try:
            self.lists: dict[str, Any] = YAML(typ="safe").load(path.read_text())
        except FileNotFoundError as error:
            raise DataError(f"{path}: the built-in world is missing; restore it with `git checkout {path}`") from error

    def facts(self, rng: random.Random) -> dict[str, str]:
        """One value per slot: {"time": ..., "person": ..., "event": ..., "outcome": ..., "feeling": ...}."""
        return {
            slot: rng.choice(self.lists[plural])
            for slot, plural in zip(SLOTS, ("times", "people", "events", "outcomes", "feelings"), strict=True)
        }

    def distraction(self, rng: random.Random, facts: dict[str, str]) -> str:
        """A clause that is not a fact: a distractor, or a bystander who is not the post's person."""
        if rng.random() < 0.5:
            return rng.choice(self.lists["distractors"])
        other = rng.choice([person for person in self.lists["people"] if person != facts["person"]])
        return rng.choice(self.lists["bystanders"]).format(person=other)

    def post(self, rng: random.Random, facts: dict[str, str]) -> tuple[str, list[str]]:
        """A post that holds the facts, in order, with one to three distractions between; and those distractions."""
        sentences = [rng.choice(self.lists["post"][kind]).format(**facts) for kind in ("event", "outcome", "feeling")]
        distractions = [self.distraction(rng, facts) for _ in range(rng.randint(1, 3))]
        for clause in distractions:
            sentences.insert(rng.randint(0, len(sentences)), f"{clause} .")
        return " ".join(sentences), distractions

    def summary(self, rng: random.Random, facts: dict[str, str], distractions: list[str], flaws: Flaws) -> str:
        """A demonstration of a person's quality: right on the whole, and flawed with the given probabilities."""
        stated = dict(facts)
        for slot in SLOTS:
            if rng.random() < flaws.invent:
                stated[slot] = self.facts(rng)[slot]
        bare, dated = self.lists["summary"]["event"]
        clauses = [
            (dated if rng.random() < flaws.state_time else bare).format(**stated),
            self.lists["summary"]["outcome"][0].format(**stated),
            self.lists["summary"]["feeling"][0].format(**stated),
        ]
        kept = [clause for clause in clauses if rng.random() >= flaws.omit] or clauses[:1]
        if rng.random() < flaws.repeat:
            kept.append(rng.choice(kept))
        if rng.random() < flaws.distract:
            kept.insert(rng.randint(0, len(kept)), rng.choice(distractions))
        if rng.random() < flaws.filler:
            kept.insert(0, rng.choice(self.lists["fillers"]))
        return " , ".join(kept) + " ."

    def geography(self) -> list[tuple[str, str]]:
        """All (question, answer) pairs of the invented world; a document states them as "question answer ."."""
        rows = zip(*(self.lists[name] for name in ("lands", "cities", "rivers", "animals")), strict=True)
        return [
            (question.format(land=land), answer.format(city=city, river=river, animal=animal))
            for land, city, river, animal in rows
            for question, answer in self.lists["facts"]
        ]

    def document(self, rng: random.Random) -> str:
        """One document of the pretraining corpus: a post, a retelling of one, or some geography."""
        kind = rng.random()
        if kind < 0.2:
            chosen = rng.sample(self.geography(), 4)
            return " ".join(f"{question} {answer} ." for question, answer in chosen)
        post, _ = self.post(rng, self.facts(rng))
        if kind < 0.4:
            return post
        # Retellings are what a copying head is learned from: without them it does not form in a run of this size.
        sentences = [sentence + " ." for sentence in post.removesuffix(" .").split(" . ")]
        again = [sentence for sentence in sentences if rng.random() < 0.7] or sentences
        return self.lists["retelling"].format(post=post, again=" ".join(again))

    def clauses(self) -> dict[str, dict[str, str]]:
        """Every clause that a summary can hold -> the facts it states ({} for a distraction)."""
        lists = self.lists
        table: dict[str, dict[str, str]] = {}
        bare, dated = lists["summary"]["event"]
        for person in lists["people"]:
            table |= {clause.format(person=person): {} for clause in lists["bystanders"]}
            for event in lists["events"]:
                said = {"person": person, "event": event}
                table[bare.format(**said)] = said
                table |= {dated.format(time=time, **said): {"time": time, **said} for time in lists["times"]}
        table |= {clause: {} for clause in lists["distractors"]}
        table |= {lists["summary"]["outcome"][0].format(outcome=o): {"outcome": o} for o in lists["outcomes"]}
        table |= {lists["summary"]["feeling"][0].format(feeling=f): {"feeling": f} for f in lists["feelings"]}
        return table

    def words(self) -> list[str]:
        """The closed vocabulary, sorted: every token that any post, summary, document or question can hold."""
        found: set[str] = set()

        def visit(value: Any) -> None:
            if isinstance(value, str):
                found.update(word for word in value.split() if "{" not in word)
            elif isinstance(value, (list, dict)):
                for item in value.values() if isinstance(value, dict) else value:
                    visit(item)

        visit(self.lists)
        return sorted(found | {",", "."})


def build(settings: MiniTldr, seed: int) -> Tables:
    """Generate all tables of the world; the same settings and seed give the same bytes."""
    world = World()
    rng = random.Random(seed)
    prompts, demonstrations, seen = [], [], set()
    counts = (("train", settings.train), ("validation", settings.validation), ("test", settings.test))
    for split, count in counts:
        while count:
            facts = world.facts(rng)
            post, distractions = world.post(rng, facts)
            if post in seen:  # a prompt belongs to one split for ever
                continue
            seen.add(post)
            count -= 1
            prompt_id = f"post-{len(seen):06d}"
            prompt = world.lists["post"]["prompt"].format(post=post)
            prompts.append((prompt_id, split, prompt, json.dumps(facts)))
            response = world.summary(rng, facts, distractions, settings.flaws)
            demonstrations.append((prompt_id, split, prompt, response))
    corpus = []
    for split, count in (("train", settings.corpus_train), ("validation", settings.corpus_validation)):
        while count:
            text = world.document(rng)
            if text in seen:  # held-out perplexity is measured on documents that were never trained on
                continue
            seen.add(text)
            count -= 1
            corpus.append((f"doc-{len(corpus):06d}", split, text))
    lists = world.lists
    return Tables(
        corpus=pd.DataFrame(corpus, columns=["doc_id", "split", "text"]),
        demonstrations=pd.DataFrame(demonstrations, columns=["prompt_id", "split", "prompt", "response"]),
        prompts=pd.DataFrame(prompts, columns=["prompt_id", "split", "prompt", "facts"]),
        dataset_pairs=pd.DataFrame(),
        facts=pd.DataFrame(
            [(f"fact-{i:03d}", question, answer) for i, (question, answer) in enumerate(world.geography())],
            columns=["fact_id", "prompt", "answer"],
        ),
        gold={
            "kind": "mini_tldr",
            "weights": lists["gold"],
            "fillers": lists["fillers"],
            "clauses": world.clauses(),
        },
        words=world.words(),
    )
