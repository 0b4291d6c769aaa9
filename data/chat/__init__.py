"""Chats: templates, spans of answers, shards with a loss mask, packing, samples."""
