"""Few-shot adaptation: nothing that is asked was learnt from, and meta-training moves by the formula."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import TransformerConfig
from models.transformer import Transformer
from training.errors import TrainingError
from training.few_shot import (
    AdaptRecipe,
    Episode,
    MetaRecipe,
    Outcome,
    Problem,
    ProblemRecipe,
    Study,
    adapt,
    draw_episode,
    features,
    fine_tuned_accuracy,
    head_accuracy,
    load_study,
    prototype_logits,
    read_problems,
    reptile_step,
    table,
    train_prototypical,
    train_reptile,
)
from training.recipe import TrunkRecipe
from training.trunk import find_trunk, trunk_tokenizer

CONFIG = TransformerConfig(
    architecture="encoder",
    style="bert",
    head="classify",
    n_labels=2,
    vocab_size=40,
    d_model=16,
    n_heads=2,
    d_ff=32,
    n_encoder_layers=2,
    max_positions=16,
    n_token_types=2,
    vector_layers=(1, 2),
)
PROBLEM = Problem(
    "parity",
    {
        "even": [(2, 10 + 2 * (n % 10), 10 + 2 * (n // 10), 3) for n in range(40)],
        "odd": [(2, 11 + 2 * (n % 10), 11 + 2 * (n // 10), 3) for n in range(40)],
    },
)


def study(**changes) -> Study:
    fields = {
        "trunk": TrunkRecipe(name="tiny", licence="none", package="tiny-trunk"),
        "model": CONFIG,
        "max_tokens": 8,
        "labels": 3,
        "examples": (6,),
        "draws": 2,
        "fine_tuned_draws": 1,
        "meta": MetaRecipe(episodes=3, examples=6, queries=4, steps=2),
        "problems": (
            ProblemRecipe(name="days", path="days", split="train", held_out=False),
            ProblemRecipe(name="nights", path="nights", split="train", held_out=True),
        ),
    }
    return Study.model_validate({**fields, **changes})


@given(seed=st.integers(0, 1000), labels=st.integers(2, 4), examples=st.integers(2, 20), queries=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_no_query_is_an_example_and_labels_come_evenly(seed: int, labels: int, examples: int, queries: int) -> None:
    problem = Problem("p", {f"label {n}": [(n, m) for m in range(20 + n)] for n in range(4)})
    episode = draw_episode(problem, labels, examples, queries, np.random.default_rng(seed))
    asked, learnt = ({ids for ids, _ in part} for part in (episode.queries, episode.examples))
    assert (len(episode.examples), episode.n_labels) == (examples, labels)
    assert len(asked) == len(episode.queries) > 0 and not asked & learnt
    counts = np.bincount([label for _, label in episode.examples], minlength=labels)
    assert counts.max() - counts.min() <= 1
    # A label keeps its number on both sides.
    numbers = {ids[0]: label for ids, label in (*episode.examples, *episode.queries)}
    assert len(numbers) == len(set(numbers.values())) == labels
    again = draw_episode(problem, labels, examples, queries, np.random.default_rng(seed))
    assert again == episode


def test_a_reptile_step_is_the_formula() -> None:
    weights = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
    adapted = {"w": torch.tensor([3.0, 2.0]), "b": torch.tensor([[-0.5]])}
    reptile_step(weights, adapted, 0.25)
    assert weights["w"].tolist() == [1.0 + 0.25 * (3.0 - 1.0), -2.0 + 0.25 * (2.0 - -2.0)]
    assert weights["b"].tolist() == [[0.5 + 0.25 * (-0.5 - 0.5)]]


def test_reptile_moves_a_model_to_where_its_episodes_lead() -> None:
    """With one episode and a whole step, the model becomes what fine-tuning on that episode makes of it."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    by_hand = Transformer(CONFIG)
    by_hand.load_state_dict(model.state_dict())
    ours = study(meta=MetaRecipe(episodes=1, examples=6, queries=4, steps=3, reptile_rate=1.0), labels=2)
    embedding = model.embed.token.weight.clone()
    train_reptile(model, [PROBLEM], ours)
    random = np.random.default_rng(ours.seed)
    random.integers(1)
    episode = draw_episode(PROBLEM, 2, 6, 4, random)
    adapt(by_hand, episode, AdaptRecipe(steps=3), np.random.default_rng(ours.seed))
    for name, weight in model.encoder.state_dict().items():
        torch.testing.assert_close(weight, by_hand.encoder.state_dict()[name])
    assert torch.equal(model.embed.token.weight, embedding)


def test_prototypes_by_hand() -> None:
    examples = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    logits = prototype_logits(examples, torch.tensor([0, 0, 1]), torch.tensor([[1.0, 1.0]]), 2)
    torch.testing.assert_close(logits, torch.tensor([[-10.0 * 1.0, -10.0 * 10.0]]))


