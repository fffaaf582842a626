"""A generator of samples: a variational auto-encoder with a Gaussian or a Dirichlet prior.

Sources: Kingma and Welling, "Auto-Encoding Variational Bayes" (ICLR 2014); conditional: Sohn et
al., "Learning Structured Output Representation using Deep Conditional Generative Models" (NeurIPS
2015); Dirichlet: Zeng et al., "Dirichlet Continual Learning" (UAI 2024), with the gradients of
Figurnov et al., "Implicit Reparameterization Gradients" (NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Distribution, Independent, Normal, kl_divergence
from torch.nn import functional

from ritornello.records import accelerators

LEAST_CONCENTRATION = 1e-2
"""Of a posterior's entries: below, float32 has no gradients for samples that are all but zero."""

LOG_VARIANCES = (-10.0, 10.0)
"""What a logarithm of a variance is kept within."""

MOST_VALUES = 16_384
"""In a sample: what a perceptron can generate at all, such as 3 x 64 x 64 pixels."""


@dataclass(frozen=True)
class GeneratorSettings:
    """What a generator is made of, and how it learns."""

    prior: str = "gaussian"
    """"gaussian": latents are normal, each by itself; "dirichlet": they are shares, which sum up
    to one."""
    concentration: float = 3.0
    """Of a Dirichlet prior: the lower, the fewer latents have most of a sample."""
    num_latents: int = 100
    num_units: int = 400
    """Of the two hidden layers of either half."""
    learning_rate: float = 0.001
    """Of its own Adam, which goes on from task to task."""
    is_conditional: bool = True
    """Whether it is told the class."""


class GaussianPrior:
    """Latents that are independent and standard normal.

    Args:
        num_latents: how many.
    """

    def __init__(self, num_latents: int) -> None:
        self.num_latents = num_latents
        self.num_outputs = 2 * num_latents
        """What the encoder says of a sample: means and logarithms of variances."""

    def posterior(self, outputs: Tensor) -> Distribution:
        """Of the latents, given the encoder's ``outputs`` ``[n, num_outputs]``."""
        mean, log_variance = outputs.chunk(2, dim=1)
        deviation = (log_variance.clamp(*LOG_VARIANCES) / 2).exp()
        return Independent(Normal(mean, deviation, validate_args=False), 1, validate_args=False)

    def divergence(self, posterior: Distribution) -> Tensor:
        """The Kullback-Leibler divergence of posteriors from the prior, ``[n]``."""
        assert isinstance(posterior, Independent)
        latents = posterior.base_dist  # each by itself: torch cannot do it of no samples together
        prior = Normal(torch.zeros_like(latents.mean), torch.ones_like(latents.mean))
        return kl_divergence(latents, prior).sum(dim=1)

    def draw(self, count: int, stream: np.random.Generator) -> Tensor:
        """Latents of the prior, float32 ``[count, num_latents]``."""
        shape = (count, self.num_latents)
        return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))

    def as_decoded(self, latents: Tensor) -> Tensor:
        """Latents as the decoder gets them: each of about the size 1."""
        return latents


class DirichletPrior:
    """Latents that are shares of one: a symmetric Dirichlet distribution.

    Args:
        num_latents: how many.
        concentration: of each.
    """

    def __init__(self, num_latents: int, concentration: float) -> None:
        self.num_latents = self.num_outputs = num_latents
        self.concentration = concentration

    def posterior(self, outputs: Tensor) -> Distribution:
        """See ``GaussianPrior.posterior``; the outputs become concentrations."""
        concentrations = functional.softplus(outputs) + LEAST_CONCENTRATION
        return Dirichlet(concentrations, validate_args=False)

    def divergence(self, posterior: Distribution) -> Tensor:
        """See ``GaussianPrior.divergence``."""
        prior = torch.full_like(posterior.mean, self.concentration)
        return kl_divergence(posterior, Dirichlet(prior, validate_args=False))

    def draw(self, count: int, stream: np.random.Generator) -> Tensor:
        """See ``GaussianPrior.draw``."""
        # In float64: all shares of a small concentration might be zero otherwise.
        concentrations = np.full(self.num_latents, self.concentration)
        return torch.from_numpy(stream.dirichlet(concentrations, count).astype(np.float32))

    def as_decoded(self, latents: Tensor) -> Tensor:
        """See ``GaussianPrior.as_decoded``."""
        return latents * self.num_latents


Prior = GaussianPrior | DirichletPrior


