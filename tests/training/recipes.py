"""Recipes of tiny models for the tests."""

from training.recipe import Recipe

MODERN = {"style": "modern", "d_model": 32, "n_heads": 2, "d_ff": 64, "max_positions": 128, "head": "lm"}
FIT = {"epochs": 2, "batch_tokens": 256, "learning_rate": 3e-3, "precision": "float32"}
WRITE = {"max_tokens": 12, "beams": 1}


def recipe(task, model, sets, **changes):
    return Recipe.model_validate(
        {
            "name": f"tiny-{task}",
            "task": task,
            "description": "For the tests.",
            "languages": ["en"],
            "licence": "CC0",
            "max_tokens": 48,
            "model": {"vocab_size": 300, **model},
            "tokenizer": {"kind": "byte-bpe", "vocab_size": 300},
            "data": [{"path": path, "licence": "CC0", "where": "made here", **more} for path, more in sets.items()],
            "fit": FIT,
            "export": {"max_input_tokens": 40, "block_size": 32},
            **changes,
        }
    )


def translate(**changes):
    model = {**MODERN, "architecture": "encoder-decoder", "n_encoder_layers": 1, "n_decoder_layers": 1}
    return recipe(
        "translate",
        model,
        {"translation/numbers": {}},
        **{
            "languages": ["en", "de"],
            "max_target_tokens": 48,
            "export": {"max_input_tokens": 40, "max_output_tokens": 12, "block_size": 32, "generation": WRITE},
            **changes,
        },
    )


def generate(**changes):
    model = {**MODERN, "architecture": "decoder", "n_decoder_layers": 1}
    return recipe(
        "generate",
        model,
        {"text/days": {}, "chat/short": {}},
        **{
            "export": {"max_input_tokens": 40, "max_output_tokens": 12, "block_size": 32, "generation": WRITE},
            "max_tokens": 16,
            **changes,
        },
    )


def from_trunk(task, sets, n_labels=0, **changes):
    """A recipe on the package of the ``trunk_package`` fixture."""
    head, stack = ("lm", "n_decoder_layers") if task == "summarize" else ("span", "n_encoder_layers")
    model = {
        "architecture": "prefix-lm" if task == "summarize" else "encoder",
        "style": "bert",
        "head": "classify" if task == "sentiment" else head,
        "d_model": 32,
        "n_heads": 2,
        "d_ff": 64,
        "max_positions": 64,
        "n_labels": n_labels,
        "n_token_types": 2,
        "extract_head": task == "summarize",
        "norm_eps": 1e-12,
        stack: 2,
    }
    export = {"max_input_tokens": 40, "block_size": 32}
    if task == "summarize":
        export |= {"max_output_tokens": 12, "generation": WRITE}
    return recipe(
        task,
        model,
        sets,
        **{
            "trunk": {"name": "tiny", "licence": "CC0", "package": "tiny-trunk"},
            "tokenizer": {"kind": "trunk", "vocab_size": 250},
            "max_target_tokens": 12,
            "export": export,
            **changes,
        },
    )


def sentiment(**changes):
    labels = ["negative", "neutral", "positive"]
    return from_trunk("sentiment", {"sentiment/days": {}}, 3, **{"labels": labels, **changes})


def answer(**changes):
    return from_trunk("answer", {"qa/rivers": {}}, **changes)


def summarize(**changes):
    sets = {"summarization/rain": {}, "summarization/marked": {"extractive": True}}
    return from_trunk("summarize", sets, **changes)


PRETRAINED = {
    "causal": {**MODERN, "architecture": "decoder", "n_decoder_layers": 1},
    "denoise": {**MODERN, "architecture": "encoder-decoder", "n_encoder_layers": 1, "n_decoder_layers": 1},
    "masked": {**MODERN, "architecture": "encoder", "style": "bert", "n_token_types": 2, "n_encoder_layers": 1},
    "prefix": {**MODERN, "architecture": "prefix-lm", "style": "bert", "n_token_types": 2, "n_decoder_layers": 1},
}
"""The model of each objective."""


def pretrain(objective="causal", **changes):
    kind = "word-piece" if objective in ("masked", "prefix") else "byte-bpe"
    document = {
        "objective": objective,
        "tokenizer": {"kind": kind, "vocab_size": 300},
        "max_tokens": 16,
        "fit": {**FIT, "batch_tokens": 64},
        **changes,
    }
    return recipe("pretrain", PRETRAINED[objective], {"text/days": {}}, **document)
