"""Wan's causal video VAE."""
