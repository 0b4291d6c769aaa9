"""Token shards on disk: format, manifest, shard sets."""
