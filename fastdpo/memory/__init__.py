"""What a run needs of a device's memory, and how to need less: predicted before anything runs.

`assumed` makes data where there is none, `shapes` says what is trained and how long its rows are,
`layer` runs one decoder layer without numbers to count its activations, `components` says what else
is held, `estimate` adds it all up over the moments of a step, `speed` its operations, `planner`
does both for a configuration, `switches` looks for what makes a run fit, `report` shows it. `plan`
is the command. `allocator` concerns the memory of the host alone.
"""
