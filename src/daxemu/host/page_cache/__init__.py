"""The page cache of a FUSE mount: the first implementation of the seam for mappings (host/mappings)."""
