"""Tiny models of every architecture with seeded random weights: complete artefact folders, no download.

The weights are made large enough that different inputs give clearly different outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from models.config import TransformerConfig
from models.graph import Scheme, write_graphs
from models.manifest import GenerationDefaults, Manifest, Quantisation, SpecialIds, Task, write_manifest
from models.transformer import Transformer

Kind = Literal["classify", "span", "bert-span", "decoder", "encoder-decoder", "prefix-lm", "bert-prefix-lm"]

PAD, UNK, BOS, EOS, CLS, SEP = range(6)
SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>", "<cls>", "<sep>"]
LABELS = ("negative", "neutral", "positive")
SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A wattle tree blooms yellow in August, and bees visit it all day long.",
    "How many joules does an answer cost? Nobody knows until somebody measures it.",
    "Ein kleiner Hund läuft schnell über die grüne Wiese und bellt laut.",
    "I love this film, but the ending was terrible; what a waste of time!",
    "Energy is what a meter counts; power is how fast it counts.",
)
TASKS: dict[Kind, Task] = {
    "classify": "sentiment",
    "span": "answer",
    "bert-span": "answer",
    "decoder": "generate",
    "encoder-decoder": "translate",
    "prefix-lm": "summarize",
    "bert-prefix-lm": "summarize",
}
KINDS = tuple(TASKS)
WRITERS: tuple[Kind, ...] = ("decoder", "encoder-decoder", "prefix-lm", "bert-prefix-lm")


def tiny_config(kind: Kind, vocab_size: int = 128, max_positions: int = 64) -> TransformerConfig:
    """Two layers of width 32."""
    bert = kind.startswith("bert-")
    shape = dict(d_model=32, n_heads=2, d_ff=64, vocab_size=vocab_size, max_positions=max_positions)
    style = dict(style="bert", n_token_types=2, norm_eps=1e-12) if bert else dict(style="modern")
    rest: dict[str, dict[str, object]] = {
        "classify": dict(architecture="encoder", head="classify", n_labels=len(LABELS), n_encoder_layers=2)
        | dict(vector_layers=(1, 2)),
        "span": dict(architecture="encoder", head="span", n_encoder_layers=2),
        "decoder": dict(architecture="decoder", head="lm", n_decoder_layers=2),
        "encoder-decoder": dict(architecture="encoder-decoder", head="lm", n_encoder_layers=2, n_decoder_layers=2),
        "prefix-lm": dict(architecture="prefix-lm", head="lm", n_decoder_layers=2, extract_head=True),
    }
    return TransformerConfig.model_validate({**shape, **style, **rest[kind.removeprefix("bert-")]})


def tiny_transformer(config: TransformerConfig, seed: int = 0) -> Transformer:
    """The PyTorch model with random weights of sizes that make its greedy texts varied and depend on its input.

    Fresh weights would not do: their branches start as zero. Sharp attention (a large ``q_norm``) keeps inputs apart,
    and random signs before the tied output keep a text from repeating its last word for ever.
    """
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "decoder_norm.weight":
                weight.normal_(0.0, 1.0)
            elif weight.ndim == 1:
                mean = 4.0 if name.endswith("q_norm.weight") else float(name.endswith("norm.weight"))
                weight.normal_(mean, 0.1)
            else:
                weight.normal_(0.0, 0.1 if name.startswith("embed.") else 0.2)
    return model


def weights_of(model: Transformer) -> Mapping[str, NDArray[np.float32]]:
    """The state dict as float32 arrays."""
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def tiny_tokenizer(max_vocabulary: int = 128) -> Tokenizer:
    """A Unigram tokenizer of the words of ``SENTENCES`` and their letters; the special tokens are ids 0 to 5.

    Made, not trained: the library's trainers break ties by chance, and give other words every time.
    """
    words = [f"\u2581{word}" for sentence in SENTENCES for word in sentence.split()]
    pieces = _pieces(words, max_vocabulary)
    # A word is likelier than the same in letters, of which each counts.
    scored = [(piece, 0.0 if piece in SPECIAL_TOKENS else -4.0 - 0.1 * (len(piece) < 2)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, SPECIAL_TOKENS.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _pieces(words: list[str], most: int) -> list[str]:
    """The special tokens, every letter of the words, and as many whole words as there is room for."""
    letters = sorted({letter for word in words for letter in word})
    whole = sorted({word for word in words if len(word) > 1})
    return [*SPECIAL_TOKENS, *letters, *whole][:most]


def bert_tokenizer(max_vocabulary: int = 128) -> Tokenizer:
    """A WordPiece tokenizer that wraps its input as BERT does: ``[CLS] a [SEP]`` and ``[CLS] a [SEP] b [SEP]``."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = [
        word for sentence in SENTENCES for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence))
    ]
    letters = sorted({f"##{letter}" for word in words for letter in word[1:]})
    pieces = _pieces(words, max_vocabulary - len(letters))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *letters])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[("<cls>", CLS), ("<sep>", SEP)],
    )
    return tokenizer


def write_tiny(
    folder: Path,
    kind: Kind,
    *,
    name: str | None = None,
    scheme: Scheme = "none",
    bits: Literal[4, 8] = 8,
    block_size: int = 32,
    max_positions: int = 64,
    chat_template: str | None = None,
    seed: int = 0,
) -> Manifest:
    """Write a complete artefact of ``kind`` into ``folder`` (made if absent) and return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bert_tokenizer() if kind.startswith("bert-") else tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(f"# A tiny {kind} model with random weights, for tests\n")
    config = tiny_config(kind, vocab_size=tokenizer.get_vocab_size(), max_positions=max_positions)
    write_graphs(folder, config, weights_of(tiny_transformer(config, seed)), scheme, bits, block_size)
    bits_stored = {"none": 32, "float16": 16, "rowwise": 8, "blockwise": bits}[scheme]
    stored = Quantisation(scheme=scheme, bits=bits_stored, block_size=block_size if scheme == "blockwise" else 0)
    writes = kind in WRITERS
    return write_manifest(
        folder,
        Manifest(
            name=name or f"tiny-{kind}",
            revision="1",
            description=f"A tiny {kind} model with random weights.",
            tasks=(TASKS[kind],),
            languages=("en", "de") if TASKS[kind] == "translate" else ("en",),
            config=config,
            max_input_tokens=max_positions - 16 if writes else max_positions,
            max_output_tokens=16 if writes else 0,
            special_ids=SpecialIds(pad=PAD, unk=UNK, bos=BOS, eos=EOS, cls=CLS, sep=SEP),
            labels=LABELS if kind == "classify" else (),
            generation=GenerationDefaults(max_tokens=16) if writes else None,
            chat_template=chat_template,
            quantisation=stored,
        ),
    )


@dataclass(frozen=True)
class Loaded:
    """A model's folder as the engine takes it."""

    manifest: Manifest
    folder: Path


def load_tiny(root: Path, kind: Kind, name: str | None = None, scheme: Scheme = "none") -> Loaded:
    """Write a complete artefact into a folder of ``root`` with its name, which is its kind unless told."""
    folder = root / (name or kind)
    return Loaded(write_tiny(folder, kind, name=folder.name, scheme=scheme), folder)
