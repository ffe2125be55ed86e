"""The command line, the composed config, and the two names that vLLM loads."""
