"""Wan in Flax NNX: transformer, video VAE and text encoder.

One folder for each network; `attention`, `linear`, `layout` and `precision` serve all of them.
"""
