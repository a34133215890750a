"""The shim: what it patches and what it leaves alone, and an alarm for CUDA spellings of a new core."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megafab import platform as module
from megafab.errors import UserError
from megafab.platform import SUPPORTED_CORE, Platform

ROOT = Path(__file__).parents[2]


def in_a_new_process(program: str) -> dict:
    """What the program prints, from JSON; a fresh interpreter in which nothing is patched yet."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- the alarm -----------------------------------------------------------------------------------------------

# Spellings that the shim does not cover, and why nothing runs into them. Whole modules and packages:
MODULES = {
    "dist_checkpointing": "checkpoints are megafab's own",
    "distributed.fsdp": "Megatron FSDP is no engine here",
    "distributed.torch_fully_sharded_data_parallel": "nor is torch's",
    "extensions.transformer_engine": "needs Transformer Engine, and so CUDA",
    "fp8_utils": "fp8 is not exposed",
    "fusions": "fused kernels are switched off in the plan",
    "inference": "megafab/generate.py samples by itself",
    "models.common.embeddings.yarn_rotary_pos_embedding": "rotary tables are megafab's own",
    "nccl_allocator": "gloo has none",
    "optimizer.cpu_offloading": "offloading is not exposed",
    "optimizer.grad_scaler": "fp16 is not exposed",
    "pipeline_parallel.combined_1f1b": "overlap of experts' all-to-all is not exposed",
    "pipeline_parallel.fine_grained_activation_offload": "offloading is not exposed",
    "pipeline_parallel.hybrid_cp_schedule": "hybrid context parallelism is not exposed",
    "pipeline_parallel.utils": "streams of combined_1f1b",
    "rerun_state_machine": "off unless switched on",
    "tensor_parallel.data": "every rank reads its own batch",
    "tensor_parallel.inference_layers": "inference",
    "timers": "timers are megafab's own",
    "transformer.cuda_graphs": "CUDA graphs are not exposed",
    "transformer.fsdp_dtensor_checkpoint": "Megatron FSDP is no engine here",
    "transformer.multi_token_prediction": "not exposed",
    "transformer.utils": "masks of core's own attention",
}
# Functions of modules that do run:
FUNCTIONS = {
    "pipeline_parallel.schedules:forward_step": "autocast, which is off",
    "tensor_parallel.layers:": "decorators for mixed precision, made at import",
    "tensor_parallel.random:CudaRNGStatesTracker.__init__": "states for CUDA graphs",
    "tensor_parallel.random:_get_cuda_rng_state": "replaced",
    "tensor_parallel.random:_set_cuda_rng_state": "replaced",
    "tensor_parallel.random:_set_cuda_rng_state.cb": "replaced",
    "transformer.attention:Attention._allocate_memory": "inference",
    "transformer.dot_product_attention:DotProductAttention.__init__": "core's own attention",
    "transformer.mlp:apply_swiglu_sharded_factory.sh_ten_merge_fn": "core's own checkpoints",
    "transformer.module:": "names of tensor types, which torch has without CUDA",
    "transformer.module:GraphableMegatronModule.get_layer_static_inputs": "CUDA graphs",
    "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.__init__": "only for the fused permutation",
    "transformer.transformer_layer:TransformerLayer._get_te_cuda_graph_replay_args.get_zero_attention_mask": (
        "CUDA graphs"
    ),
    "transformer.transformer_layer:TransformerLayer.get_layer_static_inputs": "CUDA graphs",
    "utils:GlobalSymmetricMemoryBuffer.__init__": "inference",
    "utils:StragglerDetector.configure": "off unless switched on",
    "utils:StragglerDetector.elapsed": "off unless switched on",
    "utils:nvtx_range_pop": "off unless switched on",
    "utils:nvtx_range_push": "off unless switched on",
}


