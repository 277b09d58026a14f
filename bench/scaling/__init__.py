"""One process beside several: speed, bytes exchanged, memory held (`fastdpo bench scaling`)."""
