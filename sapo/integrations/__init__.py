"""Step-aligned credit in other trainers."""
