"""The moving average against its definition."""

from __future__ import annotations

import torch
from torch import nn

from fastclap.testing import assert_close_rel
from fastclap.train.averaging import WeightAverage


def test_average_follows_its_definition_and_swap_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, decay=0.9)
    expected = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))  # moves the BatchNorm statistics and its integer counter
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * tensor.double()
            expected[name] = moved if tensor.is_floating_point() else tensor.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.swap()
    for name, tensor in model.state_dict().items():
        assert_close_rel(name, expected[name], tensor, 1e-5)
    average.swap()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
