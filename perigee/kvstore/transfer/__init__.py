"""Blocks from one store node to another: one interface, and what moves the bytes behind it."""
