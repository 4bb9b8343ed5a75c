# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the FlatQuant repository (the paper's code) in msModelSlim's form.

The repository saves `flat_matrices.pth`: for each decoder layer the transforms, the diagonal scales and the clip
factors that its calibration found, but no weights. With the float model they give what its `reparameterize_model` and
`rtn_fwrd` compute: transformed weights, rounded to nearest, four bits each.

What the format has no place for:

- `kcache_trans` and the clip factors of the KV cache, which cancel unless keys and values are quantized: left out.
- separate clip factors for the largest and the smallest activation, and for each of q, k and v, or gate and up, which
  run as one product here: their mean is taken, and the largest deviation from it is returned.
- weights that GPTQ has rounded: the file does not hold them.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_w4a4_plugin.checkpoint import CheckpointError, CheckpointReader, QuantType
from vllm_w4a4_plugin.checkpoint.types import (
    BIAS,
    CLIP_RATIO,
    LEFT_TRANS,
    RIGHT_TRANS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
)
from vllm_w4a4_plugin.checkpoint.writer import write_checkpoint
from vllm_w4a4_plugin.constants import INT4_MAX, INT4_MIN

from .files import save_tensors

MATRICES_FILE = "flat_matrices.pth"
_KIND = QuantType.W4A4_FLATQUANT_DYNAMIC
_SMALLEST_SCALE = 1e-5 / INT4_MAX
_GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
_LINEARS = (*_GROUPS[0], "self_attn.o_proj", *_GROUPS[1], "mlp.down_proj")


@dataclass(frozen=True)
class Merged:
    """What became of the clip factors.

    Attributes:
        layers: number of decoder layers.
        deviation: largest relative difference of a clip factor from the mean that stands for it.
        layer: where that is, "" if there are none.
    """

    layers: int
    deviation: float
    layer: str