class Spellings(ast.NodeVisitor):
    """Every `torch.cuda.x` and `"cuda"` of a module that is code: (function, spelling).

    `"cuda"` as the `device` of a factory that the facade replaces is spelled `device`. Annotations and
    docstrings are not code.
    """

    def __init__(self, factories: set[str]) -> None:
        self.found: list[tuple[str, str]] = []
        self._factories, self._scope = factories, list[str]()
        self._devices: set[ast.AST] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside(node, [*node.args.defaults, *filter(None, node.args.kw_defaults)])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node, [])

    def _inside(self, node: ast.FunctionDef | ast.ClassDef, defaults: list[ast.expr]) -> None:
        self._scope.append(node.name)
        for part in [*node.decorator_list, *defaults, *node.body]:
            self.visit(part)
        self._scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in self._factories:
            self._devices |= {keyword.value for keyword in node.keywords if keyword.arg == "device"}
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and (node.value == "cuda" or node.value.startswith("cuda:")):
            self._note("device" if node in self._devices else node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if ast.unparse(node.value) == "torch.cuda":
            self._note(f"torch.cuda.{node.attr}")
        self.generic_visit(node)

    def _note(self, spelling: str) -> None:
        self.found.append((".".join(self._scope), spelling))


def spellings(rank, world):
    """Of every module of Megatron-core that a training run imports: module, function, spelling, covered."""
    factories = {n for n, v in vars(module._torch_facade()).items() if v is not vars(torch).get(n)}
    stand_in = vars(module._cuda_stand_in())
    replaced = {f"torch.cuda.{name}" for name, v in stand_in.items() if v is not vars(torch.cuda).get(name)}
    assert "torch.cuda.current_device" in replaced
    assert "empty" in factories
    rows = []
    for name, loaded in sorted(sys.modules.items()):
        if name.startswith("megatron.core.") and loaded.__file__:
            visitor = Spellings({f"torch.{factory}" for factory in factories})
            visitor.visit(ast.parse(Path(loaded.__file__).read_text()))
            short = name.removeprefix("megatron.core.")
            covered = {"device", *replaced} if short in module._FACADE_MODULES else set()
            rows += [(short, function, what, what in covered) for function, what in visitor.found]
    return rows


@pytest.fixture(scope="module")
def found(ranks):
    return ranks.run(spellings, init=False)[0]


def reason(name: str, function: str) -> str | None:
    """The key of the tables above that speaks for a function."""
    packages = [name[: len(name) - len(rest)] for rest in _suffixes(name)]
    return next(
        (key for key in (*packages, f"{name}:{function}") if key in MODULES or key in FUNCTIONS), None
    )


def _suffixes(name: str) -> list[str]:
    return ["", *(name[i:] for i, letter in enumerate(name) if letter == ".")]


def test_every_cuda_spelling_of_core_is_covered_or_known(found):
    covered = {name for name, _, _, is_covered in found if is_covered}
    assert {"pipeline_parallel.schedules", "tensor_parallel.layers", "utils"} <= covered, "the search works"
    unknown = [
        (name, function, what)
        for name, function, what, is_covered in found
        if not (is_covered or reason(name, function))
    ]
    assert unknown == []


def test_no_reason_is_stale(found):
    used = {reason(name, function) for name, function, _, is_covered in found if not is_covered}
    assert (MODULES.keys() | FUNCTIONS.keys()) - used == set()


def test_no_module_sees_the_facade_without_need(found):
    assert set(module._FACADE_MODULES) == {name for name, _, _, is_covered in found if is_covered}


# -- what is patched -----------------------------------------------------------------------------------------


def test_installing_twice_changes_nothing_more():
    seen = in_a_new_process(
        """
import json, sys, torch
compile_ = torch.compile
from megafab.platform import platform, _FACADE_MODULES
platform.install()
first = [torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.current_device]
first += [sys.modules[f"megatron.core.{name}"].torch for name in _FACADE_MODULES]
import megafab.build
platform.install()
second = [torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.current_device]
second += [sys.modules[f"megatron.core.{name}"].torch for name in _FACADE_MODULES]
facade = second[4]
print(json.dumps({
    "same": all(a is b for a, b in zip(first, second, strict=True)),
    "one facade": all(each is facade for each in second[4:]) and facade is not torch,
    "compile": torch.compile is compile_,
    "function modes": torch._C._len_torch_function_stack(),
    "dispatch modes": torch._C._len_torch_dispatch_stack(),
    "torch itself": [torch.empty is facade.empty, torch.cuda is facade.cuda],
    "lazy parts": facade.compiler is torch.compiler,
    "device": str(facade.empty(2, device="cuda").device),
    "current": str(facade.zeros(2, device=facade.cuda.current_device()).device),
    "made": facade.full((2,), 3.0, device="cuda:1", pin_memory=True).tolist(),
    "streams": facade.cuda.current_stream() is facade.cuda.default_stream(),
}))
"""
    )
    assert seen == {
        "same": True,
        "one facade": True,
        "compile": True,
        "function modes": 0,
        "dispatch modes": 0,
        "torch itself": [False, False],
        "lazy parts": True,
        "device": "cpu",
        "current": "cpu",
        "made": [3.0, 3.0],
        "streams": True,
    }


def types_of_tensors(rank, world):
    """What `Tensor.type` answers, as it stands in a training process."""
    named = {str(t): torch.zeros(1, dtype=t).type() for t in (torch.float32, torch.float16, torch.bfloat16)}
    others = {str(t): torch.zeros(1, dtype=t).type() for t in (torch.float64, torch.int64, torch.bool)}
    one = torch.ones(2)
    converted = [
        one.type(torch.float64).dtype,
        one.type("torch.LongTensor").dtype,
        one.type(torch.float32) is one,
        one.type(dtype=torch.int32, non_blocking=True).dtype,
    ]
    linear = torch.nn.Linear(2, 2)
    return named, others, converted, one.cuda() is one, linear.cuda(0) is linear


def test_tensor_types(ranks):
    named, others, converted, tensor_stays, module_stays = ranks.run(types_of_tensors, init=False)[0]
    assert named == {
        "torch.float32": "torch.cuda.FloatTensor",
        "torch.float16": "torch.cuda.HalfTensor",
        "torch.bfloat16": "torch.cuda.BFloat16Tensor",
    }
    assert others == {
        "torch.float64": "torch.DoubleTensor",
        "torch.int64": "torch.LongTensor",
        "torch.bool": "torch.BoolTensor",
    }
    assert converted == [torch.float64, torch.int64, True, torch.int32]
    assert tensor_stays
    assert module_stays


def random_state(rank, world):
    """Core's tracker of random states, on a CPU: a fork draws by itself and leaves the default alone."""
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    from megafab.topology import groups as topology
    from megafab.topology.mesh import Mesh

    topology.initialize(Mesh(world, tensor=world), seed=3)
    draws = []
    for seed in (3, 3, 4):
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        before = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            first = torch.rand(3)
        with get_cuda_rng_tracker().fork():
            second = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), before)
        draws.append((first.tolist(), second.tolist(), torch.rand(3).tolist()))
    return draws


