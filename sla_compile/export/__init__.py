"""Accelerated models outside of Python: decomposition into core ATen, AOTInductor packages, ONNX files.

`import sla_compile` imports this, which teaches AOTInductor the operator, and imports neither Inductor nor onnx.
"""

from sla_compile.export.decompose import decompositions
from sla_compile.export.onnx_program import onnx, onnx_translations
from sla_compile.export.packages import aoti

__all__ = ["aoti", "decompositions", "onnx", "onnx_translations"]
