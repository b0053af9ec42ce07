"""Where adapters are fetched from: folders, buckets and hubs that the operator allowed."""
