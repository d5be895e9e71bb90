"""Imported by the process that jobs are forked from, after all the rest: no job looks for garbage
in what was imported, which would take a third of a second each time and, as Python notes what it
has seen in the objects themselves, a copy of 110 MB of them."""

import gc

gc.freeze()
gc.enable()
