"""How one row lies in bytes, a file a kind of row. See `base.RowFormat`."""
