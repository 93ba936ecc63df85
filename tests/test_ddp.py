"""Every optimizer under DistributedDataParallel: two processes, each with half of a batch, as one with all of it."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import OURS, make, network

import fastcurv

NAMES = [*OURS, "Orthogonal"]


def optimizer_of(name, params):
    return fastcurv.Orthogonal(torch.optim.AdamW(params, lr=0.05)) if name == "Orthogonal" else make(name, params)


def trained(name, wrap, part):
    """Parameters after three steps on a part of each batch."""
    net = network().cpu()
    model = wrap(net)
    optimizer = optimizer_of(name, model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def work(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: trained(name, DistributedDataParallel, slice(4 * rank, 4 * rank + 4)) for name in NAMES}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(name, found):
    """What looks at a gradient as a whole must look at the sum: the mean of two polar factors is none."""
    whole = trained(name, lambda net: net, slice(None))
    for first, second, expected in zip(*(ranks[name] for ranks in found), whole, strict=True):
        assert torch.equal(first, second)
        # The all-reduce adds halves of sums in another order; steps after that amplify what they round.
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-11)