def convert_matrices(
    source: Path, float_model: Path, output: Path, done: Callable[[int, int], object] = lambda done, total: None
) -> Merged:
    """Write the checkpoint of a FlatQuant run to the directory `output`, which must not exist.

    One decoder layer is in memory at a time.

    Args:
        source: `flat_matrices.pth`, or the directory that holds it.
        float_model: directory of the model that was calibrated.
        output: appears when it is complete.
        done: called with the number of finished layers and that of all.

    Raises:
        CheckpointError: a file is missing or malformed, or the two do not belong together.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already. Remove it or choose another output directory.")
    file = source / MATRICES_FILE if source.is_dir() else source
    layers, reader = _read(file), CheckpointReader(float_model)
    deviation, where = 0.0, ""
    types: dict[str, QuantType] = {}
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as folder:
            parts = []
            for number in range(len(layers)):
                converter = _Layer(f"model.layers.{number}", layers[number], reader, file)
                tensors = converter.tensors()
                parts.append(Path(folder) / f"layer-{number:05d}.safetensors")
                save_tensors(tensors, parts[-1])
                types |= {name: _type_of(name) for name in tensors}
                if converter.deviation > deviation:
                    deviation, where = converter.deviation, converter.prefix
                done(number + 1, len(layers))
            for number, name in enumerate(name for name in reader.tensors if name not in types):
                if any(name.startswith(f"model.layers.{layer}.") for layer in range(len(layers))):
                    raise CheckpointError(f"{float_model}: tensor {name} belongs to no module that FlatQuant knows.")
                if name.startswith("model.layers."):
                    raise CheckpointError(
                        f"{file}: has {len(layers)} layers, but {float_model} has tensor {name}. "
                        "Give the float model that was calibrated."
                    )
                parts.append(Path(folder) / f"outer-{number:05d}.safetensors")
                save_tensors({name: reader.load(name)}, parts[-1])
                types[name] = QuantType.FLOAT
            write_checkpoint(float_model, output, parts, types)
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written: {error}. Free disk space or choose another place."
        ) from None
    return Merged(len(layers), deviation, where)


def _type_of(name: str) -> QuantType:
    module, _, suffix = name.rpartition(".")
    return _KIND if module.endswith(_LINEARS) and suffix != BIAS else QuantType.FLOAT


def _read(file: Path) -> dict[int, Mapping[str, Tensor]]:
    """Layer number -> tensors by name. Nothing in the file is executed."""
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not found. Run FlatQuant's main.py with --save_matrix.") from None
    except Exception as error:  # of any kind, depending on where the file is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{file}: cannot be read as tensors saved by torch ({reason}). Copy it again; files that hold anything but "
            "tensors are not read."
        ) from None
    is_right = isinstance(data, dict) and data and sorted(data, key=str) == sorted(range(len(data)), key=str)
    if not is_right or not all(
        isinstance(layer, dict) and all(isinstance(value, Tensor) for value in layer.values())
        for layer in data.values()
    ):
        raise CheckpointError(f"{file}: expected a dictionary of layer numbers from 0 on to dictionaries of tensors.")
    return data


class _Layer:
    """One decoder layer: its float weights, and what was calibrated."""

    def __init__(self, prefix: str, found: Mapping[str, Tensor], reader: CheckpointReader, file: Path) -> None:
        self.prefix, self.found, self.reader, self.file = prefix, found, reader, file
        self.deviation = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by full name."""
        result: dict[str, Tensor] = {}
        value_trans = self._matrix("self_attn.vcache_trans.matrix")
        down_scale = self._diagonal("mlp.down_trans")
        for group, trans in (
            (_GROUPS[0], "self_attn.ln_trans"),
            (_GROUPS[1], "mlp.up_gate_trans"),
            (("mlp.down_proj",), "mlp.down_trans"),
        ):
            left, right = self._matrix(f"{trans}.matrix_left"), self._matrix(f"{trans}.matrix_right")
            clip = self._clip_ratio(group)
            for name in group:
                weight = self._transformed(name, self._weight(name) / self._diagonal(trans), left, right)
                weight = self._clipped(name, weight)
                bias = self._optional_bias(name)
                if name.endswith("v_proj"):
                    weight = _by_head(weight.T, value_trans).T
                    bias = None if bias is None else _by_head(bias.double(), value_trans).to(bias.dtype)
                if name.endswith("up_proj"):
                    if bias is not None:
                        raise CheckpointError(f"{self.prefix}.{name}: FlatQuant has no rule for its bias.")
                    weight = weight * down_scale.reshape(-1, 1)
                result |= self._stored(name, weight, bias, left, right, clip)
        outer = self._matrix("self_attn.o_trans.matrix")
        name = "self_attn.o_proj"
        weight = self._clipped(name, self._transformed(name, self._weight(name), outer, value_trans))
        result |= self._stored(name, weight, self._optional_bias(name), outer, None, self._clip_ratio((name,)))
        for norm, trans in (
            ("input_layernorm", "self_attn.ln_trans"),
            ("post_attention_layernorm", "mlp.up_gate_trans"),
        ):
            value = self._load(f"{norm}.{WEIGHT}")
            result[f"{self.prefix}.{norm}.{WEIGHT}"] = (value.double() * self._diagonal(trans)).to(value.dtype)
        return result

    def _stored(
        self, name: str, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor | None, clip: Tensor
    ) -> dict[str, Tensor]:
        """A linear layer as it is stored, rounded to nearest."""
        scale = (weight.abs().amax(1, keepdim=True) / INT4_MAX).clamp(min=_SMALLEST_SCALE)
        values = {
            WEIGHT: (weight / scale).round().clamp(INT4_MIN, INT4_MAX).to(torch.int8),
            WEIGHT_SCALE: scale.float(),
            WEIGHT_OFFSET: torch.zeros(len(weight), 1),
            LEFT_TRANS: left.float(),
            RIGHT_TRANS: None if right is None else right.float(),
            CLIP_RATIO: clip.float(),
            BIAS: bias,
        }
        return {f"{self.prefix}.{name}.{suffix}": value for suffix, value in values.items() if value is not None}

    def _transformed(self, name: str, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The rows W as L^-1 W R^-T, so that they multiply activations L^T X R to the same products."""
        rows, columns = weight.shape
        if len(left) * len(right) != columns:
            raise CheckpointError(
                f"{self.file}: layer {self.prefix}.{name}: expected transforms of {columns} features, found "
                f"{len(left)} x {len(right)}. Give the float model that was calibrated."
            )
        matrices = weight.view(rows, len(left), len(right))
        return (torch.linalg.inv(left) @ matrices @ torch.linalg.inv(right).T).reshape(rows, columns)

    def _clipped(self, name: str, weight: Tensor) -> Tensor:
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        for bound, key in ((low, "clip_factor_w_min"), (high, "clip_factor_w_max")):
            factor = self.found.get(f"{name}.{key}")
            if factor is not None:
                bound.mul_(factor.double().sigmoid().reshape(-1, 1))
        return weight.clamp(low, high)

    def _clip_ratio(self, names: tuple[str, ...]) -> Tensor:
        """float64 [1]: the one clip ratio of layers that share their input."""
        keys = [f"{name}.act_quantizer.clip_factor_a_{end}" for name in names for end in ("max", "min")]
        factors = [self.found[key].double().reshape(1).sigmoid() for key in keys if key in self.found]
        if not factors:
            return torch.ones(1, dtype=torch.float64)
        mean = torch.stack(factors).mean(0)
        self.deviation = max(self.deviation, max(float((factor / mean - 1).abs()) for factor in factors))
        return mean

    def _diagonal(self, trans: str) -> Tensor:
        value = self.found.get(f"{trans}.diag_scale")
        return torch.ones(1, dtype=torch.float64) if value is None else value.double()

    def _matrix(self, name: str) -> Tensor:
        value = self.found.get(name)
        if value is None or value.dim() != 2 or value.shape[0] != value.shape[1] or not value.isfinite().all():
            state = "missing" if value is None else "no square matrix of finite values"
            raise CheckpointError(
                f"{self.file}: layer {self.prefix}: {name} is {state}. Only runs with four-bit weights and "
                "activations, saved with --save_matrix, can be converted."
            )
        return value.double()

    def _load(self, name: str) -> Tensor:
        full = f"{self.prefix}.{name}"
        if full not in self.reader.tensors:
            raise CheckpointError(
                f"{self.reader.directory}: has no tensor {full}. Give the float model, of Llama's shape."
            )
        return self.reader.load(full)

    def _weight(self, name: str) -> Tensor:
        return self._load(f"{name}.{WEIGHT}").double()

    def _optional_bias(self, name: str) -> Tensor | None:
        full = f"{self.prefix}.{name}.{BIAS}"
        return self.reader.load(full) if full in self.reader.tensors else None


def _by_head(values: Tensor, matrix: Tensor) -> Tensor:
    """The last dimension, head by head, times a matrix [head_dim, head_dim]."""
    return (values.reshape(-1, len(matrix)) @ matrix).reshape(values.shape)
