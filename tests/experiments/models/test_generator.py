"""The generator: its priors against closed forms, its bound, and what it makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor
from torch.distributions import Dirichlet

from ritornello.experiments.models.generator import (
    LEAST_CONCENTRATION,
    DirichletPrior,
    GaussianPrior,
    Generator,
    GeneratorSettings,
    Prior,
    prior_of,
)

PRIORS: dict[str, Prior] = {"gaussian": GaussianPrior(4), "dirichlet": DirichletPrior(4, 0.7)}

SMALL = {"num_latents": 3, "num_units": 16}


def settings(**changes: Any) -> GeneratorSettings:
    return GeneratorSettings(**(SMALL | changes))


def outputs_of(prior: Prior, count: int = 3) -> Tensor:
    """Those of an encoder."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, prior.num_outputs, generator=generator, dtype=torch.float64)


def log_density_of_prior(prior: Prior, latents: Tensor) -> Tensor:
    if isinstance(prior, GaussianPrior):
        return (-latents.square() / 2 - np.log(2 * np.pi) / 2).sum(dim=-1)
    alpha, count = prior.concentration, prior.num_latents
    constant = special.gammaln(count * alpha) - count * special.gammaln(alpha)
    return constant + ((alpha - 1) * latents.log()).sum(dim=-1)


@pytest.mark.parametrize("name", PRIORS)
def test_the_divergence_is_that_of_monte_carlo(name: str) -> None:
    prior = PRIORS[name]
    posterior = prior.posterior(outputs_of(prior))
    torch.manual_seed(0)
    latents = posterior.sample((200_000,))
    terms = posterior.log_prob(latents) - log_density_of_prior(prior, latents)
    error = terms.std(dim=0) / 200_000**0.5
    assert ((terms.mean(dim=0) - prior.divergence(posterior)).abs() < 5 * error).all()
    assert error.max() < 0.02


def test_the_divergence_of_two_dirichlet_distributions_in_closed_form() -> None:
    prior = DirichletPrior(4, 0.7)
    posterior = prior.posterior(outputs_of(prior))
    assert isinstance(posterior, Dirichlet)
    a = posterior.concentration.numpy()
    b = np.full(4, 0.7)
    total = a.sum(axis=1)
    expected = special.gammaln(total) - special.gammaln(a).sum(axis=1)
    expected += special.gammaln(b).sum() - special.gammaln(b.sum())
    expected += ((a - b) * (special.digamma(a) - special.digamma(total)[:, None])).sum(axis=1)
    np.testing.assert_allclose(prior.divergence(posterior).numpy(), expected, rtol=1e-10)
    same = Dirichlet(torch.full((1, 4), 0.7, dtype=torch.float64))
    assert prior.divergence(same).abs().max() < 1e-12


@pytest.mark.parametrize("name", PRIORS)
def test_gradients_of_the_divergence_are_those_of_finite_differences(name: str) -> None:
    prior = PRIORS[name]
    outputs = outputs_of(prior).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: prior.divergence(prior.posterior(each)), outputs)


@pytest.mark.parametrize("alpha", [(0.3, 0.7), (1.5, 4.0), (8.0, 0.4)])
def test_a_share_follows_its_concentration_as_its_quantile_does(alpha: tuple[float, float]) -> None:
    """The implicit gradient: along which a sample moves that stays the same quantile."""
    torch.manual_seed(1)
    concentration = torch.tensor(alpha, dtype=torch.float64).requires_grad_()
    for _ in range(5):
        share = Dirichlet(concentration).rsample()[0]
        [gradient] = torch.autograd.grad(share, concentration)
        quantile = special.betainc(*alpha, share.item())
        step = 1e-5
        for entry in range(2):
            above, below = ([*alpha], [*alpha])
            above[entry] += step
            below[entry] -= step
            ends = (special.betaincinv(*each, quantile) for each in (above, below))
            difference = next(ends) - next(ends)
            assert gradient[entry].item() == pytest.approx(
                difference / (2 * step), rel=2e-3, abs=1e-6
            )


@pytest.mark.parametrize("name", PRIORS)
def test_moments_of_the_prior_as_it_is_drawn(name: str) -> None:
    prior = PRIORS[name]
    drawn = prior.draw(100_000, np.random.default_rng(0)).double()
    assert drawn.shape == (100_000, 4)
    alpha, total = 0.7, 2.8
    mean, square = (0.0, 1.0) if name == "gaussian" else (0.25, alpha * 1.7 / (total * 3.8))
    for values, expected in ((drawn, mean), (drawn.square(), square)):
        error = values.std(dim=0) / 100_000**0.5
        assert ((values.mean(dim=0) - expected).abs() < 5 * error).all()
    if name == "dirichlet":
        torch.testing.assert_close(drawn.sum(dim=1), torch.ones(100_000).double())


def test_shares_of_a_very_small_concentration_are_shares_still() -> None:
    drawn = DirichletPrior(100, 1e-3).draw(1000, np.random.default_rng(0))
    assert drawn.isfinite().all()
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(1000))
    least = DirichletPrior(4, 1.0).posterior(torch.full((1, 4), -1e4))
    assert isinstance(least, Dirichlet)
    assert least.concentration.min() == pytest.approx(LEAST_CONCENTRATION)


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dark and bright ones, by their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    noise = torch.randint(30, (count, 1, 4, 4), generator=generator)
    return (noise + 200 * labels[:, None, None, None]).to(torch.uint8), labels


