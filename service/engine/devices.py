"""Where sessions compute: the processor, or GPUs through CUDA; and memory on a device, by address.

Knows nothing of models. Whether CUDA works is asked of a session, never of the module: that lists CUDA wherever the
package for it is installed.
"""

import logging
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from math import prod
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.engine.buffers import Floats, Move
from service.engine.settings import EngineSettings

Ids = NDArray[np.int64]
_log = logging.getLogger(__name__)
_PROVIDER = "CUDAExecutionProvider"
_ERROR, _FATAL = 3, 4
"""How severe what ONNX Runtime logs must be."""
# `y = to; y[target] = from[source]` over rows of float16, opset 21. Asks whether a device works, and copies on one.
_COPY = b64decode(
    "CAoSADqIAgocCgRmcm9tCgZzb3VyY2USBHJvd3MiBkdhdGhlcgoUCgRyb3dzEgVzaGFwZSIFU2hhcGUKHwoGdGFyZ2V0CgVzaGFwZRIGcGxhY2Vz"
    "IgZFeHBhbmQKMwoCdG8KBnBsYWNlcwoEcm93cxIBeSIPU2NhdHRlckVsZW1lbnRzKgsKBGF4aXMYAKABAhIBY1oYCgRmcm9tEhAKDggKEgoKAxIB"
    "ZgoDEgF3WhUKBnNvdXJjZRILCgkIBhIFCgMSAW1aFgoCdG8SEAoOCAoSCgoDEgF0CgMSAXdaGQoGdGFyZ2V0Eg8KDQgGEgkKAxIBbQoCCAFiFQoB"
    "eRIQCg4IChIKCgMSAXQKAxIBd0IECgAQFQ=="
)

_MOST_NUMBERS = 2**31 - 1
"""Of what is copied to or from in one run: CUDA's operators count in 32 bits."""


class DeviceUnavailable(Exception):
    """A device that was asked for is not there; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that computes one step at a time."""

    kind: str
    """As ONNX Runtime calls it: ``cpu`` or ``cuda``."""
    index: int = 0

    @property
    def name(self) -> str:
        """What steps and meters call a GPU."""
        return f"gpu:{self.index}"

    def providers(self, *, records: bool = False) -> list[Any]:
        """What a session on it is made with, which ``records`` or not: see ``Recording``."""
        if self.kind == "cpu":
            return ["CPUExecutionProvider"]
        # Memory as it is asked for: by default the arena doubles.
        options = {"device_id": self.index, "arena_extend_strategy": "kSameAsRequested"}
        return [(_PROVIDER, options | {"enable_cuda_graph": int(records)}), "CPUExecutionProvider"]


CPU = Device("cpu")


@cache
def gpus(settings: EngineSettings) -> tuple[Device, ...]:
    """The GPUs that ``settings`` ask for and that work; none where they ask for none.

    Raises ``DeviceUnavailable`` where CUDA is asked for and a GPU does not work.
    """
    if settings.device == "cpu":
        return ()
    wanted = [Device("cuda", index) for index in settings.gpus]
    found = tuple(device for device in wanted if _works(device, says_why=settings.device == "cuda"))
    missing = [device.index for device in wanted if device not in found]
    if missing and settings.device == "cuda":
        raise DeviceUnavailable(
            f"CUDA does not work on GPU {', '.join(map(str, missing))}: it needs the extra [gpu] instead of [cpu], "
            "NVIDIA's driver, CUDA 13 and cuDNN 9; or set device to auto or cpu"
        )
    return found


def cuda_is_installed() -> bool:
    """Whether there is what runs models on GPUs, be there a GPU or not."""
    return _PROVIDER in ort.get_available_providers()


def _works(device: Device, says_why: bool) -> bool:
    if not cuda_is_installed():
        return False
    options = ort.SessionOptions()
    # ONNX Runtime alone knows which library is missing, and tells nobody but its log.
    options.log_severity_level = _ERROR if says_why else _FATAL
    ort.set_default_logger_severity(options.log_severity_level)
    # CUDA's libraries, where they were installed as Python packages.
    ort.preload_dlls(directory="")
    try:
        session = ort.InferenceSession(_COPY, options, providers=device.providers())
    except Exception as error:  # ONNX Runtime raises what the driver says
        _log.warning("%s does not work: %s", device.name, error)
        return False
    finally:
        # At every session it would warn that CUDA is no plug-in.
        ort.set_default_logger_severity(_ERROR)
    return bool(session.get_providers()[0] == _PROVIDER)


