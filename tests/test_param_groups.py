"""fastcurv.param_groups: which layers are orthogonalised."""

import pytest
import torch
from torch import nn

import fastcurv


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.transposed = nn.ConvTranspose2d(8, 4, 2)
        self.norm = nn.LayerNorm(8)
        self.batch = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.LSTM(8, 8)
        self.free = nn.Parameter(torch.ones(3, 3))
        self.hidden = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embedding.weight
        self.head = nn.Linear(8, 2)


def test_param_groups_by_layers():
    model = Everything()

    def chosen(**options):
        groups = {g["orthogonal"]: g["params"] for g in fastcurv.param_groups(model, **options)}
        everything = [p for _, p in groups[True] + groups[False]]
        assert len(everything) == len(set(everything)) and set(everything) == set(model.parameters())
        return [name for name, _ in groups[True]]

    conv = ["conv.weight", "depthwise.weight", "transposed.weight"]
    linear = ["attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight", "head.weight"]
    assert sorted(chosen()) == sorted(conv + linear)
    assert sorted(chosen(orthogonal="conv")) == sorted(conv)
    assert sorted(chosen(skip_last_linear=True)) == sorted(conv + linear[:-1])
    with pytest.raises(ValueError, match=r"orthogonal: expected one of conv\+linear, conv, got 'all'"):
        fastcurv.param_groups(model, "all")
    (only,) = fastcurv.param_groups(nn.LayerNorm(4))
    assert only["orthogonal"] is False and len(only["params"]) == 2


def test_the_last_linear_layer_is_the_last():
    def names(model):
        groups = fastcurv.param_groups(model, skip_last_linear=True)
        return [name for group in groups if group["orthogonal"] for name, _ in group["params"]]

    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    tied[3].weight = tied[0].weight
    assert names(tied) == ["1.weight", "2.weight"]
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shared[2].weight = shared[0].weight
    assert names(shared) == ["1.weight"]
    normed = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert names(normed) == ["0.weight"]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        fastcurv.param_groups(None)
