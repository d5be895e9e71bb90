"""Pieces of benchmarks.domains_come_and_go: what a run is at a moment, and what it scores."""
