"""Wan 2.1 in Flax NNX: transformer, video VAE and text encoder."""
