# SPDX-License-Identifier: Apache-2.0
"""Which quant type each linear layer gets: named recipes, YAML files, and exceptions by pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from vllm_w4a4_plugin.checkpoint import QuantType
from vllm_w4a4_plugin.checkpoint.runnable import Kind, types_for

from .errors import CalibrationError
from .model.structure import Group, Role

_FLATQUANT, _W8A8 = QuantType.W4A4_FLATQUANT_DYNAMIC, QuantType.W8A8_DYNAMIC
_W4A4, _FLOAT = QuantType.W4A4_DYNAMIC, QuantType.FLOAT
_W4A8 = QuantType.W4A8_FLATQUANT_DYNAMIC

RoleTypes = Mapping[Role, QuantType]

RECIPES: Mapping[str, RoleTypes] = {
    "tutorial": {Role.QKV: _FLATQUANT, Role.O: _W8A8, Role.GATE_UP: _FLATQUANT, Role.DOWN: _FLOAT},
    "w4a4-w8a8": {Role.QKV: _FLATQUANT, Role.O: _W8A8, Role.GATE_UP: _FLATQUANT, Role.DOWN: _W8A8},
    "all-w4a4": {Role.QKV: _FLATQUANT, Role.O: _FLATQUANT, Role.GATE_UP: _FLATQUANT, Role.DOWN: _FLATQUANT},
    "w4a8": {Role.QKV: _W4A8, Role.O: _W8A8, Role.GATE_UP: _W4A8, Role.DOWN: _FLOAT},
    "w4a4-dynamic": {Role.QKV: _W4A4, Role.O: _W8A8, Role.GATE_UP: _W4A4, Role.DOWN: _W8A8},
}
EXPERTS: Mapping[str, QuantType] = {
    "tutorial": _FLATQUANT,
    "w4a4-w8a8": _FLATQUANT,
    "all-w4a4": _FLATQUANT,
    "w4a8": _W8A8,
    "w4a4-dynamic": _W4A4,
}
"""Of all projections of the experts, which run as one layer."""


@dataclass(frozen=True)
class Recipe:
    """A quant type for each role, with exceptions.

    Attributes:
        types: of layers that match no exception.
        exceptions: pairs of pattern and type. A pattern is a shell pattern over full module names, such as
            `model.layers.0.*` or `*.o_proj`; the last match wins.
        experts: type of experts that match no exception.
    """

    types: RoleTypes
    exceptions: Sequence[tuple[str, QuantType]] = field(default=())
    experts: QuantType = _FLOAT

    @property
    def rotates_residual(self) -> bool:
        """Whether rotations are folded into the whole model instead of being computed online."""
        return _W4A4 in self.types.values()

    @property
    def headline(self) -> QuantType:
        """The one type that stands for the model in the description."""
        if self.rotates_residual:
            return _W4A4
        return _W4A8 if _W4A8 in self.types.values() else _FLATQUANT

    def of_block(self, block: str, groups: Mapping[str, Group]) -> dict[str, QuantType]:
        """Type of each group of one block, by its key.

        Raises:
            CalibrationError: exceptions give layers of one group different types.
        """
        result = {}
        for key, group in groups.items():
            types = {f"{block}.{name}": self._of_layer(f"{block}.{name}", group.role) for name in group.linears}
            if len(set(types.values())) > 1:
                listing = ", ".join(f"{name}: {kind}" for name, kind in types.items())
                raise CalibrationError(
                    "these layers run as one matrix product and must have the same quant type, but the recipe gives "
                    f"{listing}. Name all of them in the recipe or in `keep_float`."
                )
            result[key] = next(iter(types.values()))
        return result

    def of_experts(self, names: Sequence[str]) -> QuantType:
        """The one type of all experts of a layer.

        Args:
            names: of their linear layers.

        Raises:
            CalibrationError: exceptions give them different types, or one that no kernel runs experts in.
        """
        types: dict[QuantType, str] = {}
        for name in names:
            types.setdefault(self._exception(name) or self.experts, name)
        if len(types) > 1:
            listing = ", ".join(f"{name}: {kind}" for kind, name in types.items())
            raise CalibrationError(
                "the experts of a layer run as one and must have the same quant type in all projections, but the "
                f"recipe gives {listing}. End the recipe with a pattern for all of them, such as '*.experts.*'."
            )
        (kind,) = types
        if kind not in (allowed := types_for(Kind.EXPERTS)):
            raise CalibrationError(
                f"{names[0]}: experts of quant type {kind} cannot be run. Types that can: {', '.join(allowed)}. Give "
                "one of them to '*.experts.*' in the recipe."
            )
        return kind

    def check_patterns(self, names: Sequence[str], float_names: Sequence[str] = ()) -> None:
        """Refuse patterns that match no linear layer of the model.

        Args:
            names: of layers that can be quantized.
            float_names: of modules that stay FLOAT, and may be said to.

        Raises:
            CalibrationError: a pattern matches none of them.
        """
        for pattern, kind in self.exceptions:
            allowed = [*names, *float_names] if kind is _FLOAT else names
            if not any(fnmatchcase(name, pattern) for name in allowed):
                raise CalibrationError(
                    f"pattern {pattern!r} matches no linear layer; their names look like {', '.join(names[:7])}."
                )

    def _of_layer(self, name: str, role: Role) -> QuantType:
        return self._exception(name) or self.types[role]

    def _exception(self, name: str) -> QuantType | None:
        matching = [kind for pattern, kind in self.exceptions if fnmatchcase(name, pattern)]
        return matching[-1] if matching else None


def load_recipe(name: str, keep_float: Sequence[str] = ()) -> Recipe:
    """A recipe by name, or from a YAML file.

    The file has an optional `base` (a recipe's name, by default `tutorial`) and `layers`, a mapping of patterns to
    quant types in ascending order of priority:

        base: tutorial
        layers:
          "model.layers.0.*": FLOAT
          "*.down_proj": W8A8_DYNAMIC

    Raises:
        CalibrationError: unknown name, malformed file, or a type that cannot be written.
    """
    exceptions: list[tuple[str, QuantType]] = []
    base = name
    if Path(name).suffix in (".yaml", ".yml"):
        base, exceptions = _read_yaml(Path(name))
    elif name not in RECIPES:
        raise CalibrationError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}, or give a .yaml file.")
    return Recipe(RECIPES[base], [*exceptions, *((pattern, _FLOAT) for pattern in keep_float)], EXPERTS[base])


def _read_yaml(file: Path) -> tuple[str, list[tuple[str, QuantType]]]:
    """Name of the base, and the exceptions."""
    import yaml  # type: ignore[import-untyped]

    try:
        content = file.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(content)):
            raise CalibrationError(f"{file}: aliases (*name) are not allowed in a recipe. Write the value out.")
        data = yaml.safe_load(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CalibrationError(f"{file}: cannot be read as YAML: {error}") from None
    if not isinstance(data, dict) or not set(data) <= {"base", "layers"}:
        raise CalibrationError(f"{file}: expected a mapping with the keys base and layers only.")
    base, layers = data.get("base", "tutorial"), data.get("layers", {})
    if not isinstance(base, str) or base not in RECIPES:
        raise CalibrationError(f"{file}: unknown base {base!r:.200}; there are {', '.join(RECIPES)}.")
    if not isinstance(layers, dict):
        raise CalibrationError(f"{file}: layers must map patterns to quant types.")
    allowed = {t for r in RECIPES.values() for t in r.values()} | {QuantType.W4A8_DYNAMIC}
    for pattern, kind in layers.items():
        # Other layers of that type need the rotations that this base folds into the model.
        needs_rotation = kind == _W4A4 and base != "w4a4-dynamic" and ".experts." not in str(pattern)
        if not isinstance(kind, str) or kind not in allowed or needs_rotation:
            raise CalibrationError(
                f"{file}: {pattern!s:.200}: quant type must be one of {', '.join(sorted(allowed))}, found "
                f"{kind!r:.200}."
                + needs_rotation
                * f" {_W4A4} is for the base w4a4-dynamic, and for patterns with .experts. in them."
            )
    return base, [(str(pattern), QuantType(kind)) for pattern, kind in layers.items()]