@pytest.mark.parametrize("name", PRIORS)
def test_the_loss_is_the_bound_of_the_likelihood(name: str) -> None:
    generator = Generator((1, 4, 4), torch.uint8, 2, settings(prior=name)).double()
    samples, labels = images(5)
    losses = generator.losses(samples, labels, 3)
    values = samples.flatten(1).double() / 255
    posterior = generator.posterior(values, labels)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        outputs = generator.outputs(posterior.rsample(), labels)
    brightness = outputs.sigmoid()
    likelihood = values * brightness.log() + (1 - values) * (1 - brightness).log()
    bound = generator.prior.divergence(posterior) - likelihood.sum(dim=1)
    torch.testing.assert_close(losses, bound / 16)
    assert not torch.equal(losses, generator.losses(samples, labels, 4))


@pytest.mark.parametrize("name", PRIORS)
def test_no_samples_have_no_loss(name: str) -> None:
    """As on a rank that has none of a task."""
    generator = Generator((1, 4, 4), torch.uint8, 2, settings(prior=name))
    losses = generator.losses(torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0).long(), 3)
    assert losses.shape == (0,)
    losses.sum().backward()


def test_the_loss_of_features_is_gaussian_with_variances_that_are_learnt() -> None:
    generator = Generator((6,), torch.float32, 2, settings()).double()
    assert generator.log_variances is not None
    generator.log_variances.data = torch.linspace(-1, 1, 6).double()
    features, labels = torch.randn(5, 6), torch.tensor([0, 1, 0, 1, 1])
    losses = generator.losses(features, labels, 3)
    posterior = generator.posterior(features.double(), labels)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        means = generator.outputs(posterior.rsample(), labels)
    normal = torch.distributions.Normal(means, (generator.log_variances / 2).exp())
    constant = 6 * np.log(2 * np.pi) / 2
    bound = generator.prior.divergence(posterior) - normal.log_prob(features).sum(1) - constant
    torch.testing.assert_close(losses, bound / 6)


@pytest.mark.parametrize("name", PRIORS)
def test_what_it_makes_is_like_what_it_has_learnt_of_each_class(name: str) -> None:
    torch.manual_seed(0)
    generator = Generator((1, 4, 4), torch.uint8, 2, settings(prior=name))
    optimiser = torch.optim.Adam(generator.parameters(), lr=0.01)
    for step in range(150):
        optimiser.zero_grad()
        generator.losses(*images(16, step), step).mean().backward()
        optimiser.step()
    state = torch.get_rng_state()
    labels = torch.tensor([0, 1]).repeat(50)
    made = generator.generate(labels, np.random.default_rng(0))
    assert torch.equal(made, generator.generate(labels, np.random.default_rng(0)))
    assert not torch.equal(made, generator.generate(labels, np.random.default_rng(1)))
    assert torch.equal(state, torch.get_rng_state())
    assert (made.shape, made.dtype) == ((100, 1, 4, 4), torch.uint8)
    means = [made[labels == each].float().mean().item() for each in (0, 1)]
    assert means == pytest.approx([14.5, 214.5], abs=12)


def test_made_features_are_spread_as_the_real_ones() -> None:
    torch.manual_seed(0)
    generator = Generator((2,), torch.float16, 2, settings())
    optimiser = torch.optim.Adam(generator.parameters(), lr=0.01)
    scale = torch.tensor([0.6, 3.0])
    for step in range(300):
        optimiser.zero_grad()
        labels = torch.arange(32) % 2
        features = torch.randn(32, 2) * scale + 4 * labels[:, None]
        generator.losses(features, labels, step).mean().backward()
        optimiser.step()
    labels = torch.arange(1000) % 2
    made = generator.generate(labels, np.random.default_rng(0))
    assert made.dtype == torch.float16
    for each in (0, 1):
        of_class = made[labels == each].float()
        assert of_class.mean(dim=0).tolist() == pytest.approx([4 * each] * 2, abs=0.8)
        assert of_class.std(dim=0).tolist() == pytest.approx([0.6, 3.0], rel=0.5)


def test_an_unconditional_one_is_told_no_class() -> None:
    generator = Generator((1, 4, 4), torch.uint8, 2, settings(is_conditional=False))
    samples, labels = images(5)
    losses = generator.losses(samples, labels, 0)
    assert torch.equal(losses, generator.losses(samples, 1 - labels, 0))
    told = Generator((1, 4, 4), torch.uint8, 2, settings())
    num_more = sum(each.numel() for each in told.parameters())
    num_more -= sum(each.numel() for each in generator.parameters())
    assert num_more == 2 * 2 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": "uniform"}, "prior='uniform': there are gaussian, dirichlet"),
        ({"prior": "dirichlet", "concentration": 0.0}, "concentration=0.0: it must be above 0"),
        ({"num_latents": 0}, "num_latents=0: it must be at least 1"),
        ({"num_units": 0}, "num_units=0: it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: it must be above 0"),
    ],
)
def test_settings_that_break_a_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior_of(settings(**changes))


def test_samples_that_are_too_large() -> None:
    message = r"a sample has 196,608 values, of shape \(3, 256, 256\): .* at most 16,384 values"
    with pytest.raises(ValueError, match=message):
        Generator((3, 256, 256), torch.uint8, 2, settings())
