"""A sampler's weights in the order in which a processor multiplies them.

A decoding step is a product of a few rows with every weight. From the order in which these are stored, two cores reach
a quarter (8 rows) to three quarters (64 rows) of the speed that oneDNN's blocked order gives them. It costs a copy.
"""

from contextlib import contextmanager

import torch
from torch import nn

from model import LoRALinear

NARROWEST = 512  # width of a model; below, the call itself takes longer than it saves
LARGEST = 2 << 30  # bytes of weights; above, there may be no room for them twice


@contextmanager
def prepacked(model):
    """Within the `with`, a float32 text model on a CPU multiplies by prepacked copies of its weights, adapters merged.

    The weights must stand still meanwhile. Other models, and compiled ones, whose graphs bring their own products, stay
    as they are.
    """
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    weights = [model.head_weight, *(layer.weight for layer in layers)]
    fits = model.config.hidden_size >= NARROWEST and sum(w.nbytes for w in weights) <= LARGEST
    plain = all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
    compiled = "before_attention" in vars(model.model.layers[0])
    if not fits or not plain or compiled or not torch.backends.mkldnn.is_available():
        yield
        return
    beside = [isinstance(layer, LoRALinear) and layer.state == "beside" for layer in layers]
    products = [product(layer.with_adapter() if on else layer.weight, layer.bias) for layer, on in zip(layers, beside)]
    model.logits = product(model.head_weight)
    for layer, forward in zip(layers, products):
        layer.forward = forward
    try:
        yield
    finally:
        del model.logits
        for layer in layers:
            del layer.forward


def product(weight, bias=None):
    """x -> x W' + b by a prepacked copy of W (out, in)."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
