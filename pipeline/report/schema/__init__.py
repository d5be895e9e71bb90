"""What report.json holds: frozen models that families build and that terminal, page and card read.

A report is one of two kinds: on text (`language`, a loss per token) or on whole requests
(`requests`, a route and an answer each); `base` has what both share, `reading` tells them apart. A
table that a run has not made is empty or None; inside a table every field is there, and None stands
for a value that could not be measured. A float may be NaN or infinite. Unknown fields are refused,
so a name that is misspelt fails where it is written.
"""
