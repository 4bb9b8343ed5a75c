# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's Q4_0 matrix products, for comparison: ggml, built for this CPU from the sources in llama-cpp-python."""

import ctypes
import subprocess
import sys
import tarfile
import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .limits import BUILD
from .shapes import Experts, Linear

PACKAGE = "llama-cpp-python==0.3.16"
"""A source distribution whose `vendor/llama.cpp/ggml` can be built separately."""

MOST_ERROR = 0.02
"""The relative error of rounding activations to 8 bits in blocks of 32 is below this; measured: 0.004 to 0.008."""

MOST_EXPERTS_ERROR = 0.05
"""The same through an expert's three products; measured: 0.011 to 0.021."""

NATIVE = Path(__file__).parent / "native" / "ggml"
DIRECTORY = BUILD / "ggml"


class GgmlUnavailable(RuntimeError):
    """ggml's sources could not be downloaded or built; the text says why."""


@cache
def library() -> ctypes.CDLL:
    """Download, build and load ggml (about a minute the first time).

    Raises:
        GgmlUnavailable: the sources cannot be downloaded or built.
    """
    source = next(DIRECTORY.glob("llama_cpp_python-*/vendor/llama.cpp/ggml"), None) or _download()
    _call("cmake", "-S", str(NATIVE), "-B", str(DIRECTORY / "build"), f"-DGGML_SOURCE={source.resolve()}")
    _call("cmake", "--build", str(DIRECTORY / "build"), "--parallel", "2")
    loaded = ctypes.CDLL(str(next((DIRECTORY / "build").rglob("libvllm_w4a4_ggml.so"))))
    loaded.w4a4_ggml_create.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    loaded.w4a4_ggml_create.restype = ctypes.c_void_p
    loaded.w4a4_ggml_layout.argtypes = loaded.w4a4_ggml_free.argtypes = [ctypes.c_void_p]
    loaded.w4a4_ggml_layout.restype = ctypes.c_char_p
    loaded.w4a4_ggml_run.argtypes = loaded.w4a4_ggml_error.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.w4a4_ggml_error.restype = loaded.w4a4_ggml_experts_error.restype = ctypes.c_float
    loaded.w4a4_ggml_experts_create.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_int]
    loaded.w4a4_ggml_experts_create.restype = ctypes.c_void_p
    loaded.w4a4_ggml_experts_layout.argtypes = loaded.w4a4_ggml_experts_free.argtypes = [ctypes.c_void_p]
    loaded.w4a4_ggml_experts_layout.restype = ctypes.c_char_p
    loaded.w4a4_ggml_experts_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    loaded.w4a4_ggml_experts_error.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


class GgmlLinear:
    """A Q4_0 linear with random weights on as many threads as torch has.

    Raises:
        GgmlUnavailable: see `library`; or its results are wrong on this CPU.
    """

    def __init__(self, linear: Linear) -> None:
        self._library = library()
        self._out = linear.output_size
        self._handle = self._library.w4a4_ggml_create(linear.input_size, linear.output_size, torch.get_num_threads())
        weakref.finalize(self, self._library.w4a4_ggml_free, self._handle)
        for tokens in (1, 7):
            self._library.w4a4_ggml_run(self._handle, tokens)
            error = self._library.w4a4_ggml_error(self._handle, tokens)
            if not error < MOST_ERROR:
                raise GgmlUnavailable(f"ggml's Q4_0 product for {linear} has a relative error of {error:.1%}")

    @property
    def layout(self) -> str:
        """ggml's name for the memory layout of the weights."""
        return self._library.w4a4_ggml_layout(self._handle).decode()

    def run(self, x: Tensor) -> Tensor:
        """Multiply as many tokens as x has. The values are ggml's own, in float32; the result stays in its memory."""
        if self._library.w4a4_ggml_run(self._handle, x.shape[0]) != 0:
            raise RuntimeError("ggml's product failed")
        return torch.empty(x.shape[0], self._out, device="meta")


class GgmlExperts:
    """Routed experts in Q4_0 with random weights on as many threads as torch has.

    Raises:
        GgmlUnavailable: as for `GgmlLinear`.
    """

    def __init__(self, experts: Experts) -> None:
        self._library = library()
        self._hidden = experts.hidden
        self._handle = self._library.w4a4_ggml_experts_create(
            experts.hidden, experts.intermediate, experts.count, experts.top_k, torch.get_num_threads()
        )
        weakref.finalize(self, self._library.w4a4_ggml_experts_free, self._handle)
        for tokens in (1, 7):
            weights, ids = experts.routing(tokens, torch.Generator().manual_seed(tokens))
            self.run(torch.empty(tokens, experts.hidden), weights, ids)
            error = self._library.w4a4_ggml_experts_error(self._handle, tokens)
            if not error < MOST_EXPERTS_ERROR:
                raise GgmlUnavailable(f"ggml's Q4_0 experts for {experts} have a relative error of {error:.1%}")

    @property
    def layout(self) -> str:
        """ggml's name for the memory layout of the weights."""
        return self._library.w4a4_ggml_experts_layout(self._handle).decode()

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """As `GgmlLinear.run`, for float32 weights and int32 ids, both contiguous [tokens, top_k]."""
        if self._library.w4a4_ggml_experts_run(self._handle, x.shape[0], ids.data_ptr(), weights.data_ptr()) != 0:
            raise RuntimeError("ggml's experts failed")
        return torch.empty(x.shape[0], self._hidden, device="meta")


def _download() -> Path:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    _call(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation",
        "--no-binary", ":all:", "--dest", str(DIRECTORY), PACKAGE,
    )  # fmt: skip
    with tarfile.open(next(DIRECTORY.glob("*.tar.gz"))) as archive:
        archive.extractall(DIRECTORY, filter="data")
    return next(DIRECTORY.glob("llama_cpp_python-*/vendor/llama.cpp/ggml"))


def _call(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise GgmlUnavailable(f"{command[0]} failed: {(result.stderr or result.stdout).strip()[-300:]}")