def check_works(device: Device) -> None:
    """Raise what CUDA says where ``device`` is lost to this process: after some errors every call fails."""
    row, places = np.zeros((1, 1), dtype=np.float16), np.zeros(1, dtype=np.int32)
    _copier(device).run(None, {"from": row, "to": row, "source": places, "target": places[:, None]})


@dataclass(frozen=True, slots=True)
class Region:
    """Contiguous memory on a device, for as long as whoever lends it keeps it."""

    device: Device
    address: int
    shape: tuple[int, ...]
    dtype: type[np.generic]

    def rows(self, start: int, stop: int) -> "Region":
        """Those along the first axis."""
        size = prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        return Region(self.device, self.address + start * size, (stop - start, *self.shape[1:]), self.dtype)

    @property
    def flat(self) -> "Region":
        """The same with every row in one dimension."""
        return Region(self.device, self.address, (self.shape[0], prod(self.shape[1:])), self.dtype)

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph read it."""
        binding.bind_input(name, self.device.kind, self.device.index, self.dtype, self.shape, self.address)

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph write it."""
        binding.bind_output(name, self.device.kind, self.device.index, self.dtype, self.shape, self.address)


class DeviceRows:
    """Keys and values on a device: a region of zeros ``(rows, heads, capacity, head size)`` for each of ``names``.

    Rows have room for all that they may ever hold, as attention on a GPU reads no more than there is; so a row is
    contiguous, and copied as a whole. All regions are one piece of memory: one run copies rows of many of them.
    """

    def __init__(self, device: Device, names: Sequence[str], shape: tuple[int, int, int, int]) -> None:
        self._copier, self._n_regions, self._n_rows = _copier(device), len(names), shape[0]
        self.capacity = shape[2]
        whole = (len(names) * shape[0], *shape[1:])
        self._memory = ort.OrtValue.ortvalue_from_shape_and_type(whole, np.float16, device.kind, device.index)
        # What attention masks it still multiplies by zero, and that must be a number.
        self._memory.update_inplace(np.zeros(whole, dtype=np.float16))
        self._all = Region(device, self._memory.data_ptr(), whole, np.float16)
        self._regions = {
            name: self._all.rows(number * shape[0], (number + 1) * shape[0]) for number, name in enumerate(names)
        }

    def reserve(self, tokens: int, used: int) -> bool:
        """There is always room."""
        return False

    def copy(self, moves: Sequence[Move]) -> None:
        """Copy whole rows, all of them at once: see ``Rows``."""
        # Of rows that are copied one after the other, where each one's contents come from.
        origins: dict[int, int] = {}
        for source, target, _, _ in moves:
            origins[target] = origins.get(source, source)
        self._copy(self, origins)

    def adopt(self, row: int, other: "DeviceRows", end: int) -> None:
        """Let a row be what the first one of ``other`` is."""
        self._copy(other, {row: 0})

    def bind(self, binding: ort.IOBinding, rows: slice, *, updated: bool) -> None:
        """Let a graph read ``rows``, and where they are ``updated`` write them as ``new_*``."""
        for name, region in self._regions.items():
            part = region.rows(rows.start, rows.stop)
            part.bind_input(binding, name)
            if updated:
                part.bind_output(binding, f"new_{name}")

    def read(self, first: int, sources: Sequence[Sequence[int]], encoder: "SourceReader") -> None:
        """Let ``encoder`` write what it makes of ``sources`` into the rows from ``first`` on."""
        regions = {name: region.rows(first, first + len(sources)) for name, region in self._regions.items()}
        encoder.run_into(sources, regions, self.capacity)

    def _copy(self, other: "DeviceRows", origins: Mapping[int, int]) -> None:
        """Let rows, by their number, be what a row of ``other`` was."""
        if not origins:
            return
        most = max(self._n_rows, other._n_rows) * prod(self._all.shape[1:])
        at_once = max(1, _MOST_NUMBERS // most)
        for first in range(0, self._n_regions, at_once):
            count = min(at_once, self._n_regions - first)
            numbers = np.arange(count, dtype=np.int32)[:, None]
            source = (numbers * other._n_rows + np.array([*origins.values()], dtype=np.int32)).ravel()
            target = (numbers * self._n_rows + np.array([*origins], dtype=np.int32)).reshape(-1, 1)
            binding = self._copier.io_binding()
            other._regions_from(first, count).bind_input(binding, "from")
            to = self._regions_from(first, count)
            to.bind_input(binding, "to")
            to.bind_output(binding, "y")
            for name, places in (("source", source), ("target", target)):
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(places))
            self._copier.run_with_iobinding(binding)

    def _regions_from(self, first: int, count: int) -> Region:
        """So many regions as one, every row in one dimension."""
        return self._all.rows(first * self._n_rows, (first + count) * self._n_rows).flat


