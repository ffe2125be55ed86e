"""Streams: the processes that move events and findings through Kafka."""
