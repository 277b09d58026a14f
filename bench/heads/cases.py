"""What the head benchmark computes: heads, regimes, inputs, and the same in fp64.

The weights are random, which is honest for time (no provider's depends on values, but for the
blocks that CCE skips). The values matter for the errors, so logits are spread like a trained
model's: weight rows of length 1, hidden states that give logits a standard deviation of 4, and
every target's logit moved to a log-normal gap below the expected largest one: the largest logit
then is above the target's by 1.1 nats in the median and 8.5 in the 99th percentile, where
SmolLM2-135M-Instruct on real text has 0.8 and 8.8. All responses share the same gaps in the same
order, so that the margin of a comparison is moderate although the reference log-probabilities are 0
(Liger's fused loss does not take precomputed ones).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HEADS = {
    "tiny": (331, 48),
    "smollm2": (49152, 576),
    "cpu": (49152, 896),
    "qwen2.5-0.5b": (151936, 896),
    "gemma-3-1b": (262144, 1152),
    "llama-3.1-8b": (128256, 4096),
    "large": (262144, 8256),
}
"""(V, H) by name; `large` has more than 2³¹ weights."""

LARGEST_GRADIENT_ERROR = 0.25
"""Relative. bf16 logits cost a gradient some hundredths; a wrong one is off by about its size."""

_LOGIT_SPREAD = 4.0
_GAP_MEDIAN, _GAP_SPREAD = 0.8, 1.03
_SLICE = 1024
_SLOPE_TOKENS = 16384
_EXACT_TILE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Regime:
    """What is differentiated, and how many products of the head's shape that takes at least."""

    products: int
    hidden: bool = False
    weight: bool = False
    dpo: bool = False
    """The loss of comparisons; otherwise log-probabilities with an arbitrary gradient each."""
    long: bool = False
    """One comparison, longer than the workspace."""


REGIMES = {
    "no_grad": Regime(1),
    "frozen": Regime(2, hidden=True),
    "trainable": Regime(3, hidden=True, weight=True),
    "dpo": Regime(3, hidden=True, weight=True, dpo=True),
    "dpo_frozen": Regime(2, hidden=True, dpo=True),
    "dpo_long": Regime(3, hidden=True, weight=True, dpo=True, long=True),
}


