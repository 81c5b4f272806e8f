"""A pretended GPU: tensors that say they lie on `cuda:0`, with a CPU's numbers behind them and CUDA's
rules enforced. The engine's whole GPU path runs on it, on a build of torch without CUDA.

What breaks a rule raises `RuleError` where it stands:

- a CPU tensor in an operation with tensors of the device;
- whatever makes the host wait: `item`, `tolist`, boolean indexing, `nonzero`, a blocking copy, a
  copy from or to memory that is not pinned;
- within a captured graph, a copy from or to the host.

What CUDA would not notice either gives wrong numbers, as there: memory is garbage until something is
written to it, a copy on its way to the host is garbage until an event behind it was waited for, and
a graph replays its operations on the addresses that it was captured with, while capturing itself
computes nothing.

Not pretended: kernels' code (Triton's interpreter and compiler see to it), more than one stream, the
size of memory.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

#: Operations whose result has a size, or a value, that the host must wait for.
WAITING = frozenset(
    [
        "_local_scalar_dense",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
        "_unique2",
    ]
)


#: Operations that give memory and launch nothing.
GIVING_MEMORY = frozenset(["empty", "empty_like", "empty_strided", "new_empty"])


class RuleError(RuntimeError):
    """Something that a GPU would not do, or would make the host wait for."""


class Memory:
    """Bytes of the tensors that are alive on the device, and the most that there were."""

    def __init__(self) -> None:
        self._held: Counter[int] = Counter()
        self.live = self.peak = 0

    def hold(self, tensor: DeviceTensor) -> None:
        """Count a tensor's memory, once for all that are views of it, while one of them lives."""
        storage = tensor.numbers.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        if not self._held[place]:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._held[place] += 1
        weakref.finalize(tensor, self._let_go, place, size)

    def _let_go(self, place: int, size: int) -> None:
        self._held[place] -= 1
        if not self._held[place]:
            self.live -= size

    def peak_of(self, work: Callable[[], Any]) -> int:
        """The most bytes that are alive while work runs, beside what is before."""
        before = self.peak = self.live
        work()
        return self.peak - before


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended GPU; `numbers` are its own, on the CPU."""

    numbers: Tensor
    device_of: PretendedGPU
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor, gpu: PretendedGPU) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("cuda", 0),
        )
        made.numbers, made.device_of = numbers, gpu
        gpu.memory.hold(made)
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        gpu = next(leaf.device_of for leaf in tree_leaves((args, kwargs)) if is_there(leaf))
        return gpu.run(func, tuple(args), kwargs or {})

    # torch's own indexing, copying and `~` ask for a device guard, which a build without CUDA lacks,
    # before anything is dispatched.

    def __getitem__(self, key: Any) -> Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        view: Tensor = self
        dim, tensors = 0, {}
        for position, one in enumerate(keys):
            if one is None:
                view = aten.unsqueeze.default(view, dim)
                dim += 1
            elif one is Ellipsis:
                behind = sum(other is not None for other in keys[position + 1 :])
                dim = view.dim() - behind
            elif isinstance(one, slice):
                view = aten.slice.Tensor(view, dim, one.start, one.stop, one.step or 1)
                dim += 1
            elif isinstance(one, Tensor):
                tensors[dim] = one
                dim += 1
            else:
                view = aten.select.int(view, dim, int(one))
        if tensors:
            return aten.index.Tensor(view, [tensors.get(at) for at in range(max(tensors) + 1)])
        return view

    def __setitem__(self, key: Any, value: Any) -> None:
        into = self[key]
        if isinstance(value, Tensor):
            aten.copy_.default(into, value.expand(into.shape))
        else:
            aten.fill_.Scalar(into, value)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(aten.unbind.int(self))

    def __invert__(self) -> Tensor:
        return aten.bitwise_not.default(self)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return aten.copy_.default(self, source, non_blocking)

    def contiguous(self, **_: Any) -> Tensor:
        if self.is_contiguous():
            return self
        return aten.clone.default(self, memory_format=torch.contiguous_format)

    def _waits(self, *_: Any) -> Any:
        raise RuleError("the host waits for the value of a tensor on the device")

    __bool__ = __int__ = __float__ = __index__ = item = tolist = numpy = _waits


def is_there(value: Any) -> bool:
    """Whether a value is a tensor of the pretended GPU."""
    return isinstance(value, DeviceTensor)


def _numbers(value: Any) -> Any:
    return value.numbers if is_there(value) else value


def spoil(tensor: Tensor) -> Tensor:
    """Fill memory that nobody has written to with what would be noticed."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.dtype == torch.float8_e4m3fn:  # torch fills none of these
        tensor.view(torch.uint8).fill_(0x7F)  # not a number
        return tensor
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    return tensor.fill_(min(torch.iinfo(tensor.dtype).max, 1 << 40))


