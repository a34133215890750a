"""What each kernel is timed against, and the bytes it cannot do without.

A subject is one function in several makes: megafab's, PyTorch's operators (`eager`), the same compiled, and
those of Liger-Kernel and apex where they are installed. Shapes are the kernels' README's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from megafab.kernels import cross_entropy, multi_tensor, rows
from megafab.kernels.activation import activate
from megafab.kernels.dropout import bias_dropout_add
from megafab.kernels.norm import add_norm, norm
from megafab.kernels.rope import rope_table, rotate_both_
from megafab.kernels.softmax import masked_softmax

EPS = 1e-5
# Backward of a compiled function is timed over and over, so it must not eat what forward kept.
torch._functorch.config.donated_buffer = False
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """One direction of a subject.

    Attributes:
        name: the function, its shape and the direction.
        bytes: that have to cross device memory.
        goal: the share of the copy bandwidth that it is to reach.
        runs: by make, what to time.
    """

    name: str
    bytes: int
    goal: float | None
    runs: Mapping[str, Run]


class Sizes:
    """Shapes at full size, or so small that a CPU can rehearse them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, rehearsal: bool) -> None:
        self.device, self.dtype, self._divide = device, dtype, 64 if rehearsal else 1

    def __call__(self, count: int) -> int:
        """A size."""
        return max(8, count // self._divide)

    def normal(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Random values on the device."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)


def subjects(sizes: Sizes) -> Iterator[Callable[[], Sequence[Timing]]]:
    """What to time, one at a time, so that only one has its tensors on the device."""
    for tokens, width in ((16384, 4096), (8192, 8192), (4096, 16384)):
        yield functools.partial(_norm, sizes, sizes(tokens), sizes(width), layer=False)
    yield functools.partial(_norm, sizes, sizes(16384), sizes(4096), layer=True)
    yield functools.partial(_add_norm, sizes, sizes(16384), sizes(4096))
    yield functools.partial(_swiglu, sizes, sizes(8192), sizes(16384))
    yield functools.partial(_bias_gelu, sizes, sizes(8192), sizes(16384))
    yield functools.partial(_dropout, sizes, sizes(16384), sizes(4096))
    yield functools.partial(_rope, sizes, sizes(8192))
    yield functools.partial(_softmax, sizes, sizes(2048))
    yield functools.partial(_cross_entropy, sizes, sizes(8192), sizes(131072))
    yield functools.partial(_rows, sizes, sizes(16384), sizes(4096))
    yield functools.partial(_adamw, sizes, sizes(2**20), 512)
    yield functools.partial(_mask, sizes, sizes(2**20), 512)


def _both(
    name: str,
    inputs: Sequence[Tensor],
    functions: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]],
    forward: tuple[int, float | None],
    backward: tuple[int, float | None],
) -> list[Timing]:
    """Both directions of functions that autograd differentiates."""
    runs: tuple[dict[str, Run], dict[str, Run]] = {}, {}
    learning = [x for x in inputs if x.requires_grad]
    for make, function in functions.items():
        runs[0][make] = functools.partial(function, *inputs)
        out = function(*inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        grads = [torch.randn_like(x) for x in outs]
        runs[1][make] = functools.partial(torch.autograd.grad, outs, learning, grads, retain_graph=True)
    return [
        Timing(f"{name} forward", *forward, runs[0]),
        Timing(f"{name} backward", *backward, runs[1]),
    ]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _makes(
    ours: Callable[..., object], eager: Callable[..., object], **peers: Callable[..., object] | None
) -> dict[str, Callable]:
    """Megafab's, eager, and the peers that are here; on a GPU also eager compiled."""
    if torch.cuda.is_available():
        peers = {"compile": torch.compile(eager, dynamic=False), **peers}
    there = {make: peer for make, peer in peers.items() if peer is not None}
    return {"megafab": ours, "eager": eager, **there}


def _liger(name: str) -> Callable[..., object] | None:
    if not _has("liger_kernel") or not torch.cuda.is_available():
        return None
    from liger_kernel.transformers import functional

    return getattr(functional, name)


def _norm(sizes: Sizes, tokens: int, width: int, *, layer: bool) -> list[Timing]:
    x, weight = sizes.normal(tokens, width, grad=True), sizes.normal(width, grad=True)
    tensor = x.numel() * x.element_size()
    name = f"{'layer' if layer else 'rms'}_norm {tokens}x{width}"
    floors = (2 * tensor, 0.85), (3 * tensor, 0.80)
    apex = None
    if _has("apex"):
        from apex.normalization import fused_layer_norm as apex  # pyright: ignore[reportMissingImports]
    if layer:
        bias, liger = sizes.normal(width, grad=True), _liger("liger_layer_norm")
        functions = _makes(
            lambda x, w, b: norm(x, w, b, EPS),
            lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS),
            liger=liger and (lambda x, w, b: liger(x, w, b, EPS)),
            apex=apex and (lambda x, w, b: apex.fused_layer_norm_affine(x, w, b, (width,), EPS)),
        )
        return _both(name, (x, weight, bias), functions, *floors)
    liger = _liger("liger_rms_norm")
    functions = _makes(
        lambda x, w: norm(x, w, None, EPS),
        lambda x, w: F.rms_norm(x, (width,), w, EPS),
        liger=liger and (lambda x, w: liger(x, w, EPS, 0.0, "llama", False)),
        apex=apex and (lambda x, w: apex.fused_rms_norm_affine(x, w, (width,), EPS)),
    )
    return _both(name, (x, weight), functions, *floors)


