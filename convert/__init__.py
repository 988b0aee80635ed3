"""Published checkpoint layouts, read into this package's models."""
