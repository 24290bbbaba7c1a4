"""How large the numbers become that a model's matrices are multiplied with: measured on texts, so that their scale can
be fixed. Knows nothing of training.

A scale per row adapts to each token; a fixed one saves the passes that look for it. It costs no more than a bit where
the largest row is little larger than most, as behind a norm, and too much where a few rows stick out, as between the
two matrices of a feed-forward layer: those keep a scale per row.
"""

import random
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from models.config import TransformerConfig
from models.graph import write_observed
from training.graphs import Graphs
from training.tasks import Batch

_MOST_ABOVE_MEDIAN = 2.5
"""How many times as large as the median row the largest may be."""
_MARGIN = 1.1
"""For what is larger than anything that was observed."""
_PREFIX = "peaks."


def fixed_peaks(
    config: TransformerConfig, weights: Mapping[str, NDArray[np.float32]], batches: Iterable[Batch]
) -> dict[str, float]:
    """By the name of a matrix, the ``peaks`` of ``models.graph.write_graphs``, for those that can be fixed.

    Every batch is one text, so that no padding is observed.
    """
    rows: dict[str, list[NDArray[np.float32]]] = {}
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        write_observed(Path(folder), config, weights)
        graphs = Graphs(Path(folder), config)
        for batch in tqdm(batches, desc="observing activations", unit="text", delay=1.0):
            for name, found in graphs.run(_ended(config, batch, chance)).items():
                if name.startswith(_PREFIX):
                    rows.setdefault(name.removeprefix(_PREFIX), []).append(found)
    peaks = {name: fixed_peak(np.concatenate(found)) for name, found in rows.items()}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def fixed_peak(peaks: NDArray[np.floating]) -> float | None:
    """What rows with these ``peaks`` (n,) and others like them do not exceed; None where each needs its own scale."""
    largest = float(peaks.max())
    return _MARGIN * largest if 0 < largest <= _MOST_ABOVE_MEDIAN * np.median(peaks) else None


def _ended(config: TransformerConfig, batch: Batch, chance: random.Random) -> Batch:
    """``batch`` with a decoder's text ended at random: its output layer reads only the last token."""
    if config.architecture == "encoder":
        return batch
    field = "target_lengths" if config.architecture == "encoder-decoder" else "lengths"
    least = max(1, int(batch["prefix"])) if config.architecture == "prefix-lm" else 1
    ends = batch[field].clone().fill_(chance.randint(least, int(batch[field])))
    return {**batch, field: ends}
