"""A pretended GPU: numbers on the CPU, CUDA's rules about devices, and a count of what a GPU would be asked for.

A FakeGPU tensor says that it lies on the device "fakegpu" and holds a real tensor. Every aten call passes `dispatch`,
which raises where CUDA would (tensors of two devices), computes on the CPU, and counts

    launches    calls that start a kernel: no views, no allocations
    waits       calls for which the host waits: results fetched, pageable memory copied, lists or CPU tensors as index

with the line of the project that asked for each. A Triton kernel is one launch: `launched` runs it interpreted on the
held tensors, or does nothing where only the host's time counts. A CUDA graph is a list of calls on tensors that are
kept: replayed, it reads and writes those and knows nothing else. Not pretended: streams, memory, speed, rounding.
"""

import contextlib
import os
import sys
import types
from collections import Counter
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
launches, waits = Counter(), Counter()  # by line of the project


class Backend(_DummyBackendModule):
    """What torch asks of a backend: types for autocast, the state of its generator (the CPU's)."""

    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = synchronize = set_device = staticmethod(lambda *_: None)


_setup_privateuseone_for_python_backend("fakegpu", backend_module=Backend())
GPU = torch.device("fakegpu", 0)


def autocast_as_cuda():
    """Under autocast products take halves; all else stays as it is."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    library, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def narrowed(product):
        def call(*args, **kwargs):
            dtype = torch.get_autocast_dtype("fakegpu")
            narrow = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            with torch._C._ExcludeDispatchKeyGuard(key):
                return product(*tree_map(narrow, args), **kwargs)

        return call

    for name in "linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention":
        library.impl(name, narrowed(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    return library, rest


KEPT = autocast_as_cuda()  # what is registered lasts as long as this


class FakeGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, held, requires_grad=False):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), layout=held.layout, device=GPU, requires_grad=requires_grad, **layout
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if function is F.rms_norm and not torch.is_grad_enabled():  # one kernel on CUDA, seven on other devices
            launches[here()] += 1
            return FakeGPU(computed(function, tree_map(held, args), tree_map(held, kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():  # results on the CPU are plain tensors
            return function(*args, **(kwargs or {}))

    is_cuda = property(lambda self: True)

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def __getitem__(self, index):  # torch turns lists into tensors where `dispatch` does not see it
        return torch.Tensor.__getitem__(self, on_gpu(index))

    def __setitem__(self, index, value):
        on_cpu = isinstance(value, torch.Tensor) and not isinstance(value, FakeGPU) and value.dim()
        return torch.Tensor.__setitem__(self, on_gpu(index), value.to(GPU) if on_cpu else value)

    def tolist(self):
        wait("tolist")
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of a GPU to numpy: use .cpu()")

    __array__ = numpy


def held(x):
    return x.held if isinstance(x, FakeGPU) else x


def wrapped(x):
    return FakeGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeGPU) else x


def here():
    """The line of the project that is at work."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != __file__:
            return f"{path[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def wait(what):
    if Graph.recording is not None:
        raise RuntimeError(f"{here()}: {what} while a graph is recorded")
    waits[f"{here()} {what}"] += 1


