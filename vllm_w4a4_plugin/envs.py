# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that the package reads; nothing else in it reads `os.environ`.

As in `vllm.envs`, a variable is an attribute, read again at each access: `envs.VLLM_W4A4_DISABLE` is a bool.
docs/reference/environment.md has the same table, and a test compares the two.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    VLLM_W4A4_DISABLE: bool
    VLLM_W4A4_ISA: str | None
    VLLM_W4A4_ACTIVATION_BITS: int
    VLLM_W4A4_LOCAL_SCALES: bool
    VLLM_W4A4_HEAD: str
    VLLM_W4A4_FORCE: bool
    VLLM_W4A4_NPU_FUSED: bool
    VLLM_W4A4_SELF_CHECK: bool
    ASCEND_HOME_PATH: str | None


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: of the variable.
        read: converts its text (None if it is not set) to the value.
        default: as the documentation shows it.
        description: one sentence, in Markdown.
    """

    name: str
    read: Callable[[str | None], Any]
    default: str
    description: str


def _off_unless_set(text: str | None) -> bool:
    return text not in (None, "", "0")


def _on_unless_zero(text: str | None) -> bool:
    return text != "0"


def _activation_bits(text: str | None) -> int:
    if text not in (None, "", "4", "8"):
        raise ValueError(f"VLLM_W4A4_ACTIVATION_BITS: expected 4 or 8, found {text!r}")
    return int(text or 4)


def _head(text: str | None) -> str:
    if text not in (None, "", "int8", "int4", "float"):
        raise ValueError(f"VLLM_W4A4_HEAD: expected int8, int4 or float, found {text!r}")
    return text or "int8"


def _text(text: str | None) -> str | None:
    return text or None


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("VLLM_W4A4_DISABLE", _off_unless_set, "0", "`1` disables the plugin."),
        Variable(
            "VLLM_W4A4_ISA",
            _text,
            "the best one that the CPU supports",
            "Forces an instruction set of the CPU kernels: `avx512amx`, `avx512vnni`, `avxvnni`, `avx2`, "
            "`neon_i8mm`, `neon_dotprod` or `portable`. The native library reads it, not Python.",
        ),
        Variable(
            "VLLM_W4A4_ACTIVATION_BITS",
            _activation_bits,
            "4",
            "`8` runs W4A4 layers on CPUs with 8-bit activations that are not clipped (see "
            "[8-bit activations](../explanation/activation-bits.md)).",
        ),
        Variable(
            "VLLM_W4A4_LOCAL_SCALES",
            _off_unless_set,
            "0",
            "`1` lets each rank of a row-parallel layer without transform quantize and multiply its part of a token, "
            "with a scale of its own, as vllm-ascend does. It saves an exchange (see "
            "[the same answer on any number of ranks](../several-processes.md)), but results then depend on that "
            "number.",
        ),
        Variable(
            "VLLM_W4A4_HEAD",
            _head,
            "int8",
            "How a CPU computes an output head that is in float: `int8` and `int4` round its weights "
            "(see [The output head](../explanation/output-head.md)), `float` leaves it to vLLM. A head that the "
            "checkpoint has in integers runs as it is.",
        ),
        Variable(
            "VLLM_W4A4_FORCE",
            _off_unless_set,
            "0",
            "`1` uses the plugin with a version of vllm-ascend that it does not support.",
        ),
        Variable(
            "VLLM_W4A4_NPU_FUSED",
            _on_unless_zero,
            "1",
            "`0` does not use the fused NPU library, for example to compare it with CANN's operators.",
        ),
        Variable(
            "VLLM_W4A4_SELF_CHECK",
            _on_unless_zero,
            "1",
            "`0` skips the small layer that each kernel computes, and has compared with the reference, before its "
            "first use in a process.",
        ),
        Variable(
            "ASCEND_HOME_PATH",
            lambda text: _text(text) or _text(os.environ.get("ASCEND_TOOLKIT_HOME")),
            "known directories below `/usr/local/Ascend`",
            "Where `vllm-w4a4 doctor` looks for CANN. CANN's `set_env.sh` sets it; that of older releases sets "
            "`ASCEND_TOOLKIT_HOME` instead, which is read too.",
        ),
    )
}


def __getattr__(name: str) -> Any:
    if name not in VARIABLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return VARIABLES[name].read(os.environ.get(name))


def __dir__() -> list[str]:
    return [*globals(), *VARIABLES]


def set_default(name: str, value: str) -> None:
    """Set a variable of another package, vLLM's for instance, in this process unless the user has set it."""
    os.environ.setdefault(name, value)


def assign(name: str, value: str | None) -> None:
    """Set a variable of another package in this process; None removes it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def assigned(values: Mapping[str, str | None]) -> Iterator[None]:
    """Variables of another package in this process for a while; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            assign(name, value)
        yield
    finally:
        for name, value in before.items():
            assign(name, value)


def snapshot() -> dict[str, str]:
    """All variables of this process, to tell which ones another package changes."""
    return dict(os.environ)
