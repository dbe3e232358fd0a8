"""The kernels give the numbers of the authors' implementation, forward and backward, on both of its branches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sla_compile.kernels import cpu
from sla_compile.kernels.routing import route
from sla_compile.kernels.spec import Spec

FIXTURES = Path(__file__).parent / "fixtures"
RESULTS = ("o", "dq", "dk", "dv", "dw", "db")
# Relative Frobenius errors of the recorded numbers themselves, and half as much for the kernels' own.
TOLERANCE = {"a_base": 1.5e-2, "d_fp16": 1.5e-3, "e_tail2": 1.5e-2}


def load(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def test_all_fixtures_are_known() -> None:
    assert {path.stem for path in FIXTURES.glob("*.safetensors")} == set(TOLERANCE)


@pytest.mark.parametrize("branch", ["main", "SLA1"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_authors_numbers(name: str, branch: str) -> None:
    case = load(name)
    query, key, value = case["q"], case["k"], case["v"]
    spec = Spec(query.shape[-1] ** -0.5, linear="all" if branch == "main" else "marginal")
    options = dict(proj_weight=case["w"], proj_bias=case["b"])
    output, logsumexp = cpu.forward(query, key, value, case["sparse_map"], spec, **options)
    grads = cpu.backward(case["do"], query, key, value, output, logsumexp, case["sparse_map"], spec, **options)
    for result, actual in zip(RESULTS, (output, *grads[:5]), strict=True):
        theirs = case[f"{branch}.{result}"].double()
        assert (actual.double() - theirs).norm() <= TOLERANCE[name] * theirs.norm(), result


@pytest.mark.parametrize("name", TOLERANCE)
def test_branches_are_told_apart(name: str) -> None:
    """The tolerance is far below the difference between the two scopes of the linear branch."""
    case = load(name)
    main, marginal = case["main.o"].double(), case["SLA1.o"].double()
    assert (main - marginal).norm() > 3 * TOLERANCE[name] * main.norm()


@pytest.mark.parametrize("name", TOLERANCE)
def test_authors_routing(name: str) -> None:
    case = load(name)
    count = int((case["sparse_map"][0, 0, 0] == 1).sum())
    found = route(
        case["q"],
        case["k"],
        scale=case["q"].shape[-1] ** -0.5,
        block_q=64,
        block_k=64,
        sparsity=0.5,
        negligible=0.0,
        critical_blocks=count,
    )
    assert torch.equal(found, case["sparse_map"])
    listed = torch.zeros_like(found).scatter_(-1, case["lut"].long(), 1)
    assert torch.equal(listed, case["sparse_map"])
