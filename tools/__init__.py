"""What makes the generated pages of docs/; run by make, and by tests that compare."""
