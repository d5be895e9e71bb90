"""Imported by the process that jobs are forked from, before anything that takes time: it ends with
the command, and Ctrl-C is not for it. multiprocessing lets that process do nothing but import."""

from .. import garbage
from ..interrupts import end_with_starter

end_with_starter()
garbage.seldom()
