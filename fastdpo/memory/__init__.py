"""What a run needs of a device's memory, and how to need less: predicted before anything runs.

`shapes` says what is trained and how long its rows are, `layer` runs one decoder layer without
numbers to count its activations, `estimate` adds the components up over the phases of a step,
`devices` knows GPUs, `switches` looks for what makes a run fit, `report` shows it. `plan` is the
command. `allocator` concerns the memory of the host alone.
"""
