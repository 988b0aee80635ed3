"""Wan 2.1's transformers: text-to-video and VACE."""
