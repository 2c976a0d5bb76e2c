"""From a recipe to a record: runs, their folders, and who does them."""