def _add_norm(sizes: Sizes, tokens: int, width: int) -> list[Timing]:
    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (width,), weight, EPS), total

    liger = _liger("liger_fused_add_rms_norm")
    x, residual, weight = (sizes.normal(*s, grad=True) for s in ((tokens, width), (tokens, width), (width,)))
    tensor = x.numel() * x.element_size()
    functions = _makes(
        lambda x, r, w: add_norm(x, r, w, None, EPS),
        eager,
        liger=liger and (lambda x, r, w: liger(x, r, w, EPS)),
    )
    return _both(
        f"add_rms_norm {tokens}x{width}",
        (x, residual, weight),
        functions,
        (4 * tensor, 0.85),
        (4 * tensor, 0.8),
    )


def _swiglu(sizes: Sizes, tokens: int, width: int) -> list[Timing]:
    def eager(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, dim=-1)
        return F.silu(gate) * linear

    liger = _liger("liger_swiglu")
    x = sizes.normal(tokens, 2 * width, grad=True)
    tensor = x.numel() * x.element_size() // 2
    functions = _makes(
        lambda x: activate(x, None, "swiglu"), eager, liger=liger and (lambda x: liger(*x.chunk(2, dim=-1)))
    )
    return _both(f"swiglu {tokens}x{width}", (x,), functions, (3 * tensor, 0.9), (5 * tensor, 0.8))


def _bias_gelu(sizes: Sizes, tokens: int, width: int) -> list[Timing]:
    x, bias = sizes.normal(tokens, width, grad=True), sizes.normal(width)
    tensor = x.numel() * x.element_size()
    functions = _makes(lambda x, b: activate(x, b, "gelu"), lambda x, b: F.gelu(x + b))
    return _both(f"bias_gelu {tokens}x{width}", (x, bias), functions, (2 * tensor, 0.9), (3 * tensor, 0.8))


def _dropout(sizes: Sizes, tokens: int, width: int) -> list[Timing]:
    x, residual = sizes.normal(tokens, width, grad=True), sizes.normal(tokens, width)
    tensor = x.numel() * x.element_size()
    functions = _makes(
        lambda x, r: bias_dropout_add(x, None, r, 0.1, training=True), lambda x, r: r + F.dropout(x, 0.1)
    )
    return _both(
        f"dropout_add {tokens}x{width}", (x, residual), functions, (3 * tensor, None), (2 * tensor, None)
    )


