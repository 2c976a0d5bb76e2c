"""What the library costs, against what a user would run instead: `make bench`."""
