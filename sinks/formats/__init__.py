"""Pure builders from a finding to the bytes or objects that other systems read."""
