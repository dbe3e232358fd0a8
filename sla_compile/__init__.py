"""Sparse-Linear Attention for Diffusion Transformers, inside PyTorch's compiler."""

import os.path

if not os.path.isdir(os.path.join(__path__[0], "kernels")):  # a checkout: kernels/ and passes/ stand beside this folder
    __path__.append(os.path.dirname(__path__[0]))

from sla_compile import _compat, export, turbodiffusion  # noqa: F401  # the first refuses versions of torch that are too old
from sla_compile.api import accelerate, dense, parameters, report, restore
from sla_compile.calibrate import calibrate
from sla_compile.calibration_report import Calibration
from sla_compile.checkpoint import load, save
from sla_compile.config import SLAConfig
from sla_compile.functional import route, sparse_linear_attention
from sla_compile.module import SparseLinearAttention
from sla_compile.report import Report

__all__ = [
    "Calibration",
    "Report",
    "SLAConfig",
    "SparseLinearAttention",
    "accelerate",
    "calibrate",
    "dense",
    "export",
    "load",
    "parameters",
    "report",
    "restore",
    "route",
    "save",
    "sparse_linear_attention",
    "turbodiffusion",
]
