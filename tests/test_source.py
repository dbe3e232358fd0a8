"""What the source of a forward tells: whether it calls attention, joins two sequences, passes a second one on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from sla_compile.source import ATTENTION, calls_attention, concatenates, names_used, passes, takes_apart


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = self.to_k = self.to_v = nn.Linear(4, 4)


class Joint(Projections):
    def forward(self, x, context=None):
        if context is not None:
            x = torch.cat([context, x], dim=1)
        query, key = self.to_q(x), self.to_k(x)
        return F.scaled_dot_product_attention(query, key, self.to_v(x))


class JointAfterProjection(Projections):
    def forward(self, x, context=None):
        other = self.to_q(context)
        query = torch.cat([self.to_q(x), other], 1)
        return F.scaled_dot_product_attention(query, self.to_k(x), self.to_v(x))


class Cross(Projections):
    def forward(self, x, context=None):
        length = x.shape[1] if context is None else context.shape[1]
        query = self.to_q(x)[:, :length]
        tokens = torch.cat([context, context], 1)
        return F.scaled_dot_product_attention(query, self.to_k(tokens), self.to_v(tokens))


class KeysAndValuesJoined(Projections):
    def forward(self, x, context=None):
        key = torch.cat([self.to_k(x), self.to_k(context)], 1)
        x = F.scaled_dot_product_attention(self.to_q(x), key, key)
        x = torch.cat([x, context], 1)
        return F.scaled_dot_product_attention(x, x, x)


def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


class JointThroughAFunction(Projections):
    def forward(self, x, context):
        query = torch.cat([self.project(x), self.project(context)], 1)
        return attend(query, query, query)

    def project(self, x):
        return self.to_q(x)


class CrossThroughAFunction(Projections):
    def forward(self, x, context):
        query, context = self.to_q(x), torch.cat([x, context], 1)
        return attend(query, self.to_k(context), self.to_v(context))


@pytest.mark.parametrize(
    ("owner", "joint"),
    [
        (Joint, True),
        (JointAfterProjection, True),
        (JointThroughAFunction, True),
        (Cross, False),
        (CrossThroughAFunction, False),
        (KeysAndValuesJoined, False),
    ],
)
def test_joint_when_queries_hold_both_sequences(owner, joint):
    assert concatenates(owner().forward, "context") is joint


class ThroughAFunction(Projections):
    def forward(self, x):
        return self.outer(x)

    def outer(self, x):
        return self.inner(x)

    def inner(self, x):
        return attend(self.to_q(x), self.to_k(x), self.to_v(x))


class ThroughAnAttribute(Projections):
    def __init__(self):
        super().__init__()
        self.function = attend

    def forward(self, x):
        return self.function(self.to_q(x), self.to_k(x), self.to_v(x))


class ThroughAnotherName(Projections):
    def forward(self, x):
        return sdpa(self.to_q(x), self.to_k(x), self.to_v(x))


class ThroughItsBase(ThroughAnotherName):
    def forward(self, x):
        return super().forward(x) * 2


class Softmax(Projections):
    def forward(self, x):
        return torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x)


@pytest.mark.parametrize(
    ("owner", "calls"),
    [
        (Joint, True),
        (ThroughAFunction, True),
        (ThroughAnAttribute, True),
        (ThroughAnotherName, True),
        (ThroughItsBase, True),
        (Softmax, False),
    ],
)
def test_names_used_follows_methods_functions_and_attributes(owner, calls):
    used = names_used(owner())
    assert bool(used & ATTENTION) is calls
    assert ("softmax" in used) is (owner is Softmax)


class ThroughItsChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.attend = Cross(), nn.Identity()

    def forward(self, x):
        return self.attend(self.layer(x))  # the child `attend` is not the function of that name


@pytest.mark.parametrize(
    ("owner", "calls"),
    [
        (Joint, True),
        (ThroughAFunction, True),
        (ThroughAnotherName, True),
        (ThroughItsBase, True),
        (Softmax, False),
        (ThroughItsChild, False),
        (nn.TransformerEncoderLayer, False),
    ],
)
def test_whether_a_forward_calls_attention_itself(owner, calls):
    assert calls_attention(owner(8, 2) if owner is nn.TransformerEncoderLayer else owner()) is calls


class TakesApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = self.called = self.handed_on = self.explicit = self.unused = Cross()
        self.parts.to_q.weight.data.zero_()

    def forward(self, x):
        x = self.called(x) + self.called.to_q(x) + self.explicit.forward(x) + self.explicit.to_k(x)
        x = checkpoint(self.handed_on, x) + self.handed_on.to_v(x)
        return attend(self.parts.to_q(x), self.parts.to_k(x), self.parts.to_v(x))


@pytest.mark.parametrize("attribute", ["parts", "called", "handed_on", "explicit", "unused"])
def test_a_child_of_which_only_parts_are_used(attribute):
    assert takes_apart(TakesApart(), attribute) is (attribute == "parts")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.alone = self.explicit = self.same = self.given = self.positional = self.both = self.starred = Cross()
        self.unused = Cross()

    def forward(self, x, text, arguments):
        x = self.alone(x)
        x = self.explicit(x, context=None)
        x = self.same(x, context=x)
        x = self.given(x, context=text)
        x = self.positional(x, text)
        x = self.both(x) + self.both(x, text)
        return self.starred(*arguments)


@pytest.mark.parametrize(
    ("attribute", "given"),
    [
        ("alone", False),
        ("explicit", False),
        ("same", False),
        ("given", True),
        ("positional", True),
        ("both", None),
        ("starred", None),
        ("unused", None),
    ],
)
def test_whether_the_caller_passes_a_second_sequence(attribute, given):
    block = Block()
    assert passes(block, attribute, getattr(block, attribute), "context") is given


def test_code_without_source_tells_nothing():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x, context=None):\n        return self.inner(x)\n", namespace)
    made = namespace["Made"]()
    assert not concatenates(made.forward, "context")
    assert passes(made, "inner", Cross(), "context") is None
    assert not calls_attention(made) and not takes_apart(made, "inner")
    assert "inner" in names_used(made)