class Graph:
    """`torch.cuda.CUDAGraph`: captured operations, to be run again."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self._gpu = gpu
        self._work: list[Callable[[], Any]] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self._gpu.captured is not None:
            raise RuleError("a graph is captured already")
        self._gpu.captured = self._work

    def capture_end(self) -> None:
        self._gpu.captured = None

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        if self._gpu.captured is not None:
            raise RuleError("a graph is replayed while another one is captured")
        self._gpu.replays += 1
        for work in self._work:
            work()


class Stream:
    """`torch.cuda.Stream`; there is one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    """`torch.cuda.Event`: copies that were launched before it have arrived once it was waited for."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self._gpu, self._asked = gpu, 0
        self._before: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: Any = None) -> None:
        self._before = list(self._gpu.on_their_way)

    def query(self) -> bool:
        """Not at once: whoever does not ask would read garbage."""
        self._asked += 1
        if self._asked > 2:
            self.synchronize()
        return self._asked > 2

    def synchronize(self) -> None:
        for copy in self._before:
            copy[0].copy_(copy[1])
            self._gpu.on_their_way[:] = [c for c in self._gpu.on_their_way if c is not copy]
        self._before = []


class _Dispatch(TorchDispatchMode):
    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._gpu.run(func, tuple(args), kwargs or {})


class PretendedGPU:
    """The device.

    Attributes:
        strict: whether the host may not wait; a model that is loaded may let it.
        captured: what a graph under capture is to run; None: nothing is captured.
        on_their_way: copies to the host that nobody has waited for: where to, and what.
        launches: how often each operation was launched.
        replays: graphs replayed.
    """

    def __init__(self) -> None:
        self.strict = True
        self.captured: list[Callable[[], Any]] | None = None
        self.on_their_way: list[tuple[Tensor, Tensor]] = []
        self.launches: Counter[str] = Counter()
        self.memory = Memory()
        self.replays = 0
        self._pinned: set[int] = set()

    @contextlib.contextmanager
    def may_wait(self) -> Iterator[None]:
        """Let the host wait: a model is moved there."""
        self.strict = False
        try:
            yield
        finally:
            self.strict = True

    def dispatching(self) -> TorchDispatchMode:
        """While it holds, in this thread, what is made on `cuda` is made on this device."""
        return _Dispatch(self)

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory."""
        pinned = tensor.clone()
        self._pinned.add(pinned.data_ptr())
        return pinned

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of torch's."""
        name = func._schema.name.partition("::")[2]
        device = kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to_here = device is not None and torch.device(device).type == "cuda"
        if not to_here and not any(map(is_there, tensors)):
            return self._on_the_host(func, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self.dispatching():
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if name == "_to_copy":
            return self._moved(func, args, kwargs, to_here)
        if name == "copy_":
            return self._copied(func, args, kwargs)
        if name == "_fused_sdp_choice":
            return 0  # the plain one
        if name == "_flash_attention_forward":
            return self._flash(args, kwargs)
        if name == "_scaled_mm":
            return self._scaled_product(func, args, kwargs)
        self._check(name, args, tensors)
        if to_here:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return self._launched(func, name, args, {k: kwargs[k] for k in kwargs if k != "pin_memory"})

    def launch(self, name: str, work: Callable[[], Sequence[Tensor]], *made: Tensor) -> Any:
        """Launch a kernel: `work` returns the numbers of what it makes.

        Returns:
            What is made, on the device.
        """
        self.launches[name] += 1
        for tensor in made:
            spoil(tensor)

        def write() -> None:
            for tensor, numbers in zip(made, work(), strict=True):
                tensor.copy_(numbers.view(tensor.shape))

        write() if self.captured is None else self.captured.append(write)
        return tuple(DeviceTensor(tensor, self) for tensor in made)

    def _on_the_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        pinned = spoil(func(*args, **{**kwargs, "pin_memory": False}))
        self._pinned.add(pinned.data_ptr())
        return pinned

    def _check(self, name: str, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
        if self.strict and name in WAITING:
            raise RuleError(f"{name}: the host waits for the device")
        if (self.strict and name.startswith(("index.", "index_put"))) or name == "index":
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise RuleError("boolean indexing: the host waits for the device")
        for tensor in tensors:
            # One number may stand on the host, unless it says where to read.
            if not is_there(tensor) and (tensor.dim() or name.startswith("index")):
                raise RuleError(f"{name}: a CPU tensor {tuple(tensor.shape)} beside the device's")

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], here: bool) -> Any:
        source = args[0]
        if not is_there(source):
            self._from_host(source, bool(kwargs.get("non_blocking")))
            return DeviceTensor(source.to(kwargs.get("dtype") or source.dtype, copy=True), self)
        if kwargs.get("device") is not None and not here:
            if self.strict:
                raise RuleError("a blocking copy to the host")
            return func(source.numbers, *args[1:], **kwargs)
        return self._launched(func, "_to_copy", args, {**kwargs, "device": None})

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        into, source = args[:2]
        free = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if is_there(into):
            if not is_there(source) and source.dim():
                self._from_host(source, free)
            return self._launched(func, "copy_", args, kwargs)
        if self.captured is not None:
            raise RuleError("a copy to the host within a graph")
        if self.strict and not (free and into.data_ptr() in self._pinned):
            raise RuleError("a copy to the host that blocks, or to memory that is not pinned")
        self.on_their_way.append((into, source.numbers.clone()))
        return into

    def _from_host(self, source: Tensor, non_blocking: bool) -> None:
        if self.captured is not None:
            raise RuleError("a copy from the host within a graph, which keeps its address")
        if (
            self.strict
            and source.dim()
            and not (non_blocking and source.data_ptr() in self._pinned)
        ):
            raise RuleError("a copy from the host that blocks, or from memory that is not pinned")

    def _launched(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema = func._schema
        numbers, named = tree_map(_numbers, args), tree_map(_numbers, kwargs)
        writes = [at for at, one in enumerate(schema.arguments) if _is_written(one)]
        if not writes and any(one.alias_info is not None for one in schema.returns):
            # A view: nothing is launched.
            return tree_map(self._here, func(*numbers, **named))
        if name in GIVING_MEMORY:
            return tree_map(self._here, spoil(func(*numbers, **named)))
        self.launches[name] += 1
        if writes:
            work = functools.partial(func, *numbers, **named)
            work() if self.captured is None else self.captured.append(work)
            first = writes[0]
            return args[first] if first < len(args) else kwargs[schema.arguments[first].name]
        if self.captured is None:
            return tree_map(self._here, func(*numbers, **named))
        shapes = func(*tree_map(_meta, numbers), **{k: _meta(v, k) for k, v in named.items()})
        made = tree_map(_spoilt_like, shapes)

        def again() -> None:
            for into, value in zip(
                tree_leaves(made), tree_leaves(func(*numbers, **named)), strict=True
            ):
                if isinstance(into, Tensor):
                    into.copy_(value)

        self.captured.append(again)
        return tree_map(self._here, made)

    def _flash(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """FlashAttention over packed sequences: what it is told is checked, then computed plainly."""
        from pipeline.model.attention import Sequences, attend_sequences

        q, k, v, query_ends, starts, _, _, _, causal = tree_map(_numbers, args[:9])
        counts = _numbers(kwargs["seqused_k"])

        def work() -> Sequence[Tensor]:
            queries, first, rows = query_ends.diff().tolist(), starts[:-1].tolist(), counts.tolist()
            assert sum(queries) == len(q)
            assert all(at >= 0 and at + n <= len(k) for at, n in zip(first, rows, strict=True))
            packed = Sequences.pack(queries, first, rows, None)
            return (attend_sequences(q, k, v, packed, causal=causal),)

        made = self.launch("flash", work, torch.empty_like(q))
        return (*made, *(DeviceTensor(torch.empty(0), self) for _ in range(4)))

    def _scaled_product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product of 8-bit floating point, which a build without CUDA lacks: what cuBLAS and
        CUTLASS ask for is checked, then computed plainly.
        """
        names = (one.name for one in func._schema.arguments)
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        rows, weight = _numbers(told["self"]), _numbers(told["mat2"])
        scales, row_scales = _numbers(told["scale_a"]), _numbers(told["scale_b"])
        (count, into), out = rows.shape, weight.shape[1]
        assert rows.dtype == weight.dtype == torch.float8_e4m3fn
        assert rows.is_contiguous()
        assert weight.stride(0) == 1  # by columns
        assert into % 16 == out % 16 == weight.stride(1) % 16 == weight.storage_offset() % 16 == 0
        assert (scales.shape, row_scales.shape) == ((count, 1), (1, out))
        assert scales.dtype == row_scales.dtype == torch.float32
        assert told["out_dtype"] == torch.bfloat16

        def work() -> Sequence[Tensor]:
            product = (rows.float() * scales) @ (weight.float() * row_scales)
            return (product.bfloat16(),)

        return self.launch("scaled_mm", work, torch.empty(count, out, dtype=torch.bfloat16))[0]

    def _here(self, value: Any) -> Any:
        return DeviceTensor(value, self) if isinstance(value, Tensor) else value


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _meta(value: Any, name: str = "") -> Any:
    if name == "device":
        return torch.device("meta")
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _spoilt_like(shape: Any) -> Any:
    if not isinstance(shape, Tensor):
        return shape
    return spoil(torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype))


def _kernels(gpu: PretendedGPU) -> dict[str, Callable[..., Any]]:
    """Launchers in the place of `pipeline.model.kernels`', which compute what the plain forms do."""
    from pipeline.model import attention, ops

    def add_norm(name: str, x: Any, delta: Any, *affine: Any) -> Any:
        left, right, *rest = map(_numbers, (x, delta, *affine))
        made = [torch.empty_like(left)] if delta is None else [torch.empty_like(left) for _ in "ab"]

        def work() -> Sequence[Tensor]:
            total, normed = getattr(ops, name)(left, right, *rest)
            return (normed,) if right is None else (total, normed)

        results = gpu.launch(name, work, *made)
        return (x, *results) if delta is None else results

    def add_rms_norm(*arguments: Any) -> Any:
        return add_norm("add_rms_norm", *arguments)

    def add_layer_norm(*arguments: Any) -> Any:
        return add_norm("add_layer_norm", *arguments)

    def silu_multiply(gate: Any, up: Any) -> Any:
        a, b = _numbers(gate), _numbers(up)
        made = torch.empty(a.shape, dtype=a.dtype)
        return gpu.launch("silu_multiply", lambda: (ops.silu_multiply(a, b),), made)[0]

    def fp8_rows(x: Any) -> Any:
        a = _numbers(x)
        made = torch.empty(a.shape, dtype=torch.float8_e4m3fn), torch.empty(len(a), 1)
        return gpu.launch("fp8_rows", lambda: ops.fp8_rows(a), *made)

    def quick_gelu_(x: Any) -> Any:
        a = _numbers(x)
        gpu.launch("quick_gelu", lambda: _nothing(a.copy_(ops.quick_gelu_(a.clone()))))
        return x

    def rotate_(x: Any, cos: Any, sin: Any) -> Any:
        a, c, s = _numbers(x), _numbers(cos), _numbers(sin)
        gpu.launch("rotate", lambda: _nothing(a.copy_(ops.rotate_(a, c, s))))
        return x

    def rotate_and_store(qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, write: Any) -> Any:
        a, c, s, k, v, places = map(_numbers, (qkv, cos, sin, keys, values, write))
        heads = a.shape[1] - 2 * k.shape[1]

        def work() -> Sequence[Tensor]:
            a[:, :heads].copy_(ops.rotate_and_store(a, c, s, k, v, places))
            return ()

        gpu.launch("rotate_and_store", work)
        return qkv[:, :heads]

    def decode_attention(q: Any, keys: Any, values: Any, starts: Any, lengths: Any) -> Any:
        a, k, v, first, count = map(_numbers, (q, keys, values, starts, lengths))

        def work() -> Sequence[Tensor]:
            layout = attention.StepLayout(None, None, None, first, count)  # type: ignore[arg-type]
            return (attention.attend_decode(a, k, v, layout),)

        made = torch.empty(len(a), a.shape[1] * a.shape[2], dtype=a.dtype)
        return gpu.launch("decode_attention", work, made)[0]

    def most_probable(logits: Any, seen: Any, penalty: Any, slots: Any) -> Any:
        a, known, factor, index = map(_numbers, (logits, seen, penalty, slots))
        made = torch.empty(len(a), dtype=torch.int64)
        work = lambda: (ops.most_probable(a, known, factor, index),)  # noqa: E731
        return gpu.launch("most_probable", work, made)[0]

    made = (
        add_rms_norm,
        add_layer_norm,
        silu_multiply,
        fp8_rows,
        quick_gelu_,
        rotate_,
        rotate_and_store,
    )
    made += (decode_attention, most_probable)
    return {one.__name__: one for one in made}


def _nothing(_: Any) -> Sequence[Tensor]:
    return ()


#: What the pretended GPU says that is free beside a loaded model, and that it has in all.
FREE_BYTES, ALL_BYTES = 700 << 20, 1500 << 20


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """While it holds, `cuda` is a pretended GPU, also for engines that are started meanwhile."""
    from unittest.mock import patch

    from pipeline.engine.engine import Engine
    from pipeline.model import kernels

    gpu = PretendedGPU()
    loop, generator = Engine._loop, torch.Generator

    def loop_there(engine: Engine) -> None:
        with gpu.dispatching():
            loop(engine)

    torch._C._ensureCUDADeviceGuardSet()
    cuda = {
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": lambda *_, **__: Event(gpu),
        "CUDAGraph": lambda: Graph(gpu),
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: Stream(),
        "mem_get_info": lambda *_: (FREE_BYTES, ALL_BYTES),
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name, value in _kernels(gpu).items():
            stack.enter_context(patch.object(kernels, name, value))
        stack.enter_context(patch.object(torch, "Generator", lambda device="cpu": generator()))
        stack.enter_context(
            patch.object(torch.Tensor, "pin_memory", lambda self, *_: gpu.pin(self))
        )
        # In inference mode, operations made of others arrive whole.
        stack.enter_context(patch.object(torch, "inference_mode", lambda *_: torch.no_grad()))
        stack.enter_context(patch.object(Engine, "_loop", loop_there))
        stack.enter_context(gpu.dispatching())
        yield gpu
