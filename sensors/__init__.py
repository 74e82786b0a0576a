"""Sensor time series: SW-Transformer and DeepSense, pretrained with FOCAL, and REP on them (docs/sensors.md)."""
