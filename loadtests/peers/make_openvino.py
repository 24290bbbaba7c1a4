"""Quantises an encoder with static scales, calibrated on real text. Runs in the environment `openvino`.

    python -m loadtests.peers.make_openvino FOLDER SENTENCES

Reads ``FOLDER/openvino_model.xml``, writes ``FOLDER/int8.xml``. SENTENCES is the file of token ids: the first half of
it is what is measured, so the second half calibrates.
"""

import json
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino


def main() -> None:
    """Calibrate and save."""
    folder, sentences = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    model = openvino.Core().read_model(folder / "openvino_model.xml")

    def inputs(ids: list[int]) -> dict[str, object]:
        row = np.array([ids])
        return {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}

    half = sentences[len(sentences) // 2 :]
    quantised = nncf.quantize(
        model,
        nncf.Dataset(half, inputs),
        subset_size=len(half),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
    )
    openvino.save_model(quantised, folder / "int8.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()
