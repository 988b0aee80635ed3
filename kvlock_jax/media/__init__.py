"""Videos, pictures and masks: reading, writing and resizing them, on local and remote paths."""
