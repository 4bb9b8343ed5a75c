# SPDX-License-Identifier: Apache-2.0
"""What a device check does, step by step: a pure function of the model's layers, without torch."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from vllm_w4a4_plugin.capacity.model import Model
from vllm_w4a4_plugin.capacity.partition import sizes_on_rank
from vllm_w4a4_plugin.checkpoint.resolve import USUALLY_FUSED
from vllm_w4a4_plugin.checkpoint.runnable import Kind, kind_of
from vllm_w4a4_plugin.checkpoint.spec import LinearSpec
from vllm_w4a4_plugin.checkpoint.types import NPU, QuantType
from vllm_w4a4_plugin.ops.npu.select import Kernel, RankShape, select_kernel

HALF, BFLOAT16 = "float16", "bfloat16"

START_LIMIT, STEP_LIMIT = 180.0, 60.0
"""Seconds that a process may take to start and find the device, and that a step may take."""

SMALL = (80, 384)
SMALL_FACTORS: tuple[tuple[int | None, int | None], ...] = ((None, None), (16, None), (None, 24), (16, 24))
"""A small layer, with each combination of factors; the fused kernel's simplest variant first."""

TOKENS = (1, 17, 130)
"""One token, two that share a tile, and more than a tile: CANN's operators have a variant for each."""

CLASS_TOKENS = (1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 200, 300)
"""Where another variant, a second tile or the grid barrier of the fused kernel begins."""
CLASS_OUTPUTS = 1040

QWEN3_32B = (
    ("qkv_proj", 10240, 5120, 64, 80),
    ("o_proj", 5120, 8192, 64, None),
    ("gate_up_proj", 51200, 5120, 64, 80),
    ("down_proj", 5120, 25600, 160, 160),
)
"""(name, output_size, input_size, left, right) of the layers that are checked if no model is given."""

TIMED_TOKENS = (1, 64, 1024)


class Phase(StrEnum):
    """Part of a check; what fails in one of them decides the exit code."""

    ENVIRONMENT = "environment"
    CANN = "CANN's operators"
    FUSED = "fused library"
    GRAPHS = "graphs"
    TIMES = "times"


@dataclass(frozen=True)
class LayerOnRank:
    """A kind of linear layer as one device computes it.

    Attributes:
        names: of the layers that are of this kind.
        shape: on this device.
        whole_input: input features on all devices together.
        has_bias: whether these layers have one.
    """

    names: str
    shape: RankShape
    whole_input: int
    has_bias: bool

    @property
    def title(self) -> str:
        """As the report shows it."""
        factors = "" if not self.shape.quant_type.spec.has_transform else f", {self.shape.left} x {self.shape.right}"
        return f"{self.names} {self.shape.output_size} x {self.shape.input_size}{factors}"


@dataclass(frozen=True)
class Step:
    """One thing to check, which a worker does and reports in one line.

    Attributes:
        kind: key of the table of actions in `steps`.
        phase: of the check.
        title: in the report.
        kernel: a `Kernel` name, "" if the step has none.
        arguments: of the action, plain values.
        limit: seconds.
    """

    kind: str
    phase: Phase
    title: str
    kernel: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = STEP_LIMIT

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `Step(**values)` makes the step again."""
        return asdict(self)


def default_layers() -> list[LayerOnRank]:
    """Those of Qwen3-32B on one device, all of them W4A4."""
    kind = QuantType.W4A4_FLATQUANT_DYNAMIC
    return [
        LayerOnRank(name, RankShape(kind, output_size, input_size, 1, left, right), input_size, False)
        for name, output_size, input_size, left, right in QWEN3_32B
    ]


def layers_on_rank(model: Model, ranks: int) -> list[LayerOnRank]:
    """The kinds of W4A4 linear layers that a device computes, shards of fused layers together, each kind once."""
    fused: dict[tuple[str, str], list[LinearSpec]] = {}
    group_of = {part: whole for whole, parts in USUALLY_FUSED.items() for part in parts}
    for linear in model.linears:
        if NPU in linear.quant_type.spec.runs_on and kind_of(linear.name) is not Kind.EXPERTS:
            parent = linear.name.rpartition(".")[0]
            fused.setdefault((parent, group_of.get(linear.leaf, linear.leaf)), []).append(linear)
    names: dict[tuple[RankShape, int, bool], dict[str, None]] = {}
    for (_, name), shards in fused.items():
        sizes = [sizes_on_rank(shard, model, ranks) for shard in shards]
        shape = RankShape.of(shards[0], sum(size[0] for size in sizes), sizes[0][1])
        key = (shape, shards[0].input_size, any(shard.has_bias for shard in shards))
        names.setdefault(key, {})[name] = None
    return [LayerOnRank(" ".join(leaves), *key) for key, leaves in names.items()]


def make_plan(layers: Iterable[LayerOnRank], has_fused_library: bool) -> list[Step]:
    """The steps of a check, simplest first: CANN's operators, then the fused library, then graphs and times."""
    layers = list(layers)
    steps = [Step("device", Phase.ENVIRONMENT, "device", limit=START_LIMIT), Step("pack", Phase.CANN, "weight packing")]
    for kernel in dict.fromkeys(_kernel(layer, False) for layer in layers):
        if kernel is not Kernel.NONE:
            steps.append(_layout(kernel, Phase.CANN))
    for layer in layers:
        # Layers with the same transform quantize in the same way.
        steps += [step for step in _cann_steps(layer) if step.kind != "quantize" or _key(step) not in map(_key, steps)]
    if has_fused_library:
        steps += _fused_steps(layers)
    for layer in layers:
        steps += _graph_and_time_steps(layer, has_fused_library)
    return steps


