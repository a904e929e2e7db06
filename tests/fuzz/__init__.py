"""Fuzz targets: one for each parser of bytes that others wrote."""
