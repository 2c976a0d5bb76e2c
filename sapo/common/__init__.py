"""Files, processes and progress, which all else uses."""
