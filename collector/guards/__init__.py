"""Guards judge text: one guard a file, one protocol, one contract test over all of them."""
