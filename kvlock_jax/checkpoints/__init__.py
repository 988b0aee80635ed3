"""Converted checkpoints: the networks of a model, and their parameters in Orbax folders.

`registry` lists the networks, `store` reads and writes arrays, `metadata` checks `kvlock.json`, and
`format` saves and restores whole checkpoints.
"""
