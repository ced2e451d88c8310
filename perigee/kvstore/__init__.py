"""The cache service: KVCache blocks by key, kept in tiers by one store node per host."""
