"""What is optimised: the keys of the loss, and of the reference that it compares with."""

from .declare import (
    AT_LEAST_ONE,
    BELOW_HALF,
    FRACTION,
    NOT_BLANK,
    NOT_NEGATIVE,
    POSITIVE,
    key,
    one_of,
    section,
)


@section("reference")
class ReferenceKeys:
    """The policy's starting point, which the loss compares it with."""

    ref_model_name_or_path: str | None = key(
        None,
        "A reference other than the model's own starting weights: a directory or a hub name.",
        NOT_BLANK,
        path=True,
    )
    precompute_ref_log_probs: bool | None = key(
        None,
        "Compute the reference's log-probabilities once, before training, and cache them on disk, "
        "so that no reference is in memory while training. Unset is true, but false with "
        "sync_ref_model; TRL's default is false.",
    )
    sync_ref_model: bool = key(
        False,
        "Move the reference towards the policy every ref_model_sync_steps steps (TR-DPO). For "
        "training all weights.",
    )
    ref_model_mixup_alpha: float = key(
        0.6,
        "Share of the policy's weights in the reference's new ones, the rest being its old ones; "
        "needs sync_ref_model.",
        FRACTION,
    )
    ref_model_sync_steps: int = key(
        512, "Steps from one move of the reference to the next; needs sync_ref_model.", AT_LEAST_ONE
    )


@section("loss")
class LossKeys:
    """The loss and its options; each option names the losses that read it."""

    loss_type: list[str] = key(
        ["sigmoid"],
        "The loss, or several losses of comparisons that are added up with loss_weights. Unset "
        "with labelled rows (prompt, completion, label) it is kto.",
        NOT_BLANK,
    )
    loss_weights: list[float] | None = key(
        None, "One weight for each entry of loss_type; unset weighs each with 1.", NOT_NEGATIVE
    )
    beta: float = key(
        0.1,
        "Strength of the pull towards the reference; for ipo it is the paper's tau, for orpo its "
        "lambda, for sppo 1/eta. grpo, bnpo, dr_grpo and dapo may have 0, no pull.",
    )
    label_smoothing: float = key(
        0.0,
        "Probability that a label is the wrong way round. Unlike TRL, sigmoid honours it. "
        "For sigmoid, robust, exo_pair, aot, aot_unpaired, cpo and simpo.",
        BELOW_HALF,
    )
    f_divergence_type: str = key(
        "reverse_kl",
        "The divergence from the reference that the reward comes from. Others than reverse_kl are "
        "for sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust and discopop.",
        one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = key(0.5, "The alpha of alpha_divergence.")
    ld_alpha: float | None = key(
        None,
        "What a token counts that stands beyond the length of the shorter response of its "
        "comparison (LD-DPO); unset is 1. For losses of comparisons with a reference.",
        FRACTION,
    )
    use_weighting: bool = key(
        False,
        "Weigh each comparison by how probable its responses are under the policy (WPO). For "
        "losses of comparisons with a reference, but for aot and aot_unpaired.",
    )
    discopop_tau: float = key(0.05, "Temperature of discopop's mixture.", POSITIVE)
    desirable_weight: float = key(
        1.0,
        "Weight of responses with the label true, for kto, apo_zero_unpaired and bco.",
        NOT_NEGATIVE,
    )
    undesirable_weight: float = key(
        1.0,
        "Weight of responses with the label false, for kto, apo_zero_unpaired and bco.",
        NOT_NEGATIVE,
    )
    cpo_alpha: float | None = key(
        None,
        "Weight of the likelihood of the chosen response in cpo, cpo_hinge, cpo_ipo and simpo. "
        "Unset is 1, as in TRL; with 0, simpo is SimPO as its paper has it.",
        NOT_NEGATIVE,
    )
    simpo_gamma: float = key(0.5, "The margin that simpo aims at.", NOT_NEGATIVE)
    alpha: float = key(
        0.0,
        "AlphaPO's alpha, the shape of the reward in cpo, cpo_hinge, cpo_ipo and simpo; 0 is the "
        "log-probability.",
    )
    epsilon: float = key(
        0.2, "How far below 1 grpo, bnpo, dr_grpo and dapo clip the ratio of policies.", POSITIVE
    )
    epsilon_high: float | None = key(
        None, "How far above 1 they clip it; unset is epsilon.", POSITIVE
    )
    scale_rewards: str = key(
        "group",
        "What grpo, bnpo, dr_grpo and dapo divide a response's advantage by: the standard "
        "deviation of its group's scores, or nothing.",
        one_of("group", "none"),
    )
    importance_sampling_level: str = key(
        "token",
        "Whether grpo, bnpo, dr_grpo and dapo take the ratio of policies of each token or of the "
        "whole response (GSPO); none is for a single step on the policy's own responses, where it "
        "is 1.",
        one_of("token", "sequence", "none"),
    )
    max_completion_length: int | None = key(
        None,
        "The constant that dr_grpo divides by, in tokens; unset is max_length. It cuts nothing: "
        "max_length does.",
        AT_LEAST_ONE,
    )
