"""Shards that FSDP1 has flattened: right where an optimizer works element by element, refused by name elsewhere."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import distribute_tensor
from training import OURS, set_grads

import fastcurv

WHOLE = {"LAMB", "LARS", "Nero", "Ranger", "OSGD", "Muon"}


def flattened(*shape):
    param = nn.Parameter(torch.ones(shape))
    param._fsdp_flattened = True
    return param


MAKERS = {
    **{name: cls for name, (cls, _) in OURS.items()},
    "Orthogonal": lambda params: fastcurv.Orthogonal(torch.optim.SGD(params, lr=0.1)),
    "Lookahead": lambda params: fastcurv.Lookahead(fastcurv.AdamW(params)),
    "Lookahead of Ranger": lambda params: fastcurv.Lookahead(fastcurv.Ranger(params)),
}
REFUSE = [name for name in MAKERS if name in {*WHOLE, "Orthogonal", "Lookahead of Ranger"}]


@pytest.mark.parametrize("name", REFUSE)
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_a_shard_is_refused_by_name_and_nothing_is_written(name, shape):
    whole, shard = nn.Parameter(torch.ones(3, 4)), flattened(*shape)
    set_grads([whole, shard], 0)
    with pytest.raises(TypeError, match=r"expected a whole tensor, got a shard that FSDP1 .* has flattened"):
        MAKERS[name]([whole, shard]).step()  # Nero's constructor, which changes weights, refuses them already
    assert torch.equal(whole, torch.ones(3, 4)) and torch.equal(shard, torch.ones(shape))


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in REFUSE])
def test_what_works_element_by_element_takes_shards(name):
    plain, shard = nn.Parameter(torch.ones(12)), flattened(12)
    for param in (plain, shard):
        optimizer = MAKERS[name]([param])
        for seed in range(3):
            set_grads([param], seed)
            optimizer.step()
    assert torch.equal(plain, shard)


@pytest.mark.parametrize("make", [
    lambda p: fastcurv.LAMB([p], adaptive=False), lambda p: fastcurv.LARS([p], adaptive=False),
    lambda p: fastcurv.Ranger([p], use_gc=False), lambda p: fastcurv.Muon([{"params": [p], "orthogonal": False}]),
    lambda p: fastcurv.OSGD([{"params": [p], "orthogonal": False}]),
])  # fmt: skip
def test_options_that_need_no_whole_tensor_take_shards(make):
    shard = flattened(12)
    optimizer = make(shard)
    set_grads([shard], 0)
    optimizer.step()
    assert not torch.equal(shard, torch.ones(12))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_parameters_of_fsdp1(process_group, use_orig_params):
    """Of one process, where nothing is cut; how many there are does not decide what is refused."""
    model = FullyShardedDataParallel(nn.Linear(4, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    assert all(param._fsdp_flattened for param in model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(TypeError, match="FSDP1"):
        fastcurv.Muon(model.parameters()).step()
    before = [param.detach().clone() for param in model.parameters()]
    fastcurv.AdamW(model.parameters(), lr=0.1).step()
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_the_refusal_of_a_dtensor_says_for_whom_local_tensors_will_do(process_group, name):
    whole = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)))
    param = nn.Parameter(whole)
    with pytest.raises(TypeError, match="got DTensor") as raised:  # by Nero already at construction
        optimizer = OURS[name][0]([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
    enough, needed = (set(re.findall(r"\w+", part)) for part in str(raised.value).split("; ")[-2:])
    assert (name in enough) != (name in needed)
