"""Runs on rented machines, without knowing who rents them out: modal_app.py wires this to Modal.

The laptop's side reads and checks a command before anything starts, and plans it with its cost; the other side does
jobs in containers and says of each how it went.
"""

from .jobs import STEPS, Outcome, conduct, serve_next, served, work
from .laptop import DEFAULT, announced, check, explain, mirror, overrides, show_outcomes, show_report, typed
from .outlook import outlook, refuse_above, refuse_without_inputs, show_outlook
from .prices import Prices, most_gpus

__all__ = [
    "DEFAULT",
    "STEPS",
    "Outcome",
    "Prices",
    "announced",
    "check",
    "conduct",
    "explain",
    "mirror",
    "most_gpus",
    "outlook",
    "overrides",
    "refuse_above",
    "refuse_without_inputs",
    "serve_next",
    "served",
    "show_outcomes",
    "show_outlook",
    "show_report",
    "typed",
    "work",
]
