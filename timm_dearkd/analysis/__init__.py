"""Measure data sets and models: `python -m timm_dearkd.analysis TOOL`."""
