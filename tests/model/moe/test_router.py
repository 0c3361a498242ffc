"""The compact routing of a rank that holds every expert.

Second truths: Megatron's own router over [tokens, experts] maps, for choices, weights and
gradients; the definition of the sequence-wise load-balance loss, cell by cell in float64. One rank.
Not covered: the update of the biases (Megatron's).
"""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from nemotron_train.assemble.build import build_model
from nemotron_train.compose.compose import compose_config
from nemotron_train.model.moe.router import SigmoidRouter
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device
from nemotron_train.precision.attach import global_modules

LENGTH, NUM_ROWS, WIDTH, EXPERTS, CHOICES = 6, 3, 192, 16, 4
COEFFICIENT = 0.01


@pytest.fixture
def router(groups) -> SigmoidRouter:
    """A router whose biases change the choices, with an uneven load."""
    words = [f"model.moe.experts={EXPERTS}", f"model.moe.experts_per_token={CHOICES}"]
    words += [f"model.moe.load_balance_loss_coefficient={COEFFICIENT}", "model.init_std=0.2"]
    config = compose_config([*words, f"model.hidden_size={WIDTH}"])
    model = build_model(config, resolve_plan(config), device.prepare(), groups)
    router = global_modules(model)["decoder.layers.1.mlp"].router
    assert isinstance(router, SigmoidRouter) and router.expert_bias is not None
    with torch.no_grad():
        router.expert_bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    return router


def hidden_states() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(LENGTH, NUM_ROWS, WIDTH, generator=generator).requires_grad_()


def test_choices_weights_and_gradients_are_megatrons(router: SigmoidRouter) -> None:
    """Also the counts of the biases' update. The bias takes part in the choice, not in the
    weights."""
    ours, theirs = hidden_states(), hidden_states()
    experts_TK, weights_TK = router.route_here(ours)
    our_counts = router.local_tokens_per_expert.clone()
    our_loss = router.load_balance_loss_sum.clone()
    router.local_tokens_per_expert.zero_()
    router.load_balance_loss_sum = torch.zeros(())
    weights_TE, is_chosen_TE = router(theirs)
    chosen_TE = torch.zeros_like(is_chosen_TE).scatter_(1, experts_TK, True)
    assert torch.equal(chosen_TE, is_chosen_TE)
    unbiased = torch.topk(router.gating(ours).flatten(0, 1), CHOICES).indices
    assert not torch.equal(unbiased.sort().values, experts_TK.sort().values), "the biases matter"
    torch.testing.assert_close(weights_TK, weights_TE.gather(1, experts_TK))
    assert torch.equal(our_counts, router.local_tokens_per_expert)
    torch.testing.assert_close(our_loss, router.load_balance_loss_sum)
    factors_TE = torch.randn(weights_TE.shape, generator=torch.Generator().manual_seed(3))
    gradients = [
        torch.autograd.grad((weights_TK * factors_TE.gather(1, experts_TK)).sum(), ours)[0],
        torch.autograd.grad((weights_TE * factors_TE).sum(), theirs)[0],
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_load_balance_loss_is_its_definition(router: SigmoidRouter) -> None:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 17-20): in each sequence, the sum over experts of
    f_e P_e, where f_e = experts / (choices x tokens) x the tokens that would choose e by their
    scores, and P_e is the mean share of e in a token's scores; then the mean over sequences. The
    router sums it over tokens, without the coefficient."""
    hidden_SBD = hidden_states()
    router.load_balance_loss_sum = torch.zeros(())
    router.route_here(hidden_SBD)
    scores_SBE = torch.sigmoid(router.gating(hidden_SBD).double().detach())
    means = []
    for row in range(NUM_ROWS):
        total = 0.0
        tops = [set(scores_SBE[t, row].topk(CHOICES).indices.tolist()) for t in range(LENGTH)]
        for expert in range(EXPERTS):
            load = sum(expert in top for top in tops) * EXPERTS / (CHOICES * LENGTH)
            shares = [scores_SBE[t, row, expert] / scores_SBE[t, row].sum() for t in range(LENGTH)]
            total += load * float(sum(shares)) / LENGTH
        means.append(total)
    expected = sum(means) / NUM_ROWS * LENGTH * NUM_ROWS
    assert float(router.load_balance_loss_sum) == pytest.approx(expected, rel=1e-5)
