"""The device name "npu", in every way in which torch takes one.

The name is torch's place for a device extension, renamed. There is no memory behind it: an operation that is asked to make
a tensor there makes it on the CPU. torch calls our kernel only when a device named "npu" is asked for, so that nothing else
becomes slower, and factories, ``Tensor.to``, ``Tensor.npu``, modules, default devices and ``torch.tensor`` need no
replacement. As on the real device, ``.npu()`` of a tensor returns a copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils import backend_registration

from . import npu

_KEY = "PrivateUse1"  # torch's dispatch key for the one device extension of a process
_CPU = torch.device("cpu")

_libraries: list[torch.library.Library] = []  # the kernels below live as long as these


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of a device extension. Not available: so `dist.barrier` and the like work on the CPU."""

    def is_available(self) -> bool:
        return False

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, device_index: int) -> bool:
        return False


def installed() -> bool:
    """Return whether "npu" is a device of this process, by this module."""
    return bool(_libraries)


def install() -> None:
    """Make "npu" a device of this process.

    Raises:
        RuntimeError: another device extension has taken torch's only place for one.
    """
    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise RuntimeError(f"this process already has a device extension, {taken!r}; torch has room for one only")
    backend_registration._setup_privateuseone_for_python_backend("npu", npu, _Hooks())
    _register_kernels()
    _trace_on_cpu(FakeTensorMode)
    _trace_on_cpu(ProxyTorchDispatchMode)
    _store_on_cpu()
    _complete_torch()


def _register_kernels() -> None:
    """Serve every operation by `_make_on_cpu`.

    The two that most others are made of also by name: a fallback is not found from within ``torch.tensor`` while tracing.
    """
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_make_on_cpu, _KEY)
    for operation in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
        aten.impl(operation, partial(_make_on_cpu, operation), _KEY)
    _libraries.extend([every, aten])


def _make_on_cpu(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``operation``, asked for on "npu", on the CPU. Pinned memory makes no difference there."""
    kwargs.pop("pin_memory", None)
    if "device" in kwargs:
        kwargs["device"] = _CPU
    return operation(*args, **kwargs)


def _trace_on_cpu(mode: Any) -> None:
    """Let a tracing mode of torch.compile and torch.export see the CPU wherever the program says "npu".

    Tracing computes a tensor's device from the arguments, above the kernels; without this, traced tensors "on npu" would
    not mix with those on the CPU that really exist. Only tracing passes here.
    """
    dispatch = mode.__torch_dispatch__

    def dispatch_on_cpu(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "npu":
            kwargs = {**kwargs, "device": _CPU}
        return dispatch(self, func, types, args, kwargs)

    mode.__torch_dispatch__ = dispatch_on_cpu


def _store_on_cpu() -> None:
    """Let ``torch.load(..., map_location="npu")`` keep its storages on the CPU: they are made without the dispatcher."""
    storage: Any = torch.UntypedStorage
    move = storage.to

    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        on_npu = torch.device(device).type == "npu"
        return move(self, device=_CPU if on_npu else device, non_blocking=non_blocking)

    storage.to = to


def _complete_torch() -> None:
    """Add the few names whose answer torch cannot work out from a device that holds no tensors."""
    tensor: Any = torch.Tensor
    tensor.is_npu = property(lambda self: self.device.type in ("cpu", "npu"), doc="True: every CPU tensor is on the npu.")
    tensor.pin_memory = lambda self, device=None: self
    accelerator: Any = torch.accelerator
    accelerator.synchronize = npu.synchronize
