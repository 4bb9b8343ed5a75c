# SPDX-License-Identifier: Apache-2.0
"""Loads the native library, which registers `torch.ops.vllm_w4a4.*`, and adds the fake implementations."""

from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

from vllm_w4a4_plugin.constants import DISTRIBUTION

from .layout import INT4_BLOCK_BYTES, INT4_GROUP_MULTIPLE, INT4_TILE_ROWS

LIBRARY = "libvllm_w4a4.so"


_is_loaded = False


def load_library() -> None:
    """Load the native library into this process, once.

    Raises:
        RuntimeError: it was not built, was built for another torch, or packs weights differently from `layout`.
    """
    # A plain flag, because torch.compile traces through this function and looks through functools.cache.
    global _is_loaded
    if not _is_loaded:
        _load()
        _is_loaded = True


def _load() -> None:
    candidates = list(library_places(LIBRARY))
    file = next((file for file in candidates if file.exists()), None)
    if file is None:
        looked = ", ".join(str(candidate.parent) for candidate in candidates)
        raise RuntimeError(
            f"The CPU kernels were not built: {LIBRARY} was not found in {looked}. NPUs do not need them "
            "(W4A4_CPU=OFF leaves them out); to run on a CPU, build them: `pip install --no-build-isolation .` in the "
            "source directory of vllm-w4a4-plugin, in the environment that has vLLM (needs a C++ compiler)."
        )
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        raise RuntimeError(
            f"{file} cannot be loaded with torch {torch.__version__} ({error}). It needs torch 2.10 or later and "
            "the platform that it was built for. To build it again: "
            "`pip install --no-build-isolation --force-reinstall .`"
        ) from error
    expected = [INT4_TILE_ROWS, INT4_GROUP_MULTIPLE, INT4_BLOCK_BYTES]
    found = torch.ops.vllm_w4a4.int4_layout()
    if found != expected:
        raise RuntimeError(
            f"{file} packs int4 weights as {found}, but this package expects {expected}; build it again."
        )
    _register_fakes()


def cpu_instruction_set() -> str:
    """The instruction set of the CPU kernels in use; `VLLM_W4A4_ISA` forces one.

    Raises:
        RuntimeError: `VLLM_W4A4_ISA` names one that is unknown or that this CPU does not have.
    """
    load_library()
    return torch.ops.vllm_w4a4.cpu_instruction_set()


def cpu_available_instruction_sets() -> list[str]:
    """Instruction sets that this CPU can run, best first."""
    load_library()
    return torch.ops.vllm_w4a4.cpu_available_instruction_sets().split(",")


def library_places(name: str) -> Iterable[Path]:
    """The paths at which a shared library of this package may be installed."""
    # An editable installation keeps the Python files in the source tree and the library in site-packages, which may be
    # those of another environment that this one adds to its path.
    directories = [
        Path(__file__).parent.parent,
        *(Path(str(found.locate_file("vllm_w4a4_plugin"))) for found in distributions(name=DISTRIBUTION)),
    ]
    return (directory / name for directory in dict.fromkeys(directories))


def _register_fakes() -> None:
    @torch.library.register_fake("vllm_w4a4::flatquant_linear")
    def _(
        x: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        left_trans: Tensor | None,
        right_trans: Tensor | None,
        clip_ratio: Tensor,
        bias: Tensor | None = None,
        weight_offset: Tensor | None = None,
        activation_bits: int = 4,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))

    @torch.library.register_fake("vllm_w4a4::rms_norm")
    def _(x: Tensor, residual: Tensor | None, norm_weight: Tensor, epsilon: float) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("vllm_w4a4::norm_flatquant_linear")
    def _(
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        epsilon: float,
        weight_packed: Tensor,
        weight_scale: Tensor,
        *others: Tensor | int | None,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))

    @torch.library.register_fake("vllm_w4a4::silu_flatquant_linear")
    def _(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, *others: Tensor | int | None) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))

    @torch.library.register_fake("vllm_w4a4::kronecker_quant")
    def _(
        x: Tensor,
        left_trans: Tensor | None,
        right_trans: Tensor | None,
        clip_ratio: Tensor,
        activation_bits: int = 4,
        token_maximum: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)

    @torch.library.register_fake("vllm_w4a4::int4_linear")
    def _(
        q: Tensor,
        scale: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        weight_offset: Tensor | None,
        out_dtype: torch.dtype,
        activation_bits: int = 4,
    ) -> Tensor:
        return q.new_empty((*q.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)

    @torch.library.register_fake("vllm_w4a4::int8_linear")
    def _(
        q: Tensor,
        scale: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quant_bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return q.new_empty((*q.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)

    @torch.library.register_fake("vllm_w4a4::silu_and_mul")
    def _(x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @torch.library.register_fake("vllm_w4a4::weight_only_linear")
    def _(
        x: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        weight_offset: Tensor | None = None,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))

    @torch.library.register_fake("vllm_w4a4::w8a8_linear")
    def _(
        x: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        left_trans: Tensor | None = None,
        right_trans: Tensor | None = None,
        clip_ratio: Tensor | None = None,
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))

    @torch.library.register_fake("vllm_w4a4::experts_mlp")
    def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *others: Tensor | int | bool | None) -> Tensor:
        # The last argument is `is_double`, the one before an int.
        return torch.empty_like(x, dtype=torch.float64 if others[-1] is True else x.dtype)

    @torch.library.register_fake("vllm_w4a4::pack_int8_rows_")
    def _(packed: Tensor, weight: Tensor, first_row: int) -> None:
        return None

    @torch.library.register_fake("vllm_w4a4::pack_int4_rows_")
    def _(packed: Tensor, weight: Tensor, first_row: int) -> None:
        return None

    @torch.library.register_fake("vllm_w4a4::unpack_int4")
    def _(packed: Tensor, out_features: int, in_features: int) -> Tensor:
        return packed.new_empty((out_features, in_features), dtype=torch.int8)