def prior_of(settings: GeneratorSettings) -> Prior:
    """The prior that settings name.

    Raises:
        ValueError: there is none of that name, or any of the settings breaks its rule.
    """
    for name in ("num_latents", "num_units"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: it must be at least 1")
    for name in ("learning_rate", "concentration"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name}={getattr(settings, name)}: it must be above 0")
    if settings.prior == "gaussian":
        return GaussianPrior(settings.num_latents)
    if settings.prior != "dirichlet":
        raise ValueError(f"prior={settings.prior!r}: there are gaussian, dirichlet")
    return DirichletPrior(settings.num_latents, settings.concentration)


class Generator(nn.Module):
    """A variational auto-encoder of perceptrons, for small images and for features.

    Bytes are taken as brightness from 0 to 1, with the Bernoulli likelihood that is usual for them;
    floating-point samples have a Gaussian one, whose variances are learnt, one for each value.

    Args:
        sample_shape: of one sample.
        dtype: of the samples, uint8 or floating-point.
        num_classes: how many classes it can be told of, if it is conditional.
        settings: see there.

    Raises:
        ValueError: a setting breaks its rule, or samples have too many values.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        dtype: torch.dtype,
        num_classes: int,
        settings: GeneratorSettings,
    ) -> None:
        super().__init__()
        self.sample_shape, self.dtype = tuple(sample_shape), dtype
        self.num_values = prod(sample_shape)
        if self.num_values > MOST_VALUES:
            raise ValueError(
                f"a sample has {self.num_values:,} values, of shape {self.sample_shape}: the "
                f"generator is a perceptron for small images and features, of at most "
                f"{MOST_VALUES:,} values; take smaller images, or a strategy that stores samples"
            )
        self.prior = prior_of(settings)
        units = settings.num_units
        self.encode_first = nn.Linear(self.num_values, units)
        self.encode = nn.Sequential(
            nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, self.prior.num_outputs)
        )
        self.decode_first = nn.Linear(settings.num_latents, units)
        self.decode = nn.Sequential(
            nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, self.num_values)
        )
        self.classes: nn.ModuleList | None = None
        """What being of a class adds to the first layer of either half."""
        if settings.is_conditional:
            self.classes = nn.ModuleList(nn.Embedding(num_classes, units) for _ in range(2))
            for each in self.classes:
                nn.init.zeros_(each.weight)  # type: ignore[arg-type]
        self.log_variances = None
        if dtype != torch.uint8:
            self.log_variances = nn.Parameter(torch.zeros(self.num_values))

    def losses(self, samples: Tensor, labels: Tensor, seed: int) -> Tensor:
        """The negative evidence lower bound of each sample, in nats per value, ``[n]``.

        Args:
            samples: ``[n, *sample_shape]``.
            labels: int64 ``[n]``.
            seed: of the latents that are drawn, each from its posterior.
        """
        values = self._values_of(samples)
        posterior = self.posterior(values, labels)
        with accelerators.seeded(values.device, seed):
            latents = posterior.rsample()
        bound = self._unlikeliness(values, self.outputs(latents, labels))
        return (bound + self.prior.divergence(posterior)) / self.num_values

    def posterior(self, values: Tensor, labels: Tensor) -> Distribution:
        """Of the latents, given the values ``[n, num_values]`` of samples."""
        hidden = self.encode_first(values)
        if self.classes is not None:
            hidden = hidden + self.classes[0](labels)
        return self.prior.posterior(self.encode(hidden))

    def outputs(self, latents: Tensor, labels: Tensor) -> Tensor:
        """What the decoder says of latents: logits of brightness, or means, ``[n, num_values]``."""
        hidden = self.decode_first(self.prior.as_decoded(latents))
        if self.classes is not None:
            hidden = hidden + self.classes[1](labels)
        outputs: Tensor = self.decode(hidden)
        return outputs

    @torch.no_grad()
    def generate(self, labels: Tensor, stream: np.random.Generator) -> Tensor:
        """New samples of given classes, as the real ones are, ``[n, *sample_shape]``.

        Args:
            labels: int64 ``[n]``; of no effect where it is not conditional.
            stream: what latents are drawn by; the same samples on every device, but for rounding.
        """
        count, device = len(labels), labels.device
        latents = self.prior.draw(count, stream)
        outputs = self.outputs(accelerators.copied_to(device, latents), labels)
        if self.log_variances is None:
            values = (outputs.sigmoid() * 255).round()
        else:
            noise = torch.from_numpy(stream.standard_normal(outputs.shape, dtype=np.float32))
            deviations = (self.log_variances.clamp(*LOG_VARIANCES) / 2).exp()
            values = outputs + deviations * accelerators.copied_to(device, noise)
        return values.view(count, *self.sample_shape).to(self.dtype)

    def _values_of(self, samples: Tensor) -> Tensor:
        values = samples.flatten(1).to(self.encode_first.weight.dtype)
        return values if self.log_variances is not None else values / 255

    def _unlikeliness(self, values: Tensor, outputs: Tensor) -> Tensor:
        """The negative logarithm of the likelihood, without constants, ``[n]``."""
        if self.log_variances is None:
            losses = functional.binary_cross_entropy_with_logits(outputs, values, reduction="none")
            return losses.sum(dim=1)
        log_variances = self.log_variances.clamp(*LOG_VARIANCES)
        return ((values - outputs).square() / log_variances.exp() + log_variances).sum(dim=1) / 2
