"""Training on two processes, run as a script: gradients are those that one process finds for both of their inputs."""

import sys

import torch
from models import build, make_inputs
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import sla_compile
from sla_compile import SLAConfig


def accelerated(method):
    config = SLAConfig(sparsity=0.8, min_seq_len=64, method=method)
    model = sla_compile.accelerate(build(), config=config, example_inputs=make_inputs()).train()
    for parameter in sla_compile.parameters(model):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def inputs_of(rank):
    return make_inputs(200 + 10 * rank)  # another length is another seed, too


def data_parallel(model):
    return nn.parallel.DistributedDataParallel(model)


def fully_sharded(model):
    for block in model.blocks:
        fully_shard(block)
    return torch.compile(fully_shard(model), backend="aot_eager")


def check(rank, wrap, method):
    alone, model = accelerated(method), accelerated(method)
    for each in range(2):
        (alone(*inputs_of(each)).square().mean() / 2).backward()
    wrapped = wrap(model)  # kept, or what adds up the gradients would be gone before the backward
    wrapped(*inputs_of(rank)).square().mean().backward()
    added = {id(parameter) for parameter in sla_compile.parameters(alone)}
    for (name, expected), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        grad = parameter.grad
        if grad is None or expected.grad is None:  # SLA2's routers have none
            assert grad is None and expected.grad is None, name
            continue
        grad = grad.full_tensor() if isinstance(grad, distributed.tensor.DTensor) else grad
        torch.testing.assert_close(grad, expected.grad, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)
        assert id(expected) not in added or grad.any(), name


def work(rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2, store=distributed.FileStore(store, 2))
    check(rank, data_parallel, "sla2")
    check(rank, fully_sharded, "sla")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
