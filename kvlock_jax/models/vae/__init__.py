"""Wan's causal video VAE.

`autoencoder` is the network, `convolutions` and `filtering` are its layers, `chunks` bounds memory.
"""
