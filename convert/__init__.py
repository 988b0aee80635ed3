"""Reads published checkpoints into this package's models.

`source` recognises a layout, `diffusers` and `original` describe it by a `table` and `sizes`,
`weights` opens the files, and `converter` is `kvlock convert`.
"""
