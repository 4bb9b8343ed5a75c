# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that the package reads; nothing else in it reads `os.environ`.

A variable is read anew at each access, as in `vllm.envs`: `envs.VLLM_W4A4_DISABLE` is a bool.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    VLLM_W4A4_DISABLE: bool
    VLLM_W4A4_ISA: str | None
    VLLM_W4A4_KEEP_DTYPE: bool
    VLLM_W4A4_FORCE: bool
    VLLM_W4A4_NPU_FUSED: bool
    ASCEND_HOME_PATH: str | None


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: as it is set.
        read: turns its text (None if it is not set) into the value.
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


def _text(text: str | None) -> str | None:
    return text or None


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("VLLM_W4A4_DISABLE", _off_unless_set, "0", "`1`: the plugin does nothing."),
        Variable(
            "VLLM_W4A4_ISA",
            _text,
            "the best that the CPU has",
            "Forces an instruction set of the CPU kernels: `avx512vnni`, `avxvnni`, `avx2`, `neon_i8mm`, "
            "`neon_dotprod`, `portable`. The native library reads it.",
        ),
        Variable(
            "VLLM_W4A4_KEEP_DTYPE",
            _off_unless_set,
            "0",
            "`1`: keeps a checkpoint's bfloat16 on CPUs that have no instructions for it.",
        ),
        Variable(
            "VLLM_W4A4_FORCE",
            _off_unless_set,
            "0",
            "`1`: uses the plugin with a version of vllm-ascend that it was not tested with.",
        ),
        Variable(
            "VLLM_W4A4_NPU_FUSED",
            _on_unless_zero,
            "1",
            "`0`: leaves the fused NPU library unused, to compare it with CANN's operators.",
        ),
        Variable(
            "ASCEND_HOME_PATH",
            lambda text: _text(text) or _text(os.environ.get("ASCEND_TOOLKIT_HOME")),
            "the usual places",
            "Where CANN is installed, for `vllm-w4a4 doctor`; CANN's `set_env.sh` sets it (older ones set "
            "`ASCEND_TOOLKIT_HOME`).",
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
