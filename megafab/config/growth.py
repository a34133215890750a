"""What a model may grow into, and when its function can stay the same: arithmetic, no torch.

A grown model is worked out before anything is read or written, so that stages can be checked before the
first of them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from megafab.checkpoint.config import Depth, GrowConfig, Moments, Width
from megafab.errors import ConfigError, ConfigErrors
from megafab.model.config import ModelConfig
from megafab.model.shape import ModelShape

SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "experts")
SPLIT, SEED, STEPS, LR, BATCH = 0.4, 1234, 100, 1e-3, 8  # where GrowConfig has null


def depth_of(config: GrowConfig) -> Depth | None:
    """The operator that makes the model deeper; None: it does not become deeper."""
    return (config.depth or Depth.stack) if config.layers is not None else None


def width_of(config: GrowConfig) -> Width | None:
    """The operator that makes the model wider; None: it does not become wider."""
    return (config.width or Width.zero) if _wider(config) else None


def learns(config: GrowConfig) -> bool:
    """Whether an operator is trained."""
    return depth_of(config) is Depth.learned or width_of(config) is Width.learned


def grown(parent: ModelShape, config: GrowConfig, *, ids: int) -> ModelConfig:
    """The model that `parent` grows into, its sizes spelled out.

    Under `width=zero` a norm over D channels, d of them old, sees d/D of the mean square that it saw; for its
    output to stay the same its epsilon, one number for the whole model, becomes d/D of what it was.

    Args:
        parent: the sizes of the model as it is.
        config: what it becomes.
        ids: of the tokenizer that the parent was trained with.

    Raises:
        ConfigErrors: with a line for everything that cannot be.
    """
    problems = [*_sizes(parent, config, ids), *_unused(parent, config), *_conflicts(parent, config)]
    if problems:
        raise ConfigErrors(problems)
    model = parent.config
    heads, kv_heads = _heads(parent, config)
    hidden = config.hidden or model.hidden
    moe = model.moe
    if config.experts is not None:
        moe = replace(
            moe,
            experts=config.experts,
            top_k=_top_k(config),
            every=config.every or 1,
            shared_ffn=config.shared_ffn or 0,
        )
    thinned = width_of(config) is Width.zero and config.hidden is not None
    return replace(
        model,
        layers=config.layers or model.layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=parent.head_dim,
        ffn=config.ffn or parent.ffn,
        vocab=config.vocab or model.vocab,
        norm_eps=model.norm_eps * model.hidden / hidden if thinned else model.norm_eps,
        moe=moe,
    )


def obstacles(parent: ModelShape, config: GrowConfig) -> list[str]:
    """Why the grown model cannot compute what its parent does; nothing: it can, in exact arithmetic."""
    depth, width, found = depth_of(config), width_of(config), list[str]()
    if depth not in (None, Depth.zero):
        found.append(f"depth={depth.value}, which changes the function; depth=zero does not")
    if width in (Width.random, Width.learned):
        found.append(f"width={width.value}, which changes the function; width=zero does not")
    if width is Width.direct and config.hidden is not None and config.hidden % parent.config.hidden:
        found.append(
            f"hidden={config.hidden} by width=direct, which copies some channels more often than others and "
            f"so changes what norms divide by; a multiple of {parent.config.hidden}, or width=zero, does not"
        )
    if config.experts is not None and _top_k(config) == 1:
        found.append(
            "top_k=1, with which an expert counts with its probability, less than 1; of several chosen ones "
            "the probabilities sum to 1"
        )
    if config.noise is not None:
        found.append(f"noise={config.noise}")
    return found


def _wider(config: GrowConfig) -> bool:
    return any(size is not None for size in (config.hidden, config.heads, config.kv_heads, config.ffn))


def _top_k(config: GrowConfig) -> int:
    return 2 if config.top_k is None else config.top_k


def _heads(parent: ModelShape, config: GrowConfig) -> tuple[int, int]:
    """Query and key-value heads of the grown model; the former need not be a multiple of the latter."""
    heads = config.heads or parent.config.heads
    return heads, config.kv_heads or heads * parent.kv_heads // parent.config.heads


def _sizes(parent: ModelShape, config: GrowConfig, ids: int) -> Iterator[ConfigError]:
    """Sizes that do not grow, or do not fit each other."""
    model, moe = parent.config, parent.config.moe
    if model.retro.chunk:
        found, expected = f"model.retro.chunk={model.retro.chunk}", "a parent without retrieval"
        yield ConfigError("growth", found, expected, "grow the model first, then add retrieval to it")
    present = {"layers": model.layers, "hidden": model.hidden, "heads": model.heads}
    present |= {"kv_heads": parent.kv_heads, "ffn": parent.ffn, "vocab": ids}
    asked = {key: getattr(config, key) for key in SIZES}
    if all(size is None for size in asked.values()):
        fix = f"give one of {', '.join(SIZES)}"
        yield ConfigError("growth", "no size that grows", "a size larger than the parent's", fix)
    for key in present:
        size = asked[key]
        # The same number of key-value heads for more heads is a choice: more queries to each.
        least = present[key] + (key != "kv_heads" or config.heads is None)
        if size is not None and size < least:
            expected = f"at least {least}: the parent has {present[key]}"
            yield ConfigError(f"{key}={size}", f"{size}", expected, f"{key}={least} or more, or leave it out")
    yield from _head_problems(parent, config)
    if moe.experts and config.ffn is not None:
        expected = "a dense parent: experts keep their width"
        yield ConfigError(f"ffn={config.ffn}", f"{moe.experts} experts", expected, "leave ffn out")
    if moe.experts and config.layers is not None:
        for where, layers in (("model.layers", model.layers), ("layers", config.layers)):
            if layers % moe.every:
                expected = f"a multiple of model.moe.every={moe.every}, for experts to stay where they are"
                fix = f"layers in steps of {moe.every}"
                yield ConfigError(f"{where}={layers}", f"{layers}", expected, fix)
    if config.experts is not None:
        yield from _expert_problems(parent, config)


def _head_problems(parent: ModelShape, config: GrowConfig) -> Iterator[ConfigError]:
    if config.heads is None and config.kv_heads is None:
        return
    each = parent.config.heads // parent.kv_heads
    heads, kv_heads = _heads(parent, config)
    if config.kv_heads is None and heads % each:
        expected = f"a multiple of {each}, the query heads to a key-value head"
        yield ConfigError(f"heads={heads}", f"{heads}", expected, "change heads, or give kv_heads")
    elif heads % kv_heads:
        expected = f"a divisor of heads={heads}"
        yield ConfigError(f"kv_heads={kv_heads}", f"{kv_heads}", expected, "change kv_heads")
    else:
        copies = kv_heads // parent.kv_heads if width_of(config) is Width.direct else 1
        now = heads // kv_heads
        if width_of(config) is not Width.learned and now * copies < each:
            found = f"{now} query heads to a key-value head, of {each}"
            expected = "a place for every head of the parent beside its key-value head"
            enough = parent.kv_heads * -(-each // now)
            fix = f"heads={each * kv_heads}, or kv_heads={enough} and width=direct"
            yield ConfigError(f"kv_heads={kv_heads}", found, expected, fix)


def _expert_problems(parent: ModelShape, config: GrowConfig) -> Iterator[ConfigError]:
    assert config.experts is not None
    where = f"experts={config.experts}"
    if parent.config.moe.experts:
        found = f"{parent.config.moe.experts} experts"
        yield ConfigError(where, found, "a dense parent", "leave experts out")
    if parent.config.bias:
        expected = "model.bias=false: Megatron does not train experts with biases"
        yield ConfigError(where, "model.bias=true", expected, "leave experts out")
    if config.experts < 2:
        yield ConfigError(where, f"{config.experts}", "at least 2", "experts=2 or more")
    if not 1 <= _top_k(config) <= max(config.experts, 1):
        fix = f"top_k={config.experts} or less"
        yield ConfigError(f"top_k={_top_k(config)}", where, "between 1 and the number of experts", fix)
    for key, value in (("every", config.every), ("shared_ffn", config.shared_ffn)):
        if value is not None and value < 1:
            yield ConfigError(f"{key}={value}", f"{value}", "at least 1", f"leave {key} out")
    if learns(config):
        expected = "operators that are not learned, or a dense model"
        yield ConfigError(where, "a learned operator", expected, "grow in two steps, the experts last")


def _unused(parent: ModelShape, config: GrowConfig) -> Iterator[ConfigError]:
    """Settings that nothing would look at, or that are out of range."""
    depth, width = depth_of(config), width_of(config)
    wide, dense = "hidden, heads, kv_heads or ffn", config.experts is None
    copies = width is Width.direct or depth in (Depth.stack, Depth.interleave) or not dense
    copies = copies and not learns(config)
    draws = width not in (None, Width.direct) or depth in (Depth.random, Depth.learned) or not dense
    needs: tuple[tuple[str, object, bool, str, str], ...] = (
        ("depth", config.depth and config.depth.value, depth is None, "no layers=", "layers to add"),
        ("width", config.width and config.width.value, width is None, f"no {wide}", "a width to add"),
        ("top_k", config.top_k, dense, "no experts=", "experts to choose from"),
        ("every", config.every, dense, "no experts=", "experts in every n-th layer"),
        ("shared_ffn", config.shared_ffn, dense, "no experts=", "experts beside it"),
        ("split", config.split, width is not Width.direct, "no width=direct", "copies to share between"),
        ("noise", config.noise, not copies, "nothing that is copied", "copies: direct, stack, interleave"),
        ("seed", config.seed, not (draws or config.noise), "nothing that is drawn", "an operator that draws"),
        *(
            (key, value, not learns(config), "no operator that learns", "depth=learned or width=learned")
            for key, value in (("steps", config.steps), ("lr", config.lr), ("batch", config.batch))
        ),
        ("data", config.data, not (config.judge or learns(config)), "judge=false", "something to read it"),
    )
    for key, value, unused, found, expected in needs:
        if value is not None and unused:
            yield ConfigError(f"{key}={value}", found, expected, f"leave {key} out")
    ranges: tuple[tuple[str, float | None, Callable[[float], bool], str], ...] = (
        ("split", config.split, lambda x: 0 < x < 1, "between 0 and 1, both excluded"),
        ("noise", config.noise, lambda x: 0 < x < float("inf"), "more than 0"),
        ("seed", config.seed, lambda x: x >= 0, "at least 0"),
        ("steps", config.steps, lambda x: x >= 1, "at least 1"),
        ("lr", config.lr, lambda x: 0 < x < float("inf"), "more than 0"),
        ("batch", config.batch, lambda x: x >= 1, "at least 1"),
    )
    for key, value, fits, expected in ranges:
        if value is not None and not fits(value):
            yield ConfigError(f"{key}={value}", f"{value}", expected, f"correct {key}")


def _conflicts(parent: ModelShape, config: GrowConfig) -> Iterator[ConfigError]:
    """Claims and wishes that the operators cannot meet."""
    depth, width = depth_of(config), width_of(config)
    if config.optimizer is Moments.copy:
        reasons = [f"depth={depth.value}"] if depth in (Depth.random, Depth.learned) else []
        reasons += [f"width={width.value}"] if width not in (None, Width.zero) else []
        reasons += [f"experts={config.experts}"] if config.experts is not None else []
        if reasons:
            expected = "depth=stack, interleave or zero, or width=zero, for which moments are defined"
            yield ConfigError("optimizer=copy", ", ".join(reasons), expected, "optimizer=reset")
    if config.preserving:
        for reason in obstacles(parent, config):
            expected = "operators that keep the function"
            yield ConfigError("preserving=true", reason, expected, "leave preserving out, or change it")
        if not config.judge:
            expected = "a judge to hold the claim to"
            yield ConfigError("preserving=true", "judge=false", expected, "leave one of them out")