def _rope(sizes: Sizes, tokens: int) -> list[Timing]:
    """Queries and keys of Llama 3 8B, two sequences."""
    dim, batch = 128, 2
    q, k = (sizes.normal(tokens // batch, batch, heads, dim) for heads in (32, 8))
    position = torch.arange(tokens // batch, device=sizes.device).expand(batch, -1)
    table = rope_table(position, dim, 10000.0, sizes.dtype)

    def turn(x: Tensor, table: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = table
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    functions = _makes(rotate_both_, lambda q, k, table: (turn(q, table), turn(k, table)))
    # Of Liger's kernel, which wants [B, H, L, D] and the angles twice.
    if liger := _liger("liger_rope"):
        q_first, k_first = (x.permute(1, 2, 0, 3).contiguous() for x in (q, k))
        cos, sin = (torch.cat((part, part), -1)[:, :1, 0].transpose(0, 1).contiguous() for part in table)
        functions["liger"] = lambda q, k, table: liger(q_first, k_first, cos, sin)
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    with torch.no_grad():
        runs = {make: functools.partial(function, q, k, table) for make, function in functions.items()}
    return [Timing(f"rope {tokens} tokens, 32 and 8 heads of 128", moved, 0.85, runs)]


def _softmax(sizes: Sizes, length: int) -> list[Timing]:
    scores = sizes.normal(2, 16, length, length, grad=True)
    mask = torch.rand(2, 1, length, length, device=sizes.device) > 0.3
    tensor = scores.numel() * scores.element_size()
    functions = _makes(
        lambda s, m: masked_softmax(s, m, 0.1),
        lambda s, m: (s * 0.1).masked_fill(~m, float("-inf")).softmax(-1),
    )
    floors = (2 * tensor + mask.numel(), None), (3 * tensor, None)
    return _both(f"masked_softmax 2x16x{length}x{length}", (scores, mask), functions, *floors)


def _cross_entropy(sizes: Sizes, tokens: int, vocab: int) -> list[Timing]:
    """Forward and backward together: the gradient goes into the place of the logits."""
    logits = sizes.normal(tokens, vocab)
    labels = torch.randint(vocab, (tokens,), device=sizes.device)
    tensor = logits.numel() * logits.element_size()
    one = torch.ones((), device=sizes.device)
    ones = torch.ones(tokens, device=sizes.device)

    def once() -> None:
        cross_entropy.nll_and_gradient_(logits, labels, one)

    def apart() -> None:
        peak, total, *_ = cross_entropy.statistics(logits, labels)
        cross_entropy.gradient_(
            logits, labels, 0, peak, total, nll=ones, log_z=None, mean=None, vocabulary=vocab
        )

    def peer(function: Callable[..., Tensor]) -> Run:
        leaf = logits.detach().clone().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf, labels), leaf)

    functions = _makes(lambda x, y: None, lambda x, y: F.cross_entropy(x.float(), y))
    runs: dict[str, Run] = {"megafab": once, "megafab, two launches": apart}
    runs |= {make: peer(function) for make, function in functions.items() if make != "megafab"}
    if liger := _liger("liger_cross_entropy"):
        runs["liger"] = peer(liger)
    return [Timing(f"cross_entropy {tokens}x{vocab}", 2 * tensor, 1 / 1.3, runs)]


def _rows(sizes: Sizes, tokens: int, width: int) -> list[Timing]:
    """Half of the rows taken out, and put back."""
    x, new = sizes.normal(tokens, width, grad=True), sizes.normal(tokens // 2, width, grad=True)
    chosen = torch.randperm(tokens, device=sizes.device)[: tokens // 2].sort().values
    tensor = x.numel() * x.element_size()

    def put(x: Tensor, new: Tensor) -> Tensor:
        return x.index_copy(0, chosen, new)

    gather = _makes(lambda x: rows.gather_rows(x, chosen), lambda x: x.index_select(0, chosen))
    scatter = _makes(lambda x, new: rows.put_rows(x, new, chosen), put)
    return [
        *_both(f"gather_rows {tokens}x{width}", (x,), gather, (tensor, None), (3 * tensor // 2, None)),
        *_both(f"put_rows {tokens}x{width}", (x, new), scatter, (2 * tensor, None), (5 * tensor // 2, None)),
    ]


def _adamw(sizes: Sizes, each: int, count: int) -> list[Timing]:
    """Many tensors at once; and their norm."""
    masters, grads, m, v = ([sizes.normal(each, dtype=torch.float32) for _ in range(count)] for _ in range(4))
    for moment in v:
        moment.abs_()
    copies = [master.to(torch.bfloat16) for master in masters]
    steps = [torch.tensor(7.0, device=sizes.device) for _ in masters]
    scale = torch.ones((), device=sizes.device)
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}

    def ours() -> None:
        multi_tensor.adamw_(masters, grads, m, v, copies, scale=scale, decay=0.1, step=7, **settings)

    def eager() -> None:
        torch._foreach_mul_(grads, scale)
        torch._fused_adamw_(
            masters,
            grads,
            m,
            v,
            [],
            steps,
            amsgrad=False,
            maximize=False,
            weight_decay=0.1,
            **settings,
        )
        torch._foreach_copy_(copies, masters)

    def norm() -> Tensor:
        return torch.stack(torch._foreach_norm(grads)).square().sum()

    total = each * count
    return [
        Timing(f"adamw {count}x{each}", 30 * total, 0.9, {"megafab": ours, "eager": eager}),
        Timing(
            f"sum_of_squares {count}x{each}",
            4 * total,
            None,
            {"megafab": lambda: multi_tensor.sum_of_squares(grads), "eager": norm},
        ),
    ]


def _mask(sizes: Sizes, each: int, count: int) -> list[Timing]:
    values = [sizes.normal(each, dtype=torch.float32) for _ in range(count)]
    masks = [torch.rand(each, device=sizes.device) > 0.5 for _ in range(count)]

    def eager() -> None:
        for value, mask in zip(values, masks, strict=True):
            value.mul_(mask)

    runs = {"megafab": lambda: multi_tensor.mask_(values, masks), "eager": eager}
    return [Timing(f"mask {count}x{each}", 9 * each * count, None, runs)]
