import math

import pytest
import torch

from trainer.blocks.transformer import Attention, Block, Time, rotary_angles, rotated, sinusoids


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rotary_products_depend_on_the_distance_alone():
    positions = torch.tensor([[0.0, 0, 0], [1, 2, 3], [5, 1, 4], [6, 3, 7]])
    angles = rotary_angles(positions, 16)
    assert angles.shape == (4, 8) and torch.all(angles[0] == 0)
    q, k = (rotated(draw(1, 1, 1, 16, seed=s).expand(1, 1, 4, 16), angles)[0, 0] for s in (1, 2))
    assert torch.allclose(q[1] @ k[0], q[3] @ k[2], atol=1e-5), "both are (1, 2, 3) apart"
    assert not torch.allclose(q[1] @ k[0], q[2] @ k[0], atol=1e-3)
    assert rotary_angles(positions, 14)[1, :3].tolist() == pytest.approx([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    with pytest.raises(ValueError, match="a head of 4 numbers has no pair for each of 3 axes; take an even 6 or more"):
        rotary_angles(positions, 4)


def test_masked_tokens_are_not_attended_to():
    attention, x = Attention(12, 2), draw(1, 5, 12)
    angles, mask = rotary_angles(torch.arange(5.0)[:, None], 6), torch.tensor([[True, True, True, False, False]])
    whole = attention(x, angles, mask)
    other = torch.cat((x[:, :3], draw(1, 2, 12, seed=3)), dim=1)
    assert torch.allclose(attention(other, angles, mask)[:, :3], whole[:, :3])
    assert torch.allclose(attention(x[:, :3], angles[:3]), whole[:, :3], atol=1e-6)
    assert not torch.allclose(attention(x, angles)[:, :3], whole[:, :3], atol=1e-3)


def test_attention_against_its_formula():
    attention, x = Attention(8, 1), draw(1, 3, 8)
    q, k, v = attention.qkv(x)[0].chunk(3, dim=-1)
    q, k = (part / part.square().mean(-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt() for part in (q, k))
    by_hand = attention.out(torch.softmax(q @ k.T / math.sqrt(8), dim=-1) @ v)
    assert torch.allclose(attention(x, torch.zeros(3, 4))[0], by_hand, atol=1e-6)


def test_a_conditioned_block_starts_as_nothing_and_then_listens():
    block, x, angles = Block(12, 2, conditioned=True), draw(2, 5, 12), torch.zeros(5, 3)
    condition = draw(2, 12, seed=1)
    assert torch.equal(block(x, angles, condition), x)
    torch.nn.init.normal_(block.modulation.weight, std=0.5)
    assert not torch.allclose(block(x, angles, condition), block(x, angles, 2 * condition), atol=1e-3)


def test_time_features_by_hand():
    features = sinusoids(torch.tensor([0.0, 2.0]), 4)
    assert features[0].tolist() == [1, 1, 0, 0]
    assert features[1].tolist() == pytest.approx([math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)], abs=1e-6)
    assert Time(6)(torch.tensor([0.25, 1.0])).shape == (2, 6)
