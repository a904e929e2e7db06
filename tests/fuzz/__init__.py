"""Fuzz targets: one for each parser of foreign bytes."""
