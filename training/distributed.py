"""Where a run computes: its device, its processes, and what they tell one another. Knows nothing of data or steps.

Under ``torchrun`` each process has one device and its part of every batch: with whole copies of the model (DDP), or
with a share of each weight (FSDP2). What is learned is the same in any layout.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from energy.meters.base import Meter, Reading, Unavailable
from energy.meters.choose import MeterSettings, choose_meter
from energy.survey import outside
from models.transformer import Layer, Transformer
from training.errors import TrainingError
from training.settings import DeviceKind
from training.tasks import Batch, Loss


@dataclass(frozen=True)
class Layout:
    """The processes that carry out one run, and this one's place among them."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the processes of this host."""
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """What computes, for the records."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return name if self.world == 1 else f"{self.world} x {name}"


@dataclass(frozen=True)
class Execution:
    """How a run is carried out; none of it changes what is learned, only memory and speed."""

    layout: Layout = Layout()
    micro_batch_tokens: int | None = None
    """Padded tokens that one process computes at once; a larger batch is computed in parts."""
    recompute: bool = False
    """Keep no activations of a layer for the backward pass: it computes them again."""
    compile: bool = False
    """Compile the layers, on a GPU."""
    fsdp: bool = False
    """Share out the weights instead of copying them."""


class LossModule(nn.Module):
    """A model whose output is its loss: the one module that DDP and FSDP see the forward pass of."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Batch, counts: Tensor) -> Tensor:
        """The batch's part of the loss of a step whose targets number ``counts`` ``(parts,)``."""
        return (torch.stack(list(self._loss.loss(cast(Transformer, self.model), batch))) / counts).sum()


@contextmanager
def join(kind: DeviceKind) -> Iterator[Layout]:
    """The layout of this process; where torchrun started it, it joins the others for as long as the context lasts.

    Raises ``TrainingError`` where there is no such device.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device cuda: torch finds no GPU here; `--device cpu` trains without")
    cuda = kind != "cpu" and torch.cuda.is_available()
    rank, world, local_rank, local_world = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    if cuda and local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"{local_world} processes on a host with {torch.cuda.device_count()} GPUs: start one for each GPU"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    layout = Layout(device, rank, world, local_rank, local_world)
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield layout
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield layout
    finally:
        dist.destroy_process_group()


def total(layout: Layout, values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes; they wait for each other here."""
    if layout.world == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=layout.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


@contextmanager
def in_turn(layout: Layout) -> Iterator[None]:
    """The first process goes ahead; the others follow when it is through."""
    if not layout.is_first:
        total(layout, [0.0])
    yield
    if layout.is_first:
        total(layout, [0.0])


def place(model: nn.Module, loss: Loss, execution: Execution) -> nn.Module:
    """Put ``model`` where it computes and wrap it so that a backward pass leaves the mean over all processes.

    ``model`` stays the module to read weights from. Raises ``TrainingError`` for what this machine cannot do.
    """
    layout = execution.layout
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if execution.compile and layout.device.type != "cuda":
        raise TrainingError("compile is for GPUs: on a CPU it costs time and gains none")
    if execution.fsdp and not dist.is_initialized():
        raise TrainingError("fsdp shares weights out among processes: start them with torchrun")
    model.to(layout.device)
    for layer in layers:
        layer.recompute = execution.recompute
        if execution.compile:
            layer.compile(dynamic=True)
    module = LossModule(model, loss)
    if execution.fsdp:
        mesh = init_device_mesh(layout.device.type, (layout.world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    elif layout.world > 1:
        devices = [layout.device] if layout.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False)
    return module


def unsynchronised(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, a backward pass adds to gradients that the processes do not yet exchange."""
    # FSDP exchanges each time: it has no room to keep whole gradients.
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


class HostMeters:
    """The meters of all hosts together, each host's counted once. All processes read it at the same moment."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._own = _host_meter(layout) if layout.local_rank == 0 else Unavailable("read by another process")
        self.name, self.source, self.idle_uw = self._own.name, self._own.source, self._own.idle_uw

    def read(self) -> tuple[Reading, ...]:
        """The readings of every host, or none where one of them has none: a part would look like the whole."""
        if self._layout.world == 1:
            return self._own.read()
        found: list[tuple[int, tuple[Reading, ...]]] = [(0, ())] * self._layout.world
        dist.all_gather_object(found, (self._layout.local_rank, self._own.read()))
        hosts = [readings for local_rank, readings in found if local_rank == 0]
        return tuple(
            # Every host calls its processor "cpu".
            Reading(f"{host}/{each.device}", each.source, each.at_ns, each.energy_uj, each.resolution_ns, each.quality)
            for host, readings in enumerate(hosts)
            for each in readings
            if all(hosts)
        )


def _host_meter(layout: Layout) -> Meter:
    gpus: tuple[int, ...] = ()
    if layout.device.type == "cuda":
        # NVML numbers all GPUs of the host, torch those that CUDA_VISIBLE_DEVICES leaves.
        gpus = tuple(torch.cuda._get_nvml_device_index(index) for index in range(layout.local_world))
    settings = MeterSettings(gpus=gpus)
    # An estimate goes by CPU time: that of all processes that torchrun, their parent, started here.
    choice = choose_meter(settings) if layout.world == 1 else outside(settings, os.getppid())
    if sum(reading.device.startswith("gpu:") for reading in choice.meter.read()) < len(gpus):
        # What the rest takes would look like the whole.
        said = "; ".join(finding.detail for finding in choice.findings)
        return Unavailable(f"the GPUs that train cannot all be read: {said}")
    return choice.meter