def test_prototypical_training_brings_the_labels_apart() -> None:
    torch.manual_seed(1)
    model = Transformer(CONFIG)
    rate = MetaRecipe(episodes=25, examples=8, queries=16, prototypical_rate=3e-3)

    def loss() -> float:
        """Of unseen queries under the prototypes, over a few draws."""
        total = 0.0
        for seed in range(5):
            episode = draw_episode(PROBLEM, 2, 8, 30, np.random.default_rng((9, seed)))
            found = torch.from_numpy(features(model, [ids for ids, _ in (*episode.examples, *episode.queries)]))
            labels = torch.tensor([label for _, label in (*episode.examples, *episode.queries)])
            logits = prototype_logits(found[:8], labels[:8], found[8:], 2)
            total += float(torch.nn.functional.cross_entropy(logits, labels[8:]))
        return total

    before = loss()
    train_prototypical(model, [PROBLEM], study(meta=rate, labels=2))
    assert loss() < 0.8 * before


def test_heads_and_fine_tuning_learn_what_is_there_to_learn() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    episode = draw_episode(PROBLEM, 2, 30, 40, np.random.default_rng(0))
    texts = sorted({ids for ids, _ in (*episode.examples, *episode.queries)})
    embedded = dict(zip(texts, features(model, texts), strict=True))
    assert all(head_accuracy(embedded, episode, kind) > 75 for kind in ("mean", "ridge"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    how = AdaptRecipe(steps=80, trunk_rate=1e-3)
    assert fine_tuned_accuracy(model, episode, how, np.random.default_rng(0)) > 75
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    # Labels drawn at random cannot be learnt.
    drawn = np.random.default_rng(1).integers(0, 2, 40).tolist()
    noise = Episode(episode.examples, [(ids, n) for (ids, _), n in zip(episode.queries, drawn, strict=True)], 2)
    assert all(head_accuracy(embedded, noise, kind) < 75 for kind in ("mean", "ridge"))


def write(folder: Path, path: str, rows: list[dict[str, str]]) -> None:
    (folder / path).mkdir(parents=True)
    with gzip.open(folder / path / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_no_text_of_a_held_out_problem_is_trained_on(tmp_path: Path, trunk_package: Path) -> None:
    tokenizer = trunk_tokenizer(find_trunk(TrunkRecipe(name="t", licence="", package="tiny-trunk")))
    words = [word for word in ("happy", "sad", "river", "valley", "awful", "fine") if tokenizer.token_to_id(word)]
    shared = [{"text": f"{a} {b} day", "label": a} for a in words[:2] for b in words]
    own = [{"text": f"the {a} {b}", "label": a} for a in words[:2] for b in words]
    write(tmp_path, "days", [*shared, *own])
    write(tmp_path, "nights", shared)
    ((trained_on,), (held_out,)) = read_problems(study(), tmp_path, tokenizer)
    learnt, secret = ({text for texts in each.texts.values() for text in texts} for each in (trained_on, held_out))
    assert learnt and secret and not learnt & secret
    assert len(secret) == len(shared)


def test_books_are_told_apart_by_title_and_divided(tmp_path: Path, trunk_package: Path) -> None:
    tokenizer = trunk_tokenizer(find_trunk(TrunkRecipe(name="t", licence="", package="tiny-trunk")))
    rows = []
    for title in "ABCD":
        paragraphs = "\n\n".join(f"the {'day ' * n}{'river ' * (ord(title) - 60)}" + "a " * 100 for n in range(8))
        rows += [{"text": f"# Title: {title}\n\n## Author: X\n\n{paragraphs}"}]
    write(tmp_path, "books", rows)
    book = {"path": "books", "split": "train", "by": "title"}
    problems = (
        ProblemRecipe(name="even", held_out=False, part="even", **book),
        ProblemRecipe(name="odd", held_out=True, part="odd", **book),
    )
    ((trained_on,), (held_out,)) = read_problems(study(problems=problems, max_tokens=32), tmp_path, tokenizer)
    assert (set(trained_on.texts), set(held_out.texts)) == ({"A", "C"}, {"B", "D"})
    assert all(len(texts) == 8 for texts in held_out.texts.values())


def test_a_problem_with_too_few_texts_is_named(tmp_path: Path, trunk_package: Path) -> None:
    tokenizer = trunk_tokenizer(find_trunk(TrunkRecipe(name="t", licence="", package="tiny-trunk")))
    write(tmp_path, "days", [{"text": "a fine day", "label": "a"}])
    write(tmp_path, "nights", [{"text": "a sad day", "label": "a"}])
    with pytest.raises(TrainingError, match="nights: two labels"):
        read_problems(study(), tmp_path, tokenizer)


def test_the_shipped_study_is_one_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    assert load_study("few-shot").examples == (8, 16, 32, 64)
    with pytest.raises(TrainingError, match=r"nowhere\.toml"):
        load_study("nowhere.toml")
    (tmp_path / "wrong.toml").write_text("draws = 'many'")
    with pytest.raises(TrainingError, match="draws"):
        load_study(str(tmp_path / "wrong.toml"))


def test_the_table_says_how_sure_it_is() -> None:
    outcomes = [Outcome("ridge", "p", 8, [50.0, 60.0]), Outcome("ridge", "p", 16, [70.0, 70.0])]
    assert outcomes[0].interval == pytest.approx(1.96 * math.sqrt(50) / math.sqrt(2))
    lines = table(outcomes).splitlines()
    assert "at 8, 16 examples" in lines[0]
    assert "55.0 ± 9.8" in lines[1] and "(2 draws)" in lines[1]
    assert math.isnan(Outcome("ridge", "p", 8, [50.0]).interval)
