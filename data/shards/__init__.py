"""Token shards on disk: format, manifest, sets of shards."""
