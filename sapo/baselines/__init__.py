"""Other recommenders, one file each."""
