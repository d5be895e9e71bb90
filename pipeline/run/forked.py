"""Imported by the process that jobs are forked from, before anything that takes time: it ends with
the command, and Ctrl-C is not for it. multiprocessing lets that process do nothing but import."""

import gc

from ..interrupts import end_with_starter

end_with_starter()
# Nothing of what is imported is garbage; `imported` has it looked for again
gc.disable()
