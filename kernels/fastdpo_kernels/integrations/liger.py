"""The single-pass head under the call of Liger's `LigerFusedLinearDPOLoss`, for trainers that are
written for it (TRL 0.28 to 1.13, axolotl).

Liger builds the logits of every position of a pair, prompt and padding included. Here the positions
that carry no label are left out before the head, and what its metrics say about them, the mean
logit, is a product with the mean row of the weight.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..losses import Comparisons, Loss
from ..ops import linear_dpo_loss, linear_logprob

Metrics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class LinearDPOLoss(torch.nn.Module):
    """DPO's loss of a padded batch from hidden states, in the place of `LigerFusedLinearDPOLoss`.

        from fastdpo_kernels import LinearDPOLoss as LigerFusedLinearDPOLoss

    or, in TRL 1.0 to 1.12, `trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss = LinearDPOLoss` (in
    1.13 the name is `FusedLinearDPOLoss`).

    Two things are not as in Liger 0.8.5: `label_smoothing` is honoured for "sigmoid" too, and a
    row without any label counts as a response of 0 nats where Liger's averages become NaN.

    Args:
        ignore_index: label of positions that are not scored.
        beta: strength of the pull towards the reference.
        alpha: weight of the chosen responses' negative log-likelihood, if `compute_nll_loss`.
        compute_nll_loss: add that term to the loss.
        use_ref_model: False takes 0 for the reference's log-probabilities.
        average_log_prob: divide a response's log-probability by its tokens, the reference's too.
        loss_type: a name of `fastdpo_kernels.LOSSES`: Liger's, "ipo", and those registered since.
        label_smoothing: share of labels that are the wrong way round.
        discopop_tau: τ of "discopop".
        compiled, chunk_size: accepted and not needed: nothing is compiled, and workspace is cut in
            tokens instead of pairs.
        backend: as in `linear_dpo_loss`.

    Everything after `beta` is keyword-only, because Liger's own third argument changed its meaning
    between 0.8.0 and 0.8.2.

    Raises:
        ValueError: an unknown `loss_type`, naming the known ones, or a `label_smoothing` that it
            cannot take.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        *,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.average_log_prob = compute_nll_loss, average_log_prob
        self.use_ref_model, self.backend = use_ref_model, backend
        self.loss_type, self.label_smoothing = loss_type, label_smoothing
        self._preference = Loss.named(
            loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau
        ).of_comparisons()
        one = torch.ones(1)
        self._preference(Comparisons(one, one, one, one, one, one))

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss of the batch, differentiable in `_input`, `lin_weight` and `bias`, and metrics.

        Waits for the device once, to learn how many labels each row has.

        Args:
            lin_weight, bias: (V, H) and (V,) or None.
            _input: (B, L, H) hidden states, chosen responses in the first half of the rows, their
                rejected ones in the second.
            target: (B, L) int64, the label that each position predicts, or `ignore_index`.
            ref_input, ref_weight, ref_bias: the reference's, (B, L, H'), (V, H'), (V,) or None.

        Returns:
            `(loss, metrics)`, the loss a mean over pairs, metrics without gradient: chosen and
            rejected log-probabilities (B/2,), mean logit over all positions (labelled or not) and
            the vocabulary of the chosen and of the rejected rows, negative log-likelihood per
            chosen token (0 unless `compute_nll_loss`), chosen and rejected rewards β·log-ratio
            (B/2,).

        Raises:
            ValueError: shapes that do not fit, or a reference that is missing.
        """
        half = self._pairs(_input, target)
        ignored = target == self.ignore_index
        lengths = target.shape[1] - ignored.sum(1)
        counts = lengths.cpu()
        index = _labelled(ignored, int(counts.sum()))
        labels = target.reshape(-1).index_select(0, index)
        ref = self._reference(target, index, labels, ref_input, ref_weight, ref_bias)
        # On the host, where the head can see without waiting which tokens belong together.
        pairs = torch.arange(2 * half).view(2, half).T.contiguous()
        response_ids = pairs.reshape(-1).repeat_interleave(counts[pairs.reshape(-1)])
        loss, logps = linear_dpo_loss(
            _rows(_input, index),
            lin_weight,
            labels,
            response_ids,
            pairs,
            ref,
            bias,
            beta=self.beta,
            loss_type=self.loss_type,
            loss_function=self._objective(half, int(counts[:half].sum())),
            label_smoothing=self.label_smoothing,
            response_lengths=lengths.to(ref.dtype),
            backend=self.backend,
        )
        return loss, self._metrics(logps, ref, lengths, _input, lin_weight, bias)

    def _pairs(self, hidden: Tensor, target: Tensor) -> int:
        if hidden.ndim != 3 or hidden.shape[:2] != target.shape or target.shape[0] % 2:
            raise ValueError(
                "expected _input (B, L, H) and target (B, L), as many rejected as chosen rows, got "
                f"{tuple(hidden.shape)} and {tuple(target.shape)}"
            )
        return target.shape[0] // 2

    @torch.no_grad()
    def _reference(
        self,
        target: Tensor,
        index: Tensor,
        labels: Tensor,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The reference's log-probability of each row, (B,) fp64."""
        ref = torch.zeros(target.shape[0], dtype=torch.float64, device=target.device)
        if not self.use_ref_model:
            return ref
        if hidden is None or weight is None:
            raise ValueError("ref_input and ref_weight are needed unless use_ref_model=False")
        if hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"ref_input: expected {tuple(target.shape)} and a width, got {tuple(hidden.shape)}"
            )
        logps = linear_logprob(_rows(hidden, index), weight, labels, bias, backend=self.backend)
        return ref.index_add_(0, index // target.shape[1], logps.double())

    def _objective(self, pairs: int, chosen_tokens: int) -> Callable[[Comparisons], Tensor] | None:
        """The loss of each comparison, such that their mean is Liger's loss of the batch.

        None where `loss_type` says all, which spares `torch.compile` a graph break.
        """
        share = self.alpha * pairs / max(1, chosen_tokens) if self.compute_nll_loss else 0.0
        if self._preference.plain and not (share or self.average_log_prob):
            return None

        def objective(values: Comparisons) -> Tensor:
            loss = self._preference(_per_token(values) if self.average_log_prob else values)
            return loss - share * values.chosen_logps if share else loss

        return objective

    @torch.no_grad()
    def _metrics(
        self,
        logps: Tensor,
        ref: Tensor,
        lengths: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Metrics:
        half = hidden.shape[0] // 2
        nll = logps.new_zeros(())
        if self.compute_nll_loss:
            nll = -logps[:half].sum() / lengths[:half].sum().clamp(min=1)
        tokens = lengths.clamp(min=1) if self.average_log_prob else 1
        rewards = self.beta * (logps - ref.to(logps.dtype)) / tokens
        logps = logps / tokens
        chosen, rejected = _mean_logits(hidden, weight, bias)
        return (
            logps[:half],
            logps[half:],
            chosen,
            rejected,
            nll,
            rewards[:half],
            rewards[half:],
        )


def _labelled(ignored: Tensor, count: int) -> Tensor:
    """Where the `count` labels of (B, L) are, as indices of B·L positions, the two rows of a pair
    next to each other, so that the head can cut between pairs.
    """
    rows, length = ignored.shape
    positions = torch.arange(rows * length, device=ignored.device).view(2, rows // 2, length)
    # A stable sort by "ignored" lists the others without asking the device for their number.
    paired = ignored.view(2, rows // 2, length).transpose(0, 1).reshape(-1).byte()
    index = paired.argsort(stable=True)[:count]
    return positions.transpose(0, 1).reshape(-1).index_select(0, index)


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)


def _per_token(values: Comparisons) -> Comparisons:
    """The same comparisons with log-probabilities averaged over the tokens of their responses."""
    chosen, rejected = values.chosen_lengths.clamp(min=1), values.rejected_lengths.clamp(min=1)
    return replace(
        values,
        chosen_logps=values.chosen_logps / chosen,
        rejected_logps=values.rejected_logps / rejected,
        ref_chosen_logps=values.ref_chosen_logps / chosen,
        ref_rejected_logps=values.ref_rejected_logps / rejected,
        chosen_lengths=torch.ones_like(chosen),
        rejected_lengths=torch.ones_like(rejected),
    )


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of x·Wᵀ + b over all positions and the vocabulary, of the first and the second half of
    the rows: the mean position times the mean row of W, 2VH + BLH operations.
    """
    half, length = hidden.shape[0] // 2, hidden.shape[1]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    row = weight.sum(0, dtype=dtype) / weight.shape[0]
    shift = 0.0 if bias is None else bias.mean(dtype=dtype)
    positions = half * length
    chosen, rejected = (
        (part.sum((0, 1), dtype=dtype) / positions * row).sum() + shift
        for part in (hidden[:half], hidden[half:])
    )
    return chosen, rejected