def test_random_states_are_core_s_own(ranks):
    (first, again, other), (beside, *_) = ranks.run(random_state, world=2)
    assert first == again
    assert len({tuple(draw) for draw in (*first, *other)}) == 6
    # Inside a fork tensor ranks draw apart, outside alike.
    assert beside[0] != first[0]
    assert beside[2] == first[2]


def test_on_cuda_nothing_of_torch_is_replaced():
    """The platform of a machine with GPUs, as far as that can be told without one."""
    seen = in_a_new_process(
        """
import json, sys, torch
names = ["empty", "zeros", "ones", "tensor", "arange", "full", "cuda", "compile"]
before = [getattr(torch, name) for name in names]
methods = [torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda]
calls = dict(vars(torch.cuda))
torch.cuda.is_available = lambda: True
from megafab.platform import Platform, _FACADE_MODULES, _FUNCTION_PATCHES
platform = Platform()
torch.cuda.is_available = calls["is_available"]
platform.install()
import importlib
core = [importlib.import_module(f"megatron.core.{name}") for name in _FACADE_MODULES]
print(json.dumps({
    "platform": [platform.is_cuda, platform.backend, platform.device.type],
    "torch": all(getattr(torch, name) is value for name, value in zip(names, before, strict=True)),
    "methods": methods == [torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda],
    "calls": [name for name, value in calls.items() if getattr(torch.cuda, name) is not value],
    "core": all(each.torch is torch for each in core),
    "functions": not any(
        getattr(importlib.import_module(f"megatron.core.{name}"), attribute) is replacement
        for name, attribute, replacement in _FUNCTION_PATCHES
    ),
    "initialised": torch.cuda.is_initialized(),
}))
"""
    )
    assert seen == {
        "platform": [True, "nccl", "cuda"],
        "torch": True,
        "methods": True,
        "calls": [],
        "core": True,
        "functions": True,
        "initialised": False,
    }


