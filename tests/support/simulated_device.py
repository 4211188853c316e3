"""A simulated GPU: ordinary torch tensors of the device type `simgpu`, whose values lie in CPU memory.

    device = register()
    with device.measured(limit=4_000_000) as usage:
        ...

It behaves like a CUDA device towards a program: operations on tensors of two devices raise, `.numpy()` raises, memory
is limited, reads by the host are counted, streams and events order the work, and autograd runs its backward in a thread
of its own. The CPU computes every operation, so results equal those of the CPU up to rounding.

torch registers one such device for the lifetime of a process. Use it in processes of `tests.support.forked` alone.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

NAME = "simgpu"
ROOT = str(Path(__file__).resolve().parents[2])

_aten = torch.ops.aten
# Operations whose result's shape depends on values: a GPU waits for its queue to tell the host the shape.
_SHAPED_BY_VALUES = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "repeat_interleave.Tensor")


@dataclass
class Usage:
    """Counts within a block of `SimulatedDevice.measured`.

    Attributes:
        limit: bytes that fit on the device; None for no limit.
        peak: most bytes that were alive at once.
        reads: (kind, "file:line" of the product's line) of each read for which the host waits.
        lags: operations that were queued behind the copy, for each read of kind "event".
        uploads: bytes of each copy from the host.
        blocking: "file:line" of each copy from the host for which the host waits, as it does without pinned memory.
        short: allocations that did not fit.
        hazards: descriptions of accesses that two streams made without order.
    """

    limit: int | None = None
    peak: int = 0
    reads: list[tuple[str, str]] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    blocking: list[str] = field(default_factory=list)
    short: int = 0
    hazards: list[str] = field(default_factory=list)

    def places(self) -> Counter:
        """Return the number of reads for each kind and place."""
        return Counter(self.reads)


class _Block:
    """Memory of one storage.

    Attributes:
        memory: the CPU storage.
        writes: the last write as (stream number, tick); reads: the last read of each stream.
        on: streams that `record_stream` named.
    """

    __slots__ = ("memory", "nbytes", "on", "place", "reads", "writes")

    def __init__(self, memory, nbytes, writes):
        self.memory = memory
        self.nbytes = nbytes
        self.place = memory.data_ptr()
        self.writes = writes
        self.reads = {}
        self.on = set()


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_EXTERNAL = 12  # kDLExtDev: torch takes it for its device of out-of-tree backends
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.POINTER(_DLTensor)
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Memory(np.ndarray):
    """Bytes of a storage, which torch owns. Python keeps a set error while it calls `__del__`, but not a C callback."""

    block: _Block | None = None

    def __del__(self):
        if _SIMULATED is not None and self.block is not None:
            _SIMULATED.release(self.block)


class Stream(torch.Stream):
    """A queue of work. Work of two streams has no order unless an event or `wait_stream` makes one."""

    count = 0
    known: dict[int, int]
    tick: int

    def __new__(cls, device=None, priority=0):
        cls.count += 1
        made = super().__new__(cls, stream_id=cls.count - 1, device_index=0, device_type=_TYPE)
        # How far each stream had come when this one last waited for it.
        made.known = {}
        made.tick = 0
        return made

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def wait_event(self, event):
        _SIMULATED.log("wait", self.stream_id, event.known)
        for number, tick in event.known.items():
            self.known[number] = max(self.known.get(number, 0), tick)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        _SIMULATED.wait("synchronize")

    def query(self):
        return True


class Event:
    """A mark in a stream."""

    def __init__(self, enable_timing=False, blocking=False):
        self.known = {}

    def record(self, stream=None):
        stream = stream or current_stream()
        self.known = {**stream.known, stream.stream_id: stream.tick}
        _SIMULATED.log("record", stream.stream_id, self.known)

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def synchronize(self):
        """Wait for the work before the mark; work that was queued since may go on."""
        _SIMULATED.wait("event", self.known)

    def query(self):
        return True


# c10::DeviceType::PrivateUse1.
_TYPE = 20
_STREAMS = threading.local()


def current_stream(device=None):
    """Return this thread's stream."""
    return getattr(_STREAMS, "now", None) or _SIMULATED.stream


@contextmanager
def stream(chosen):
    """Queue the work of the block on a stream."""
    before = current_stream()
    _STREAMS.now = chosen
    try:
        yield
    finally:
        _STREAMS.now = before


class _DeviceGenerator(torch._C.Generator):
    """A generator of the device; the CPU draws its numbers."""


class _AnyGenerator(type):
    def __instancecheck__(cls, value):
        return isinstance(value, torch._C.Generator)

    def __call__(cls, device="cpu"):
        own = torch.device(device).type == NAME
        return _DeviceGenerator("cpu") if own else torch._C.Generator(device)


class Generator(metaclass=_AnyGenerator):
    """The type of all generators. torch makes those of out-of-tree devices by C++ code alone."""


class SimulatedDevice:
    """The device of this process.

    Attributes:
        live: bytes of live storages.
        peak: most of them since `reset_peak`.
        usage: the counts of the block that measures.
        events: ("record" or "wait", stream number, {stream number: tick}) of each event.
    """

    def __init__(self):
        self.stream = Stream()
        self.live = 0
        self.peak = 0
        self.total = 1 << 40
        self.usage = Usage()
        self.events = []
        self.failure = None
        self._blocks = {}
        self._pinned = {}
        self._copies = []
        self._known_roles = {}
        # Released by another thread in the middle of an allocation otherwise.
        self._lock = threading.RLock()

    @contextmanager
    def measured(self, limit: int | None = None):
        """Yield the Usage of the block, in which at most `limit` bytes fit on the device."""
        before, self.usage = self.usage, Usage(limit, self.live)
        try:
            yield self.usage
        finally:
            self.usage = before

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def log(self, kind, number, known):
        """Record a stream's event."""
        self.events.append((kind, number, dict(known)))

    def check(self):
        """Raise the error of a hook of autograd; see `_guard_hooks`."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def wait(self, kind, until=None):
        """Count a read for which the host waits: for all work of the device, or for that up to an event."""
        self.usage.reads.append((kind, _place()))
        if until is not None:
            now = current_stream()
            self.usage.lags.append(now.tick - until.get(now.stream_id, 0))
        waiting, self._copies = self._copies, []
        for row in waiting:
            target, values, number, tick = row
            if until is None or until.get(number, 0) >= tick:
                target.copy_(values)
            else:
                self._copies.append(row)

    # Pinned memory of the host.

    def pin(self, tensor):
        """Pin a CPU tensor's memory in place, until the process ends."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor

    def is_pinned(self, tensor):
        """Report whether a CPU tensor's memory is pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    # Memory.

    def adopt(self, values: torch.Tensor) -> torch.Tensor:
        """Return a device tensor over the memory of a CPU tensor."""
        memory = values.untyped_storage()
        size = memory.nbytes()
        # Each storage has an address of its own, even an empty one.
        memory = memory if size else torch.empty(1, dtype=torch.uint8, device="cpu").untyped_storage()
        self._reserve(size)
        now = current_stream()
        block = _Block(memory, size, (now.stream_id, now.tick))
        owner = torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).numpy().view(_Memory)
        owner.block = block
        with self._lock:
            self._blocks[block.place] = block
        capsule = owner.__dlpack__()
        tensor = _pointer(capsule, b"dltensor").contents
        tensor.device = _DLDevice(_EXTERNAL, 0)
        tensor.shape[0] = size
        return _alias(torch._C._from_dlpack(capsule), values)

    def _reserve(self, size):
        usage = self.usage
        with self._lock:
            if usage.limit is not None and self.live + size > usage.limit:
                usage.short += 1
                raise torch.OutOfMemoryError(
                    f"{NAME} out of memory. Tried to allocate {size} bytes. {self.live} of {usage.limit} are in use."
                )
            self.live += size
            self.peak = max(self.peak, self.live)
            usage.peak = max(usage.peak, self.live)

    def release(self, block):
        """Count a block as free."""
        with self._lock:
            del self._blocks[block.place]
            self.live -= block.nbytes
        for number, tick in (block.writes, *block.reads.items()):
            # The allocator gives this memory to the main stream at once.
            if number and number not in block.on and self.stream.known.get(number, 0) < tick:
                self.usage.hazards.append(f"memory is freed while stream {number} uses it")

    def values(self, tensor: torch.Tensor, written: bool = False) -> torch.Tensor:
        """Return the CPU tensor over a device tensor's memory."""
        with self._lock:
            block = self._blocks[tensor.untyped_storage().data_ptr()]
        self._order(block, written)
        empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return empty.set_(block.memory, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _order(self, block, written):
        now = current_stream()
        now.tick += 1
        before = [block.writes, *block.reads.items()] if written else [block.writes]
        for number, tick in before:
            if number != now.stream_id and now.known.get(number, 0) < tick:
                does = "writes" if written else "reads"
                self.usage.hazards.append(f"stream {now.stream_id} {does} what stream {number} uses, at {_place()}")
        if written:
            block.writes = (now.stream_id, now.tick)
            block.reads = {}
        else:
            block.reads[now.stream_id] = now.tick

    # Operations.

    def run(self, operator, *args, **kwargs):
        """Compute any operation on the CPU. The arguments must be of this device, apart from CPU scalars."""
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self._run(operator, args, kwargs)

    def _run(self, operator, args, kwargs):
        self.check()
        written, tensors = self._roles(operator)
        known = {}
        # torch passes a number where the operation takes a tensor of no dimensions.
        args = [
            torch.tensor(value, device="cpu") if index in tensors and isinstance(value, (int, float)) else value
            for index, value in enumerate(args)
        ]
        here = [self._here(value, index in written, known) for index, value in enumerate(args)]
        more = {name: self._here(value, name in written, known) for name, value in kwargs.items()}
        found = operator(*here, **more)
        if any(tensor.shape != values.shape for tensor, values in known.values()):
            raise NotImplementedError(f"{operator}: memory of {NAME} does not grow")
        name = operator.name().removeprefix("aten::")
        if name in _SHAPED_BY_VALUES or _has_mask(operator, args):
            self.wait("shape")
        elif not isinstance(found, (torch.Tensor, tuple, list)) and found is not None:
            self.wait("value")
        return self._there(found, known)

    def _roles(self, operator):
        """Return (positions and names of the arguments that an operation changes, positions of single tensors)."""
        if operator not in self._known_roles:
            arguments = list(enumerate(operator._schema.arguments))
            changed = [(i, one.name) for i, one in arguments if one.alias_info and one.alias_info.is_write]
            tensors = {i for i, one in arguments if str(one.type) == "Tensor"}
            self._known_roles[operator] = {key for pair in changed for key in pair}, tensors
        return self._known_roles[operator]

    def _here(self, value, written, known):
        if isinstance(value, torch.Tensor):
            if value.device.type == NAME:
                values = self.values(value, written)
                known[id(values)] = value, values
                return values
            if value.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                    f"{value.device}!"
                )
            return value
        if isinstance(value, (list, tuple)):
            return type(value)([self._here(one, written, known) for one in value])
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if isinstance(value, torch._C.Generator) and not isinstance(value, _DeviceGenerator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device.type}'")
        return value

    def _there(self, found, known):
        if isinstance(found, (list, tuple)):
            return type(found)([self._there(one, known) for one in found])
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) in known:
            return known[id(found)][0]
        place = found.untyped_storage()._cdata
        for tensor, values in known.values():
            if values.untyped_storage()._cdata == place:
                return _alias(tensor, found)
        return self.adopt(found)

    def allocate(self, operator):
        """Return the kernel of an operation that allocates."""

        def kernel(*args, device=None, pin_memory=None, **kwargs):
            self.check()
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return self.adopt(operator(*args, device=torch.device("cpu"), **kwargs))

        return kernel

    def copy(self, target, source, non_blocking=False):
        """Copy within the device, from the host, or to it."""
        self.check()
        with torch._C._AutoDispatchBelowADInplaceOrView():
            here = self.values(source) if source.device.type == NAME else source
            if source.device.type != NAME:
                self.usage.uploads.append(source.nbytes)
                if not (non_blocking and self.is_pinned(source)):
                    self.usage.blocking.append(_place())
            if target.device.type == NAME:
                self.values(target, True).copy_(here)
            elif non_blocking and self.is_pinned(target):
                # Until the host waits for it, the target holds other numbers.
                now = current_stream()
                self._copies.append((target.detach(), here.clone(), now.stream_id, now.tick))
                target.fill_(float("nan") if target.is_floating_point() else 0)
            else:
                self.wait("copy")
                target.copy_(here)
            return target

    def item(self, tensor):
        """Return the value of a tensor of one element."""
        self.wait("item")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.values(tensor).item()

    def record_stream(self, tensor, chosen):
        """Keep a tensor's memory until the stream is done with it."""
        self._blocks[tensor.untyped_storage().data_ptr()].on.add(chosen.stream_id)


