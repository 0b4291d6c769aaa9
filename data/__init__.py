"""Raw corpora to token shards to a blended, resumable stream of samples."""
