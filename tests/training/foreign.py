"""Tiny models of the transformers library with seeded random weights, saved as their folders are."""

import json

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = 96
PAD, UNK, BOS, EOS, CLS, SEP = range(WORDS - 6, WORDS)
"""The last ids, so that none is right by chance."""
SPECIAL = {"pad": PAD, "unk": UNK, "bos": BOS, "eos": EOS, "cls": CLS, "sep": SEP}
_SIZE = {"vocab_size": WORDS, "max_position_embeddings": 48}
_BERT = {
    **_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "pad_token_id": PAD,
}
_DISTILBERT = {**_SIZE, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "pad_token_id": PAD}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "bos_token_id": BOS, "eos_token_id": EOS, "attention_dropout": 0.0}
_MARIAN = {
    **_SIZE,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "scale_embedding": True,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
    "eos_token_id": EOS,
    "forced_eos_token_id": None,
}
_SENTIMENTS = {"id2label": {0: "NEGATIVE", 1: "Neutral", 2: "positive"}}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}

KINDS = {
    "llama": ("LlamaForCausalLM", {**_LLAMA, **_ROPE, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": False, "attention_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "num_key_value_heads": 4, "sliding_window": 48}),
    "marian": ("MarianMTModel", {**_MARIAN, "activation_function": "swish"}),
    "marian-relu": ("MarianMTModel", {**_MARIAN, "activation_function": "relu"}),
    "bert": ("BertModel", _BERT),
    "bert-sentiment": ("BertForSequenceClassification", {**_BERT, **_SENTIMENTS}),
    "bert-answer": ("BertForQuestionAnswering", _BERT),
    "distilbert": ("DistilBertModel", _DISTILBERT),
    "distilbert-sentiment": ("DistilBertForSequenceClassification", {**_DISTILBERT, **_SENTIMENTS}),
    "distilbert-answer": ("DistilBertForQuestionAnswering", _DISTILBERT),
}
WRITERS = ("llama", "llama-untied", "qwen2", "mistral", "marian", "marian-relu")


def make(kind, **changes):
    """A model whose texts vary and depend on what it read."""
    name, config = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**{**config, **changes})).eval()
    if kind.startswith("marian"):
        # As its makers save it: the id that a text starts with is never written.
        model.generation_config.bad_words_ids = [[PAD]]
        model.final_logits_bias.normal_(0.0, 0.1)
    marian = kind.startswith("marian")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" in name:
                continue  # sinusoids, which a checkpoint need not hold
            if name == "model.decoder.layers.1.final_layer_norm.weight":
                weight.normal_()  # random signs before a tied output keep a text from repeating its last word
            elif weight.ndim == 1:
                weight.normal_(float("norm" in name.lower() and name.endswith("weight")), 0.1)
            elif "embed" in name or "shared" in name:
                weight.normal_(0.0, 0.4 if marian else 0.6)
            elif marian:
                # What a text owes to its source must not drown its own words.
                weight.normal_(0.0, 0.05 if "attn.out_proj" in name else 0.2)
            else:
                weight.normal_(0.0, 0.25)
    return model


def word_tokenizer():
    """Knows the words ``w0``, ``w1``, ... by their ids; wraps a text as encoders want it."""
    words = {f"w{number}": number for number in range(PAD)}
    tokenizer = Tokenizer(models.WordLevel({**words, **{f"<{name}>": n for name, n in SPECIAL.items()}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([f"<{name}>" for name in SPECIAL])
    return tokenizer


def save(folder, kind, **changes):
    """Write the folder of a model as transformers does, with a tokenizer; returns the model."""
    model = make(kind, **changes)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    frames = {"bert": "<cls> $A <sep>", "marian": "$A <eos>"}
    frame = next((frame for stem, frame in frames.items() if stem in kind), "<bos> $A")
    tokenizer.post_processor = processors.TemplateProcessing(
        frame, special_tokens=[(f"<{n}>", i) for n, i in SPECIAL.items()]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad", "unk", "cls", "sep") if "bert" in kind else ("pad", "unk", "bos", "eos")
    document = {f"{name}_token": f"<{name}>" for name in names}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    return model
