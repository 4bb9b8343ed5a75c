# SPDX-License-Identifier: Apache-2.0
"""The fused NPU library: it is preferred, the table names what it cannot run, and a broken one is not used."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.linears import load, relative_error
from tests.npu.fused_library import fused_library
from tests.npu.linears import DYNAMIC, SAME_ROUNDINGS, Linear, inputs, output
from vllm_w4a4_plugin.ops.npu import fused
from vllm_w4a4_plugin.ops.npu.select import Kernel

pytestmark = pytest.mark.usefixtures("config")


class TestFusedLibrary:
    """A library in Python in place of csrc/npu's."""

    @pytest.fixture(autouse=True)
    def library(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(fused, "unavailable_reason", lambda: "")
        with fused_library():
            yield

    @pytest.mark.parametrize(("left", "right", "kind"), [(12, 16, None), (12, None, None), (None, None, DYNAMIC)])
    def test_it_is_preferred(
        self, column: Callable[..., Any], left: int | None, right: int | None, kind: str | None, calls: list[Any]
    ) -> None:
        linear = Linear(48, 192, left, right, bias=True, **({"kind": kind} if kind else {}))
        layer = column(linear)
        calls.clear()
        x = inputs(192)
        assert relative_error(output(layer, x), linear.expected(x, with_npu_roundings=False)) < 0.03
        assert calls == []
        assert layer.quant_method.scheme.operator == Kernel.FUSED
        assert Kernel.FUSED in layer.quant_config.report.table()

    def test_weights_are_loaded_again(self, column: Callable[..., Any]) -> None:
        layer, other = column(Linear(48, 192)), Linear(48, 192, seed=7)
        x = inputs(192)
        assert relative_error(output(load(layer, {None: other}), x), other.expected(x, with_npu_roundings=False)) < 0.03

    def test_what_it_cannot_do_goes_to_the_next_and_is_named(
        self, column: Callable[..., Any], calls: list[Any]
    ) -> None:
        linear = Linear(40, 192)
        layer = column(linear)
        x = inputs(192)
        assert relative_error(output(layer, x), linear.expected(x)) < SAME_ROUNDINGS
        assert layer.quant_method.scheme.operator == Kernel.KRONECKER
        assert "weight 40 x 192 is not made of 16 x 64 fractals" in layer.quant_config.report.table()


def test_without_a_built_library_the_reason_is_known() -> None:
    fused.unavailable_reason.cache_clear()
    assert fused.unavailable_reason() == "libvllm_w4a4_npu.so is not built"


def test_a_library_that_does_not_load_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / fused.LIBRARY
    file.write_bytes(b"not a library")
    monkeypatch.setattr(fused, "library_places", lambda name: iter([file]))
    fused.unavailable_reason.cache_clear()
    assert "cannot be loaded" in fused.unavailable_reason()
    assert f"The fused NPU library {file} cannot be loaded" in caplog.text
    fused.unavailable_reason.cache_clear()