class Graph:
    """torch.cuda.CUDAGraph. Each call was computed once, when recorded; replayed, its results get new numbers."""

    recording, replays = None, 0  # the list being filled; of all graphs

    def __init__(self):
        self.calls = []

    @contextlib.contextmanager
    def record(self, capture_error_mode="global"):
        Graph.recording = self.calls
        try:
            yield
        finally:
            Graph.recording = None

    def replay(self):
        launches[here()] += 1
        Graph.replays += 1
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_iter(results), tree_iter(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def computed(function, args, kwargs, view=False):
    results = function(*args, **kwargs)
    if Graph.recording is not None and not view:
        Graph.recording.append((function, args, kwargs, results))
    return results


def on_gpu(index):
    def one(part):
        if (
            isinstance(part, (list, tuple))
            or isinstance(part, torch.Tensor)
            and not isinstance(part, FakeGPU)
            and part.dim()
        ):
            wait("index from the CPU")
            return FakeGPU(torch.as_tensor(part))
        return part

    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


# -- the rules ---------------------------------------------------------------------------------------------------------

COPIES = {"aten::copy_", "aten::_to_copy"}  # the only calls that take both devices
NO_LAUNCH = {"aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::alias",
             "aten::new_empty_strided", "aten::lift_fresh", "aten::_unsafe_view", "aten::set_"}  # fmt: skip
WAITS = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::_unique2", "aten::equal"}


def wide(product):
    """A product of halves with an fp32 result: CUDA has it, a CPU does not."""

    def on_cpu(*args, out_dtype=None, **kwargs):
        return product(*(x.float() for x in args if isinstance(x, torch.Tensor)), **kwargs)

    return on_cpu


def flash(q, k, v, dropout=0.0, causal=False):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
    none = torch.empty(0)
    return out, lse, none, none, 0, 0, none, none, none


def efficient(q, k, v, bias, with_lse, dropout=0.0, causal=False):
    assert bias is None and with_lse
    out, lse, none, *_ = flash(q, k, v, dropout, causal)
    return out, lse, none, none


INSTEAD = {
    **dict.fromkeys(["aten.mm.dtype", "aten.mm.dtype_out"], wide(torch.mm)),
    **dict.fromkeys(["aten.addmm.dtype", "aten.addmm.dtype_out"], wide(torch.addmm)),
    "aten._scaled_dot_product_flash_attention.default": flash,
    "aten._scaled_dot_product_efficient_attention.default": efficient,
}


def dispatch(function, args, kwargs):
    name, tensors = function._schema.name, [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [isinstance(t, FakeGPU) for t in tensors]
    device = kwargs.get("device")
    to = device is not None and torch.device(device).type == "fakegpu"
    if not any(ours) and not to:
        return function(*args, **kwargs)
    if name in COPIES:
        onto = isinstance(args[0], FakeGPU) if device is None else to
        source = isinstance(args[-1] if name == "aten::copy_" else args[0], FakeGPU)
        if onto != source and not (onto and kwargs.get("non_blocking") and Graph.recording is None):
            wait("copy to the GPU" if onto else "copy to the CPU")
    else:
        alien = [t for t, own in zip(tensors, ours) if not own and t.dim()]
        if any(ours) and alien:
            found = [f"{'GPU' if own else 'CPU'} {tuple(t.shape)}" for t, own in zip(tensors, ours)]
            raise RuntimeError(f"{here()}: expected all tensors on one device, found {', '.join(found)} in {name}")
        onto = to if device is not None else True
        if name in WAITS or str(function) == "aten.repeat_interleave.Tensor":
            wait(name)
    if not function.is_view and name not in NO_LAUNCH:
        launches[here()] += 1
    plain_args, plain = tree_map(held, args), tree_map(held, kwargs)
    if device is not None:
        plain["device"] = torch.device("cpu") if onto else device
    view = function.is_view or name in NO_LAUNCH  # shares, or has no numbers yet
    result = computed(INSTEAD.get(str(function), function), plain_args, plain, view)
    if name == "aten::_local_scalar_dense" or not onto:
        return args[0] if name == "aten::copy_" else result
    return return_and_correct_aliasing(function, args, kwargs, tree_map(wrapped, result))


class Rules(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


@contextlib.contextmanager
def pretended(launch=None):
    """Within: tensors can be made on GPU, counts start at 0, and what is asked of torch.cuda has an answer.

    launch: what runs a Triton kernel on the held tensors, given (kernel, grid, arguments, options); default: itself.
    """

    def made(make):
        def on_device(data, *args, device=None, **kwargs):
            if device is None or torch.device(device).type != "fakegpu" or isinstance(data, torch.Tensor):
                return make(data, *args, **kwargs, **({} if device is None else {"device": device}))
            wait("tensor from the CPU")
            return FakeGPU(make(data, *args, **kwargs))

        return on_device

    cuda = types.SimpleNamespace(multi_processor_count=132, name="pretended", total_memory=80 << 30)
    launches.clear()
    waits.clear()
    Graph.replays = 0
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch, "tensor", made(torch.tensor)),
            (torch, "as_tensor", made(torch.as_tensor)),
            (torch.cuda, "get_device_properties", lambda *_: cuda),
            (torch.cuda, "get_device_name", lambda *_: cuda.name),
            (torch.cuda, "max_memory_allocated", lambda *_: 0),
            (torch.cuda, "memory_allocated", lambda *_: 0),
            (torch.cuda, "memory_reserved", lambda *_: 0),
            (torch.cuda, "mem_get_info", lambda *_: (1 << 28, 1 << 30)),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", Graph.record),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for module, kernel in triton_kernels():
            stack.enter_context(mock.patch.object(module, kernel, Launched(getattr(module, kernel), launch)))
        stack.enter_context(Rules())
        yield


def triton_kernels():
    from kernels import advantage_triton, decode_triton, logprob_triton

    return [(logprob_triton, "sweep"), (logprob_triton, "sweep_once"), (advantage_triton, "group_statistics"),
            (decode_triton, "decode")]  # fmt: skip


class Launched:
    """A Triton kernel on FakeGPU tensors: kernel[grid](...), one launch."""

    def __init__(self, kernel, launch):
        self.kernel, self.launch = kernel, launch or (lambda kernel, grid, args, how: kernel[grid](*args, **how))

    def __getitem__(self, grid):
        def start(*args, **how):
            if alien := [a for a in args if isinstance(a, torch.Tensor) and not isinstance(a, FakeGPU)]:
                raise RuntimeError(f"{here()}: expected tensors of the GPU, found {len(alien)} of the CPU")
            launches[here()] += 1
            computed(self.launch, (self.kernel, grid, tree_map(held, args), how), {})

        return start


def to_gpu(model):
    """A model's parameters, moved in place (what load_pretrained does on a device)."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(FakeGPU(p.detach()), requires_grad=p.requires_grad)
    return model