class SourceReader(Protocol):
    """What reads sources."""

    def run_into(self, rows: Sequence[Sequence[int]], regions: Mapping[str, Region], width: int) -> None:
        """Read ``rows`` padded to ``width``, and write each output into its region."""


def not_recorded() -> ort.RunOptions:
    """How a session that records runs what has other shapes every time."""
    return _run_options(-1)


class Recording:
    """A run of a graph whose inputs and outputs lie at fixed addresses on a device.

    CUDA records its kernels at the first run and launches them together from then on (a CUDA graph, which ONNX Runtime
    makes): a step of a small model costs less to compute than to launch.
    """

    def __init__(
        self,
        device: Device,
        session: ort.InferenceSession,
        inputs: Mapping[str, NDArray[np.generic]],
        outputs: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
        *,
        records: bool,
    ) -> None:
        """``inputs`` that change from run to run, with values to begin with; shape and type of ``outputs``. One that
        does not record runs kernel by kernel."""

        def value(shape: tuple[int, ...], dtype: Any) -> ort.OrtValue:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device.kind, device.index)

        self._session, self._options = session, _run_options(next(_recordings)) if records else not_recorded()
        self.binding = session.io_binding()
        """For whatever else the graph reads and writes."""
        self._inputs = {name: value(array.shape, array.dtype) for name, array in inputs.items()}
        self.outputs = {name: value(*kind) for name, kind in outputs.items()}
        """Where the latest run left them."""
        for name, each in self._inputs.items():
            each.update_inplace(inputs[name])
            self.binding.bind_ortvalue_input(name, each)
        for name, each in self.outputs.items():
            self.binding.bind_ortvalue_output(name, each)

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        """Run the graph on ``inputs``; those that are left out are what they were."""
        for name, array in inputs.items():
            self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self.binding, self._options)


_recordings = count(1)


def _run_options(recording: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(recording))
    return options


class DeviceLogits:
    """Logits ``(rows, words)`` that stay on a device unless somebody looks at them; their argmax is known."""

    def __init__(self, value: ort.OrtValue, tokens: Ids) -> None:
        self.value: ort.OrtValue | None = value
        """On the device, perhaps with further rows; None once what the host holds is another."""
        self._tokens = tokens
        self._fetched: Floats | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, place: int) -> Floats:
        row: Floats = self._host()[place]
        return row

    def __setitem__(self, place: tuple[int, Sequence[int]], value: float) -> None:
        self._host()[place] = value
        self.value = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        return self._host()

    def argmax(self, axis: int) -> Ids:
        """The likeliest word of each row; ``axis`` is the last."""
        return self._tokens

    def copy(self) -> "DeviceLogits":
        """What follows a prompt has memory of its own."""
        return self

    def _host(self) -> Floats:
        if self._fetched is None:
            assert self.value is not None
            self._fetched = self.value.numpy()[: len(self)].copy()
        return self._fetched


Logits = Floats | DeviceLogits


def first_rows(logits: Logits, count: int) -> Logits:
    """The first ``count`` rows."""
    if isinstance(logits, DeviceLogits):
        return logits if count == len(logits) else np.asarray(logits)[:count]
    return logits[:count]


@cache
def _copier(device: Device) -> ort.InferenceSession:
    return ort.InferenceSession(_COPY, providers=device.providers())
