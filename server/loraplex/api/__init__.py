"""HTTP: OpenAI's dialect and the adapter routes. The only place that knows status codes and headers."""
