import math

import pytest
import torch

from loop.kto.loss import kto_losses, kto_metrics, reference_point


def test_losses_are_the_papers_equations_by_hand() -> None:
    # β = 0.1, z0 = 1; r = 3, -2 desirable, r = 3, -2 undesirable; λ as in the third row
    policy = torch.tensor([-7.0, -12.0, -7.0, -12.0])
    reference = torch.tensor([-10.0, -10.0, -10.0, -10.0])
    desirable = torch.tensor([True, True, False, False])
    weight = torch.tensor([1.0, 1.5, 2.0, 1.0])
    losses = kto_losses(policy, reference, desirable, weight, torch.tensor(1.0), beta=0.1)
    # λ(1 − σ(β(r − z0))) and λ(1 − σ(β(z0 − r))): σ(0.2) = 0.549834, σ(−0.3) = 0.425557, σ(0.3) = 0.574443
    expected = [1 - 0.54983400, 1.5 * (1 - 0.42555748), 2.0 * (1 - 0.45016600), 1 - 0.57444252]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_the_papers_by_hand() -> None:
    policy = torch.tensor([-9.0, -9.0], requires_grad=True)
    desirable = torch.tensor([True, False])
    kto_losses(
        policy, torch.tensor([-10.0, -10.0]), desirable, torch.ones(2), torch.tensor(0.5), beta=0.2
    ).sum().backward()
    slope = 0.2 * (1 / (1 + math.exp(-0.1))) * (1 - 1 / (1 + math.exp(-0.1)))  # β σ(x)(1 − σ(x)) at x = β·0.5
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-slope, slope], abs=1e-7)


def test_z0_is_the_clamped_mean_over_mismatched_pairs_without_gradient() -> None:
    policy = torch.tensor([-1.0, -3.0], requires_grad=True)
    z0 = reference_point(policy, torch.tensor([-2.0, -5.0]))
    assert z0.item() == pytest.approx(1.5)
    assert not z0.requires_grad
    assert reference_point(torch.tensor([-5.0]), torch.tensor([-2.0])).item() == 0.0
    assert reference_point(torch.zeros(0), torch.zeros(0)).item() == 0.0


def test_weight_zero_means_no_loss_and_no_gradient() -> None:
    policy = torch.tensor([-9.0, -9.0], requires_grad=True)
    weight = torch.tensor([0.0, 1.0])
    losses = kto_losses(policy, torch.full((2,), -10.0), torch.tensor([True, True]), weight, torch.tensor(0.0), 0.1)
    losses.sum().backward()
    assert losses[0].item() == 0.0
    assert policy.grad is not None
    assert policy.grad[0].item() == 0.0
    assert policy.grad[1].item() != 0.0


def test_metrics_have_trls_names_and_leave_out_a_label_that_is_not_there() -> None:
    policy, reference = torch.tensor([-4.0, -8.0]), torch.tensor([-5.0, -6.0])
    both = kto_metrics(policy, reference, torch.tensor([True, False]), torch.ones(2), torch.tensor(0.0), 0.1)
    assert both["rewards/chosen"] == pytest.approx(0.1)
    assert both["rewards/rejected"] == pytest.approx(-0.2)
    assert both["rewards/margins"] == pytest.approx(0.3)
    assert both["logps/chosen"] == -4.0
    only = kto_metrics(policy, reference, torch.tensor([True, True]), torch.ones(2), torch.tensor(0.0), 0.1)
    assert set(only) == {"loss", "kl", "rewards/chosen", "logps/chosen"}
