"""The one file that knows CUDA/NCCL from CPU/gloo, and the shim that lets Megatron-core run without CUDA.

`platform` holds what the rest of the code asks for: the device, the backend, a few device calls. On
CUDA, `install()` only defines a name that core forgets without Transformer Engine. On a CPU it makes
Megatron-core's hard-coded CUDA spellings mean the CPU, in three narrow ways, all listed below with the
core version they were written for:

1. The modules in `_FACADE_MODULES` see, under their global name `torch`, a copy of torch's namespace in
   which `torch.cuda` is a stand-in and the factory functions take `device="cuda"` as the CPU. It is a
   plain module object: an attribute look-up there costs what it costs in torch, and no operator of the
   model passes through Python.
2. `_FUNCTION_PATCHES` replaces single functions that cannot work on a CPU, or waste time there, by the CPU's
   counterpart.
3. `Tensor.cuda`, `Module.cuda` and the no-argument form of `Tensor.type` answer as Megatron expects.

`tests/unit/test_platform.py` searches the installed core for CUDA spellings outside these tables, so a
new release of Megatron-core that adds one is noticed there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import time
import types
import warnings
from typing import Any

import torch
import torch.distributed

from megafab.errors import UserError

SUPPORTED_CORE = ("0.16.1",)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _INT_MAX = -1, -3, 2**31 - 1

# Modules of megatron.core whose global `torch` becomes the facade.
_FACADE_MODULES = (
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rotary_pos_embedding",
    "models.gpt.gpt_model",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "parallel_state",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "transformer.moe.experts",
    "transformer.moe.moe_utils",
    "transformer.moe.router",
    "transformer.moe.shared_experts",
    "transformer.moe.token_dispatcher",
    "utils",
)


class _CpuStream:
    """Everything on a CPU already happens in order; a stream has nothing to do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _CpuEvent:
        return event or _CpuEvent()

    def synchronize(self) -> None: ...


class _CpuEvent:
    """Records the wall clock, which on a CPU is when the work before it ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _CpuEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


def _cuda_stand_in() -> types.ModuleType:
    """A `torch.cuda` whose calls mean the CPU; anything not listed is torch's own."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    stream = _CpuStream()
    cuda.__dict__.update(
        current_device=lambda: torch.device("cpu"),
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(),
        Stream=_CpuStream,
        Event=_CpuEvent,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )
    return cuda


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        if device is not None and torch.device(device).type == "cuda":
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return make


def _torch_facade() -> types.ModuleType:
    facade = types.ModuleType("torch")
    facade.__dict__.update(torch.__dict__)
    facade.__dict__["__getattr__"] = lambda name: getattr(torch, name)  # torch loads some parts lazily
    facade.__dict__["cuda"] = _cuda_stand_in()
    for name in ("empty", "zeros", "ones", "tensor", "arange", "full"):
        facade.__dict__[name] = _on_cpu(getattr(torch, name))
    return facade


