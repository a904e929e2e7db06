"""Generators of pages of docs/. Run by make, and by tests for a comparison."""
