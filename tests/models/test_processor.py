"""Whether 8-bit products need ONNX Runtime's exact mode is read off the processor."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import processor
from models.graph import quantize_rows


class Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@pytest.fixture(autouse=True)
def fresh() -> None:
    processor._multiplies_8_bits_exactly.cache_clear()


@pytest.mark.parametrize(
    ("machine", "flags", "needed"),
    [
        ("x86_64", "flags : avx2 fma", True),
        ("x86_64", "flags : avx2 avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_the_exact_mode_is_for_x86_without_vnni(
    machine: str, flags: str | None, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: object) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read)
    options = Options()
    processor.keep_products_exact(options)
    assert options.entries == ({"session.x64quantprecision": "1"} if needed else {})
    seven = Options()
    processor.keep_products_exact(seven, weight_bits=7)
    processor._multiplies_8_bits_exactly.cache_clear()
    assert not seven.entries


def test_the_largest_products_with_weights_of_seven_bits_are_right_without_it() -> None:
    codes, scales = quantize_rows(np.ones((16, 64), dtype=np.float32), bits=7)
    constants = {"codes": codes.T.copy(), "scales": scales, "one": np.float32(1), "zero": np.uint8(128)}
    inputs = ["rows", "codes", "one", "scales", "zero"]
    graph = helper.make_graph(
        [helper.make_node("MatMulIntegerToFloat", inputs, ["sums"], domain="com.microsoft")],
        "products",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, [3, 64])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, [3, 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"rows": np.full((3, 64), 255, dtype=np.uint8)})
    assert np.allclose(sums, 64 * (255 - 128))
