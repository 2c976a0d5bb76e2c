"""The three stages of training."""
