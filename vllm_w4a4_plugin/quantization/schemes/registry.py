# SPDX-License-Identifier: Apache-2.0
"""The table of schemes, by quant type and backend."""

from collections.abc import Callable
from typing import TypeVar

from vllm_w4a4_plugin.checkpoint.plan import LayerPlan
from vllm_w4a4_plugin.checkpoint.types import CPU, QuantType

from .base import LinearScheme

Scheme = TypeVar("Scheme", bound=type[LinearScheme])

_SCHEMES: dict[tuple[str, str], type[LinearScheme]] = {}


def register_scheme(*quant_types: str, backend: str = CPU) -> Callable[[Scheme], Scheme]:
    """Class decorator: the scheme of linear layers of these types on `backend`.

    Raises:
        ValueError: a type is not in the table, its entry does not name the backend, or it has another scheme there.
    """

    def register(scheme: Scheme) -> Scheme:
        for name in quant_types:
            kind = QuantType(name)
            if backend not in kind.spec.runs_on:
                raise ValueError(f"{name} does not run on {backend!r}: its entry has {sorted(kind.spec.runs_on)}")
            if _SCHEMES.setdefault((kind, backend), scheme) is not scheme:
                raise ValueError(f"{name} has a scheme for {backend!r} already: {_SCHEMES[kind, backend].__name__}")
        return scheme

    return register


def new_scheme(plan: LayerPlan, on_packed: Callable[[], None], backend: str = CPU) -> LinearScheme | None:
    """The scheme of one layer, None if its type has none on `backend`.

    Args:
        plan: of the layer.
        on_packed: called after each weight tensor that was packed.
    """
    scheme = _SCHEMES.get((plan.quant_type, backend))
    return scheme(plan, on_packed) if scheme else None
