"""Direct mappings: processes map the media itself, and the filesystem decides each fault (docs/direct.md)."""
