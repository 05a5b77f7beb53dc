"""FSDP2 from outside: the model file knows nothing of it, and whoever trains an adapter or on one GPU needs none of it.

A rank holds its rows of each weight, gradient and AdamW moment, in equal chunks of the first axis (the last may be
shorter); a layer's weights are gathered while it runs. Gradients are summed, not averaged: a loss has its global
denominator already.
"""

import contextlib
import math

import torch

import model as qwen
from data import InputError
from support.batching import is_fsdp


def shard(model, device, dtype, rank, world, adapter=None):
    """Split `model`, on the meta device, over the ranks, in place, and read it; matrix products in `dtype`.

    adapter: a folder whose LoRA is merged into the weights.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: the imports take two seconds
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    half = dtype if dtype != torch.float32 else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in [*model.model.layers, model]:  # the rest is one unit, tower included: not every batch has pictures
        fully_shard(unit, mesh=mesh, mp_policy=precision)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    _read_rows(model.to_empty(device=device), rank, world, adapter)


def _read_rows(model, rank, world, adapter):
    """Fill a rank's rows from the checkpoint, W + scale B A where an adapter says so: no rank ever holds all of it."""
    updates = adapter_products(adapter) if adapter else {}
    stored = qwen.stored_tensors(model)
    for name, p in model.named_parameters():
        file, key = stored[name]
        update = updates.pop(name.removesuffix(".weight"), None)
        rows = file.read(key, "cpu", torch.float32 if update else p.dtype).chunk(world)
        if rank < len(rows):
            mine = rows[rank]
            if update:
                scale, A, B = update
                mine = mine + scale * B.chunk(world)[rank] @ A  # rounded once, after the sum
            p.detach().to_local().copy_(mine)
    if updates:
        raise InputError(f"{adapter}: found LoRA of {', '.join(updates)}, expected only layers that the model has")


@contextlib.contextmanager
def unsharded(model):
    """Gather every unit's weights in the compute dtype, once, until the block ends; a plain model stays as it is."""
    units = [m for m in model.modules() if is_fsdp(m)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model)
            unit.reshard()


def gathered(weight):
    """A weight that FSDP has split, whole in every rank, its gradient summed over them; a plain one as it is."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def whole(model, dtype, is_main):
    """The model with all its weights in `dtype` on rank 0's CPU (elsewhere on meta), gathered a tensor at a time."""
    with torch.device("meta"):
        copy = qwen.Qwen25VL(model.config)
    copy.source = model.source
    for name, p in model.named_parameters():
        p = p.full_tensor()
        if is_main:
            owner, _, leaf = name.rpartition(".")
            setattr(copy.get_submodule(owner), leaf, torch.nn.Parameter(p.detach().to("cpu", dtype)))
    return copy


def adapter_products(folder):
    """{name of a linear layer: (scale, A, B)} of an adapter, on the CPU in fp32: its weight becomes W + scale B A."""
    file, stored, rank, alpha, _, rslora = qwen.stored_adapter(folder)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    tensors = {name: file.read(there, "cpu", torch.float32) for name, there in stored.items()}
    layers = {name.rpartition(".")[0] for name in tensors}
    return {name: (scale, tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in sorted(layers)}