def _kernel(layer: LayerOnRank, has_fused_library: bool) -> Kernel:
    return select_kernel(layer.shape, has_fused_library=has_fused_library).kernel


def _key(step: Step) -> tuple[Any, ...]:
    """What a step's q and scale depend on."""
    names = ("whole_input", "factors", "dtype", "clip_ratio")
    return (step.kind, step.kernel, *(step.arguments.get(name) for name in names))


def _layout(kernel: Kernel, phase: Phase) -> Step:
    return Step("layout", phase, "one-hot tokens", kernel)


def _of_layer(layer: LayerOnRank, **other: Any) -> dict[str, Any]:
    """Arguments of a step on one layer. A row-parallel layer's tokens are quantized whole, its product is a part."""
    shape, has_transform = layer.shape, layer.shape.quant_type.spec.has_transform
    return {
        "sizes": (shape.output_size, shape.input_size),
        "whole_input": layer.whole_input if has_transform else shape.input_size,
        "factors": (shape.left, shape.right) if has_transform else (None, None),
        **other,
    }


def _cann_steps(layer: LayerOnRank) -> Iterator[Step]:
    choice = select_kernel(layer.shape, has_fused_library=False)
    kernel = choice.kernel
    if kernel is Kernel.NONE:
        yield Step("refused", Phase.CANN, layer.title, arguments={"reason": choice.reason})
        return
    for dtype in (BFLOAT16, HALF):
        # A clip ratio of 0.5 saturates many values: to 7 and -8, or -7 where the kernel clamps first.
        for clip in (1.0, 0.5) if layer.shape.quant_type is not QuantType.W4A4_DYNAMIC else (1.0,):
            arguments = _of_layer(layer, dtype=dtype, clip_ratio=clip, tokens=TOKENS)
            yield Step("quantize", Phase.CANN, f"q and scale, {layer.title}, {dtype}, clip {clip}", kernel, arguments)
    for has_bias in dict.fromkeys((False, True)):
        arguments = _of_layer(layer, dtype=BFLOAT16, has_bias=has_bias, tokens=TOKENS)
        title = f"product{' and bias' if has_bias else ''}, {layer.title}"
        yield Step("multiply", Phase.CANN, title, kernel, arguments)
    yield Step("nonfinite", Phase.CANN, f"NaN and infinity, {layer.title}", kernel, _of_layer(layer, dtype=BFLOAT16))


def _small(factors: tuple[int | None, int | None], dtype: str, tokens: int, **other: Any) -> dict[str, Any]:
    arguments = {"sizes": SMALL, "factors": factors, "dtype": dtype, "tokens": (tokens,)}
    return {**arguments, "clip_ratio": 0.5, "has_bias": True, **other}


def _small_title(factors: tuple[int | None, int | None]) -> str:
    return f"{SMALL[0]} x {SMALL[1]}, {factors[0]} x {factors[1]}"


def _fused_steps(layers: list[LayerOnRank]) -> Iterator[Step]:
    """From the first phase alone, without a transform, to whole layers: what fails first needs the fewest parts."""
    fused = Phase.FUSED
    yield Step("library", fused, "library and its symbols")
    for phases, what in ((1, "transform and quantize alone"), (3, "then multiply, in a second launch")):
        for tokens in (3, 300):
            for factors in (SMALL_FACTORS[0], SMALL_FACTORS[-1]):
                title = f"{what}, {tokens} tokens, {_small_title(factors)}"
                yield Step("phases", fused, title, Kernel.FUSED, _small(factors, BFLOAT16, tokens, phases=phases))
    for dtype in (HALF, BFLOAT16):
        # Three tokens: every core computes them for itself. Three hundred: the cores share them, with a grid barrier.
        for tokens, how in ((3, "without grid barrier"), (300, "with grid barrier")):
            for factors in SMALL_FACTORS:
                title = f"{how}, {tokens} tokens, {_small_title(factors)}, {dtype}"
                yield Step("linear", fused, title, Kernel.FUSED, _small(factors, dtype, tokens))
    yield _layout(Kernel.FUSED, fused)
    of_library = [layer for layer in layers if _kernel(layer, True) is Kernel.FUSED]
    for number, layer in enumerate(of_library):
        arguments = _of_layer(layer, dtype=BFLOAT16, clip_ratio=0.75, has_bias=layer.has_bias)
        if number == 0:
            sizes = (min(layer.shape.output_size, CLASS_OUTPUTS), layer.shape.input_size)
            few = {**arguments, "sizes": sizes, "tokens": CLASS_TOKENS}
            yield Step("linear", fused, f"{len(CLASS_TOKENS)} numbers of tokens, {layer.title}", Kernel.FUSED, few)
        yield Step("linear", fused, layer.title, Kernel.FUSED, {**arguments, "tokens": (1, 64)})
    if of_library:
        arguments = _of_layer(of_library[0], dtype=BFLOAT16)
        yield Step("nonfinite", fused, f"NaN and infinity, {of_library[0].title}", Kernel.FUSED, arguments)


def _graph_and_time_steps(layer: LayerOnRank, has_fused_library: bool) -> Iterator[Step]:
    for kernel in dict.fromkeys((_kernel(layer, False), _kernel(layer, has_fused_library))):
        if kernel is Kernel.NONE:
            continue
        phase = Phase.FUSED if kernel is Kernel.FUSED else Phase.GRAPHS
        arguments = _of_layer(layer, dtype=BFLOAT16)
        yield Step("graph", phase, f"captured graph, {layer.title}", kernel, arguments)
        timed = {**arguments, "tokens": TIMED_TOKENS, "quant_type": layer.shape.quant_type.value}
        yield Step("time", Phase.TIMES, f"time, {layer.title}", kernel, timed)
