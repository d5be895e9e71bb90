"""Faster forms of single operations, each held against the plain one."""
