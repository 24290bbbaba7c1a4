"""What each task teaches: the labels, checked by hand."""

import pytest
import torch

from models.transformer import Transformer
from tests.tiny import tiny_transformer
from tests.training import recipes
from training.tasks import (
    IGNORED,
    TASKS,
    Answer,
    Generate,
    Sample,
    Sentiment,
    Summarize,
    Translate,
    collate,
    mean_loss,
)
from training.tokenizer import learn_byte_bpe, prune_word_pieces
from training.trunk import trunk_tokenizer


@pytest.fixture
def pieces(trunk_package):
    return prune_word_pieces(
        trunk_tokenizer(trunk_package[1]), ["the river rises a day and the rain fell"], 250, mask_handles=False
    )[0]


@pytest.fixture
def bytes_pair():
    return learn_byte_bpe(["one two three eins zwei drei"], 280, end_every_text=True, chat=True)


def test_collate_pads_on_the_right():
    batch = collate([Sample([1, 2], labels=[5]), Sample([3], labels=[6])], pad_id=9)
    assert batch["ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["lengths"].tolist() == [2, 1]
    assert batch["labels"].tolist() == [[5], [6]]
    assert "types" not in batch
    assert "target" not in batch


def test_an_answer_is_the_tokens_that_cover_it(pieces):
    context = "the river rises in a day"
    row = {"context": context, "question": "where", "answers": [{"text": "rises", "start": 10}]}
    (sample,) = Answer(recipes.answer(), pieces).samples(row)
    start, end = sample.labels
    assert [pieces.id_to_token(token) for token in sample.ids[start : end + 1]] == ["rises"]
    first = sample.types.index(1)
    assert pieces.decode(sample.ids[first:-1]) == context
    assert sample.ids[first - 1] == sample.ids[-1] == pieces.token_to_id("[SEP]")


def test_a_long_context_gives_the_window_with_the_answer(pieces):
    context = "a " * 60 + "river"
    row = {"context": context, "question": "is it", "answers": [{"text": "river", "start": 120}]}
    task = Answer(recipes.answer(), pieces)
    (sample,) = task.samples(row)
    assert pieces.id_to_token(sample.ids[sample.labels[0]]) == "river"
    assert len(sample.ids) <= 48
    unanswerable = list(task.samples({**row, "answers": []}))
    assert len(unanswerable) == 2
    assert all(sample.labels == [0, 0] for sample in unanswerable)


def test_a_long_text_keeps_its_end_mark(pieces):
    (sample,) = Sentiment(recipes.sentiment(), pieces).samples({"text": "a " * 100, "label": "neutral"})
    assert len(sample.ids) == 48
    assert sample.ids[-1] == pieces.token_to_id("[SEP]")
    assert sample.labels == [1]


def test_rare_labels_weigh_more(pieces):
    torch.manual_seed(0)
    recipe = recipes.sentiment()
    task = Sentiment(recipe, pieces)
    rows = [{"text": "a", "label": label} for label in ["negative"] * 8 + ["neutral", "positive"]]
    samples = [sample for row in rows for sample in task.samples(row)]
    model = Transformer(recipe.model).eval()
    batch = collate(samples, 0)
    logits = model.label_logits(model.encode(batch["ids"], batch["lengths"]), batch["lengths"])
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 0], reduction="none")
    by_label = torch.stack([losses[:8].mean(), losses[8], losses[9]]).mean()
    assert torch.allclose(mean_loss(task, model, batch), by_label, atol=1e-5)


def test_a_translation_begins_and_ends(bytes_pair):
    (sample,) = Translate(recipes.translate(), bytes_pair).samples({"source": "one two", "target": "eins zwei"})
    assert sample.ids[-1] == 2
    assert (sample.target[0], sample.target[-1]) == (1, 2)
    assert bytes_pair.decode(sample.target[1:-1]) == "eins zwei"
    assert list(Translate(recipes.translate(), bytes_pair).samples({"source": "one", "target": ""})) == []


def test_a_summary_is_written_after_its_document(pieces):
    task = Summarize(recipes.summarize(), pieces)
    (sample,) = task.samples({"document": "the river rises", "summary": "it rises"})
    sep = pieces.token_to_id("[SEP]")
    assert sample.ids[sample.prefix - 1] == sep
    written = [label for label in sample.labels if label != IGNORED]
    assert pieces.decode(written[:-1]) == "it rises"
    assert written[-1] == sep
    assert sample.labels.index(written[0]) == sample.prefix - 1, "the prefix's last token writes the first word"
    assert sample.types == [0] * sample.prefix + [1] * (len(sample.ids) - sample.prefix)
    (long,) = task.samples({"document": "a " * 90, "summary": "it rises"})
    assert len(long.ids) <= 48
    assert long.ids[long.prefix - 1] == sep


