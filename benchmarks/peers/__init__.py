"""Who trains and assembles in the benchmarks: this project and its peers, a module each, started by
`__main__`.

A module has `train(job, watch)`, and where it can, `bundle(job, watch)` and `open_bundle(job,
watch)`. What it imports stands at its top, as the level after imports is where its memory counts
from.
"""
