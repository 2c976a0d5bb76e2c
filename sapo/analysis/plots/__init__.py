"""Figures by kind: Axes in, Axes out."""