def test_sentences_of_the_summary_are_marked(pieces):
    row = {"document": "The river rises. It is a day. The rain fell.", "summary": "It is a day.", "extractive": True}
    (sample,) = Summarize(recipes.summarize(), pieces).samples(row)
    marked = [(pieces.id_to_token(sample.ids[n]), label) for n, label in enumerate(sample.labels) if label != IGNORED]
    assert marked == [("the", 0), ("i", 1), ("the", 0)]
    assert sample.extract


def test_texts_are_packed_end_to_end():
    tokenizer = learn_byte_bpe(["some text of some length"], 280, end_every_text=False, chat=True)
    task = Generate(recipes.generate(), tokenizer)
    blocks = [sample for n in range(8) for sample in task.samples({"text": f"text number {n}"})]
    assert all(len(block.ids) == len(block.labels) == 16 for block in blocks)
    stream = [token for block in blocks for token in block.ids]
    assert [token for block in blocks for token in block.labels] == [*stream[1:], blocks[-1].labels[-1]]
    assert 2 in stream, "texts are parted by the end mark"


def test_a_chat_ends_with_the_assistant():
    tokenizer = learn_byte_bpe(["Hello, how are you?"], 280, end_every_text=False, chat=True)
    task = Generate(recipes.generate(max_tokens=1), tokenizer)
    row = {"prompt": "Hello .\nHi !\nHow ' s it ?", "response": "Fine ."}
    samples = list(task.samples(row))
    text = tokenizer.decode([sample.ids[0] for sample in samples] + samples[-1].labels, skip_special_tokens=False)
    assert text == "<|user|>Hello.</s><|assistant|>Hi!</s><|user|>How's it?</s><|assistant|>Fine.</s>"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_recipe_for_tests(name):
    assert getattr(recipes, name)().task == name


ROWS = {
    "sentiment": [
        {"text": "the river " * n, "label": label} for n, label in enumerate(["neutral", "positive"] * 3, 1)
    ],
    "answer": [
        {"context": "the river rises in a day", "question": "where " * n, "answers": [{"text": "rises", "start": 10}]}
        for n in range(1, 7)
    ],
    "translate": [{"source": "one " * n, "target": "zwei " * (7 - n)} for n in range(1, 7)],
    "summarize": [
        {"document": "The river rises. " * n, "summary": "The rain fell. " * n, "extractive": n > 4}
        for n in range(1, 7)
    ],
    "generate": [{"text": "one two three " * 9}] * 3,
}


def gradients(task, model, parts):
    """Of one step over all parts together, as the loop computes it."""
    counts = [sum(each) for each in zip(*(task.count(part) for part in parts), strict=True)]
    model.zero_grad()
    for part in parts:
        sums = task.loss(model, part)
        sum(total / (count or 1) for total, count in zip(sums, counts, strict=True)).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_in_parts_is_the_same_batch(name, pieces, bytes_pair):
    torch.manual_seed(0)
    recipe = getattr(recipes, name)()
    tokenizer = bytes_pair if recipe.tokenizer.kind == "byte-bpe" else pieces
    task = TASKS[name](recipe, tokenizer)
    samples = [sample for row in ROWS[name] for sample in task.samples(row)]
    model = tiny_transformer(recipe.model).train()
    whole = gradients(task, model, [collate(samples, 0)])
    # The parts differ in size, in length and in what they hold: of summaries, only the last marks sentences.
    parts = [collate(samples[start:end], 0) for start, end in [(0, 1), (1, 4), (4, len(samples))]]
    in_parts = gradients(task, model, parts)
    for weight, grad in whole.items():
        assert torch.allclose(in_parts[weight], grad, rtol=1e-5, atol=1e-5), weight
    # Every part of the model takes part in every batch: all devices wait for the same gradients.
    assert all(grad is not None for grad in gradients(task, model, parts[:1]).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TASKS)
def test_a_gpu_computes_the_same_loss(name, pieces, bytes_pair):
    recipe = getattr(recipes, name)()
    tokenizer = bytes_pair if recipe.tokenizer.kind == "byte-bpe" else pieces
    task = TASKS[name](recipe, tokenizer)
    batch = collate([sample for row in ROWS[name] for sample in task.samples(row)], 0)
    model = tiny_transformer(recipe.model)
    here = mean_loss(task, model, batch)
    there = mean_loss(task, model.cuda(), {field: tensor.cuda() for field, tensor in batch.items()})
    assert torch.allclose(here, there.cpu(), atol=1e-4)
