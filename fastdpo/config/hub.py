"""What of a run goes to the hub: the keys that transformers' `TrainingArguments` have for it."""

from .declare import NOT_BLANK, key, one_of, section


@section("hub")
class HubKeys:
    """Where the model is uploaded, when, and by whom."""

    push_to_hub: bool = key(
        False,
        "Upload the model to the hub. Whether that may be done is asked before anything is "
        "loaded; what fails later is one line, and the run's files are kept.",
    )
    hub_model_id: str | None = key(
        None,
        "The repository, with its owner or without, made where there is none; unset is the name "
        "of output_dir.",
        NOT_BLANK,
    )
    hub_strategy: str = key(
        "every_save",
        "What is uploaded: end the model after the last step; every_save that of every checkpoint "
        "too, while training goes on; checkpoint the newest one beside it as last-checkpoint; "
        "all_checkpoints all of them.",
        one_of("end", "every_save", "checkpoint", "all_checkpoints"),
    )
    hub_token: str | None = key(
        None,
        "Token to upload with, which is written nowhere; unset is HF_TOKEN or that of hf auth "
        "login.",
        NOT_BLANK,
        secret=True,
    )
    hub_private_repo: bool | None = key(
        None, "Make the repository private; unset is the owner's default."
    )
    hub_always_push: bool = key(
        False, "Upload every checkpoint; without it, one is skipped while another is uploaded."
    )
    hub_revision: str | None = key(
        None, "Branch to upload to, made where there is none; unset is main.", NOT_BLANK
    )
