"""The routing's keeper. `fleet` is what shards report, `decisions` follow from it, `server` is the process."""
