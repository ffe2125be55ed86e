"""The collector: sees every request an inference server works on, judges it, and publishes hashed audit events.

Runs inside the vLLM process (the plugin and the gate) or before another server (the proxy). The other rooms take
only `collector.event` and `collector.kafka` from here.
"""
