"""The KV cache: what is remembered (store), what attention sees (window), who decides (policy)."""