def _move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`moe_utils.maybe_move_tensor_to_cpu` for tensors that are there already (it skips the conversion)."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _get_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _unless_alone(collective: Any) -> Any:
    """A collective from a view of a buffer into the buffer, or back: for one rank they are the same memory,
    which gloo would copy over itself twice, in another thread."""

    @functools.wraps(collective)
    def call(output: torch.Tensor, input: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
        return collective(output, input, group=group, **kwargs) if group.size() > 1 else None

    return call


_BUFFERS = "distributed.param_and_grad_buffer"

# (module of megatron.core, name, replacement). The dispatcher imported the function by name: patch both.
_FUNCTION_PATCHES = (
    ("tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    ("tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
    ("transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", _move_to_host),
    ("transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _move_to_host),
    (_BUFFERS, "dist_reduce_scatter_func", _unless_alone(torch.distributed.reduce_scatter_tensor)),
    (_BUFFERS, "dist_all_gather_func", _unless_alone(torch.distributed.all_gather_into_tensor)),
)

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next step's tensors, which are of the same sizes.

    By default it gives large blocks back to the kernel, and every step pays for the pages again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Older versions refuse more than 32 MiB.
        mallopt(_M_MMAP_THRESHOLD, _INT_MAX) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def _patch_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The distributed optimizer and the clipping ask `param.type() == "torch.cuda.FloatTensor"`.
        if dtype is None and not args and not kwargs and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return original_type(self, dtype, *args, **kwargs) if dtype is not None else original_type(self)

    torch.Tensor.type = tensor_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


class Platform:
    """The device this process computes on. One object, `platform`, made at import from what torch sees."""

    def __init__(self) -> None:
        self.is_cuda = torch.cuda.is_available() and os.environ.get("MEGAFAB_DEVICE") != "cpu"
        self.backend = "nccl" if self.is_cuda else "gloo"
        self.device = torch.device("cuda" if self.is_cuda else "cpu")
        self._installed = False

    def start(self, local_rank: int, threads: int | None = None) -> None:
        """Choose this process' device and thread count and make Megatron-core ready for it.

        Raises:
            UserError: a GPU was asked for and there is none for this rank.
        """
        if os.environ.get("MEGAFAB_DEVICE") == "cuda" and not self.is_cuda:
            raise UserError(
                "launch.device=cuda",
                f"no GPU that torch {torch.__version__} can use",
                "one for each rank of this node",
                "see megafab doctor, or set launch.device=auto",
            )
        if self.is_cuda:
            if torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ:
                local_rank = 0  # srun with one bound GPU a task: each sees its own as number 0
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    "launch.ranks",
                    f"local rank {local_rank} on a node with {torch.cuda.device_count()} GPUs",
                    "at most one rank a GPU",
                    "lower launch.ranks, or set launch.device=cpu",
                )
            # One hardware queue keeps Megatron's collectives ahead of the matmuls they overlap with.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            torch.cuda.set_device(local_rank)
            self.device = torch.device("cuda", local_rank)
        else:
            if threads:
                torch.set_num_threads(threads)
            _keep_freed_memory()
        self.install()
        # Notes by core and torch to their own developers; what concerns a user, `megafab doctor` says.
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    def install(self) -> None:
        """Prepare Megatron-core for this platform; once per process, before any of it is used.

        Raises:
            UserError: on a CPU with a Megatron-core version that the shim was not written for.
        """
        if self._installed:
            return
        if not self.is_cuda:
            _check_core_version()
            _import_core_uncompiled()
            facade = _torch_facade()
            for name in _FACADE_MODULES:
                setattr(importlib.import_module(f"megatron.core.{name}"), "torch", facade)  # noqa: B010
            for name, attribute, replacement in _FUNCTION_PATCHES:
                setattr(importlib.import_module(f"megatron.core.{name}"), attribute, replacement)
            _patch_tensor_methods()
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        if not hasattr(moe_utils, "te_general_gemm"):  # core asks "is not None" of a name it never defined
            setattr(moe_utils, "te_general_gemm", None)  # noqa: B010
        self._installed = True

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def host_buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` values of host memory, flat and not initialised, to which the device copies fast."""
        return torch.empty(count, dtype=dtype, pin_memory=self.is_cuda)

    def memory_peak(self) -> int:
        """Peak bytes: allocated on the GPU, or resident for the process on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device_name(self) -> str:
        """The device's own name, for reports and the peak-FLOPs table."""
        return torch.cuda.get_device_name() if self.is_cuda else "cpu"


def _check_core_version() -> None:
    from importlib.metadata import version

    found = version("megatron-core")
    if found not in SUPPORTED_CORE:
        raise UserError(
            "megatron-core",
            f"version {found}",
            f"{' or '.join(SUPPORTED_CORE)} (the CPU shim is written for it)",
            f"pip install megatron-core=={SUPPORTED_CORE[-1]}, or run on a GPU",
        )


def _import_core_uncompiled() -> None:
    """Import Megatron-core with `torch.compile` as the identity: its small fused functions would start a
    C++ compiler on the first step and gain nothing on a CPU."""
    already = [name for name in sys.modules if name.startswith("megatron.core")]
    assert not already, (
        f"platform.install() must come before any import of megatron.core, found {already[:3]}"
    )
    compile_, torch.compile = (
        torch.compile,
        lambda model=None, **_: model if model is not None else (lambda f: f),
    )
    # Core's inference code looks for wandb, a fifth of all imports, which only the writing rank will need.
    hidden = {"wandb": None} if "wandb" not in sys.modules else {}
    sys.modules.update(hidden)  # pyright: ignore
    with warnings.catch_warnings():
        # Core warns once a module that apex and Transformer Engine are absent; `megafab doctor` says it once.
        warnings.simplefilter("ignore")
        try:
            for name in _FACADE_MODULES:
                importlib.import_module(f"megatron.core.{name}")
        finally:
            torch.compile = compile_
            for name in hidden:
                del sys.modules[name]


platform = Platform()