def _alias(tensor, shape):
    """Return a tensor over the storage of `tensor` with the geometry and dtype of `shape`."""
    other = _aten.alias(tensor)
    if other.dtype != shape.dtype:
        flat = other.as_strided_((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        other = _aten.view.dtype(flat, shape.dtype)
    return other.as_strided_(shape.size(), shape.stride(), shape.storage_offset())


def _has_mask(operator, args):
    """Report whether an operation indexes by a mask."""
    if operator not in (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default):
        return False
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _place() -> str:
    """Return the line of the product from which this is called, or of whoever calls torch."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith((f"{ROOT}/trainers", f"{ROOT}/nodes")):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _Module:
    """The functions of `torch.simgpu`, as torch.cuda has them."""

    Stream = Stream
    Event = Event
    stream = staticmethod(stream)
    current_stream = staticmethod(current_stream)

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def set_device(self, device):
        pass

    def manual_seed(self, seed):
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed):
        pass

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device=None):
        _SIMULATED.wait("synchronize")

    def empty_cache(self):
        pass

    def memory_allocated(self, device=None):
        return _SIMULATED.live

    def max_memory_allocated(self, device=None):
        return _SIMULATED.peak

    def reset_peak_memory_stats(self, device=None):
        _SIMULATED.peak = _SIMULATED.live

    def mem_get_info(self, device=None):
        total = _SIMULATED.total if _SIMULATED.usage.limit is None else _SIMULATED.usage.limit
        return max(0, total - _SIMULATED.live), total


_SIMULATED: SimulatedDevice | None = None
_LIBRARIES = []


def register() -> SimulatedDevice:
    """Register the device with torch, once in a process, and return it."""
    global _SIMULATED
    if _SIMULATED is not None:
        return _SIMULATED
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _SIMULATED = device = SimulatedDevice()
    every = torch.library.Library("_", "IMPL")
    every.fallback(device.run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    functional, factories = _list_composite()
    for name in ("empty.memory_format", "empty_strided", *factories):
        aten.impl(name, device.allocate(_operator(name)), "PrivateUse1")
    for name in functional:
        aten.impl(name, functools.partial(device.run, _operator(name)), "PrivateUse1")
    aten.impl("copy_", device.copy, "PrivateUse1")
    aten.impl("_local_scalar_dense", device.item, "PrivateUse1")
    aten.impl("record_stream", device.record_stream, "PrivateUse1")
    aten.impl("as_strided", _as_strided, "PrivateUse1")
    aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
    aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    _LIBRARIES.extend((every, aten))
    torch.Generator = Generator
    _share_parameters()
    _guard_hooks(device)
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.is_pinned = lambda tensor: device.is_pinned(tensor)
    return device


def _pin_memory(tensor):
    """Return a copy in pinned memory; the tensor itself if it is pinned."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.device}' tensors: only dense CPU tensors can be pinned")
    if _SIMULATED.is_pinned(tensor):
        return tensor
    # As torch: with the tensor's strides, so that pinning an expanded tensor raises.
    copied = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    copied.copy_(tensor.detach())
    _SIMULATED.pin(copied)
    return copied


def _operator(name):
    base, _, overload = name.partition(".")
    return getattr(getattr(_aten, base), overload or "default")


def _list_composite():
    """Return (operations on tensors, operations that make tensors) that torch would split into several.

    Such a part fills memory that has still to grow. Computing them at once takes half of the time, too.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    functional, factories = [], []
    for name in torch._C._dispatch_get_all_op_names():
        split = any(has(name, f"CompositeExplicitAutograd{end}") for end in ("", "NonFunctional"))
        name = name.removeprefix("aten::")
        if split and "::" not in name:
            schema = _operator(name)._schema
            takes = any("Tensor" in str(one.type) for one in schema.arguments)
            chooses = any(one.name == "device" for one in schema.arguments)
            if takes != chooses and not any(one.alias_info for one in (*schema.arguments, *schema.returns)):
                (functional if takes else factories).append(name)
    return functional, factories


def _as_strided(tensor, size, stride, storage_offset=None):
    with torch._C._AutoDispatchBelowADInplaceOrView():
        offset = tensor.storage_offset() if storage_offset is None else storage_offset
        return _aten.alias(tensor).as_strided_(size, stride, offset)


def _convolution(*args):
    return _SIMULATED.run(_aten.convolution.default, *args)


def _convolution_backward(grad, inputs, weight, *args):
    # Convolution biases are summed by torch's own rule for devices with a convolution of their own.
    needed = args[-1]
    sizes = [weight.shape[0]] if needed[2] else None
    return _SIMULATED.run(_aten.convolution_backward.default, grad, inputs, weight, sizes, *args)


def _share_parameters():
    """Let `Parameter.data = ...` change the device, as it does between CPU and CUDA.

    torch allows it for the devices that it knows. For others `nn.Module.to` makes new Parameters instead.
    """
    # It looks at the function when it is imported, as every optimizer imports it.
    import torch._dynamo

    known = torch._has_compatible_shallow_copy_type
    data = torch._C.TensorBase.data

    def compatible(tensor, other):
        return known(tensor, other) or {tensor.device.type, other.device.type} == {NAME, "cpu"}

    def assign(tensor, other):
        if tensor.device.type == other.device.type or not compatible(tensor, other):
            data.__set__(tensor, other)
            return
        grad, needed = tensor.grad, tensor.requires_grad
        moved = other.detach()
        if tensor.__dict__:
            moved = moved.as_subclass(type(tensor)) if type(tensor) is not torch.nn.Parameter else moved
        torch._C._swap_tensor_impl(tensor, moved)
        tensor.requires_grad_(needed)
        tensor.grad = grad

    torch._has_compatible_shallow_copy_type = compatible
    torch.Tensor.data = property(data.__get__, assign)


def _guard_hooks(device):
    """Raise errors of autograd's hooks from the next operation instead.

    Between CPU and CUDA the engine hands them on. A device guard in Python is called while the engine leaves the
    hook, with the error still set, and ends the process.
    """

    def guarded(hook, instead):
        def call(*args):
            try:
                return hook(*args)
            except Exception as error:
                first, device.failure = device.failure or error, None
                value = instead(*args)
                device.failure = first
                return value

        return call

    nothing = lambda *args: None  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks
    begin = hooks.__init__

    def init(self, pack, unpack):
        def packed(tensor):
            return pack(tensor), tensor.shape, tensor.dtype, tensor.device

        def unpacked(kept):
            return unpack(kept[0])

        def filler(kept):
            _, shape, dtype, where = kept
            with torch.no_grad(), device.measured():
                return torch.zeros((), dtype=dtype, device=where).expand(shape)

        begin(self, packed, guarded(unpacked, filler))

    hooks.__init__ = init
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        register = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, _with_guard(register, lambda hook: guarded(hook, nothing)))
    run = torch.autograd.graph._engine_run_backward

    def engine(*args, **kwargs):
        found = run(*args, **kwargs)
        device.check()
        return found

    torch.autograd.graph._engine_run_backward = engine
    torch.autograd._engine_run_backward = engine


def _with_guard(register, guard):
    return lambda tensor, hook: register(tensor, guard(hook))


def _pin_for_comfy(tensor):
    _SIMULATED.pin(tensor)
    return True


@contextmanager
def comfy_on(device: torch.device, state: str = "NORMAL_VRAM"):
    """Let ComfyUI compute on a device in the block, in a state of its memory management such as LOW_VRAM."""
    import comfy.model_management as management

    free, total = management.get_free_memory, management.get_total_memory

    def get_free_memory(dev=None, torch_free_too=False):
        if (dev or device).type != NAME:
            return free(dev, torch_free_too)
        left = _Module().mem_get_info()[0]
        return (left, left) if torch_free_too else left

    def get_total_memory(dev=None, torch_total_too=False):
        if (dev or device).type != NAME:
            return total(dev, torch_total_too)
        whole = _Module().mem_get_info()[1]
        return (whole, whole) if torch_total_too else whole

    values = {"get_torch_device": lambda: device, "is_nvidia": lambda: False, "is_amd": lambda: False}
    values |= {"get_free_memory": get_free_memory, "get_total_memory": get_total_memory}
    if device.type == NAME:
        # Text encoders compute on a GPU that can compute in half precision; models keep the dtype of their files.
        values |= {"should_use_fp16": lambda device=None, *args, **kwargs: device is None}
        values |= {"should_use_bf16": lambda *args, **kwargs: False}
        values |= {"cpu_state": management.CPUState.GPU, "vram_state": management.VRAMState[state]}
        values |= {"pin_memory": _pin_for_comfy, "unpin_memory": lambda tensor: True}
    before = {name: getattr(management, name) for name in values}
    management.current_loaded_models.clear()
    vars(management).update(values)
    try:
        yield device
    finally:
        vars(management).update(before)
        management.current_loaded_models.clear()
