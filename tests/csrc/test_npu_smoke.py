# SPDX-License-Identifier: Apache-2.0
"""csrc/npu/device_smoke.py has no device here. What it takes for right is compared with the operators' reference."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vllm_w4a4_plugin.ops import reference
from vllm_w4a4_plugin.ops.npu.nz import unpack_nz

SCRIPT = Path(__file__).parents[2] / "csrc" / "npu" / "device_smoke.py"


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    spec = importlib.util.spec_from_file_location("device_smoke", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factors", [(None, None), (16, None), (None, 24), (16, 24)])
def test_expected_results_are_the_reference_up_to_16_bits(smoke, factors, dtype) -> None:
    linear = smoke.make_linear(20, 384, 50, *factors, dtype, clip_ratio=0.75, bias=True)
    wanted = reference.flatquant_linear(
        linear.x.float(), linear.weight, linear.weight_scale, linear.left_trans, linear.right_trans, 0.75, linear.bias
    )
    found = smoke.expected(linear).float()
    # X R is rounded to the dtype, which moves few activations by a step of a 4-bit grid; y is rounded once.
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_operands_are_the_operators(smoke) -> None:
    linear = smoke.make_linear(3, 128, 40, None, None, torch.bfloat16, groups=2)
    x, weight, weight_scale, left, right, clip, bias = linear.on("cpu")
    assert torch.equal(unpack_nz(weight, 40, 128), linear.weight)
    assert weight_scale.shape == (2, 40)
    assert weight_scale.is_contiguous()
    assert (left, right, bias, clip) == (None, None, None, 1.0)
    assert x is linear.x or torch.equal(x, linear.x)


def test_a_wrong_result_is_reported(smoke, capsys) -> None:
    wanted = torch.ones(2, 3, dtype=torch.bfloat16)
    found = wanted.clone()
    assert smoke.compare("same", found, wanted, exact=True)
    found[1, 2] = 1.0078125  # one unit in the last place
    assert smoke.compare("near", found, wanted, exact=False)
    assert not smoke.compare("near", found, wanted, exact=True)
    assert "FAILED near: 1 of 6 differ, first (1, 2)" in capsys.readouterr().out
