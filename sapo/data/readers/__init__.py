"""One file a format: what others wrote, read."""
