"""Routing sets: requests with the expert they belong to."""
