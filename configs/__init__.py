"""One small file per run, each with a `get_config()`."""
