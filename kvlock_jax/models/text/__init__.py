"""Text: the tokenizer, the UMT5 encoder, and prompts to contexts."""
