"""Items as K coarse-to-fine tokens."""
