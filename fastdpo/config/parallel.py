"""How many devices a run takes, and what each of them holds: the keys of many devices."""

from .declare import AT_LEAST_ONE, key, one_of, section


@section("parallel")
class ParallelKeys:
    """Processes, one a device, and how model, rows and long contexts are spread over them."""

    devices: int | None = key(
        None,
        "Processes to start on this machine, one a device. Unset is one. Under torchrun, which "
        "starts them itself, leave it out.",
        AT_LEAST_ONE,
    )
    data_parallel: str = key(
        "auto",
        "replicate keeps the whole model on each device, fsdp (torch FSDP2) a share of weights, "
        "gradients and states, hsdp a share within each group of devices, one group a host unless "
        "dp_replicate_size says otherwise. auto replicates where that fits.",
        one_of("auto", "replicate", "fsdp", "hsdp"),
    )
    dp_replicate_size: int | None = key(
        None,
        "With hsdp: how many whole models there are over all devices; unset is one a host.",
        AT_LEAST_ONE,
    )
    cp_size: int = key(
        1,
        "Devices that compute each row together, every one a stretch of its tokens, for contexts "
        "that are too long for one.",
        AT_LEAST_ONE,
    )
    head_parallel: str = key(
        "auto",
        "gathered has the output head whole on each device while rows are scored; vocabulary (with "
        "fsdp) leaves it sharded over the vocabulary, and hidden states are exchanged instead. "
        "auto gathers where that fits.",
        one_of("auto", "gathered", "vocabulary"),
    )
    global_batch_size: int | None = key(
        None,
        "What a step takes over all devices together, in place of per_device_train_batch_size x "
        "gradient_accumulation_steps x devices: the same steps on any number of devices.",
        AT_LEAST_ONE,
    )
    ddp_timeout: int = key(
        1800,
        "Seconds that a process waits for the others before the run is ended.",
        AT_LEAST_ONE,
    )