# -- refusals and answers ------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch) -> Platform:
    monkeypatch.setenv("MEGAFAB_DEVICE", "cpu")
    return Platform()


def test_a_core_that_the_shim_was_not_written_for_is_refused(on_cpu, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(UserError) as caught:
        on_cpu.install()
    assert str(caught.value) == (
        "megatron-core: found version 0.99.0, expected 0.16.1 (the CPU shim is written for it). "
        "Fix: pip install megatron-core==0.16.1, or run on a GPU"
    )
    assert torch.compile is compile_


def test_the_installed_core_is_a_supported_one():
    assert importlib.metadata.version("megatron-core") in SUPPORTED_CORE


def test_importing_core_first_is_a_programmer_s_error():
    seen = in_a_new_process(
        """
import json
import megatron.core.utils
from megafab.platform import platform
platform.is_cuda = False
try:
    platform.install()
except AssertionError as error:
    print(json.dumps({"text": str(error)}))
"""
    )
    assert seen["text"].startswith("platform.install() must come before any import of megatron.core")


def test_what_a_cpu_answers(on_cpu):
    assert (on_cpu.is_cuda, on_cpu.backend, str(on_cpu.device)) == (False, "gloo", "cpu")
    assert on_cpu.device_name() == "cpu"
    on_cpu.synchronize()
    before = on_cpu.memory_peak()
    held = torch.ones(16_000_000)  # 64 MB
    assert on_cpu.memory_peak() >= before
    assert on_cpu.memory_peak() > held.nbytes


def test_threads_and_environment_of_a_start():
    seen = in_a_new_process(
        """
import json, os
os.environ["MEGAFAB_DEVICE"] = "cpu"
import torch
from megafab.platform import platform
platform.start(0, threads=3)
print(json.dumps({"threads": torch.get_num_threads(), "set": "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ}))
"""
    )
    assert seen == {"threads": 3, "set": False}


def test_more_ranks_than_gpus_is_the_user_s_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        Platform().start(2)
    assert str(caught.value) == (
        "launch.ranks: found local rank 2 on a node with 2 GPUs, expected at most one rank a GPU. "
        "Fix: lower launch.ranks, or set launch.device=cpu"
    )


def test_a_gpu_that_was_asked_for_and_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MEGAFAB_DEVICE", "cuda")
    with pytest.raises(UserError) as caught:
        Platform().start(0)
    assert str(caught.value) == (
        f"launch.device=cuda: found no GPU that torch {torch.__version__} can use, expected one for each "
        "rank of this node. Fix: see megafab doctor, or set launch.device=auto"
    )


def test_the_stand_in_s_clock_runs():
    event, later = module._CpuEvent(), module._CpuEvent()
    event.record()
    later.record()
    assert event.elapsed_time(later) >= 0
    assert event.query()
    assert module._CpuStream().record_event(event) is event


def test_factories_keep_their_names_and_other_devices():
    facade = module._torch_facade()
    assert facade.empty.__name__ == "empty"
    assert inspect.isbuiltin(facade.rand)
    assert facade.zeros(2, device="meta").device.type == "meta"
    assert facade.tensor([1, 2], dtype=torch.int32).tolist() == [1, 2]
    assert facade.arange(3, device=torch.device("cuda", 1)).tolist() == [0, 1, 2]
