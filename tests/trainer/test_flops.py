"""Operations are counted by hand-checked formulas, and counting changes no bit."""

import torch
from torch import nn

from trainer.flops import WARM, FlopMeter


def train(steps, meter=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 6 * 5, 2))
    x_BCHW = torch.randn(2, 3, 6, 5)
    for _ in range(steps):
        model.zero_grad()
        with meter.step("still") if meter else torch.enable_grad():
            model(x_BCHW).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_forward_and_backward_of_a_convolution_and_a_matrix_product():
    meter = FlopMeter()
    train(WARM - 1, meter)
    assert meter.total == 0, "first steps are not slowed down"
    meter = FlopMeter()
    train(WARM + 2, meter)
    convolution, linear = 2 * 2 * 4 * 3 * 9 * 6 * 5, 2 * 2 * 120 * 2
    # The input of the convolution needs no gradient: its backward pass is one more product, that of the linear two.
    assert meter.total == (WARM + 2) * (2 * convolution + 3 * linear)


def test_counting_changes_no_bit():
    assert torch.equal(train(WARM, FlopMeter()), train(WARM))
