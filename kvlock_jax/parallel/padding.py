"""Padding a row of tokens to a length that its devices divide."""

TOKEN_BLOCK = 128
"""Tokens of each of several devices are a multiple of it where they are many: a TPU's lanes."""

MANY_TOKENS = 1024
"""Tokens of a device above which padding to `TOKEN_BLOCK` adds at most an eighth."""


def token_block(tokens: int, shards: int) -> int:
    """The unit that the tokens of each of `shards` devices are a multiple of."""
    return TOKEN_BLOCK if shards > 1 and tokens >= MANY_TOKENS * shards else 1


def padded(tokens: int, shards: int) -> int:
    """The length of a row of tokens that `shards` devices share in equal blocks."""
    unit = shards * token_block(tokens, shards)
    return -(-tokens // unit) * unit
