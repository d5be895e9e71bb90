"""Imported by the process that jobs are forked from, after all the rest: no job looks for garbage
in what was imported, which would take a third of a second each time and a copy of 110 MB of it."""

from .. import garbage

garbage.as_usual()
