"""A model that thinks in K blocks, then names an item."""
