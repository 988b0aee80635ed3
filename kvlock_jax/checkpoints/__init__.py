"""Converted checkpoints: what a model consists of, and its parameters in Orbax folders."""
