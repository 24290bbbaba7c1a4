"""Writing as plainly as it can be said: PyTorch, one text at a time, everything recomputed at each step."""

import torch

from models.transformer import Transformer
from service.engine.sampling import repeating_tokens
from service.engine.types import Sampling


@torch.no_grad()
def next_log_probabilities(model: Transformer, source: list[int], text: list[int], bos: int) -> torch.Tensor:
    """Of every word ``(words,)`` after ``text``, written from ``source``."""
    lengths = torch.tensor([len(source)])
    if model.config.architecture == "encoder-decoder":
        memory = model.encode(torch.tensor([source]), lengths)
        hidden = model.decode(torch.tensor([[bos, *text]]), memory=memory, memory_lengths=lengths)
    elif model.config.architecture == "prefix-lm":
        types = torch.tensor([[0] * len(source) + [1] * len(text)]) if model.config.n_token_types else None
        hidden = model.decode(torch.tensor([[*source, *text]]), prefix_lengths=lengths, token_types=types)
    else:
        hidden = model.decode(torch.tensor([[*source, *text]]))
    return torch.log_softmax(model.word_logits(hidden[0, -1]), -1)


def greedy(model: Transformer, source: list[int], sampling: Sampling, bos: int, eos: int) -> tuple[list[int], str]:
    """The likeliest word, again and again."""
    text: list[int] = []
    while len(text) < sampling.max_tokens:
        scores = next_log_probabilities(model, source, text, bos)
        scores[repeating_tokens(text, sampling.no_repeat_ngram)] = -torch.inf
        word = int(scores.argmax())
        if word == eos:
            return text, "stop"
        text.append(word)
    return text, "length"


def beam_search(
    model: Transformer, source: list[int], sampling: Sampling, bos: int, eos: int
) -> tuple[list[int], str]:
    """The best finished text of ``sampling.beams`` that are kept at each step."""
    living: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int], str]] = []
    for length in range(1, sampling.max_tokens + 1):
        candidates = []
        for score, text in living:
            after = next_log_probabilities(model, source, text, bos)
            after[repeating_tokens(text, sampling.no_repeat_ngram)] = -torch.inf
            candidates += [(score + float(after[word]), text, word) for word in range(len(after))]
        candidates.sort(key=lambda candidate: -candidate[0])
        living = []
        for rank, (score, text, word) in enumerate(candidates[: 2 * sampling.beams]):
            if word != eos and len(living) < sampling.beams:
                living.append((score, [*text, word]))
            elif word == eos and rank < sampling.beams:
                finished.append((score / length**sampling.length_penalty, text, "stop"))
        finished = sorted(finished, key=lambda each: -each[0])[: sampling.beams]
        enough = len(finished) == sampling.beams
        if enough and finished[-1][0] >= living[0][0] / length**sampling.length_penalty:
            break
    else:
        finished += [(score / length**sampling.length_penalty, text, "length") for score, text in living]
    _, text, reason = max(finished, key=lambda each: each[0])
    return text, reason
