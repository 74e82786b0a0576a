"""Towers that take slots, the methods that provide them, heads, and the classifier that joins them."""
