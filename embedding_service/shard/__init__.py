"""The row server: `holdings` keeps parts, `service` answers lookups, `registration` does what the controller says."""
