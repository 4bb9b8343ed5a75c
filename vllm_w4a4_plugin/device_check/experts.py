# SPDX-License-Identifier: Apache-2.0
"""Steps that compare the operators of experts with the reference, on six experts of a model's sizes."""

from collections.abc import Callable

import torch

from vllm_w4a4_plugin.ops.npu.experts_check import ExpertsVariant, product_fault, swiglu_fault, transform_fault
from vllm_w4a4_plugin.ops.npu.select_experts import Product

from .layers import Session
from .outcome import Outcome, failed, passed
from .plan import Step


def products(step: Step, session: Session) -> Outcome:
    """int4 tokens times the weights of their experts."""
    arguments, scale_groups = step.arguments, step.arguments["scale_groups"]
    variant = ExpertsVariant(Product(arguments["product"]), _dtype(step), scale_groups > 1, arguments["has_bias"])
    sizes, counts = tuple(arguments["sizes"]), tuple(arguments["counts"])
    return _outcome(lambda: product_fault(variant, session.device, sizes, counts, scale_groups))


def transform(step: Step, session: Session) -> Outcome:
    """Tokens times the Kronecker factors of their experts."""
    arguments = step.arguments
    factors, counts = tuple(arguments["factors"]), tuple(arguments["counts"])
    return _outcome(lambda: transform_fault(_dtype(step), session.device, factors, arguments["size"], counts))


def activation(step: Step, session: Session) -> Outcome:
    """silu(gate) * up."""
    arguments = step.arguments
    return _outcome(lambda: swiglu_fault(_dtype(step), session.device, arguments["size"], sum(arguments["counts"])))


def _dtype(step: Step) -> torch.dtype:
    return getattr(torch, step.arguments["dtype"])


def _outcome(fault: Callable[[], str]) -> Outcome:
    text = fault()
    return failed(text) if text else passed("as the reference, within one unit in the last place")
