"""Sinks: where findings go. Formats are pure builders; delivery is written once for all of them."""
