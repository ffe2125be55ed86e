"""Detectors: pure folds from events to findings. No Kafka, no Faust, no clock, no I/O."""
