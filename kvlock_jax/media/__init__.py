"""Reads, writes and resizes videos, pictures and masks, on local and remote paths.

`decode` reads and `encode` writes; the modules beside them each know one property of files, such as
`colour`, `orientation`, `timing` or `sound`. `fit` and `masks` bring arrays to the model's sizes.
"""
