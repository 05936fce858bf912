"""A GPU for machines without one: tensors that say they are on `cuda:0`, computed on the CPU.

As on a GPU, no operation takes tensors of both devices (those without dimensions aside). What makes
the host wait for the device is written down: values read, sizes that hang on values, copies from
the device, and copies to it that are not from pinned memory and `non_blocking`. To PyTorch's C++,
which would ask a driver, the device is "meta".
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
WAITING = (
    aten._local_scalar_dense, aten.equal, aten.is_nonzero,  # values read
    aten.nonzero, aten.masked_select, aten.repeat_interleave, aten.bincount, aten._unique2,
    aten.unique_consecutive,
)  # fmt: skip
COPIES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_)


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; its `values` are a CPU tensor."""

    @staticmethod
    def __new__(cls, values):
        options = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        options |= {"dtype": values.dtype, "device": META}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **options)

    def __init__(self, values):
        self.values = values

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnGpu({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise AssertionError(f"{function} after the GPU's end")


class CudaAsMeta(TorchFunctionMode):
    """Calls that name a CUDA device name it as C++ does here."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function in (torch.tensor, torch.as_tensor):  # made on the CPU, then copied
            device = keywords.pop("device", None)
            tensor = function(*arguments, **keywords)
            return tensor if device is None else tensor.to(cuda_as_meta(device))
        if function is torch.Tensor.__getitem__ and isinstance(arguments[1], list):
            tensor, index = arguments  # likewise, and copied to where the tensor is
            arguments = tensor, torch.tensor(index).to(META if on_gpu(tensor) else CPU)
        if function is torch.Tensor.__setitem__:
            tensor, index, value = arguments
            # a number for one place is copied there from the CPU; several places are filled
            if on_gpu(tensor) and not torch.is_tensor(value) and not tensor[index].ndim:
                arguments = tensor, index, torch.tensor(value, dtype=tensor.dtype)
        arguments, keywords = tree_map(cuda_as_meta, (arguments, keywords))
        return function(*arguments, **keywords)


def cuda_as_meta(leaf):
    return META if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


class Gpu(TorchDispatchMode):
    """What the GPU does, and `waits`: the operations in which the host has waited for it."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.pinned = []  # kept, so that their addresses stay theirs

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        operation, keywords = function.overloadpacket, dict(keywords or {})
        if operation is aten._fused_sdp_choice:
            return 0  # attention as plain products
        if operation is aten.is_pinned:
            return self.is_pinned(arguments[0])
        if operation is aten._pin_memory:
            self.pinned.append(arguments[0].clone())
            return self.pinned[-1]
        with self:  # in inference mode, operations made of others come whole
            output = function.decompose(*arguments, **keywords)
        if output is not NotImplemented:
            return output
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if torch.is_tensor(leaf)]
        inputs = {id(tensor.values): tensor for tensor in tensors if on_gpu(tensor)}
        device = keywords.get("device") or (META if inputs else CPU)
        if operation in COPIES:
            self.note_copy(function, arguments, keywords, device)
        else:
            check_devices(function, arguments, tensors)
            if inputs and waits(operation, arguments):
                self.waits.append(str(function))
        if "device" in keywords:
            keywords["device"] = CPU
        arguments, keywords = tree_map(values_of, (arguments, keywords))
        output = function(*arguments, **keywords)
        if device == CPU:
            return output
        if operation is aten._to_copy and id(output) not in inputs:
            output = output.clone()  # memory of its own
        return tree_map(
            lambda leaf: inputs[id(leaf)] if id(leaf) in inputs else wrapped(leaf), output
        )

    def is_pinned(self, tensor) -> bool:
        return any(tensor.data_ptr() == pinned.data_ptr() for pinned in self.pinned)

    def note_copy(self, function, arguments, keywords, device):
        """Write down a copy from one device to the other that the host waits for."""
        goal, source = device != CPU, arguments[0]
        non_blocking = keywords.get("non_blocking", False)
        if function.overloadpacket is aten.copy_:
            goal, source = on_gpu(arguments[0]), arguments[1]
            non_blocking = arguments[2:3] == (True,)
        if goal == on_gpu(source) or (goal and non_blocking and self.is_pinned(source)):
            return
        self.waits.append(f"{function} {'to' if goal else 'from'} the GPU")


def on_gpu(tensor) -> bool:
    return isinstance(tensor, OnGpu)


def values_of(leaf):
    return leaf.values if on_gpu(leaf) else leaf


def wrapped(leaf):
    return OnGpu(leaf) if torch.is_tensor(leaf) else leaf


def waits(operation, arguments) -> bool:
    if operation not in INDEXING:
        return operation in WAITING
    # a mask's size hangs on its values, and an index on the CPU is copied
    return any(i is not None and (i.dtype == torch.bool or not on_gpu(i)) for i in arguments[1])


def check_devices(function, arguments, tensors) -> None:
    """Raises AssertionError where a GPU would refuse: an operation on both devices."""
    if function.overloadpacket in INDEXING:  # takes indices from the CPU too
        indices = [i for i in arguments[1] if i is not None and not on_gpu(i)]
        tensors = [tensor for tensor in tensors if all(tensor is not i for i in indices)]
    sides = {on_gpu(tensor) for tensor in tensors if tensor.ndim or on_gpu(tensor)}
    assert len(sides) < 2, f"{function} on tensors of the CPU and of the GPU"


def to_gpu(model):
    """The model with its weights and buffers on the GPU, in place (ties apart: there are none)."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = OnGpu(tensor.detach().clone())
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved) if is_weight else moved
    return model


@contextmanager
def pretended_gpu():
    """A GPU inside the `with` block: the Gpu."""
    with CudaAsMeta(), Gpu() as gpu:
        yield gpu