@dataclass(frozen=True)
class Inputs:
    """T tokens at one head, and everything that fp64 knows about them."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (T,) int64
    token_grads: Tensor  # (T,) fp32, the arbitrary gradient of each log-probability

    @staticmethod
    def make(head: str, tokens: int, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Random inputs, the same for every call on one device."""
        period = response_tokens(REGIMES["dpo"], tokens)
        vocab, width = HEADS[head]
        g = torch.Generator(device).manual_seed(0)
        weight = torch.randn(vocab, width, generator=g, device=device).mul_(width**-0.5).to(dtype)
        hidden = torch.randn(tokens, width, generator=g, device=device).mul_(_LOGIT_SPREAD)
        targets = torch.randint(vocab, (tokens,), generator=g, device=device)
        quantile = (torch.randperm(period, generator=g, device=device) + 0.5) / period
        gap = (math.log(_GAP_MEDIAN) + _GAP_SPREAD * torch.special.ndtri(quantile)).exp()
        largest = _LOGIT_SPREAD * torch.special.ndtri(torch.tensor(1 - 0.5 / vocab)).item()
        row = weight[targets].float()
        off = largest - gap.repeat(tokens // period) - torch.linalg.vecdot(hidden, row)
        hidden += (off / torch.linalg.vecdot(row, row)).unsqueeze(1) * row
        token_grads = torch.randn(tokens, generator=g, device=device)
        return Inputs(hidden.to(dtype), weight, targets, token_grads)

    @cached_property
    def exact(self) -> "Exact":
        """Log-probabilities and their derivatives in fp64, computed once for all regimes."""
        tokens, vocab = self.targets.shape[0], self.weight.shape[0]
        weight, x = self.weight.detach().double(), self.hidden.detach()
        vocabulary = torch.arange(0, vocab, -(-vocab // _SLICE), device=x.device)
        logps = weight.new_empty(tokens)
        slope = weight.new_empty(min(tokens, _SLOPE_TOKENS), x.shape[1])
        residual = weight.new_empty(tokens, vocabulary.numel())
        rows = max(1, _EXACT_TILE_BYTES[x.device.type] // (8 * vocab))
        for start in range(0, tokens, rows):
            tile = slice(start, start + rows)
            z = x[tile].double() @ weight.T
            target = self.targets[tile].unsqueeze(1)
            z -= z.logsumexp(-1, keepdim=True)
            logps[tile] = z.gather(1, target).squeeze(1)
            z.exp_().neg_().scatter_add_(1, target, torch.ones_like(z[:, :1]))
            residual[tile] = z[:, vocabulary]
            if start < len(slope):
                torch.mm(z[: len(slope) - start], weight, out=slope[tile])
        return Exact(x, logps, slope, vocabulary, residual)


@dataclass(frozen=True)
class Exact:
    """fp64. A gradient is a coefficient a token away from these.

    Every log-probability and every token's share of dW is known, for which one product in fp64 is
    enough; dX, which needs a second one and (T, H) numbers of 8 bytes, for the first tokens only.
    """

    hidden: Tensor  # (T, H), as it was given
    logps: Tensor  # (T,)
    slope: Tensor  # (min(T, 16384), H), ∂logp_t / ∂x_t
    vocabulary: Tensor  # (S,), the entries at which the weight's gradient is compared
    residual: Tensor  # (T, S), onehot − softmax there

    def gradients(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """dX of the first tokens and dW (S, H) of Σ c_t·logp_t."""
        c = coefficients.double().unsqueeze(1)
        dw = self.slope.new_zeros(self.vocabulary.numel(), self.hidden.shape[1])
        for start in range(0, len(c), _SLOPE_TOKENS):
            tile = slice(start, start + _SLOPE_TOKENS)
            dw += self.residual[tile].T @ (c[tile] * self.hidden[tile].double())
        return c[: len(self.slope)] * self.slope, dw


def response_tokens(regime: Regime, tokens: int) -> int:
    """Tokens of a response: 256 in packed comparisons (or T/8), half of all in a long one, T/8
    elsewhere.
    """
    if tokens % 8 or (tokens > 2048 and tokens % 2048):
        raise ValueError(f"tokens: expected a multiple of 8, above 2048 one of 2048; got {tokens}")
    if regime.long:
        return tokens // 2
    return min(256, tokens // 8) if regime.dpo else tokens // 8


@dataclass(frozen=True)
class Problem:
    """One regime on one set of inputs: what every provider gets."""

    inputs: Inputs
    regime: Regime
    workspace_mib: int

    @staticmethod
    def make(inputs: Inputs, regime: Regime, workspace_mib: int) -> "Problem":
        """In `dpo_long`, the workspace is at most half of what the comparison would need."""
        if regime.long:
            cells = inputs.targets.numel() * inputs.weight.shape[0]
            needed = cells * inputs.weight.element_size() >> 20
            if needed < 2:
                raise ValueError(f"dpo_long: {cells} logits fit a workspace of 1 MiB")
            workspace_mib = min(workspace_mib, needed // 2)
        return Problem(inputs, regime, workspace_mib)

    @property
    def response_tokens(self) -> int:
        """L, the same for all responses."""
        return response_tokens(self.regime, self.inputs.targets.numel())

    @property
    def responses(self) -> int:
        """R = T/L."""
        return self.inputs.targets.numel() // self.response_tokens

    @property
    def beta(self) -> float:
        """0.1 for responses of 256 tokens, less for longer ones, whose margins are larger."""
        return 1.6 / math.sqrt(self.response_tokens)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the regime differentiates."""
        return tuple(
            tensor
            for tensor, wanted in (
                (self.inputs.hidden, self.regime.hidden),
                (self.inputs.weight, self.regime.weight),
            )
            if wanted
        )

    def loss(self, response_logps: Tensor) -> Tensor:
        """DPO's loss, mean over comparisons; responses 2i and 2i + 1 are chosen and rejected."""
        chosen, rejected = response_logps.view(-1, 2).unbind(1)
        return -logsigmoid(self.beta * (chosen - rejected)).mean()

    @cached_property
    def exact_gradients(self) -> tuple[Tensor, Tensor]:
        """dX of the first tokens and the compared rows of dW, fp64."""
        return self.inputs.exact.gradients(self._coefficients())

    @cached_property
    def exact_loss(self) -> float:
        """DPO's loss, fp64."""
        return self.loss(self.sums(self.inputs.exact.logps)).item()

    def _coefficients(self) -> Tensor:
        if not self.regime.dpo:
            return self.inputs.token_grads
        sums = self.sums(self.inputs.exact.logps).requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(sums), sums)
        return gradient.repeat_interleave(self.response_tokens)

    def sums(self, logps: Tensor) -> Tensor:
        """Log-probabilities of responses (R,) from those of tokens; those of responses as they are.

        fp64.
        """
        if logps.numel() == self.responses:
            return logps.double()
        return logps.double().view(self.responses, -1).sum(1)

    def errors(
        self, logps: Tensor, gradients: tuple[Tensor, ...], loss: Tensor | None = None
    ) -> dict[str, float]:
        """Against fp64: the largest absolute error of a response's log-probability in nats, that of
        the loss, and the relative Frobenius errors of dX (of the first 16384 tokens) and of the
        compared rows of dW (all tokens).
        """
        exact = self.inputs.exact
        errors = {"logp_error": (self.sums(logps) - self.sums(exact.logps)).abs().max().item()}
        if loss is not None:
            errors["loss_error"] = abs(loss.item() - self.exact_loss)
        for name, ours, right in zip(("dx", "dw"), gradients, self.exact_gradients, strict=False):
            compared = ours[: len(right)] if name == "dx" else ours[exact.vocabulary]
            errors[f"{name}_error"] = ((compared.double() - right).norm() / right.norm()).item()
        return errors

    @property
    def logp_bound(self) -> float:
        """Nats by which a right provider's log-probability of a response may be off at most.

        Rounding the largest logit z to the dtype moves a token's by up to ε·z/2, the product's sum
        of H terms in fp32 by some √H·ε₃₂·z, and L tokens add up as √L. Four times that leaves room
        for the worst response of many, and in bf16 is a hundredth of the log-probability itself.
        """
        vocab, width = self.inputs.weight.shape
        largest = _LOGIT_SPREAD * torch.special.ndtri(torch.tensor(1 - 0.5 / vocab)).item()
        rounding = torch.finfo(self.inputs.weight.dtype).eps / 2
        rounding += math.sqrt(width) * torch.finfo(torch.float32).eps
        return 4 * math.sqrt(self.response_tokens) * largest * rounding

    def refusal(self, errors: dict[str, float]) -> str | None:
        """Why these errors are no rounding, so that their provider's time counts for nothing; None
        where they are. Written so that NaN is refused.
        """
        bounds = {
            "logp": self.logp_bound,
            "loss": 2 * self.beta * self.logp_bound / math.sqrt(self.responses / 2),
            "dx": LARGEST_GRADIENT_ERROR,
            "dw": LARGEST_GRADIENT_ERROR,
        }
        for name, bound in bounds.items():
            error = errors.get(f"{name}_error", 0.0)
            if not error <= bound:
                return f"its {name} is off by {error:.2g}, more than {bound:.2g}"
        return None
