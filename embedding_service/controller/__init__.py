"""The routing's keeper: `fleet` is what shards report, `decisions` what follows from it, `server` the process."""
