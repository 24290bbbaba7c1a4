"""The model card: the manifest told to a person. Knows nothing beyond the manifest."""

from collections.abc import Sequence
from pathlib import Path

from models.manifest import Load, Manifest, Score, Stage, Variant
from training.report import figure


def described(load: Load) -> str:
    """The load at which energy was measured, as a sentence."""
    others = "" if load.foreign_cores is None else f"; other processes kept {load.foreign_cores:.2g} of them busy"
    return (
        f"Energy: the median of {load.rounds} rounds of {load.queries // load.rounds} queries in requests of "
        f"{load.texts_per_request} texts, one request at a time, on {load.cores} cores ({load.processor}){others}."
    )


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write ``README.md`` of a model folder; call it before the manifest, which hashes it."""
    config, stored = manifest.config, manifest.quantisation
    layers = [
        f"{n} {kind}" for n, kind in ((config.n_encoder_layers, "encoder"), (config.n_decoder_layers, "decoder")) if n
    ]
    lines = [
        f"# {manifest.name}",
        "",
        manifest.description,
        "",
        f"- Task: {', '.join(manifest.tasks) or 'vectors of texts'}; languages: {', '.join(manifest.languages)}",
        f"- Shape: {config.architecture}, {' and '.join(layers)} layers, d_model {config.d_model}, "
        f"{config.n_heads} heads, d_ff {config.d_ff}, {config.vocab_size:,} words",
        f"- Reads at most {manifest.max_input_tokens} tokens at a time"
        + (f" and writes at most {manifest.max_output_tokens}" if manifest.max_output_tokens else ""),
        f"- Licence of the weights: {manifest.licence}",
    ]
    if manifest.parent is not None:
        parent = manifest.parent
        lines.append(f"- {parent.relation.capitalize()} from {parent.name} ({parent.licence}). {parent.note}".rstrip())
    if stored.scheme != "none":
        scales = {
            "float16": "in half precision",
            "rowwise": "with a scale for each output",
            "calibrated": "with a scale for each output, and scales of activations that are fixed",
            "blockwise": f"in blocks of {stored.block_size}",
        }
        tables = ", and embeddings with 4" if stored.table_bits == 4 else ""
        lines.append(
            f"- Stored with {stored.bits} bits a weight {scales[stored.scheme]}{tables}; against float32 the "
            f"logits' cosine is {stored.parity_cosine}, their largest difference {stored.parity_max_error}"
        )
    lines += ["", "## Scores", ""]
    if manifest.scores:
        lines += [
            "Of this quantised model, through the service (`wattle evaluate`).",
            "",
            "| data | split | rows | metric | value | setting |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {s.data} | {s.split} | {s.rows:,} | {s.metric} | {s.value:.2f} | {s.setting} |"
            for s in manifest.scores
        ]
    else:
        lines.append("Not yet measured: `wattle evaluate` does.")
    if manifest.confidence is not None:
        trust = manifest.confidence
        lines += [
            "",
            f"Confidence of answers from a knowledge base is fitted on {trust.rows:,} questions of {trust.data}, "
            "whose passages are in no training and not asked about in the scores with a base; "
            f"below {trust.least:.2f} an answer is withheld (`wattle confidence`).",
        ]
    if manifest.variants:
        lines += [
            "",
            "## Ways to store it",
            "",
            "Each measured by `wattle quantise`, from the same weights and on the same rows."
            + (f" {described(manifest.variants[0].load)}" if manifest.variants[0].load is not None else ""),
            "",
            *_ways(manifest.variants),
        ]
    lines += ["", "## Training data", ""]
    if manifest.training_data:
        lines += ["| set | rows | licence | where |", "|---|---|---|---|"]
    else:
        lines.append("Unknown here: see what its makers say.")
    lines += [f"| {d.name} | {d.rows:,} | {d.licence} | {d.where} |" for d in manifest.training_data]
    if manifest.lineage:
        lines += ["", "## Lineage", "", *_lineage(manifest.lineage)]
    energy = manifest.training_energy
    if energy is not None:
        lines += ["", "## Energy of training", ""]
        if energy.joules is None:
            lines.append(f"Unavailable: no meter and no estimate; the run took {figure(energy.seconds / 60)} minutes.")
        else:
            lines.append(
                f"{figure(energy.joules / 1000)} kJ ({energy.quality}, the machine's idle power included), "
                f"{figure(energy.gco2e)} gCO2e at the world's average grid, {figure(energy.seconds / 60)} minutes."
            )
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def by_set(scores: Sequence[Score]) -> dict[str, str]:
    """Figures of each data set in one cell, under what they are: a column for each set."""
    sets: dict[tuple[str, int], list[Score]] = {}
    for score in scores:
        sets.setdefault((score.data, score.rows), []).append(score)
    return {
        f"{' / '.join(each.metric for each in found)} ({data}, {rows:,} rows)": " / ".join(
            f"{each.value:.2f}" for each in found
        )
        for (data, rows), found in sets.items()
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _ways(variants: Sequence[Variant]) -> list[str]:
    """A table of the ways to store a model; all have scores of the same sets."""
    rows = []
    for each in variants:
        known = each.active_j_per_query is not None
        joules = f"{each.active_j_per_query:.3g} ({each.quality})" if known else "unavailable"
        size, cosine = f"{each.size_mb:g}", f"{each.parity_cosine:g}"
        rows.append([each.scheme, str(each.bits), size, cosine, each.setting, *by_set(each.scores).values(), joules])
    head = ["scheme", "bits", "MB", "cosine to float32", "setting", *by_set(variants[0].scores), "active J a query"]
    return table(head, rows)


def _lineage(stages: Sequence[Stage]) -> list[str]:
    """A table of the stages and what they cost, teachers included."""
    lines = [
        "What was trained to get here, the oldest first.",
        "",
        "| stage | kind | from | teacher | data | parameters | steps | tokens | loss | minutes | kJ | gCO2e | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in stages:
        teacher = stage.teacher or "none"
        if stage.teacher_joules is not None:
            teacher += f" ({figure(stage.teacher_joules / 1000)} kJ for its targets)"
        loss = "unknown" if stage.loss is None else f"{stage.loss:.3f}"
        cost = "unavailable" if stage.joules is None else f"{figure(stage.joules / 1000)} ({stage.quality})"
        grams = "unavailable" if stage.gco2e is None else figure(stage.gco2e)
        lines.append(
            f"| {stage.name} | {stage.kind} | {stage.parent or 'random weights'} | {teacher} | "
            f"{', '.join(stage.data)} | {stage.parameters:,} | {stage.steps:,} | {stage.tokens:,} | {loss} | "
            f"{figure(stage.elapsed_s / 60)} | {cost} | {grams} | {stage.device} |"
        )
    return lines
