"""The text encoder: tokenizer, UMT5, and the encoding of prompts into contexts."""
