"""``Where`` over booleans, which ONNX Runtime has no kernel for and masks are made with, as And, Or and Not."""

from __future__ import annotations

import onnx_ir as ir


def replace_boolean_where(model: ir.Model) -> None:
    """Replaces ``Where(c, a, b)`` of booleans by ``Or(And(c, a), And(Not(c), b))``, in place."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "Where" or node.domain or node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        assert node.graph is not None  # it was found there
        condition, chosen, other = node.inputs
        yes = ir.node("And", [condition, chosen], name=f"{node.name}_yes")
        never = ir.node("Not", [condition], name=f"{node.name}_not")
        no = ir.node("And", [never.outputs[0], other], name=f"{node.name}_no")
        either = ir.node("Or", [yes.outputs[0], no.outputs[0]], name=f"{node.name}_either")
        nodes = (yes, never, no, either)
        for new in nodes:
            new.outputs[0].name = f"{new.name}_output"
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, either.outputs)
