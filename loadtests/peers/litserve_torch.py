"""LitServe serving a starter that classifies on PyTorch in float32, as most who use LitServe would. Runs in the
environment `http`.

    python -m loadtests.peers.litserve_torch FOLDER PORT WORKERS THREADS BATCH MAX_TOKENS

The same weights, as what their codes stand for, in the module that trained them; batched as in `litserve_server`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loadtests.peers.litserve_server import Starter, main
from models.manifest import load_manifest
from models.transformer import Transformer
from models.weights import read_weights


class TorchStarter(Starter):
    """One that classifies."""

    def _open(self) -> None:
        torch.set_num_threads(self._threads)
        manifest = load_manifest(self._folder)
        self._model = Transformer(manifest.config).eval()
        weights = read_weights(self._folder, manifest.quantisation)
        self._model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})

    def _logits(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        ids, lengths = map(torch.from_numpy, self._padded(rows))
        with torch.inference_mode():
            hidden = self._model.encode(ids, lengths, torch.zeros_like(ids))
            logits: NDArray[np.float32] = self._model.label_logits(hidden, lengths).numpy()
        return logits


if __name__ == "__main__":
    main(TorchStarter)
